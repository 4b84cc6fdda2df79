//! Values as people write them, with their units.

use std::time::Duration;

/// A size in MiB: a bare number is MiB; K, M, G, T, P (with or without `iB` or `B`) are powers of 1024.
pub fn parse_mib(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size such as 512M or 2G"))?;
    let unit = unit.to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let scaled = match unit {
        "" | "m" => Some(number),
        "k" if number.is_multiple_of(1024) => Some(number / 1024),
        "k" => return Err(format!("{text:?} is not a whole number of MiB")),
        "g" => number.checked_mul(1 << 10),
        "t" => number.checked_mul(1 << 20),
        "p" => number.checked_mul(1 << 30),
        _ => return Err(format!("{text:?} has an unknown unit: known are K, M, G, T, P")),
    };
    scaled.ok_or_else(|| format!("{text:?} is too large"))
}

/// What `--disk` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disk {
    /// Size of the root disk in MiB.
    Root(u64),
    /// A further disk, as the node is asked for it.
    Extra(String),
}

/// A size is the root disk's; anything with a colon is a further disk, and the node's to check. Its size has units here.
pub fn parse_disk(text: &str) -> Result<Disk, String> {
    match text.split_once(":new:") {
        Some((name, size)) => parse_mib(size).map(|mib| Disk::Extra(format!("{name}:new:{mib}"))),
        None if text.contains(':') => Ok(Disk::Extra(text.to_string())),
        None => parse_mib(text).map(Disk::Root),
    }
}

/// A time: a bare number is seconds; units are ms, s, m, h. At most a year.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const YEAR_MS: u64 = 366 * 24 * 3600 * 1000;
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a time such as 500ms, 30s or 5m"))?;
    let scale = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60 * 1000,
        "h" => 3600 * 1000,
        _ => return Err(format!("{text:?} has an unknown unit: known are ms, s, m, h")),
    };
    match number.checked_mul(scale) {
        Some(ms) if ms <= YEAR_MS => Ok(Duration::from_millis(ms)),
        _ => Err(format!("{text:?} is over a year")),
    }
}

/// A time limit: a time, with `:pause` where the sandbox is to be paused then, or `:stop`; or `none`. Gives it as the node
/// takes it, in seconds.
pub fn parse_time_limit(text: &str) -> Result<String, String> {
    if text == "none" {
        return Ok(text.to_string());
    }
    let (time, at_end) = text.split_once(':').unwrap_or((text, "stop"));
    if !matches!(at_end, "stop" | "pause") {
        return Err(format!("{at_end:?} is neither stop nor pause"));
    }
    let time = parse_duration(time)?;
    if time.subsec_nanos() > 0 {
        return Err(format!("{text:?} is not a whole number of seconds"));
    }
    Ok(format!("{}:{at_end}", time.as_secs()))
}

/// `KEY=VALUE`; what a key may be is the node's to say.
pub fn parse_label(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_string()),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// Puts the value of this process's environment to a bare `NAME`, as docker does; a name that is not set here is
/// left out.
pub fn resolve_env(given: &[String]) -> Vec<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    given
        .iter()
        .filter_map(|entry| match entry.contains('=') {
            true => Some(entry.clone().into_bytes()),
            false => std::env::var_os(entry).map(|v| [entry.as_bytes(), b"=", &v.into_vec()].concat()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(parse_mib("512"), Ok(512));
        assert_eq!(parse_mib("512MiB"), Ok(512));
        assert_eq!(parse_mib("2g"), Ok(2048));
        assert_eq!(parse_mib("1P"), Ok(1 << 30));
        assert_eq!(parse_mib("2048k"), Ok(2));
        for bad in ["", "G", "1.5G", "-1", "1000k", "5X", "99999999999999999999", "9999999999999999P"] {
            assert!(parse_mib(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "1d", "99999999h", "1.5s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_limit_says_what_happens_then() {
        for (text, limit) in [("90", "90:stop"), ("10m:pause", "600:pause"), ("1h:stop", "3600:stop"), ("none", "none")]
        {
            assert_eq!(parse_time_limit(text).as_deref(), Ok(limit));
        }
        for bad in ["", "10m:", "10m:kill", "500ms", "none:pause", "x:pause"] {
            assert!(parse_time_limit(bad).is_err(), "{bad}");
        }
    }
}
