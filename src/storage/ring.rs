//! Output of a program, kept in a bounded ring file so that it can be replayed, also by the next supervisor.
//!
//! Layout: 16 octets of head (magic, total octets ever written, both little endian), then `capacity` octets
//! of which octet n of the stream stands at n modulo capacity. The total is written after the data: a
//! supervisor killed between the two finds a smaller total and fetches those octets again from the agent.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: &[u8; 8] = b"WRNRING1";
const HEAD: u64 = 16;

/// The last `capacity` octets of a stream.
#[derive(Debug)]
pub struct Ring {
    file: File,
    capacity: u64,
    total: u64,
}

impl Ring {
    /// A new, empty ring. `capacity` is in octets and must be more than any burst that a reader must not miss.
    pub fn create(path: &Path, capacity: u64) -> io::Result<Self> {
        // What a power cut left of one is in nobody's use.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let ring = Self { file, capacity: capacity.max(1), total: 0 };
        if let Err(e) = ring.write_head() {
            // Half a ring would be in the way of the next one.
            let _ = std::fs::remove_file(path);
            return Err(e);
        }
        Ok(ring)
    }

    /// A ring that an earlier supervisor made with the same capacity.
    pub fn open(path: &Path, capacity: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut head = [0u8; HEAD as usize];
        file.read_exact_at(&mut head, 0)?;
        let (magic, total) = head.split_at(8);
        if magic != MAGIC {
            return Err(io::Error::new(ErrorKind::InvalidData, "not an output ring"));
        }
        let total = u64::from_le_bytes(total.try_into().map_err(|_| ErrorKind::InvalidData)?);
        Ok(Self { file, capacity: capacity.max(1), total })
    }

    /// Looks at what another has written since.
    pub fn refresh(&mut self) -> io::Result<()> {
        let mut total = [0u8; 8];
        self.file.read_exact_at(&mut total, 8)?;
        self.total = u64::from_le_bytes(total);
        Ok(())
    }

    /// Octets ever written: the offset at which the next one will stand.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The smallest offset that is still kept.
    pub fn oldest(&self) -> u64 {
        self.total.saturating_sub(self.capacity)
    }

    /// Appends to the stream; what no longer fits is dropped from its start.
    pub fn append(&mut self, octets: &[u8]) -> io::Result<()> {
        let keep = usize::try_from(self.capacity).unwrap_or(usize::MAX).min(octets.len());
        let skipped = octets.len() - keep;
        let mut at = self.total + skipped as u64;
        let mut rest = &octets[skipped..];
        while !rest.is_empty() {
            let place = at % self.capacity;
            let room = usize::try_from(self.capacity - place).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at(room);
            self.file.write_all_at(now, HEAD + place)?;
            at += room as u64;
            rest = later;
        }
        self.total += octets.len() as u64;
        self.write_head()
    }

    /// Reads at most `buffer.len()` octets from `offset`, which must be one that is kept.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        if offset < self.oldest() || offset > self.total {
            return Err(ErrorKind::InvalidInput.into());
        }
        let place = offset % self.capacity;
        let length = (self.total - offset).min(self.capacity - place);
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len());
        self.file.read_exact_at(&mut buffer[..length], HEAD + place)?;
        Ok(length)
    }

    /// The last `limit` octets of a ring that is written no more, or by another; and how many there ever were.
    pub fn tail(path: &Path, limit: u64) -> io::Result<(Vec<u8>, u64)> {
        let file = File::open(path)?;
        let mut head = [0u8; HEAD as usize];
        file.read_exact_at(&mut head, 0)?;
        let (magic, total) = head.split_at(8);
        let total = u64::from_le_bytes(total.try_into().map_err(|_| ErrorKind::InvalidData)?);
        // The capacity is not in the file, but the file of a stream that came round is as long as that.
        let capacity = file.metadata()?.len().saturating_sub(HEAD).max(1);
        if magic != MAGIC {
            return Err(io::Error::new(ErrorKind::InvalidData, "not an output ring"));
        }
        let ring = Self { file, capacity, total };
        let mut octets = vec![0; usize::try_from(limit.min(total).min(capacity)).unwrap_or(usize::MAX)];
        let mut filled = 0;
        while filled < octets.len() {
            let at = total - (octets.len() - filled) as u64;
            filled += ring.read_at(at, &mut octets[filled..])?;
        }
        Ok((octets, total))
    }

    fn write_head(&self) -> io::Result<()> {
        let mut head = [0u8; HEAD as usize];
        head[..8].copy_from_slice(MAGIC);
        head[8..].copy_from_slice(&self.total.to_le_bytes());
        self.file.write_all_at(&head, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(ring: &Ring) -> Vec<u8> {
        let mut out = Vec::new();
        let mut chunk = [0u8; 7];
        let mut at = ring.oldest();
        while at < ring.total() {
            let n = ring.read_at(at, &mut chunk).expect("kept octets");
            out.extend_from_slice(&chunk[..n]);
            at += n as u64;
        }
        out
    }

    #[test]
    fn the_ring_keeps_the_end_of_the_stream_whatever_the_pieces() {
        let dir = std::env::temp_dir().join(format!("warren-ring-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("temp dir");
        let path = dir.join("out");
        let mut ring = Ring::create(&path, 100).expect("create");
        let mut model = Vec::new();
        for size in [0usize, 1, 99, 100, 101, 7, 250, 3] {
            let piece: Vec<u8> = (0..size).map(|i| u8::try_from((model.len() + i) % 251).expect("small")).collect();
            ring.append(&piece).expect("append");
            model.extend_from_slice(&piece);
            assert_eq!(read_all(&ring), model[model.len().saturating_sub(100)..]);
        }
        assert!(ring.read_at(ring.oldest().wrapping_sub(1), &mut [0; 1]).is_err());
        for limit in [0, 1, 60, 100, 1000] {
            let (tail, total) = Ring::tail(&path, limit).expect("tail");
            assert_eq!(
                (total, &tail[..]),
                (model.len() as u64, &model[model.len() - usize::try_from(limit).expect("small").min(100)..])
            );
        }
        drop(ring);
        let again = Ring::open(&path, 100).expect("open");
        assert_eq!(read_all(&again), model[model.len() - 100..]);
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
