//! The worker's side of its jail: what only the program itself can give up, before it reads its first request.
//!
//! The spawner (`sandbox::spawn`) has taken user id, capabilities, namespaces and limits away before this program ran.
//! `close` sees that this is so, hides the process from others of its user, and shuts the kernel's file system, network
//! and signal interfaces by Landlock where the kernel has it. Last it puts a list of system calls in force; each thread has
//! one of its own on top of it. docs/security.md has the whole.

mod filter;
mod landlock;
pub mod lists;
mod threads;

pub use filter::Breach;
pub use threads::{all_entered, enter, spawn};

use std::fmt;
use std::io;

use super::last_words::{self, RECORD_FD};

/// Why the jail cannot be closed. A worker whose jail is open does not run.
#[derive(Debug)]
pub enum JailError {
    /// The spawner did not do its part.
    Open(&'static str),
    /// The kernel refused a step.
    Refused(&'static str, io::Error),
}

impl fmt::Display for JailError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(what) => write!(f, "the jail is open: {what}; a worker is started by `warren supervise` only"),
            Self::Refused(step, cause) => write!(f, "the jail cannot be closed: {step}: {cause}"),
        }
    }
}

impl std::error::Error for JailError {}

/// Closes the jail of this process. To be called once, with no other thread there yet.
pub fn close(breach: Breach) -> Result<(), JailError> {
    confine()?;
    // One heap for all threads: they allocate little, and a heap for each would need mprotect to grow.
    // SAFETY: takes plain numbers, and no other thread is there.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    if breach == Breach::Explain {
        last_words::explain_refusals();
    }
    threads::close(breach).map_err(|e| JailError::Refused("system calls", e))
}

/// All of it but for the list of system calls.
pub fn confine() -> Result<(), JailError> {
    check_confinement()?;
    // SAFETY: these take plain numbers. Nothing that the program has open is above the record.
    unsafe {
        refused("dumpable", libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0).into())?;
        refused("descriptors", libc::syscall(libc::SYS_close_range, RECORD_FD + 1, libc::c_uint::MAX, 0))?;
    }
    landlock::shut().map_err(|e| JailError::Refused("Landlock", e))?;
    Ok(())
}

/// Length of the largest file where no disk is larger: the log of its console and its own.
const LEAST_FILE_BYTES: u64 = 4 << 20;

/// No file that this process writes gets longer than `bytes`, or than its logs may be. The limit only ever goes down; tests
/// of the worker run without a jail, and without this.
pub fn limit_files(bytes: u64) -> Result<(), JailError> {
    if !threads::is_closed() {
        return Ok(());
    }
    let bytes = bytes.max(LEAST_FILE_BYTES);
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    let nothing = std::ptr::null_mut::<libc::rlimit>();
    // SAFETY: a live limit that is read; the former one is not asked for.
    let done = unsafe { libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_FSIZE, &raw const limit, nothing) };
    refused("length of files", done).map(drop)
}

/// What the spawner has to have done, as far as it would be dangerous if it had not.
fn check_confinement() -> Result<(), JailError> {
    // SAFETY: these take nothing and cannot fail.
    let ids = unsafe { [libc::getuid(), libc::geteuid(), libc::getgid(), libc::getegid()] };
    if ids.contains(&0) {
        return Err(JailError::Open("it runs as root"));
    }
    // SAFETY: takes plain numbers.
    if unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) } != 1 {
        return Err(JailError::Open("it may gain privileges"));
    }
    // SAFETY: takes plain numbers; 1 where the bounding set has CAP_SYS_ADMIN.
    if unsafe { libc::prctl(libc::PR_CAPBSET_READ, 21, 0, 0, 0) } != 0 {
        return Err(JailError::Open("it may gain capabilities"));
    }
    Ok(())
}

fn refused(step: &'static str, result: i64) -> Result<i64, JailError> {
    if result < 0 { Err(JailError::Refused(step, io::Error::last_os_error())) } else { Ok(result) }
}
