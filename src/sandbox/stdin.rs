//! A program's stdin on its way through the supervisor: from whoever feeds it now to its agent.
//!
//! It is one stream, whoever feeds it. Each of those who do, one after the other, may send `INITIAL_CREDIT` octets at once, also
//! where the program has not read what came before: then its part waits here. That is a window at most, as nobody else gets to
//! feed it before it is gone.

use std::collections::VecDeque;

use super::flow::QUEUE_HIGH;
use crate::wire::{Code, Error, INITIAL_CREDIT};

/// Small pieces are joined up to this size.
const CHUNK: usize = 16 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It is open, and the agent takes more.
    Open,
    /// Its agent is to say where it stands. `known`: this supervisor has sent all that was sent before.
    Away { known: bool },
    /// There is none, or no more.
    Closed,
}

/// What an agent says of a program's stdin, against what is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// As it must be.
    Same,
    /// It is not open.
    Closed,
    /// It is not where it was sent to: what was under way is lost, or the sandbox was put back.
    Elsewhere(u64),
}

/// A program's stdin.
#[derive(Debug)]
pub struct Stdin {
    phase: Phase,
    /// Octets that the agent was sent, from the start of the stream.
    sent: u64,
    /// Octets that it may be sent, from the start of the stream.
    allowed: u64,
    /// What was taken and not sent.
    held: VecDeque<Vec<u8>>,
    /// Its octets.
    holds: u64,
    /// Octets that who feeds it may still send.
    left: u64,
    /// Nothing more comes.
    ended: bool,
    /// The agent was told so over this link.
    end_sent: bool,
    /// Where it stood when the agent last said so.
    said: Option<u64>,
}

impl Stdin {
    /// Of a program that is started, with a stdin or without.
    pub fn of_new(open: bool) -> Self {
        let phase = if open { Phase::Open } else { Phase::Closed };
        Self { phase, allowed: INITIAL_CREDIT, left: INITIAL_CREDIT, ..Self::unknown() }
    }

    /// Of a program that runs already: its agent is to say.
    pub fn unknown() -> Self {
        Self {
            phase: Phase::Away { known: false },
            sent: 0,
            allowed: 0,
            held: VecDeque::new(),
            holds: 0,
            left: 0,
            ended: false,
            end_sent: false,
            said: None,
        }
    }

    /// Whether octets of it wait here.
    pub fn is_holding(&self) -> bool {
        self.holds > 0
    }

    /// Why nobody can begin to feed it.
    pub fn check(&self) -> Result<(), Error> {
        if self.phase == Phase::Closed || self.ended {
            return Err(not_open());
        }
        if self.is_holding() {
            let message = format!("stdin: the program has not yet read what came before: {} octets wait", self.holds);
            return Err(Error::new(Code::NoCapacity, message).with("waiting", self.holds).with("max", 0));
        }
        Ok(())
    }

    /// Another client feeds it from now on. Gives where that begins, as far as that is known; else it is `said` once it is.
    pub fn begin(&mut self) -> Option<u64> {
        self.left = INITIAL_CREDIT;
        let known = !matches!(self.phase, Phase::Away { known: false });
        known.then(|| self.sent.saturating_add(self.holds))
    }

    /// Where it stood when the agent last said so.
    pub fn said(&self) -> Option<u64> {
        self.said
    }

    /// Takes octets from who feeds it.
    pub fn take(&mut self, octets: Vec<u8>) -> Result<(), Error> {
        if self.phase == Phase::Closed || self.ended {
            return Err(not_open());
        }
        let length = octets.len() as u64;
        if length > self.left {
            let message = format!("stdin: {length} octets are over the credit of {}", self.left);
            return Err(Error::new(Code::CreditExceeded, message));
        }
        self.left -= length;
        self.holds += length;
        // Many small ones would cost more than their octets, and so would one large one that is split again and again.
        match self.held.back_mut() {
            _ if octets.is_empty() => {}
            Some(last) if last.len() + octets.len() <= CHUNK => last.extend_from_slice(&octets),
            _ => self.held.push_back(octets),
        }
        Ok(())
    }

    /// Who feeds it says that nothing more comes, ever.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The agent allows more.
    pub fn allow(&mut self, octets: u64) {
        self.allowed = self.allowed.saturating_add(octets);
    }

    /// What the agent may be sent next.
    pub fn pass_on(&mut self) -> Option<Vec<u8>> {
        let room = usize::try_from(self.allowed.saturating_sub(self.sent)).unwrap_or(usize::MAX);
        if self.phase != Phase::Open || room == 0 {
            return None;
        }
        let mut octets = self.held.pop_front()?;
        if octets.len() > room {
            self.held.push_front(octets.split_off(room));
        }
        self.holds -= octets.len() as u64;
        self.sent = self.sent.saturating_add(octets.len() as u64);
        Some(octets)
    }

