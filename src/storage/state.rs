//! The state database on the data partition: what the node must remember across restarts and power cuts.
//!
//! SQLite in WAL mode, written by one thread. The supervisor submits changes and never waits: completions are
//! polled after `notify` was called from the thread. All changes that are queued when the thread wakes up go
//! into one transaction. After a power cut the database holds a prefix of the committed batches
//! (synchronous=NORMAL); a durable change is on the medium when it completes (FULL). What happens to sandboxes and
//! templates is durable always: after a power cut the node must still know what ran. Executions are not, unless asked.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode};

use super::audit::{self, AuditQuery, AuditRow};
use super::backup;
use super::events::{self, EventRow};
use super::history::{self, HistoryQuery, OpenRecord, Record, RecordQuery, RecordRow};
use super::owed::Owed;
use super::schema;
pub use super::schema::{AllocationRow, Change, DrainRow, ExecutionRow, SCHEMA_VERSION, SandboxRow, TemplateRow};
use super::snapshots::rows as snapshots;
pub use super::snapshots::rows::{LayerRow, SnapshotKind, SnapshotRow, SnapshotState};

/// Changes in one transaction at most: bounds how long a durable change waits for others.
const MAX_BATCH: usize = 1024;
/// Pause before removals that were refused are tried again, where nothing else is written meanwhile.
const OWED_AGAIN: Duration = Duration::from_secs(5);
/// How long to wait for a predecessor that still holds the file (it was told to end) before giving up.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Where it is kept that the node is being drained.
pub(super) const DRAIN: &str = "drain";
/// Damaged databases that are kept for a look.
const MAX_ASIDE: u32 = 1000;

/// Why the database could not be opened or a change was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateError {
    /// No room on the data partition.
    DiskFull(String),
    /// The medium or the file system failed.
    Io(String),
    /// The change contradicts what is there: a live name that is taken, an execution of no sandbox.
    Conflict(String),
    /// The file is damaged.
    Corrupt(String),
    /// Another process holds the file.
    Busy(String),
    /// A newer program wrote the file; it is left as it is.
    Newer {
        /// Schema version in the file.
        found: u64,
        /// The newest that this program knows.
        known: u64,
    },
    /// Anything else that SQLite says.
    Database(String),
    /// The database was closed.
    Closed,
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DiskFull(why) => write!(f, "no room for the state database: {why}"),
            Self::Io(why) => write!(f, "input or output of the state database failed: {why}"),
            Self::Conflict(why) => write!(f, "the state database has a conflicting row: {why}"),
            Self::Corrupt(why) => write!(f, "the state database is damaged: {why}"),
            Self::Busy(why) => write!(f, "another process holds the state database: {why}"),
            Self::Newer { found, known } => {
                write!(f, "the state database has schema version {found}, this program knows versions up to {known}")
            }
            Self::Database(why) => write!(f, "the state database refused: {why}"),
            Self::Closed => f.write_str("the state database is closed"),
        }
    }
}

impl std::error::Error for StateError {}

impl From<rusqlite::Error> for StateError {
    fn from(error: rusqlite::Error) -> Self {
        let why = error.to_string();
        match &error {
            rusqlite::Error::SqliteFailure(failure, _) => match failure.code {
                ErrorCode::DiskFull => Self::DiskFull(why),
                ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::ReadOnly => {
                    Self::Io(format!("{why} (SQLite code {})", failure.extended_code))
                }
                ErrorCode::ConstraintViolation => Self::Conflict(why),
                ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Self::Corrupt(why),
                ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Self::Busy(why),
                _ => Self::Database(why),
            },
            // A row that does not read as what was written there.
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::Utf8Error(..) => Self::Corrupt(why),
            _ => Self::Database(why),
        }
    }
}

/// Names one submitted change until its completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What the database held when it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// 32 hex digits, made once with the database.
    pub node_id: String,
    /// When the database was made, Unix time in milliseconds.
    pub created_ms: u64,
    /// Where a damaged predecessor was moved, when that happened at this start: the node then knows nothing of before.
    pub moved_aside: Option<PathBuf>,
    /// Oldest first.
    pub sandboxes: Vec<SandboxRow>,
    /// By name.
    pub templates: Vec<TemplateRow>,
    /// By sandbox and number.
    pub executions: Vec<ExecutionRow>,
    /// By sandbox.
    pub allocations: Vec<AllocationRow>,
    /// Oldest first.
    pub snapshots: Vec<SnapshotRow>,
    /// By id.
    pub layers: Vec<LayerRow>,
    /// Number of the next row of the audit log.
    pub next_audit: u64,
    /// Number of the next record of an execution.
    pub next_record: u64,
    /// Records of executions that had not ended.
    pub open_records: Vec<OpenRecord>,
    /// The newest events, oldest first.
    pub events: Vec<EventRow>,
    /// Where the node is being drained.
    pub drain: Option<DrainRow>,
}

