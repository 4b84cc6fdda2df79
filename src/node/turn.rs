//! What one source may bring in one turn of the loop, so that a flood leaves room for everybody else.

use std::io;

use crate::wire::Filled;

/// Messages.
const MESSAGES: usize = 256;
/// What one read costs, in messages. What is read may be none: empty lines, the inside of a line that is too long.
const READ: usize = 8;

/// One source's turn.
#[derive(Debug)]
pub(super) struct Turn {
    left: usize,
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Step<T> {
    /// Something was heard.
    Heard(T),
    /// The source has had its turn and may have more: it is to be served again, without an event.
    Over,
    /// It has nothing more for now; an event tells of more.
    Drained,
    /// It closed its side.
    Closed,
    /// It failed.
    Failed(io::Error),
}

impl Turn {
    /// A turn begins.
    pub fn new() -> Self {
        Self { left: MESSAGES }
    }

    /// Takes the next thing that was read, or reads.
    pub fn step<P, T>(
        &mut self,
        peer: &mut P,
        next: impl Fn(&mut P) -> Option<T>,
        fill: impl Fn(&mut P) -> io::Result<Filled>,
    ) -> Step<T> {
        while self.left > 0 {
            if let Some(heard) = next(peer) {
                self.left -= 1;
                return Step::Heard(heard);
            }
            self.left = self.left.saturating_sub(READ);
            match fill(peer) {
                Ok(Filled::More) => {}
                Ok(Filled::Drained) => return Step::Drained,
                Ok(Filled::Closed) => return Step::Closed,
                Err(e) => return Step::Failed(e),
            }
        }
        Step::Over
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::wire::Link;

    /// A peer that sends the same for ever.
    struct Endless(&'static [u8]);

    impl Read for Endless {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            into.iter_mut().zip(self.0.iter().cycle()).for_each(|(to, from)| *to = *from);
            Ok(into.len() / self.0.len() * self.0.len())
        }
    }

    impl Write for Endless {
        fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
            Ok(octets.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_source_that_sends_without_end_has_its_turn_and_no_more() {
        for (said, messages) in [(&b"\n"[..], 0), (b"x", 1), (b"1 item a=b\n", MESSAGES)] {
            let (mut link, mut turn, mut heard) = (Link::new(Endless(said)), Turn::new(), 0);
            loop {
                match turn.step(&mut link, Link::next, Link::fill) {
                    Step::Heard(_) => heard += 1,
                    Step::Over => break,
                    other => panic!("{other:?}"),
                }
            }
            assert!(heard <= messages && (messages < MESSAGES || heard > MESSAGES / 2), "{said:?}: {heard}");
            assert!(matches!(turn.step(&mut link, Link::next, Link::fill), Step::Over), "until the next turn");
        }
    }
}