    /// Whether the agent is to be told now that nothing more comes. Once on each link.
    pub fn ends(&mut self) -> bool {
        let now = self.phase == Phase::Open && self.ended && self.held.is_empty();
        now && !std::mem::replace(&mut self.end_sent, true)
    }

    /// Credit for who feeds it now, given what is queued toward the agent. Small grants wait until they add up.
    pub fn grant(&mut self, queued: usize) -> Option<u64> {
        // What waits here goes first: nobody knows when, and the agent may allow any number.
        if self.phase != Phase::Open || self.ended || queued >= QUEUE_HIGH || !self.held.is_empty() {
            return None;
        }
        let room = self.allowed.saturating_sub(self.sent.saturating_add(self.holds)).min(INITIAL_CREDIT);
        let more = room.saturating_sub(self.left);
        if more == 0 || (more < INITIAL_CREDIT / 4 && self.left > INITIAL_CREDIT / 2) {
            return None;
        }
        self.left += more;
        Some(more)
    }

    /// The link to the agent is made anew: it is to say where it stands.
    pub fn away(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Away { known: true };
        }
    }

    /// Over a new link the agent says how many octets it has, where the stream is open, and how many more it takes.
    pub fn stands(&mut self, offset: Option<u64>, credit: Option<u64>) -> Standing {
        let Phase::Away { known } = self.phase else { return Standing::Same };
        let Some(offset) = offset else {
            // It was told to close it.
            let expected = self.end_sent;
            self.close();
            return if expected { Standing::Same } else { Standing::Closed };
        };
        let elsewhere = known && offset != self.sent;
        if elsewhere {
            // After a gap it would be another stream, and its end another one's.
            self.drop_held();
            self.ended = false;
        }
        self.phase = Phase::Open;
        self.sent = offset;
        self.allowed = offset.saturating_add(credit.unwrap_or(INITIAL_CREDIT).min(INITIAL_CREDIT));
        self.said = Some(offset);
        self.end_sent = false;
        if elsewhere { Standing::Elsewhere(offset) } else { Standing::Same }
    }

    /// The program has ended.
    pub fn close(&mut self) {
        self.phase = Phase::Closed;
        self.drop_held();
    }

    fn drop_held(&mut self) {
        self.held = VecDeque::new();
        self.holds = 0;
    }
}

