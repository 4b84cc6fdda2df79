//! zstd (RFC 8878): frames one after the other, as image builders write them, with their checksums. ruzstd decodes one frame.

use std::io::{self, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::inflate::bad;
use super::xxh64::Xxh64;

/// What a frame may ask to be kept of what was unpacked, in octets; as zstd's own decoder has it.
const MAX_WINDOW: u64 = 128 << 20;

/// What frames unpack to.
pub(super) struct Unzstd<R> {
    from: R,
    decoder: FrameDecoder,
    /// Of what the frame that is read has unpacked to; `None` between frames.
    sum: Option<Xxh64>,
    given: u64,
}

impl<R: Read> Unzstd<R> {
    pub fn new(from: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW);
        Self { from, decoder, sum: None, given: 0 }
    }

    /// The next frame that is not to be skipped; `false` where there is none any more.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            let mut first = Vec::with_capacity(1);
            if self.from.by_ref().take(1).read_to_end(&mut first)? == 0 {
                return Ok(false);
            }
            match self.decoder.reset(first.chain(&mut self.from)) {
                Ok(()) => {
                    (self.sum, self.given) = (Some(Xxh64::new()), 0);
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let skipped = io::copy(&mut self.from.by_ref().take(length.into()), &mut io::sink())?;
                    if skipped < u64::from(length) {
                        return Err(bad("zstd: it ends too early"));
                    }
                }
                Err(e) => return Err(bad(format!("zstd: {e}"))),
            }
        }
    }

    /// A frame has ended: whether it is what its header and its end say.
    fn end(&mut self, sum: &Xxh64) -> io::Result<()> {
        // Of the digest only its lower half is written.
        if self.decoder.get_checksum_from_data().is_some_and(|expected| expected != sum.digest() as u32) {
            return Err(bad("zstd: its checksum is wrong"));
        }
        let size = self.decoder.content_size();
        if size > 0 && size != self.given {
            return Err(bad(format!("zstd: a frame has {} octets, its header says {size}", self.given)));
        }
        Ok(())
    }
}

impl<R: Read> Read for Unzstd<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            if self.sum.is_none() && !self.begin()? {
                return Ok(0);
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let block = self.decoder.decode_blocks(&mut self.from, BlockDecodingStrategy::UptoBlocks(1));
                block.map_err(|e| bad(format!("zstd: {e}")))?;
            }
            let got = self.decoder.read(into)?;
            if let Some(sum) = &mut self.sum {
                sum.update(&into[..got]);
            }
            if got > 0 {
                self.given += got as u64;
                return Ok(got);
            }
            if let Some(sum) = self.sum.take() {
                self.end(&sum)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf 'content content content\n' | zstd --check`
    const FRAME: &str = "28b52ffd04587d000048636f6e74656e74200a0100eb0a1739698401";

    fn frame() -> Vec<u8> {
        (0..FRAME.len()).step_by(2).map(|at| u8::from_str_radix(&FRAME[at..at + 2], 16).unwrap()).collect()
    }

    fn read(octets: &[u8]) -> io::Result<String> {
        let mut all = String::new();
        Unzstd::new(octets).read_to_string(&mut all)?;
        Ok(all)
    }

    #[test]
    fn frames_follow_each_other_and_some_are_skipped() {
        let one = read(&frame()).unwrap();
        assert_eq!(one, "content content content\n");
        let skipped = [&0x184D_2A53u32.to_le_bytes()[..], &5u32.to_le_bytes(), b"notes"].concat();
        let all = [skipped.clone(), frame(), skipped.clone(), skipped.clone(), frame(), skipped.clone()].concat();
        assert_eq!(read(&all).unwrap(), one.repeat(2));
        let short = [frame(), skipped[..10].to_vec()].concat();
        assert_eq!(read(&short).unwrap_err().to_string(), "zstd: it ends too early");
    }

    #[test]
    fn damaged_or_cut_frames_are_errors() {
        let whole = frame();
        for cut in 1..whole.len() {
            assert!(read(&whole[..cut]).is_err(), "{cut}");
            assert!(read(&[&whole, &whole[..cut]].concat()).is_err(), "{cut}");
        }
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(read(&damaged).unwrap_err().to_string(), "zstd: its checksum is wrong");
        assert!(read(&[whole, b"more".to_vec()].concat()).is_err());
    }
}
