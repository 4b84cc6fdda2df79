//! Threads of a jailed worker: each closes its own list before it does anything, and no guest runs before all have.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use super::filter::{self, Breach};
use super::lists::Kind;

/// Set when this process' jail was closed; tests of the devices run without one.
static CLOSED: OnceLock<Breach> = OnceLock::new();

/// Threads whose lists are not in force yet.
static OPEN: Mutex<usize> = Mutex::new(0);
static NONE_OPEN: Condvar = Condvar::new();

fn open() -> MutexGuard<'static, usize> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts the first list in force; from here on every thread gets its own.
pub(super) fn close(breach: Breach) -> io::Result<()> {
    filter::apply(Kind::Start, breach)?;
    CLOSED.get_or_init(|| breach);
    Ok(())
}

/// Whether this process' jail was closed.
pub(super) fn is_closed() -> bool {
    CLOSED.get().is_some()
}

/// Puts a list in force on the calling thread.
pub fn enter(kind: Kind) -> io::Result<()> {
    match CLOSED.get() {
        Some(breach) => filter::apply(kind, *breach),
        None => Ok(()),
    }
}

/// Starts a thread under a list of its own. `stack` is in octets.
pub fn spawn<F, T>(kind: Kind, name: String, stack: usize, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    *open() += 1;
    let entered = || {
        *open() -= 1;
        NONE_OPEN.notify_all();
    };
    let started = std::thread::Builder::new().name(name).stack_size(stack).spawn(move || {
        if let Err(e) = enter(kind) {
            // Its record is left by the panic hook, and the process ends.
            panic!("the list of a {kind:?} thread cannot be put in force: {e}");
        }
        entered();
        body()
    });
    if started.is_err() {
        entered();
    }
    started
}

/// Waits until every thread that was started is under its list.
pub fn all_entered() {
    let waited = NONE_OPEN.wait_while(open(), |count| *count > 0);
    drop(waited.unwrap_or_else(PoisonError::into_inner));
}
