//! Log lines of the long-running roles: `warren[role]: LEVEL message` on standard error.
//!
//! On the node standard error is /dev/kmsg, so that every line reaches every console, keeps its order with
//! the kernel's own and survives in pstore. There each line carries its priority and must be one write.

use std::fmt::Write as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::{OnceLock, PoisonError, RwLock};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest record that /dev/kmsg takes is 1,024 octets (PRINTKRB_RECORD_MAX); a little is left for its prefix.
const MAX_RECORD: usize = 1000;
/// /dev/kmsg: character device 1:11 (Documentation/admin-guide/devices.txt).
const KMSG: libc::dev_t = libc::makedev(1, 11);

struct Logger {
    role: &'static str,
    kernel: bool,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Takes a log line's level and message in the place of standard error. Must not log.
pub type Writer = Box<dyn Fn(Level, &str) + Send + Sync>;

static WRITER: RwLock<Option<Writer>> = RwLock::new(None);

/// Lines go there from now on; `None`: to standard error.
pub fn set_writer(writer: Option<Writer>) {
    *WRITER.write().unwrap_or_else(PoisonError::into_inner) = writer;
}

/// Sends this process's log to standard error at level `info`. Call once, first thing in a role's `main`.
/// A panic is logged the same way, as one line.
pub fn init(role: &'static str) {
    let logger = LOGGER.get_or_init(|| Logger { role, kernel: stderr_is_kmsg() });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Info);
        std::panic::set_hook(Box::new(|info| log::error!("{info}")));
    }
}

/// Changes the level from now on (configuration key `log.level`).
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            if let Some(writer) = &*WRITER.read().unwrap_or_else(PoisonError::into_inner) {
                return writer(record.level(), &record.args().to_string());
            }
            let line = format_line(self.role, self.kernel, record.level(), &record.args().to_string());
            write_stderr(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// One line as it is written. Control characters are escaped: a message that quotes a client or a guest must
/// not be able to forge another line.
pub fn format_line(role: &str, kernel: bool, level: Level, message: &str) -> String {
    let mut line = String::with_capacity(message.len() + 32);
    if kernel {
        let priority = match level {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        let _ = write!(line, "<{priority}>");
    }
    let _ = write!(line, "warren[{role}]: {level} ");
    for c in message.chars() {
        if kernel && line.len() > MAX_RECORD - 16 {
            line.push_str("...");
            break;
        }
        if c.is_control() {
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
    line.push('\n');
    line
}

/// To standard error: one write(2), past Rust's own locks: a log line must come out even from a panic.
pub fn write_stderr(line: &[u8]) {
    // SAFETY: the pointer and length are of a live slice; write(2) only reads it.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
}

fn stderr_is_kmsg() -> bool {
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == KMSG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_role_level_and_message() {
        assert_eq!(format_line("supervise", false, Level::Info, "hello"), "warren[supervise]: INFO hello\n");
        assert_eq!(format_line("init", true, Level::Error, "bad"), "<3>warren[init]: ERROR bad\n");
    }

    #[test]
    fn a_message_cannot_forge_a_second_line() {
        assert_eq!(
            format_line("vmm", true, Level::Warn, "x\n<0>kernel: y\u{1b}[2J"),
            "<4>warren[vmm]: WARN x\\n<0>kernel: y\\u{1b}[2J\n"
        );
    }

    #[test]
    fn a_kernel_record_is_never_too_long() {
        for c in ['a', 'ü', '\n', '\u{10fffd}'] {
            let line = format_line("vmm", true, Level::Info, &c.to_string().repeat(5000));
            assert!(line.len() <= MAX_RECORD && line.ends_with("...\n"), "{}", line.len());
        }
    }
}
