//! What `ping` and `snmp` share: one socket for each address family that carries the requests to all devices, read so much
//! at one go that no timer is late under a flood; and timers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

/// Datagrams read at one go.
const AT_ONCE: usize = 512;

/// What a look at a socket gave.
pub enum Heard<D> {
    /// A datagram.
    Datagram(D),
    /// Nothing of use; there may be more.
    Nothing,
    /// Nothing more for now.
    Empty,
}

/// Two sockets by family (0: IPv4, 1: IPv6; their events have the same numbers), and timers, whose names are `T`.
pub struct Datagrams<S, T> {
    sockets: [Option<S>; 2],
    /// Since then a socket may have more than was read at one go.
    more: [Option<Instant>; 2],
    timers: BinaryHeap<Reverse<(Instant, T)>>,
}

impl<S, T: Ord + Copy> Datagrams<S, T> {
    /// No sockets, no timers.
    pub fn new() -> Self {
        Self { sockets: [None, None], more: [None; 2], timers: BinaryHeap::new() }
    }

    /// The socket of a family, if it is open.
    pub fn socket(&self, family: usize) -> Option<&S> {
        self.sockets[family].as_ref()
    }

    /// Opens it where it is not.
    pub fn open<E>(&mut self, family: usize, open: impl FnOnce() -> Result<S, E>) -> Result<(), E> {
        if self.sockets[family].is_none() {
            self.sockets[family] = Some(open()?);
        }
        Ok(())
    }

    /// Something is there to be read: to be followed by [`Datagrams::next`] until that gives nothing.
    pub fn begin(&mut self, family: usize) -> Turn {
        self.more[family] = None;
        Turn { family, left: AT_ONCE }
    }

    /// The next datagram of this turn.
    pub fn next<D>(&mut self, turn: &mut Turn, now: Instant, mut hear: impl FnMut(&S) -> Heard<D>) -> Option<D> {
        let socket = self.sockets[turn.family].as_ref()?;
        while turn.left > 0 {
            turn.left -= 1;
            match hear(socket) {
                Heard::Datagram(datagram) => return Some(datagram),
                Heard::Nothing => {}
                Heard::Empty => return None,
            }
        }
        self.more[turn.family] = Some(now);
        None
    }

    /// Wakes at a time.
    pub fn set(&mut self, at: Instant, timer: T) {
        self.timers.push(Reverse((at, timer)));
    }

    /// When something is to be done, if nothing comes before.
    pub fn wake_at(&self) -> Option<Instant> {
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        timer.into_iter().chain(self.more.iter().flatten().copied()).min()
    }

    /// Families of which a turn left something.
    pub fn left_over(&self) -> impl Iterator<Item = usize> + use<S, T> {
        let more = self.more;
        (0..2).filter(move |&family| more[family].is_some())
    }

    /// The next timer whose time has come.
    pub fn due(&mut self, now: Instant) -> Option<T> {
        let Reverse((at, timer)) = *self.timers.peek()?;
        (at <= now).then(|| {
            self.timers.pop();
            timer
        })
    }
}

/// A turn at one socket.
pub struct Turn {
    family: usize,
    left: usize,
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_is_read_in_turns_and_timers_come_in_order() {
        let mut datagrams: Datagrams<Cell<usize>, u8> = Datagrams::new();
        datagrams.open(1, || Ok::<_, ()>(Cell::new(AT_ONCE + 100))).unwrap();
        let now = Instant::now();
        let hear = |socket: &Cell<usize>| match socket.get() {
            0 => Heard::Empty,
            left => {
                socket.set(left - 1);
                if left % 2 == 0 { Heard::Datagram(left) } else { Heard::Nothing }
            }
        };
        let mut counts = Vec::new();
        for _ in 0..2 {
            let mut turn = datagrams.begin(1);
            counts.push(std::iter::from_fn(|| datagrams.next(&mut turn, now, hear)).count());
            counts.push(datagrams.left_over().count());
        }
        assert_eq!(counts, [AT_ONCE / 2, 1, 50, 0]);
        assert!(datagrams.socket(0).is_none() && datagrams.wake_at().is_none());
        for (after, timer) in [(3, 3), (1, 1), (2, 2)] {
            datagrams.set(now + Duration::from_secs(after), timer);
        }
        assert_eq!(datagrams.wake_at(), Some(now + Duration::from_secs(1)));
        let until = now + Duration::from_secs(2);
        assert_eq!((datagrams.due(until), datagrams.due(until), datagrams.due(until)), (Some(1), Some(2), None));
    }
}
