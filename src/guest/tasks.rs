//! What may block for long, or for ever when a file system in the sandbox hangs, is done on threads: each file request
//! has one for as long as it goes on. The loop never touches a file; it passes orders to the thread and what the thread
//! says to the link.
//!
//! Everything under way is bounded: a thread says no more content or rows than it was ordered to, and it is ordered more
//! only while the link's queue has room. A thread whose request has ended meanwhile finds that out when it comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use mio::{Poll, Token, Waker};

use super::connection::QUEUE_HIGH;
use crate::wire::{Code, Error, Fields, INITIAL_CREDIT, Message};

/// Threads at once. Their stacks stay with the process for the next ones, a few pages each.
const THREADS_MAX: usize = 64;
/// Deep enough for the file operations, which do not recurse.
const STACK: usize = 128 * 1024;
/// Octets of content, and rows of a list, that a thread may be ahead of the link.
const CONTENT_AHEAD: u64 = 128 * 1024;
const ROWS_AHEAD: u64 = 128;

/// What the loop tells a thread.
#[derive(Debug)]
pub(super) enum Order {
    /// Say so many more octets, or rows.
    More(u64),
    /// Content from the client.
    Content(Vec<u8>),
    /// There is no more content.
    End,
}

/// What a thread says, for its request's link.
#[derive(Debug)]
pub(super) struct Report {
    pub link: u64,
    pub number: u64,
    pub message: Message,
}

/// The thread's end.
#[derive(Debug)]
pub(super) struct Desk {
    /// The request's tag.
    pub tag: String,
    link: u64,
    number: u64,
    orders: Receiver<Order>,
    reports: Sender<Report>,
    waker: Arc<Waker>,
}

impl Desk {
    /// The next order. `None`: nobody waits for the request any more.
    pub(super) fn order(&self) -> Option<Order> {
        self.orders.recv().ok()
    }

    /// The next order where there is one: `Some(None)` where there is none yet, `None` as of `order`.
    pub(super) fn order_now(&self) -> Option<Option<Order>> {
        match self.orders.try_recv() {
            Ok(order) => Some(Some(order)),
            Err(TryRecvError::Empty) => Some(None),
            Err(TryRecvError::Disconnected) => None,
        }
    }

    /// Says something on the request's link.
    pub(super) fn say(&self, message: Message) {
        let _ = self.reports.send(Report { link: self.link, number: self.number, message });
        let _ = self.waker.wake();
    }
}

/// How a request's content flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// There is none.
    Answer,
    /// To the client: content, by its credit.
    Content { granted: u64, ordered: u64, said: u64 },
    /// To the client: rows.
    Rows { ordered: u64, said: u64 },
    /// From the client: content, by ours.
    Taking { granted: u64, received: u64, ended: bool },
}

impl Flow {
    pub(super) const CONTENT: Self = Self::Content { granted: INITIAL_CREDIT, ordered: 0, said: 0 };
    pub(super) const ROWS: Self = Self::Rows { ordered: 0, said: 0 };
    pub(super) const TAKING: Self = Self::Taking { granted: INITIAL_CREDIT, received: 0, ended: false };
}

/// The loop's end. Dropping it lets the thread know that nobody waits any more.
#[derive(Debug)]
pub(super) struct Task {
    pub number: u64,
    orders: Sender<Order>,
    flow: Flow,
}

impl Task {
    /// Orders what the client and the link's queue have room for.
    pub(super) fn pump(&mut self, queued: usize) {
        if queued >= QUEUE_HIGH {
            return;
        }
        let more = match &mut self.flow {
            Flow::Content { granted, ordered, said } => {
                let more = (*granted - *ordered).min(CONTENT_AHEAD - (*ordered - *said));
                *ordered += more;
                more
            }
            // In portions: a row is little to wake a thread for.
            Flow::Rows { ordered, said } if *ordered - *said <= ROWS_AHEAD / 2 => {
                let more = ROWS_AHEAD - (*ordered - *said);
                *ordered += more;
                more
            }
            _ => 0,
        };
        if more > 0 {
            // A thread that has ended has said why.
            let _ = self.orders.send(Order::More(more));
        }
    }

