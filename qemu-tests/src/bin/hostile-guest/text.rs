//! Words in and out: the command line, and the serial port.

use core::fmt;

use super::cpu;

const COM1: u16 = 0x3f8;

/// The serial port as something to write to.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|octet| cpu::out8(COM1, octet));
        Ok(())
    }
}

/// Writes to the serial port, whatever state an attack left it in.
pub fn say(arguments: fmt::Arguments<'_>) {
    cpu::out8(COM1 + 3, 3); // no divisor latch
    cpu::out8(COM1 + 4, 0); // no loopback
    let _ = fmt::Write::write_fmt(&mut Serial, arguments);
}

#[macro_export]
macro_rules! say {
    ($($arguments:tt)*) => { $crate::text::say(format_args!($($arguments)*)) };
}

/// The kernel's command line.
pub struct CommandLine(&'static str);

impl CommandLine {
    /// As the start_info names it.
    pub fn of(info: u64) -> Self {
        Self(cpu::string(cpu::read64(info + 24)))
    }

    /// What follows `key` in one of the words.
    pub fn value(&self, key: &str) -> Option<&'static str> {
        self.0.split(' ').find_map(|word| word.strip_prefix(key))
    }

    /// The same as a number.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.value(key).and_then(|value| value.parse().ok()).unwrap_or(default)
    }
}
