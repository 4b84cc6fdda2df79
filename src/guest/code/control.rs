//! What a runner says on its control channel. It is in the code's process, so any octets may come.

/// Longest line, in octets, its LF included.
const LINE_MAX: usize = 64;

/// What a runner says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// The run of that number is over, with an exit code as a program would have it.
    Done {
        /// The run.
        run: u64,
        /// 0 where the code ran to its end.
        exit: u8,
    },
}

/// A line that is none of the runner's protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nonsense;

/// Puts lines together from what is read piece by piece. Holds less than a line.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// Takes the next octets and gives each whole line of them to `heard`.
    ///
    /// # Errors
    /// At the first line that is too long or says nothing known; nothing after it counts.
    pub(crate) fn take(&mut self, octets: &[u8], mut heard: impl FnMut(Word)) -> Result<(), Nonsense> {
        for &octet in octets {
            if octet == b'\n' {
                let word = parse(&self.begun);
                self.begun.clear();
                heard(word.ok_or(Nonsense)?);
            } else if self.begun.len() + 1 < LINE_MAX {
                self.begun.push(octet);
            } else {
                return Err(Nonsense);
            }
        }
        Ok(())
    }
}

/// `done RUN EXIT`
fn parse(line: &[u8]) -> Option<Word> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let done = (words.next()?, words.next()?, words.next()?, words.next());
    let ("done", run, exit, None) = done else { return None };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    Some(Word::Done { run: number(run)?, exit: u8::try_from(number(exit)?).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[&[u8]]) -> (Vec<Word>, Result<(), Nonsense>) {
        let (mut lines, mut words) = (Lines::default(), Vec::new());
        let result = pieces.iter().try_for_each(|piece| lines.take(piece, |word| words.push(word)));
        (words, result)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_several_at_once() {
        let (words, result) = all(&[b"do", b"ne 7 0\ndone 8 1", b"30\n"]);
        assert_eq!(words, [Word::Done { run: 7, exit: 0 }, Word::Done { run: 8, exit: 130 }]);
        assert_eq!(result, Ok(()));
    }

    #[test]
    fn what_is_no_line_of_the_protocol_ends_the_listening() {
        let long = [b'x'; LINE_MAX];
        let cases: [&[u8]; 9] = [
            b"\n",
            b"done\n",
            b"done 1\n",
            b"done 1 256\n",
            b"done -1 0\n",
            b"done 1 0 0\n",
            b"done  1 0\n",
            b"done 99999999999999999999 0\n",
            &long,
        ];
        for case in cases {
            assert_eq!(all(&[case]), (vec![], Err(Nonsense)), "{case:?}");
        }
    }
}
