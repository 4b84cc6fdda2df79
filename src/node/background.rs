//! Work that may block, off the supervisor's loop: each piece on a plain thread, its result by message.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use mio::Waker;

/// Runs pieces of work and hands their results back to the loop.
#[derive(Debug)]
pub struct Background<D> {
    waker: Arc<Waker>,
    done: Sender<D>,
    results: Receiver<D>,
    /// Names of the pieces that were started and have not ended.
    under_way: Arc<Mutex<Vec<&'static str>>>,
}

/// Stack of a background thread: enough for directory walks and hashing.
const STACK: usize = 256 * 1024;

impl<D: Send + 'static> Background<D> {
    /// `waker` wakes the loop when a result is there.
    pub fn new(waker: Arc<Waker>) -> Self {
        let (done, results) = channel();
        Self { waker, done, results, under_way: Arc::default() }
    }

    /// Starts a piece of work. Fails when the node can start no thread.
    pub fn run(&self, name: &'static str, work: impl FnOnce() -> D + Send + 'static) -> io::Result<()> {
        let (done, waker) = (self.done.clone(), Arc::clone(&self.waker));
        let under_way = Arc::clone(&self.under_way);
        under_way.lock().unwrap_or_else(PoisonError::into_inner).push(name);
        let ended = move || {
            let mut names = under_way.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = names.iter().position(|other| *other == name) {
                names.swap_remove(at);
            }
        };
        let not_started = ended.clone();
        let started = std::thread::Builder::new().name(name.to_string()).stack_size(STACK).spawn(move || {
            // When the loop is gone nobody needs the result.
            let _ = done.send(work());
            ended();
            let _ = waker.wake();
        });
        if started.is_err() {
            not_started();
        }
        started.map(|_| ())
    }

    /// Names of the pieces that have not ended.
    pub fn under_way(&self) -> Vec<&'static str> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A way for a thread that stays to hand results to the loop.
    pub fn reporter(&self) -> impl Fn(D) + Send + 'static + use<D> {
        let (done, waker) = (self.done.clone(), Arc::clone(&self.waker));
        move |result| {
            let _ = done.send(result);
            let _ = waker.wake();
        }
    }

    /// The next result.
    pub fn finished(&self) -> Option<D> {
        self.results.try_recv().ok()
    }
}