/// The error of who feeds what is not open.
pub fn not_open() -> Error {
    Error::new(Code::BadState, "stdin is not open: the program was started without stdin=true, or it was ended")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: usize = INITIAL_CREDIT as usize;

    /// All that may be sent now.
    fn sent(stdin: &mut Stdin) -> Vec<u8> {
        std::iter::from_fn(|| stdin.pass_on()).flatten().collect()
    }

    #[test]
    fn who_comes_next_has_a_window_of_its_own_and_what_the_agent_has_no_room_for_waits() {
        let mut stdin = Stdin::of_new(true);
        assert_eq!(stdin.begin(), Some(0));
        stdin.take(vec![b'a'; WINDOW]).expect("the first window");
        assert_eq!(sent(&mut stdin).len(), WINDOW);
        assert_eq!(stdin.grant(0), None, "the program reads nothing");
        assert!(stdin.take(vec![0]).is_err_and(|error| error.is(Code::CreditExceeded)));
        // The next one begins where that stopped.
        assert!(stdin.check().is_ok());
        assert_eq!(stdin.begin(), Some(INITIAL_CREDIT));
        stdin.take(vec![b'b'; WINDOW]).expect("its own window");
        assert!(sent(&mut stdin).is_empty() && stdin.is_holding());
        let refused = stdin.check().expect_err("nobody else before that is gone");
        assert!(refused.is(Code::NoCapacity) && refused.fields.number("waiting") == Some(INITIAL_CREDIT), "{refused}");
        // As the program reads it goes on, and credit comes only for what is beyond what waits.
        stdin.allow(100);
        assert_eq!(sent(&mut stdin), [b'b'; 100]);
        assert_eq!(stdin.grant(0), None);
        stdin.allow(2 * INITIAL_CREDIT);
        assert_eq!(sent(&mut stdin).len(), WINDOW - 100);
        assert_eq!(stdin.grant(QUEUE_HIGH), None, "the link is full");
        assert_eq!(stdin.grant(0), Some(INITIAL_CREDIT));
        assert_eq!(stdin.grant(0), None);
    }

    #[test]
    fn whatever_the_agent_allows_and_however_small_the_pieces_are_a_window_waits_at_most() {
        let mut stdin = Stdin::of_new(true);
        stdin.begin();
        stdin.allow(u64::MAX);
        for _ in 0..WINDOW {
            stdin.take(vec![1]).expect("a window");
            stdin.take(Vec::new()).expect("nothing");
            assert_eq!(stdin.grant(0), None, "it waits for the sandbox to run");
        }
        assert!(stdin.take(vec![1]).is_err() && stdin.held.len() == WINDOW / CHUNK);
        assert_eq!(sent(&mut stdin).len(), WINDOW);
        assert_eq!(stdin.grant(0), Some(INITIAL_CREDIT));
    }

    #[test]
    fn an_end_that_the_agent_was_not_told_of_explains_nothing() {
        // It was not open when this supervisor came, or when its link was made anew.
        let mut stdin = Stdin::unknown();
        stdin.begin();
        stdin.take(b"lost".to_vec()).expect("room");
        stdin.end();
        assert_eq!(stdin.stands(None, None), Standing::Closed);
        // After a gap there is no end: who feeds it again goes on.
        let mut stdin = Stdin::of_new(true);
        stdin.begin();
        stdin.take(b"0123456789".to_vec()).expect("room");
        assert_eq!(sent(&mut stdin).len(), 10);
        stdin.end();
        stdin.away();
        assert_eq!(stdin.stands(Some(4), None), Standing::Elsewhere(4));
        assert!(!stdin.ends() && stdin.check().is_ok());
        assert_eq!(stdin.begin(), Some(4));
    }

    #[test]
    fn its_end_comes_after_all_octets_and_nobody_feeds_it_after_that() {
        let mut stdin = Stdin::of_new(true);
        stdin.begin();
        stdin.take(b"last".to_vec()).expect("room");
        stdin.end();
        assert!(!stdin.ends(), "there is something before it");
        assert_eq!(sent(&mut stdin), b"last");
        assert!(stdin.ends() && !stdin.ends());
        assert!(stdin.check().is_err_and(|error| error.is(Code::BadState)));
        assert!(stdin.take(b"more".to_vec()).is_err_and(|error| error.is(Code::BadState)));
        // An end that was lost with its link is said again; one that was not is as it must be.
        stdin.away();
        assert_eq!(stdin.stands(Some(4), None), Standing::Same);
        assert!(stdin.ends());
        stdin.away();
        assert_eq!(stdin.stands(None, None), Standing::Same);
        assert!(!stdin.ends());
        for mut without in [Stdin::of_new(false), stdin] {
            assert!(without.check().is_err_and(|error| error.is(Code::BadState)));
            without.away();
            assert_eq!(without.stands(Some(0), None), Standing::Same);
            assert!(without.check().is_err() && without.grant(0).is_none());
        }
    }

    #[test]
    fn over_a_new_link_it_goes_on_where_the_agent_says() {
        let mut stdin = Stdin::of_new(true);
        stdin.begin();
        stdin.take(b"one".to_vec()).expect("room");
        assert_eq!(sent(&mut stdin), b"one");
        stdin.away();
        stdin.take(b"two".to_vec()).expect("it waits");
        assert!(stdin.pass_on().is_none() && stdin.grant(0).is_none());
        assert_eq!(stdin.stands(Some(3), Some(5)), Standing::Same);
        assert_eq!(sent(&mut stdin), b"two");
        stdin.take(b"three".to_vec()).expect("room");
        assert_eq!(sent(&mut stdin), b"th", "five octets are allowed in all");
        // What was under way is lost: the rest is not sent after the gap.
        stdin.away();
        assert_eq!(stdin.stands(Some(6), None), Standing::Elsewhere(6));
        assert!(stdin.pass_on().is_none() && !stdin.is_holding());
        assert_eq!(stdin.begin(), Some(6));
        stdin.away();
        assert_eq!(stdin.stands(None, None), Standing::Closed);
    }

    #[test]
    fn one_that_is_not_known_yet_takes_a_window_and_no_number_of_an_agent_overflows() {
        let mut stdin = Stdin::unknown();
        assert!(stdin.check().is_ok() && stdin.begin().is_none());
        stdin.take(vec![b'x'; WINDOW]).expect("a window");
        assert!(stdin.take(vec![0]).is_err());
        assert_eq!(stdin.stands(Some(u64::MAX - 1), Some(u64::MAX)), Standing::Same);
        assert_eq!(stdin.said(), Some(u64::MAX - 1));
        stdin.allow(u64::MAX);
        sent(&mut stdin);
        assert_eq!(stdin.grant(0), None);
        stdin.close();
        assert!(stdin.pass_on().is_none() && !stdin.is_holding() && stdin.check().is_err());
    }
}