/// What is read while the node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Query {
    /// Rows of the audit log.
    Audit(AuditQuery),
    /// Records of executions.
    History(HistoryQuery),
    /// One of them, with all that is kept.
    Record(RecordQuery),
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// Rows of the audit log, newest first.
    Audit(Vec<AuditRow>),
    /// Records of executions, newest first.
    History(Vec<RecordRow>),
    /// One of them, if it is there.
    Record(Option<Box<Record>>),
}

/// What the thread is asked for.
enum Order {
    Write(Job),
    Read(Ticket, Query),
    Copy(Ticket, PathBuf),
}

pub(super) struct Job {
    ticket: Ticket,
    pub(super) change: Change,
    durable: bool,
}

#[cfg(test)]
impl Job {
    /// For tests of those that handle jobs.
    pub(super) fn of(change: Change) -> Self {
        Self { ticket: Ticket(0), change, durable: false }
    }
}

/// Results by ticket.
type Results<T> = Vec<(Ticket, Result<T, StateError>)>;
type Completions = Arc<Mutex<Results<()>>>;
type Readings = Arc<Mutex<Results<Reading>>>;

/// The supervisor's handle. Dropping it writes what is queued and closes the database.
#[derive(Debug)]
pub struct State {
    jobs: Option<Sender<Order>>,
    completions: Completions,
    readings: Readings,
    thread: Option<JoinHandle<()>>,
    next_ticket: u64,
    pending: usize,
    /// What was refused at the end: how many rows, and why the first.
    refused: (usize, Option<StateError>),
}

impl State {
    /// Opens or makes the database at `path` and reads it whole. Blocks; for the start, before the loop.
    /// `notify` is called from the database's thread when `completed` has something new.
    ///
    /// A database that was put beside it by a restore takes its place. A damaged database is moved aside to `PATH.corrupt-N` and a new one begun.
    pub fn open(path: &Path, notify: impl Fn() + Send + 'static) -> Result<(Self, Snapshot), StateError> {
        if backup::take_in(path)? {
            log::warn!("state database {} is the one that was restored", path.display());
        }
        let (connection, snapshot) = match open_file(path) {
            Err(StateError::Corrupt(why)) => {
                let aside = move_aside(path)?;
                log::error!("state database {} is damaged ({why}): moved to {}", path.display(), aside.display());
                log::error!("a new state database is begun: nothing is known of sandboxes made before");
                let (connection, mut snapshot) = open_file(path)?;
                snapshot.moved_aside = Some(aside);
                (connection, snapshot)
            }
            other => other?,
        };
        let (jobs, queue) = mpsc::channel();
        let completions = Completions::default();
        let readings = Readings::default();
        let (written, read) = (Arc::clone(&completions), Arc::clone(&readings));
        let thread = std::thread::Builder::new()
            .name("state".to_string())
            .spawn(move || run(connection, &queue, &written, &read, &notify))
            .map_err(|error| StateError::Io(format!("no thread: {error}")))?;
        Ok((
            Self {
                jobs: Some(jobs),
                completions,
                readings,
                thread: Some(thread),
                next_ticket: 1,
                pending: 0,
                refused: (0, None),
            },
            snapshot,
        ))
    }

    /// Queues a change. Changes are made in the order they were submitted.
    pub fn submit(&mut self, change: Change) -> Ticket {
        let durable = !matches!(
            change,
            Change::PutExecution(_)
                | Change::RemoveExecution { .. }
                // What a power cut leaves of a sandbox is its directory, which is found without them.
                | Change::PutAllocation(_)
                | Change::RemoveAllocation { .. }
                | Change::BeginAudit(_)
                | Change::EndAudit(_)
                | Change::History(_)
                | Change::Event(_)
        );
        self.queue(change, durable)
    }

    /// Queues a change that must be on the medium when it completes.
    pub fn submit_durable(&mut self, change: Change) -> Ticket {
        self.queue(change, true)
    }

