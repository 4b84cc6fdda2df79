//! What a receiver refused for good, kept for a look: one JSON line per batch. Two files at most, each half of what is
//! allowed; the older one goes first.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::gather::Outgoing;
use super::json;
use crate::sentinel::log::now_ms;

/// The dead letters of one destination.
#[derive(Debug)]
pub struct DeadLetters {
    path: PathBuf,
    older: PathBuf,
    limit: u64,
}

impl DeadLetters {
    /// `DIRECTORY/DESTINATION.rejected` and `….1`, at most `limit` octets together. Nothing is made before there is
    /// something to keep.
    pub fn new(directory: PathBuf, destination: &str, limit: u64) -> Self {
        let path = directory.join(format!("{destination}.rejected"));
        let older = directory.join(format!("{destination}.rejected.1"));
        Self { path, older, limit }
    }

    /// Keeps a batch, if it fits at all.
    pub fn keep(&self, status: u16, answer: &[u8], batch: &Outgoing) -> io::Result<()> {
        let mut line = String::new();
        let _ = write!(line, "{{\"time\":{},\"status\":{status},\"answer\":", now_ms());
        json::text(&mut line, &String::from_utf8_lossy(&answer[..answer.len().min(1024)]));
        let _ = write!(line, ",\"sequence\":{},\"samples\":", batch.first);
        json::samples(&mut line, &batch.samples);
        line.push_str("}\n");
        let half = self.limit / 2;
        if line.len() as u64 > half {
            return Ok(());
        }
        let mut file = self.open()?;
        if file.metadata()?.len() + line.len() as u64 > half {
            fs::rename(&self.path, &self.older)?;
            file = self.open()?;
        }
        file.write_all(line.as_bytes())
    }

    fn open(&self) -> io::Result<File> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)
    }
}
