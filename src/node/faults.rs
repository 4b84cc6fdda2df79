//! Points at which a test has the node fail. Without the environment variable `WARREN_FAULTS`, which only who starts the
//! supervisor can set, nothing of this does anything.
//!
//! The variable names a file. A point that is reached reads its first line; where the first word of it is that point, the line
//! goes, and the file with its last, so that the next supervisor goes on. The words after it happen in their order: a number
//! is a process that is killed, `die` kills the supervisor, `term` has it hand over to the next one, `full` has the step fail as on a full disk,
//! `wait` has it go no further: the power is about to go; `late` has what begins there be out of time at once.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use crate::storage::snapshots::files::FaultPoint;

/// Names the file.
pub const VARIABLE: &str = "WARREN_FAULTS";

/// A point between two steps of the node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// One of files and layers.
    Storage(FaultPoint),
    /// The snapshot that a fork is made from is there.
    ForkBegun,
    /// The row of a sandbox that is put back says so.
    RollbackWritten,
    /// The worker of before a rollback is gone.
    RollbackEnded,
    /// The agent of a guest that was put back is there.
    AgentReturned,
    /// The row says that a guest that was put back runs.
    ReturnWritten,
    /// A guest that goes on from a snapshot knows who it is.
    Introduced,
    /// The row of a sandbox says that it is being paused.
    PauseWritten,
    /// A pause's files are written, and not synced.
    PauseCaptured,
    /// They are on the medium and count.
    PauseCommitted,
    /// The worker of a paused sandbox is gone.
    PauseEnded,
    /// The memory that a sandbox is paused as, a difference, is about to be made whole.
    SettleBegun,
    /// The whole memory is on the medium.
    SettleCopied,
    /// It is what the sandbox is paused as.
    SettleRenamed,
    /// The agent of a resumed guest is there.
    AgentResumed,
    /// What it was paused as is out of the way.
    Unpaused,
    /// Rows that nobody needed are gone.
    Collected,
    /// The file of a merged layer is there, and empty.
    MergeBegun,
    /// The merged layer is on the medium; no row has it.
    MergeSynced,
    /// Rows have the merged layer, and the files of those that it stands for are still there.
    MergeWritten,
    /// The memory of a snapshot, a difference to another's, is about to be made whole.
    FlattenBegun,
    /// Its row says that it is whole.
    FlattenWritten,
    /// The files of a snapshot that was sent are there, not synced.
    ImportReceived,
    /// They are on the medium; no row has them.
    ImportSynced,
    /// Rows have them, and the client was not told.
    ImportWritten,
    /// The image that a build came to is on the medium, and has no name.
    TemplateFlattened,
    /// It has its name; no row has it.
    TemplatePublished,
}

impl Point {
    /// Those of templates that are built.
    pub const OF_TEMPLATES: [Self; 2] = [Self::TemplateFlattened, Self::TemplatePublished];

    /// Those of sandboxes and snapshots that are not of files and layers.
    pub const OF_NODE: [Self; 24] = [
        Self::ForkBegun,
        Self::RollbackWritten,
        Self::RollbackEnded,
        Self::AgentReturned,
        Self::ReturnWritten,
        Self::Introduced,
        Self::PauseWritten,
        Self::PauseCaptured,
        Self::PauseCommitted,
        Self::PauseEnded,
        Self::SettleBegun,
        Self::SettleCopied,
        Self::SettleRenamed,
        Self::AgentResumed,
        Self::Unpaused,
        Self::Collected,
        Self::MergeBegun,
        Self::MergeSynced,
        Self::MergeWritten,
        Self::FlattenBegun,
        Self::FlattenWritten,
        Self::ImportReceived,
        Self::ImportSynced,
        Self::ImportWritten,
    ];

    /// All of sandboxes and snapshots.
    pub fn all() -> impl Iterator<Item = Self> {
        FaultPoint::ALL.into_iter().map(Self::Storage).chain(Self::OF_NODE)
    }

    /// The word that means it.
    pub fn name(self) -> String {
        match self {
            Self::Storage(point) => format!("{point:?}"),
            other => format!("{other:?}"),
        }
    }
}

/// A point of files and layers is reached; the error is for the step.
pub(super) fn storage(point: FaultPoint) -> io::Result<()> {
    reached(Point::Storage(point))
}

/// A point is reached at which nothing can fail.
pub(super) fn pass(point: Point) {
    // An error is the test's mistake.
    let _ = reached(point);
}

/// A point is reached; the error is for the step.
pub(super) fn reached(point: Point) -> io::Result<()> {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let Some(file) = FILE.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)) else { return Ok(()) };
    let Ok(text) = fs::read_to_string(file) else { return Ok(()) };
    let (line, rest) = text.split_once('\n').unwrap_or((&text, ""));
    let mut words = line.split_whitespace();
    if words.next() != Some(point.name().as_str()) {
        return Ok(());
    }
    match rest.is_empty() {
        true => fs::remove_file(file)?,
        false => fs::write(file, rest)?,
    }
    log::warn!("a test has the node fail: {line}");
    for word in words {
        match word {
            "full" => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            "late" => return Err(io::ErrorKind::TimedOut.into()),
            "die" => loop {
                let _ = kill(getpid(), Signal::SIGKILL);
                thread::sleep(Duration::from_secs(1));
            },
            "wait" => loop {
                thread::sleep(Duration::from_secs(1));
            },
            "term" => kill(getpid(), Signal::SIGTERM)?,
            pid => {
                let pid = pid.parse().map_err(io::Error::other)?;
                kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            }
        }
    }
    Ok(())
}
