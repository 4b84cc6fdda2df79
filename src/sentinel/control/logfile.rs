//! Where log lines go: standard error, a file that is changed for a new one when it is large, or both; as text or as JSON.
//!
//! Lines in a file have their time; those on standard error have it only as JSON, because whoever takes them (the journal,
//! the kernel's log) adds one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::log::Level;

use crate::node::logging;
use crate::sentinel::config::{LogFormat, LogOutput, LogSettings};
use crate::sentinel::send::json;

/// Puts the settings in force. A file that cannot be opened is an error and changes nothing.
pub fn apply(settings: &LogSettings) -> Result<(), String> {
    let json = settings.format == LogFormat::Json;
    if settings.output == LogOutput::Stderr && !json {
        logging::set_writer(None);
    } else {
        let file = match settings.output {
            LogOutput::Stderr => None,
            _ => Some(Rotating::open(settings).map_err(|e| format!("log.file: {}: {e}", settings.file.display()))?),
        };
        let (both, file) = (settings.output != LogOutput::File, file.map(Mutex::new));
        logging::set_writer(Some(Box::new(move |level, message| {
            let now = SystemTime::now();
            let dated =
                if json { as_json(now, level, message) } else { format!("{} {}", utc(now), as_text(level, message)) };
            let kept = file.as_ref().is_some_and(|file| {
                file.lock().unwrap_or_else(PoisonError::into_inner).write(dated.as_bytes(), now).is_ok()
            });
            // What the file does not take (a full disk) is told all the same.
            if both || !kept {
                let line = if json { dated } else { as_text(level, message) };
                logging::write_stderr(line.as_bytes());
            }
        })));
    }
    logging::set_level(settings.level.into());
    Ok(())
}

fn as_text(level: Level, message: &str) -> String {
    logging::format_line("sentinel", false, level, message)
}

fn as_json(now: SystemTime, level: Level, message: &str) -> String {
    let mut line = format!("{{\"time\":\"{}\",\"level\":\"{level}\",\"role\":\"sentinel\",\"message\":", utc(now));
    json::text(&mut line, message);
    line.push_str("}\n");
    line
}

/// RFC 3339, in UTC, to the millisecond.
fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years begin in March, so that leap days come last; 146,097 days are 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, milli) = (second / 3600, second / 60 % 60, since.subsec_millis());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{milli:03}Z", second % 60)
}

/// A file that becomes `FILE.1` when it is full, and that one `FILE.2`.
struct Rotating {
    path: PathBuf,
    limit: u64,
    files: u64,
    age: Duration,
    file: File,
    size: u64,
}

impl Rotating {
    fn open(settings: &LogSettings) -> io::Result<Self> {
        let file = open(&settings.file)?;
        let size = file.metadata()?.len();
        let age = Duration::from_secs(settings.days * 86_400);
        let (limit, files) = (settings.max_mib << 20, settings.files);
        Ok(Self { path: settings.file.clone(), limit, files, age, file, size })
    }

    fn write(&mut self, line: &[u8], now: SystemTime) -> io::Result<()> {
        if self.size > 0 && self.size + line.len() as u64 > self.limit {
            self.rotate(now)?;
        }
        self.file.write_all(line)?;
        self.size += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self, now: SystemTime) -> io::Result<()> {
        for number in (1..=self.files).rev() {
            let file = numbered(&self.path, number);
            let Ok(meta) = fs::metadata(&file) else { continue };
            let old = meta.modified().ok().and_then(|at| now.duration_since(at).ok()).is_some_and(|age| age > self.age);
            if number == self.files || old {
                fs::remove_file(&file)?;
            } else {
                fs::rename(&file, numbered(&self.path, number + 1))?;
            }
        }
        if self.files == 0 {
            fs::remove_file(&self.path)?;
        } else {
            fs::rename(&self.path, numbered(&self.path, 1))?;
        }
        (self.file, self.size) = (open(&self.path)?, 0);
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

fn numbered(path: &Path, number: u64) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |seconds: u64, milli: u64| utc(UNIX_EPOCH + Duration::from_millis(seconds * 1000 + milli));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400, 7), "2000-02-29T00:00:00.007Z");
        assert_eq!(at(1_709_251_199, 999), "2024-02-29T23:59:59.999Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000Z");
        assert_eq!(at(1_798_761_599, 0), "2026-12-31T23:59:59.000Z");
    }

    #[test]
    fn a_message_is_one_line_of_json_whatever_it_holds() {
        let line = as_json(UNIX_EPOCH, Level::Warn, "a \"b\"\n{c}\u{1b}");
        assert_eq!(line.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&value["level"], &value["message"]), (&"WARN".into(), &"a \"b\"\n{c}\u{1b}".into()));
    }

    #[test]
    fn a_full_file_is_kept_under_a_number_until_there_are_too_many_or_it_is_too_old() {
        let directory = std::env::temp_dir().join(format!("warren-logfile-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("s.log");
        let settings = LogSettings { file: path.clone(), max_mib: 0, files: 2, days: 30, ..LogSettings::default() };
        let mut log = Rotating::open(&settings).unwrap();
        log.limit = 11;
        for line in ["one\n", "two\n", "three\n", "four\n", "five five five\n", "six\n"] {
            log.write(line.as_bytes(), SystemTime::now()).unwrap();
        }
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_else(|e| e.kind().to_string());
        assert_eq!(text(&path), "six\n");
        assert_eq!(text(&numbered(&path, 1)), "five five five\n");
        assert_eq!(text(&numbered(&path, 2)), "three\nfour\n");
        assert!(!numbered(&path, 3).exists());
        // Much later: what is old goes, though there is room for it.
        log.write(b"seven seven\n", SystemTime::now() + Duration::from_secs(31 * 86_400)).unwrap();
        assert_eq!((text(&path), text(&numbered(&path, 1))), ("seven seven\n".into(), "six\n".into()));
        assert!(!numbered(&path, 2).exists());
        // A later start goes on with the file.
        drop(log);
        assert_eq!(Rotating::open(&settings).unwrap().size, 12);
        fs::remove_dir_all(&directory).unwrap();
    }
}
