//! Kernel command line parameters that are meant for init.

use std::time::Duration;

/// Extra services at most.
const MAX_SERVICES: usize = 16;
/// Longest wait for the data partition.
const MAX_WAIT_S: u64 = 120;

/// What the command line asks of init.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `warren.service="/path arg…"`, repeatable: programs that init starts and restarts.
    pub services: Vec<Vec<String>>,
    /// `warren.data_wait_s=N`: how long to wait for a data partition that is not there yet (disks behind USB or
    /// slow controllers). Disks found by the kernel's own probing need no wait.
    pub data_wait: Duration,
}

impl Parameters {
    /// Of the running kernel.
    pub fn read() -> Self {
        match std::fs::read_to_string("/proc/cmdline") {
            Ok(line) => Self::parse(&line),
            Err(error) => {
                log::error!("cannot read /proc/cmdline: {error}");
                Self::default()
            }
        }
    }

    fn parse(line: &str) -> Self {
        let mut parameters = Self::default();
        for (key, value) in split(line) {
            match key.as_str() {
                "warren.service" => {
                    let argv: Vec<String> = value.split_ascii_whitespace().map(str::to_string).collect();
                    if !argv.first().is_some_and(|path| path.starts_with('/')) {
                        log::error!("kernel parameter warren.service={value:?} names no absolute path");
                    } else if parameters.services.len() < MAX_SERVICES {
                        parameters.services.push(argv);
                    } else {
                        log::error!(
                            "more than {MAX_SERVICES} kernel parameters warren.service: {value:?} is not started"
                        );
                    }
                }
                "warren.data_wait_s" => match value.parse() {
                    Ok(seconds @ 0..=MAX_WAIT_S) => parameters.data_wait = Duration::from_secs(seconds),
                    _ => log::error!("kernel parameter warren.data_wait_s={value:?} is no number up to {MAX_WAIT_S}"),
                },
                _ => {}
            }
        }
        parameters
    }
}

/// Cuts a command line as the kernel does (lib/cmdline.c, next_arg): at spaces outside of double quotes, and the
/// quotes around a value or a whole parameter go.
fn split(line: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let (mut key, mut value, mut in_value, mut quoted) = (String::new(), String::new(), false, false);
    for c in line.trim_end().chars().chain([' ']) {
        match c {
            '"' => quoted = !quoted,
            '=' if !in_value => in_value = true,
            c if c.is_ascii_whitespace() && !quoted => {
                if !key.is_empty() {
                    found.push((std::mem::take(&mut key), std::mem::take(&mut value)));
                }
                in_value = false;
            }
            c if in_value => value.push(c),
            c => key.push(c),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_taken_with_their_arguments_in_order() {
        let parameters = Parameters::parse(
            "console=ttyS0 warren.service=/usr/bin/a \"warren.service=/usr/bin/b --x y\" warren.service=\"/c d\" quiet\n",
        );
        assert_eq!(parameters.services, [vec!["/usr/bin/a"], vec!["/usr/bin/b", "--x", "y"], vec!["/c", "d"]]);
    }

    #[test]
    fn a_service_that_is_no_absolute_path_is_not_started() {
        assert_eq!(Parameters::parse("warren.service=sh warren.service= warren.service"), Parameters::default());
    }

    #[test]
    fn the_wait_for_data_is_bounded() {
        assert_eq!(Parameters::parse("warren.data_wait_s=10").data_wait, Duration::from_secs(10));
        assert_eq!(Parameters::parse("warren.data_wait_s=121").data_wait, Duration::ZERO);
        assert_eq!(Parameters::parse("warren.data_wait_s=x").data_wait, Duration::ZERO);
    }

    #[test]
    fn services_are_bounded() {
        assert_eq!(Parameters::parse(&"warren.service=/x ".repeat(100)).services.len(), MAX_SERVICES);
    }
}