    /// Queues a reading, after all that was submitted before; `readings` has it later.
    pub fn read(&mut self, query: Query) -> Ticket {
        let ticket = self.ticket();
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send(Order::Read(ticket, query)).is_err()) {
            let mut readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
            readings.push((ticket, Err(StateError::Closed)));
        }
        ticket
    }

    /// Queues a copy of the whole database as it is after all that was submitted before, into a new file; `completed` has
    /// its result. What is submitted after it waits for it.
    pub fn copy(&mut self, to: PathBuf) -> Ticket {
        let ticket = self.ticket();
        self.pending += 1;
        self.send(ticket, Order::Copy(ticket, to));
        ticket
    }

    /// Takes the readings that are there. Never waits.
    pub fn readings(&mut self) -> Results<Reading> {
        std::mem::take(&mut *self.readings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the results that are there, in order of submission. Never waits.
    pub fn completed(&mut self) -> Results<()> {
        let done = std::mem::take(&mut *self.completions.lock().unwrap_or_else(PoisonError::into_inner));
        self.pending -= done.len().min(self.pending);
        if self.is_ending() {
            let errors: Vec<&StateError> = done.iter().filter_map(|(_, result)| result.as_ref().err()).collect();
            self.refused.0 += errors.len();
            self.refused.1 = self.refused.1.take().or_else(|| errors.first().map(|&error| error.clone()));
        }
        done
    }

    /// Changes submitted whose results were not taken yet: what a caller bounds.
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Whether `end` was called.
    pub fn is_ending(&self) -> bool {
        self.jobs.is_none()
    }

    /// Rows whose refusal was taken from `completed` since `end`, and why the first was refused: nobody puts them again.
    pub fn refused(&self) -> (usize, Option<&StateError>) {
        (self.refused.0, self.refused.1.as_ref())
    }

    /// Takes nothing more, and closes the database once what is queued is written. Never waits: whether that is so.
    /// `completed` has the last results then.
    pub fn end(&mut self) -> bool {
        self.jobs = None;
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Writes what is queued, closes the database and gives the results that were not taken yet. Blocks.
    pub fn close(mut self) -> Results<()> {
        self.join();
        self.completed()
    }

    fn queue(&mut self, change: Change, durable: bool) -> Ticket {
        let ticket = self.ticket();
        self.pending += 1;
        self.send(ticket, Order::Write(Job { ticket, change, durable }));
        ticket
    }

    fn send(&self, ticket: Ticket, order: Order) {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(order).is_ok());
        if !sent {
            let mut completions = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
            completions.push((ticket, Err(StateError::Closed)));
        }
    }

    fn ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }

    fn join(&mut self) {
        self.jobs = None; // the thread ends when the queue is empty
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.join();
    }
}

/// The thread: one batch a wake-up, then one notification.
fn run(
    mut connection: Connection,
    queue: &Receiver<Order>,
    completions: &Completions,
    readings: &Readings,
    notify: &impl Fn(),
) {
    let mut owed = Owed::default();
    loop {
        let (mut batch, mut next) = match next_order(queue, &owed) {
            Ok(first) => (Vec::new(), Some(first)),
            Err(RecvTimeoutError::Timeout) => (Vec::new(), None),
            Err(RecvTimeoutError::Disconnected) => break,
        };
        let aside = loop {
            match next {
                Some(Order::Write(job)) => batch.push(job),
                other => break other,
            }
            next = if batch.len() < MAX_BATCH { queue.try_recv().ok() } else { None };
        };
        owed.settle(&batch, |jobs| write_transaction(&mut connection, jobs).map(drop));
        let results = write_batch(&mut connection, &batch);
        owed.keep(batch, results.iter().map(|(_, result)| result));
        completions.lock().unwrap_or_else(PoisonError::into_inner).extend(results);
        match aside {
            Some(Order::Read(ticket, query)) => {
                let rows = match query {
                    Query::Audit(query) => audit::read(&connection, &query).map(Reading::Audit),
                    Query::History(query) => history::list(&connection, &query).map(Reading::History),
                    Query::Record(query) => history::record(&connection, &query).map(Reading::Record),
                };
                readings.lock().unwrap_or_else(PoisonError::into_inner).push((ticket, rows));
            }
            Some(Order::Copy(ticket, to)) => {
                let made = backup::make(&connection, &to);
                completions.lock().unwrap_or_else(PoisonError::into_inner).push((ticket, made));
            }
            Some(Order::Write(_)) | None => {}
        }
        notify();
    }
    owed.settle(&[], |jobs| write_transaction(&mut connection, jobs).map(drop));
    // So that the next start finds one file and no log to replay. A failure costs nothing: the log is kept.
    if let Err(error) = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
        log::warn!("state database: last checkpoint failed: {error}");
    }
}

/// Waits for what the thread is asked for next; not for ever where removals are owed.
fn next_order(queue: &Receiver<Order>, owed: &Owed) -> Result<Order, RecvTimeoutError> {
    if owed.is_empty() {
        return queue.recv().map_err(|_| RecvTimeoutError::Disconnected);
    }
    queue.recv_timeout(OWED_AGAIN)
}