    /// The client has taken that many octets.
    pub(super) fn credit(&mut self, octets: u64) {
        if let Flow::Content { granted, .. } = &mut self.flow {
            *granted = granted.saturating_add(octets);
        }
    }

    /// Content from the client.
    pub(super) fn content(&mut self, payload: Vec<u8>) -> Result<(), Error> {
        let Flow::Taking { granted, received, ended: false } = &mut self.flow else { return Err(no_content()) };
        *received += payload.len() as u64;
        if received > granted {
            let error =
                Error::new(Code::CreditExceeded, format!("content has {received} octets, credit is for {granted}"));
            return Err(error.with("channel", "content"));
        }
        let _ = self.orders.send(Order::Content(payload));
        Ok(())
    }

    /// The client has no more content.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        let Flow::Taking { ended: ended @ false, .. } = &mut self.flow else { return Err(no_content()) };
        *ended = true;
        let _ = self.orders.send(Order::End);
        Ok(())
    }

    /// Takes note of what the thread says.
    pub(super) fn note(&mut self, message: &Message) {
        match (&mut self.flow, message) {
            (Flow::Content { said, .. }, Message::Data { payload, .. }) => *said += payload.len() as u64,
            (Flow::Rows { said, .. }, Message::Item { .. }) => *said += 1,
            (Flow::Taking { granted, .. }, Message::Credit { octets, .. }) => {
                *granted = granted.saturating_add(*octets);
            }
            _ => {}
        }
    }
}

fn no_content() -> Error {
    Error::new(Code::BadArgument, "the request takes nothing on channel content").with("channel", "content")
}

/// Starts threads and collects what they say.
#[derive(Debug)]
pub(super) struct Tasks {
    sender: Sender<Report>,
    receiver: Receiver<Report>,
    /// Made for the first task: a boot needs none.
    waker: Option<Arc<Waker>>,
    running: Arc<AtomicUsize>,
    next: u64,
}

/// One of the threads that may run at once.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Tasks {
    pub(super) fn new() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver, waker: None, running: Arc::default(), next: 0 }
    }

    /// Runs `work` on a thread; what it says, and at last its result, comes out of `next` after an event of `token`.
    pub(super) fn run(
        &mut self,
        poll: &Poll,
        token: Token,
        link: u64,
        tag: &str,
        flow: Flow,
        work: impl FnOnce(&Desk) -> Result<Fields, Error> + Send + 'static,
    ) -> Result<Task, Error> {
        let no_thread = |why: &str| Error::new(Code::NoCapacity, format!("no thread for a file operation: {why}"));
        let waker = match &self.waker {
            Some(waker) => waker.clone(),
            None => Arc::new(Waker::new(poll.registry(), token).map_err(|e| no_thread(&e.to_string()))?),
        };
        self.waker = Some(waker.clone());
        let place = Place(self.running.clone());
        if self.running.fetch_add(1, Ordering::SeqCst) >= THREADS_MAX {
            let limit = format!("{THREADS_MAX} are under way, which is the limit");
            return Err(no_thread(&limit).with("max", THREADS_MAX));
        }
        self.next += 1;
        let number = self.next;
        let (orders, receiver) = channel();
        let desk = Desk { tag: tag.to_string(), link, number, orders: receiver, reports: self.sender.clone(), waker };
        let run = move || {
            let message = match work(&desk) {
                Ok(fields) => Message::ok(&desk.tag, fields),
                Err(error) => Message::err(&desk.tag, error),
            };
            // Who hears of the end may start the next at once.
            drop(place);
            desk.say(message);
        };
        std::thread::Builder::new().stack_size(STACK).spawn(run).map_err(|e| no_thread(&e.to_string()))?;
        Ok(Task { number, orders, flow })
    }

    /// The next thing that a thread said.
    pub(super) fn next(&self) -> Option<Report> {
        self.receiver.try_recv().ok()
    }
}
