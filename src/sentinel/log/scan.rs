//! Reads a segment's records one after the other and gets over what is damaged.

use std::io;
use std::sync::Arc;

use super::files::{LogFile, read_full};
use super::record::{self, Found, RECORD_HEADER, RecordHeader, SEGMENT_HEADER};

/// Octets read at once.
const CHUNK: usize = 64 * 1024;

/// Goes through one segment. Never holds more than one record and a chunk in memory.
pub struct Scanner {
    file: Arc<dyn LogFile>,
    /// What is in `buffer` begins here in the file.
    start: u64,
    buffer: Vec<u8>,
    /// Read up to here in `buffer`.
    at: usize,
    /// Something that was no record was passed over since the last record.
    skipping: bool,
    /// Places where that happened and a record came after.
    damaged: u64,
    /// After the last record.
    good_end: u64,
    /// After the last octet seen that is not zero.
    data_end: u64,
}

impl Scanner {
    /// Begins after the segment's header.
    pub fn new(file: Arc<dyn LogFile>) -> Self {
        Self {
            file,
            start: SEGMENT_HEADER,
            buffer: Vec::new(),
            at: 0,
            skipping: false,
            damaged: 0,
            good_end: SEGMENT_HEADER,
            data_end: SEGMENT_HEADER,
        }
    }

    /// The next undamaged record that ends at or before offset `limit`. Nothing: there is none, so far.
    pub fn next(&mut self, limit: u64) -> io::Result<Option<(RecordHeader, &[u8])>> {
        let len = loop {
            match record::decode(&self.buffer[self.at..]) {
                Found::Record(_, payload) => break RECORD_HEADER + payload.len(),
                Found::Needs(need) if self.offset() + need as u64 <= limit => {
                    if !self.fill(need, limit)? {
                        if self.at == self.buffer.len() {
                            return Ok(None);
                        }
                        self.skip();
                    }
                }
                // Nothing is there yet, or too little of what may be read.
                Found::Needs(_) if self.at == self.buffer.len() => {
                    if self.offset() >= limit || !self.fill(1, limit)? {
                        return Ok(None);
                    }
                }
                Found::Needs(_) | Found::Nothing => self.skip(),
            }
        };
        let begin = self.at;
        self.at += len;
        self.good_end = self.offset();
        self.data_end = self.data_end.max(self.good_end);
        if std::mem::take(&mut self.skipping) {
            self.damaged += 1;
        }
        match record::decode(&self.buffer[begin..self.at]) {
            Found::Record(header, payload) => Ok(Some((header, payload))),
            _ => Ok(None),
        }
    }

    /// Where it stands in the file.
    fn offset(&self) -> u64 {
        self.start + self.at as u64
    }

    /// Passes over at least one octet, to the next that may begin a record.
    fn skip(&mut self) {
        self.skipping = true;
        let from = (self.at + 1).min(self.buffer.len());
        let next = record::next_magic(&self.buffer[from..]).map_or(self.buffer.len(), |at| from + at);
        if let Some(last) = self.buffer[self.at..next].iter().rposition(|&octet| octet != 0) {
            self.data_end = self.data_end.max(self.offset() + last as u64 + 1);
        }
        self.at = next;
    }

    /// Gets at least `need` octets into the buffer, as far as `limit`. Whether there were so many.
    fn fill(&mut self, need: usize, limit: u64) -> io::Result<bool> {
        self.buffer.drain(..self.at);
        self.start += self.at as u64;
        self.at = 0;
        let have = self.buffer.len();
        let end = self.start + have as u64;
        let more = (limit.saturating_sub(end)).min(need.saturating_sub(have).max(CHUNK) as u64) as usize;
        self.buffer.resize(have + more, 0);
        match read_full(&*self.file, &mut self.buffer[have..], end) {
            Ok(count) => self.buffer.truncate(have + count),
            Err(e) => {
                self.buffer.truncate(have);
                return Err(e);
            }
        }
        Ok(self.buffer.len() >= need)
    }

    /// Damaged places passed over so far; what is damaged at the end of the segment is not among them.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Offset after the last record found.
    pub fn good_end(&self) -> u64 {
        self.good_end
    }

    /// Offset after the last octet seen that is not zero: beyond [`Scanner::good_end`] it is a torn record.
    pub fn data_end(&self) -> u64 {
        self.data_end
    }
}