/// Makes all changes in one transaction. Where that fails as a whole (no room, I/O), each is tried by itself, so
/// that every change has its own true result and a small one is not lost for a big one's sake.
fn write_batch(connection: &mut Connection, batch: &[Job]) -> Vec<(Ticket, Result<(), StateError>)> {
    if batch.is_empty() {
        return Vec::new();
    }
    match write_transaction(connection, batch) {
        Ok(results) => batch.iter().map(|job| job.ticket).zip(results).collect(),
        Err(error) if batch.len() == 1 => vec![(batch[0].ticket, Err(error))],
        Err(error) => {
            log::warn!("state database: {} changes together failed, trying each: {error}", batch.len());
            batch.iter().flat_map(|job| write_batch(connection, std::slice::from_ref(job))).collect()
        }
    }
}

/// One transaction. The outer error means that nothing of it was written.
fn write_transaction(connection: &mut Connection, batch: &[Job]) -> Result<Vec<Result<(), StateError>>, StateError> {
    // Cannot be changed inside a transaction.
    let durable = batch.iter().any(|job| job.durable);
    connection.pragma_update(None, "synchronous", if durable { "FULL" } else { "NORMAL" })?;
    let mut transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let mut results = Vec::with_capacity(batch.len());
    for job in batch {
        let savepoint = transaction.savepoint()?;
        match schema::apply(&savepoint, &job.change) {
            Ok(()) => {
                savepoint.commit()?;
                results.push(Ok(()));
            }
            // Of this change alone: the savepoint is rolled back when it is dropped.
            Err(error @ StateError::Conflict(_)) => results.push(Err(error)),
            Err(error) => return Err(error),
        }
    }
    transaction.commit()?;
    Ok(results)
}

pub(super) fn open_file(path: &Path) -> Result<(Connection, Snapshot), StateError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| StateError::Io(format!("{}: {e}", folder.display())))?;
    }
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // One process at a time; and the log's index is then plain memory, which no failing disk can turn into a SIGBUS.
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "journal_size_limit", 4 * 1024 * 1024)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // The file may have been edited: what it says must not run code or reach beyond itself.
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)?;
    let verdict: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(StateError::Corrupt(verdict));
    }
    schema::migrate(&mut connection)?;
    if schema::meta(&connection, "node_id")?.is_none() {
        let transaction = connection.transaction()?;
        schema::set_meta(&transaction, "node_id", &random_id()?)?;
        schema::set_meta(&transaction, "created_ms", &now_ms().to_string())?;
        transaction.commit()?;
    }
    let snapshot = Snapshot {
        node_id: schema::meta(&connection, "node_id")?.unwrap_or_default(),
        created_ms: schema::meta_number(&connection, "created_ms")?,
        moved_aside: None,
        sandboxes: schema::sandboxes(&connection)?,
        templates: schema::templates(&connection)?,
        executions: schema::executions(&connection)?,
        allocations: schema::allocations(&connection)?,
        snapshots: snapshots::snapshots(&connection)?,
        layers: snapshots::layers(&connection)?,
        next_audit: audit::take_up(&connection)?,
        next_record: history::next(&connection)?,
        open_records: history::open(&connection)?,
        events: events::newest(&connection)?,
        drain: schema::meta(&connection, DRAIN)?.map(|text| DrainRow::parse(&text)),
    };
    Ok((connection, snapshot))
}

/// Renames the database and its log to the first free `PATH.corrupt-N`.
fn move_aside(path: &Path) -> Result<PathBuf, StateError> {
    let with = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let failed = |error: std::io::Error| StateError::Io(format!("cannot move {} aside: {error}", path.display()));
    let aside = (1..=MAX_ASIDE)
        .map(|n| format!(".corrupt-{n}"))
        .find(|suffix| !with(suffix).exists())
        .ok_or_else(|| StateError::Io(format!("{} has {MAX_ASIDE} damaged predecessors", path.display())))?;
    // The log first: a new database must never meet an old log, whenever the power fails.
    for log in ["-wal", "-shm"] {
        match std::fs::rename(with(log), with(&format!("{aside}{log}"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    std::fs::rename(path, with(&aside)).map_err(failed)?;
    if let Some(folder) = path.parent() {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    }
    Ok(with(&aside))
}

/// 128 random bits as hex. Waits until the kernel's generator is seeded: two nodes must not share an id.
fn random_id() -> Result<String, StateError> {
    let mut octets = [0u8; 16];
    // SAFETY: the pointer and length are of a live, writable array.
    let got = unsafe { libc::getrandom(octets.as_mut_ptr().cast(), octets.len(), 0) };
    if usize::try_from(got) != Ok(octets.len()) {
        return Err(StateError::Io(format!("getrandom: {}", std::io::Error::last_os_error())));
    }
    Ok(octets.iter().map(|octet| format!("{octet:02x}")).collect())
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
