//! The board's few registers: power-off, reset, panic. Everything here is a single port without state.

use super::boot::layout::{KEYBOARD_COMMAND, PVPANIC, RESET, RESET_VALUE, S5_SLEEP_TYPE, SLEEP_CONTROL, SLEEP_STATUS};
use super::last_words::{End, Reason};

/// Sleep enable in the ACPI sleep control register (ACPI 6.5 table 4.19); the type is in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;
/// "Pulse the reset line" to a keyboard controller.
const KEYBOARD_RESET: u8 = 0xfe;
/// pvpanic: the guest panicked.
const PANICKED: u8 = 1;
/// pvpanic: it panicked and goes on in a crash kernel, so this is not yet the end.
const CRASH_LOADED: u8 = 2;

/// A write to a port that may be one of the board's; gives the end of the guest where it means one.
pub fn write(port: u16, octets: &[u8]) -> Option<End> {
    let value = *octets.first()?;
    match port {
        SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == S5_SLEEP_TYPE => {
            Some(End::new(Reason::GuestPoweroff, "the guest switched itself off"))
        }
        RESET if value == RESET_VALUE => Some(End::new(Reason::GuestReset, "the guest asked for a reset")),
        KEYBOARD_COMMAND if value == KEYBOARD_RESET => {
            Some(End::new(Reason::GuestReset, "the guest asked for a reset by its keyboard controller"))
        }
        PVPANIC if value & PANICKED != 0 => {
            Some(End::new(Reason::GuestPanic, "the guest's kernel panicked; its log has the cause"))
        }
        _ => None,
    }
}

/// A read from a port that may be one of the board's; gives whether it is.
pub fn read(port: u16, octets: &mut [u8]) -> bool {
    let value = match port {
        PVPANIC => PANICKED | CRASH_LOADED, // the events that can be reported
        // No sleep state is left by waking, and the keyboard controller is always ready for a command.
        SLEEP_STATUS | SLEEP_CONTROL | RESET | KEYBOARD_COMMAND => 0,
        _ => return false,
    };
    octets.fill(0);
    if let Some(first) = octets.first_mut() {
        *first = value;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(port: u16, value: u8) -> Option<Reason> {
        write(port, &[value]).map(|end| end.reason)
    }

    #[test]
    fn power_off_reset_and_panic_are_told_apart() {
        assert_eq!(reason(SLEEP_CONTROL, S5_SLEEP_TYPE << 2 | SLEEP_ENABLE), Some(Reason::GuestPoweroff));
        assert_eq!(reason(RESET, RESET_VALUE), Some(Reason::GuestReset));
        assert_eq!(reason(KEYBOARD_COMMAND, KEYBOARD_RESET), Some(Reason::GuestReset));
        assert_eq!(reason(PVPANIC, PANICKED), Some(Reason::GuestPanic));
    }

    #[test]
    fn other_values_and_ports_end_nothing() {
        assert_eq!(reason(SLEEP_CONTROL, S5_SLEEP_TYPE << 2), None);
        assert_eq!(reason(SLEEP_CONTROL, SLEEP_ENABLE), None);
        assert_eq!(reason(SLEEP_STATUS, 0xff), None);
        assert_eq!(reason(RESET, 0), None);
        assert_eq!(reason(KEYBOARD_COMMAND, 0xd1), None);
        assert_eq!(reason(PVPANIC, CRASH_LOADED), None);
        assert_eq!(reason(0x80, 0xff), None);
        assert_eq!(write(RESET, &[]), None);
    }
}
