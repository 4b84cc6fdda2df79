//! What may block for long (fsync, deep removals) is done on short-lived threads that report by message.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use mio::{Poll, Token, Waker};

use crate::wire::{Error, Fields};

/// Deep enough for the file operations, which do not recurse.
const STACK: usize = 128 * 1024;

/// A request's end, as a thread reports it.
#[derive(Debug)]
pub(super) struct Report {
    pub link: u64,
    pub tag: String,
    pub result: Result<Fields, Error>,
}

/// Starts threads and collects their reports.
#[derive(Debug)]
pub(super) struct Tasks {
    sender: Sender<Report>,
    receiver: Receiver<Report>,
    /// Made for the first task: a boot needs none.
    waker: Option<Arc<Waker>>,
    /// A report is there that no event tells of.
    pub at_hand: bool,
}

impl Tasks {
    pub(super) fn new() -> Self {
        let (sender, receiver) = channel();
        Self { sender, receiver, waker: None, at_hand: false }
    }

    /// Runs `work` on a thread; its report comes out of `next` after an event of `token`.
    pub(super) fn run(
        &mut self,
        poll: &Poll,
        token: Token,
        link: u64,
        tag: &str,
        work: impl FnOnce() -> Result<Fields, Error> + Send + 'static,
    ) {
        let waker = match &self.waker {
            Some(waker) => Some(waker.clone()),
            None => Waker::new(poll.registry(), token).ok().map(Arc::new),
        };
        self.waker.clone_from(&waker);
        // Behind a lock so that, when no thread is to be had, the work is still here.
        let work = Arc::new(Mutex::new(Some(work)));
        let sender = self.sender.clone();
        let tag = tag.to_string();
        let run = {
            let (work, tag, waker) = (work.clone(), tag.clone(), waker.clone());
            move || {
                let taken = work.lock().ok().and_then(|mut work| work.take());
                if let Some(taken) = taken {
                    let _ = sender.send(Report { link, tag, result: taken() });
                }
                if let Some(waker) = waker {
                    let _ = waker.wake();
                }
            }
        };
        let started = waker.is_some() && std::thread::Builder::new().stack_size(STACK).spawn(run).is_ok();
        if !started {
            let taken = work.lock().ok().and_then(|mut work| work.take());
            if let Some(taken) = taken {
                let _ = self.sender.send(Report { link, tag, result: taken() });
                self.at_hand = true;
            }
        }
    }

    /// The next report that is there.
    pub(super) fn next(&self) -> Option<Report> {
        self.receiver.try_recv().ok()
    }
}
