//! The power button: an input device with the key KEY_POWER (Documentation/input/event-codes.rst).

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// linux/input-event-codes.h
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// Of `struct input_event` on 64-bit machines: two 8-octet times, then u16 type, u16 code, i32 value.
const EVENT: usize = 24;
/// Machines have one or two, and keyboards may have one more.
const MAX_BUTTONS: usize = 8;

/// All buttons that were there at start.
pub struct PowerButtons {
    devices: Vec<File>,
}

impl PowerButtons {
    /// Opens them.
    pub fn open() -> Self {
        Self { devices: open_in(Path::new("/sys/class/input"), Path::new("/dev/input")) }
    }

    /// To poll for reading.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().map(AsFd::as_fd)
    }

    /// Reads what came. Whether a button was pressed. A device that is gone is forgotten.
    pub fn pressed(&mut self) -> bool {
        let mut pressed = false;
        self.devices.retain_mut(|device| {
            let mut events = [0; 64 * EVENT];
            loop {
                match device.read(&mut events) {
                    Ok(0) => return false,
                    Ok(n) => pressed |= events[..n].chunks_exact(EVENT).any(is_press),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return false,
                }
            }
        });
        pressed
    }
}

fn open_in(class: &Path, dev: &Path) -> Vec<File> {
    let Ok(entries) = fs::read_dir(class) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().starts_with("event"))
        .filter(|name| {
            fs::read_to_string(class.join(name).join("device/capabilities/key")).is_ok_and(|keys| has_power(&keys))
        })
        .collect();
    names.sort();
    names
        .iter()
        .take(MAX_BUTTONS)
        .filter_map(|name| {
            let path = dev.join(name);
            let device = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
            device.map_err(|error| log::error!("cannot open {}: {error}", path.display())).ok()
        })
        .collect()
}

/// A bitmap as 64-bit words in hex, the highest first.
fn has_power(keys: &str) -> bool {
    let word = keys.split_ascii_whitespace().rev().nth(usize::from(KEY_POWER / 64));
    word.and_then(|word| u64::from_str_radix(word, 16).ok()).is_some_and(|word| word >> (KEY_POWER % 64) & 1 == 1)
}

fn is_press(event: &[u8]) -> bool {
    let u16_at = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    u16_at(16) == EV_KEY && u16_at(18) == KEY_POWER && value == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut event = vec![0xaa; 16];
        event.extend(kind.to_ne_bytes());
        event.extend(code.to_ne_bytes());
        event.extend(value.to_ne_bytes());
        event
    }

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_press(&event(EV_KEY, 30, 1)));
        assert!(!is_press(&event(0, KEY_POWER, 1)));
    }

    #[test]
    fn buttons_are_told_from_other_devices_by_their_keys() {
        assert!(has_power("10000000000000 0\n"));
        assert!(!has_power("10000000000000\n"));
        assert!(!has_power("0\n"));
        assert!(!has_power("x y\n"));

        let root = std::env::temp_dir().join(format!("warren-input-{}", std::process::id()));
        for (name, keys) in [("event0", "10000000000000 0\n"), ("event1", "0\n"), ("input0", "10000000000000 0\n")] {
            fs::create_dir_all(root.join("class").join(name).join("device/capabilities")).unwrap();
            fs::write(root.join("class").join(name).join("device/capabilities/key"), keys).unwrap();
        }
        fs::create_dir_all(root.join("dev")).unwrap();
        fs::write(root.join("dev/event0"), [event(0, 0, 0), event(EV_KEY, KEY_POWER, 1)].concat()).unwrap();
        let mut buttons = PowerButtons { devices: open_in(&root.join("class"), &root.join("dev")) };
        assert_eq!(buttons.descriptors().count(), 1);
        assert!(buttons.pressed());
        assert_eq!(buttons.descriptors().count(), 0, "a device at its end is gone");
        assert!(!buttons.pressed());
        fs::remove_dir_all(&root).unwrap();
    }
}
