//! Work that may block, off the supervisor's loop: each piece on a plain thread, its result by message.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use mio::Waker;

/// Runs pieces of work and hands their results back to the loop.
#[derive(Debug)]
pub struct Background<D> {
    waker: Arc<Waker>,
    done: Sender<D>,
    results: Receiver<D>,
}

/// Stack of a background thread: enough for directory walks and hashing.
const STACK: usize = 256 * 1024;

impl<D: Send + 'static> Background<D> {
    /// `waker` wakes the loop when a result is there.
    pub fn new(waker: Arc<Waker>) -> Self {
        let (done, results) = channel();
        Self { waker, done, results }
    }

    /// Starts a piece of work. Fails when the node can start no thread.
    pub fn run(&self, name: &str, work: impl FnOnce() -> D + Send + 'static) -> io::Result<()> {
        let (done, waker) = (self.done.clone(), Arc::clone(&self.waker));
        std::thread::Builder::new().name(name.to_string()).stack_size(STACK).spawn(move || {
            // The loop outlives its threads; when it is gone nobody needs the result.
            let _ = done.send(work());
            let _ = waker.wake();
        })?;
        Ok(())
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
