//! The guest kernel's command line.

use std::fmt;

use super::layout::COMMAND_LINE_MAX;

/// Warren's own parameters. What is not here is a default of the guest kernel's configuration.
///
/// * `console=ttyS0 quiet`: the log is the serial port; each character costs an exit, so routine messages
///   stay in the kernel's ring buffer, warnings and worse are seen.
/// * `pci=off`: there is no PCI, and no scan for it (the kernel has the code because ACPI needs it).
/// * `8250.nr_uarts=1`: one port is probed, not four.
/// * `panic=-1`: a panic ends the guest at once; pvpanic has told the worker why.
/// * `random.trust_cpu=on`: no wait for entropy.
/// * `noreplace-smp`: a guest with one processor would take 6,000 lock prefixes out of its code, one at a time: 4 ms.
/// * `no_timer_check tsc=reliable`: the clocks are KVM's; there is no PIT to compare them with.
/// * `swiotlb=noforce`: virtio takes any address; a guest with memory beyond 4 GiB would set 64 MiB of it aside for
///   devices that cannot reach it.
const BASE: &str = "console=ttyS0 quiet pci=off 8250.nr_uarts=1 panic=-1 random.trust_cpu=on no_timer_check tsc=reliable \
     noreplace-smp swiotlb=noforce rdinit=/init";

/// Why a command line cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub enum CommandLineError {
    /// It is too long, given in octets with Warren's own part and the NUL.
    TooLong(usize),
    /// It holds an octet that is no printable ASCII character.
    BadCharacter(char),
}

impl fmt::Display for CommandLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(len) => {
                write!(f, "kernel command line of {len} octets is over the limit of {COMMAND_LINE_MAX}")
            }
            Self::BadCharacter(c) => write!(f, "kernel command line holds {c:?}, which is not printable ASCII"),
        }
    }
}

impl std::error::Error for CommandLineError {}

/// Warren's parameters, then `extra`, then NUL. Later parameters override earlier ones of the same name.
pub fn build(extra: &str) -> Result<Vec<u8>, CommandLineError> {
    if let Some(c) = extra.chars().find(|c| !matches!(c, ' '..='~')) {
        return Err(CommandLineError::BadCharacter(c));
    }
    let mut line = BASE.as_bytes().to_vec();
    if !extra.is_empty() {
        line.push(b' ');
        line.extend(extra.as_bytes());
    }
    line.push(0);
    if line.len() > COMMAND_LINE_MAX {
        return Err(CommandLineError::TooLong(line.len()));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_parameters_come_last() {
        let line = build("quiet root=/dev/vda").unwrap();
        assert!(line.starts_with(b"console=ttyS0 "));
        assert!(line.ends_with(b" quiet root=/dev/vda\0"));
    }

    #[test]
    fn a_line_over_the_limit_or_with_control_characters_is_refused() {
        let room = COMMAND_LINE_MAX - BASE.len() - 2;
        assert!(build(&"x".repeat(room)).is_ok());
        assert_eq!(build(&"x".repeat(room + 1)), Err(CommandLineError::TooLong(COMMAND_LINE_MAX + 1)));
        assert_eq!(build("a\nb"), Err(CommandLineError::BadCharacter('\n')));
        assert_eq!(build("a\0b"), Err(CommandLineError::BadCharacter('\0')));
        assert_eq!(build("ä"), Err(CommandLineError::BadCharacter('ä')));
    }
}
