//! Tables of the state database: their migrations, their rows, and the one change of a row at a time.

use std::collections::BTreeMap;

use rusqlite::types::Type;
use rusqlite::{Connection, Row, params};

use super::audit::{self, AuditEnd, AuditRow};
use super::events::{self, EventRow};
use super::history::{self, Note};
use super::snapshots::rows::{self as snapshots, LayerRow, SnapshotRow};
use super::state::StateError;

/// Version that this program writes: the number of migrations.
pub const SCHEMA_VERSION: u64 = MIGRATIONS.len() as u64;

/// Migration n leads from version n to n + 1. Never edit one that was released; add another.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE meta (
        key   TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE sandboxes (
        id              TEXT PRIMARY KEY,
        name            TEXT,
        template        TEXT NOT NULL,
        template_sha256 TEXT NOT NULL,
        state           TEXT NOT NULL,
        reason          TEXT NOT NULL,
        vcpus           INTEGER NOT NULL,
        memory_mib      INTEGER NOT NULL,
        disk_mib        INTEGER NOT NULL,
        env             TEXT NOT NULL,      -- JSON array of strings
        labels          TEXT NOT NULL,      -- JSON object of strings
        created_ms      INTEGER NOT NULL,
        started_ms      INTEGER,
        ended_ms        INTEGER,
        pid             INTEGER
    ) STRICT;
    CREATE UNIQUE INDEX sandboxes_live_name ON sandboxes (name) WHERE ended_ms IS NULL;
    CREATE TABLE templates (
        name        TEXT PRIMARY KEY,
        sha256      TEXT NOT NULL,
        size_bytes  INTEGER NOT NULL,
        description TEXT NOT NULL,
        imported_ms INTEGER NOT NULL,
        path        TEXT NOT NULL
    ) STRICT;
    CREATE TABLE executions (
        sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
        exec_id    INTEGER NOT NULL,
        argv       TEXT NOT NULL,           -- JSON array of strings
        state      TEXT NOT NULL,
        started_ms INTEGER NOT NULL,
        ended_ms   INTEGER,
        exit       INTEGER,
        signal     INTEGER,
        timeout    INTEGER NOT NULL,
        cpu_ms     INTEGER,
        peak_kib   INTEGER,
        PRIMARY KEY (sandbox_id, exec_id)
    ) STRICT, WITHOUT ROWID;
",
    "
    ALTER TABLE sandboxes ADD COLUMN disks TEXT NOT NULL DEFAULT '[]';  -- JSON array of strings
    ALTER TABLE sandboxes ADD COLUMN disk_iops INTEGER;
    ALTER TABLE sandboxes ADD COLUMN disk_mbps INTEGER;
",
    "
    ALTER TABLE sandboxes ADD COLUMN network TEXT;                          -- on, off; NULL without a device
    ALTER TABLE sandboxes ADD COLUMN net_allow TEXT NOT NULL DEFAULT '[]';  -- JSON array of strings
    ALTER TABLE sandboxes ADD COLUMN net_deny TEXT NOT NULL DEFAULT '[]';   -- JSON array of strings
    ALTER TABLE sandboxes ADD COLUMN net_mbps INTEGER;
    ALTER TABLE sandboxes ADD COLUMN net_address TEXT;                      -- while it has a slot
",
    "
    ALTER TABLE sandboxes ADD COLUMN owner TEXT NOT NULL DEFAULT 'root';
    DROP INDEX sandboxes_live_name;
    CREATE UNIQUE INDEX sandboxes_live_name ON sandboxes (owner, name) WHERE ended_ms IS NULL;
",
    audit::MIGRATION,
    "
    ALTER TABLE sandboxes ADD COLUMN cpu_quota INTEGER;                     -- hundredths of a processor
",
    "
    ALTER TABLE sandboxes ADD COLUMN restart TEXT NOT NULL DEFAULT 'never';
    ALTER TABLE sandboxes ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sandboxes ADD COLUMN restarts_in_row INTEGER NOT NULL DEFAULT 0;
",
    "
    CREATE TABLE allocations (              -- what sandboxes hold; a row may outlive its sandbox's
        sandbox_id TEXT PRIMARY KEY,
        held       TEXT NOT NULL            -- words, as the ledger writes them
    ) STRICT, WITHOUT ROWID;
",
    snapshots::MIGRATION,
    "
    ALTER TABLE executions ADD COLUMN language TEXT;                        -- of a code run; NULL for a program
    ALTER TABLE executions ADD COLUMN context INTEGER;                      -- that it ran in
",
    "
    ALTER TABLE sandboxes ADD COLUMN time_limits TEXT NOT NULL DEFAULT '';  -- words, as requests write them
    ALTER TABLE sandboxes ADD COLUMN ttl_until_ms INTEGER;
",
    history::MIGRATION,
    events::MIGRATION,
    "
    ALTER TABLE sandboxes ADD COLUMN trace TEXT NOT NULL DEFAULT '';        -- spans, as `sandbox::trace` writes them
",
    history::TRACE_MIGRATION,
    "
    ALTER TABLE sandboxes ADD COLUMN read_only INTEGER NOT NULL DEFAULT 0;
",
    events::TEMPLATES,
];

/// Rows that a table may bring at start: more than a node can ever have made is not read.
const MAX_ROWS: u64 = 1_000_000;

/// One sandbox. Times are Unix time in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxRow {
    /// Primary key.
    pub id: String,
    /// Whose it is.
    pub owner: String,
    /// Unique among its owner's sandboxes that have not ended.
    pub name: Option<String>,
    /// Name of its template.
    pub template: String,
    /// Hash of the template's image when the sandbox was made, in hex.
    pub template_sha256: String,
    /// Lifecycle state, as the lifecycle table names it.
    pub state: String,
    /// Why it is in that state; empty where there is nothing to say.
    pub reason: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Time of processors, in hundredths of one.
    pub cpu_quota: Option<u64>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk in MiB.
    pub disk_mib: u64,
    /// Further disks, as requests write them.
    pub disks: Vec<String>,
    /// Limit of requests to disks for each second.
    pub disk_iops: Option<u64>,
    /// Limit of octets to and from disks, in 10^6 for each second.
    pub disk_mbps: Option<u64>,
    /// `on` or `off`; `None` without a network device.
    pub network: Option<String>,
    /// Ranges that it may reach expressly.
    pub net_allow: Vec<String>,
    /// Ranges that it may not reach.
    pub net_deny: Vec<String>,
    /// Limit of octets each way, in 10^6 for each second.
    pub net_mbps: Option<u64>,
    /// Whether it is started again when it fails, as requests write it.
    pub restart: String,
    /// How often it was.
    pub restarts: u32,
    /// How often since it ran well.
    pub restarts_in_row: u32,
    /// How long it may be there, as `sandbox::time_limits` writes it.
    pub time_limits: String,
    /// When its time to live is over, where it has one.
    pub ttl_until_ms: Option<u64>,
    /// The guest's address, while it has a network slot.
    pub net_address: Option<String>,
    /// `KEY=value` each.
    pub env: Vec<String>,
    /// Metadata.
    pub labels: BTreeMap<String, String>,
    /// When it was asked for.
    pub created_ms: u64,
    /// When its agent was ready.
    pub started_ms: Option<u64>,
    /// When it ended. From then on its name is free.
    pub ended_ms: Option<u64>,
    /// Its worker's process id; a hint only, for people.
    pub pid: Option<u32>,
    /// The newest frozen layer under its own overlay; `None` over the base.
    pub layer: Option<String>,
    /// The snapshot that it is paused in, or whose memory file its worker maps.
    pub snapshot: Option<String>,
    /// Name of its own overlay in its directory; `None` for `overlay`.
    pub overlay: Option<String>,
    /// Its programs write below `/workspace` and `/tmp` only.
    pub read_only: bool,
    /// What its create took, as `sandbox::trace` writes it.
    pub trace: String,
}

/// One imported template.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TemplateRow {
    /// Primary key.
    pub name: String,
    /// Of its image, in hex.
    pub sha256: String,
    /// Of its image.
    pub size_bytes: u64,
    /// One line for people.
    pub description: String,
    /// When it was imported, Unix time in milliseconds.
    pub imported_ms: u64,
    /// Folder of image and manifest.
    pub path: String,
}

/// One exec in a sandbox. Lives as long as its sandbox's row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecutionRow {
    /// Whose; the sandbox's row must be there.
    pub sandbox_id: String,
    /// Number within the sandbox.
    pub exec_id: u64,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// `running`, `exited` …, as the supervisor names it.
    pub state: String,
    /// Unix time in milliseconds.
    pub started_ms: u64,
    /// Unix time in milliseconds.
    pub ended_ms: Option<u64>,
    /// Exit code.
    pub exit: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Whether its time limit ended it.
    pub timeout: bool,
    /// CPU time used.
    pub cpu_ms: Option<u64>,
    /// Peak memory in KiB.
    pub peak_kib: Option<u64>,
    /// Of a code run.
    pub language: Option<String>,
    /// The context that a code run ran in.
    pub context: Option<u64>,
}

/// What one sandbox holds on the node. Written before its sandbox's row, and forgotten after it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AllocationRow {
    /// Whose.
    pub sandbox_id: String,
    /// What, as the ledger writes it.
    pub held: String,
}

/// One write. Puts replace the whole row, so that a change may be repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Adds or replaces a sandbox.
    PutSandbox(Box<SandboxRow>),
    /// Forgets a sandbox and its executions.
    RemoveSandbox {
        /// Which; it need not be there.
        id: String,
    },
    /// Adds or replaces a template.
    PutTemplate(TemplateRow),
    /// Forgets a template.
    RemoveTemplate {
        /// Which; it need not be there.
        name: String,
    },
    /// Adds or replaces an execution.
    PutExecution(Box<ExecutionRow>),
    /// Forgets an execution.
    RemoveExecution {
        /// In which sandbox.
        sandbox_id: String,
        /// Which; it need not be there.
        exec_id: u64,
    },
    /// Adds or replaces what a sandbox holds.
    PutAllocation(AllocationRow),
    /// A sandbox holds nothing any more.
    RemoveAllocation {
        /// Which; it need not be there.
        sandbox_id: String,
    },
    /// Adds or replaces a snapshot.
    PutSnapshot(Box<SnapshotRow>),
    /// Forgets a snapshot.
    RemoveSnapshot {
        /// Which; it need not be there.
        id: String,
    },
    /// Adds or replaces a frozen layer.
    PutLayer(LayerRow),
    /// Forgets a frozen layer.
    RemoveLayer {
        /// Which; it need not be there.
        id: String,
    },
    /// Only where a sandbox's disk and memory are in frozen files changes; its row must be there.
    Rebase {
        /// Which sandbox.
        id: String,
        /// As in its row.
        layer: Option<String>,
        /// As in its row.
        snapshot: Option<String>,
        /// As in its row.
        overlay: Option<String>,
    },
    /// All of these or none.
    Together(Vec<Change>),
    /// The node is being drained, or not any more.
    Drain(Option<DrainRow>),
    /// A request was taken.
    BeginAudit(Box<AuditRow>),
    /// It has its answer.
    EndAudit(AuditEnd),
    /// Something about the history of executions.
    History(Note),
    /// Something happened.
    Event(Box<EventRow>),
}

/// That the node is being drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DrainRow {
    /// When sandboxes are ended, Unix time in milliseconds; without it they end by themselves.
    pub until_ms: Option<u64>,
    /// They are paused then, where they can be, and not stopped.
    pub pauses: bool,
}

impl DrainRow {
    const PAUSES: &str = "pause";

    /// Reads what was written; what it does not know is left out.
    pub(super) fn parse(text: &str) -> Self {
        let mut words = text.split(' ');
        Self { until_ms: words.clone().find_map(|word| word.parse().ok()), pauses: words.any(|w| w == Self::PAUSES) }
    }
}

/// Brings the tables to `SCHEMA_VERSION`. A database of a newer program is refused and left alone.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StateError> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let known: bool =
        transaction.query_row("SELECT count(*) FROM sqlite_master WHERE name = 'meta'", [], |row| row.get(0))?;
    let found = if known { meta_number(&transaction, "schema_version")? } else { 0 };
    if found > SCHEMA_VERSION {
        return Err(StateError::Newer { found, known: SCHEMA_VERSION });
    }
    for migration in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(usize::MAX)) {
        transaction.execute_batch(migration)?;
    }
    set_meta(&transaction, "schema_version", &SCHEMA_VERSION.to_string())?;
    Ok(transaction.commit()?)
}

pub(super) fn meta(connection: &Connection, key: &str) -> Result<Option<String>, StateError> {
    match connection.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0)) {
        Ok(value) => Ok(Some(value)),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn meta_number(connection: &Connection, key: &str) -> Result<u64, StateError> {
    let value = meta(connection, key)?.unwrap_or_default();
    value.parse().map_err(|_| StateError::Corrupt(format!("meta.{key} is {value:?}, not a number")))
}

pub(super) fn set_meta(connection: &Connection, key: &str, value: &str) -> Result<(), StateError> {
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)", [key, value])?;
    Ok(())
}

pub(super) fn sandboxes(connection: &Connection) -> Result<Vec<SandboxRow>, StateError> {
    rows(
        connection,
        "SELECT id, name, template, template_sha256, state, reason, vcpus, memory_mib, disk_mib, env, labels,
                created_ms, started_ms, ended_ms, pid, disks, disk_iops, disk_mbps, network, net_allow, net_deny,
                net_mbps, net_address, owner, cpu_quota, restart, restarts, restarts_in_row, layer, snapshot, overlay,
                time_limits, ttl_until_ms, trace, read_only
           FROM sandboxes ORDER BY created_ms, id LIMIT ?1",
        |row| {
            Ok(SandboxRow {
                id: row.get(0)?,
                name: row.get(1)?,
                template: row.get(2)?,
                template_sha256: row.get(3)?,
                state: row.get(4)?,
                reason: row.get(5)?,
                vcpus: row.get(6)?,
                memory_mib: unsigned(row, 7)?,
                disk_mib: unsigned(row, 8)?,
                env: json(row, 9)?,
                labels: json(row, 10)?,
                created_ms: unsigned(row, 11)?,
                started_ms: maybe_unsigned(row, 12)?,
                ended_ms: maybe_unsigned(row, 13)?,
                pid: row.get(14)?,
                disks: json(row, 15)?,
                disk_iops: maybe_unsigned(row, 16)?,
                disk_mbps: maybe_unsigned(row, 17)?,
                network: row.get(18)?,
                net_allow: json(row, 19)?,
                net_deny: json(row, 20)?,
                net_mbps: maybe_unsigned(row, 21)?,
                net_address: row.get(22)?,
                owner: row.get(23)?,
                cpu_quota: maybe_unsigned(row, 24)?,
                restart: row.get(25)?,
                restarts: row.get(26)?,
                restarts_in_row: row.get(27)?,
                layer: row.get(28)?,
                snapshot: row.get(29)?,
                overlay: row.get(30)?,
                time_limits: row.get(31)?,
                ttl_until_ms: maybe_unsigned(row, 32)?,
                trace: row.get(33)?,
                read_only: row.get(34)?,
            })
        },
    )
}

pub(super) fn templates(connection: &Connection) -> Result<Vec<TemplateRow>, StateError> {
    rows(
        connection,
        "SELECT name, sha256, size_bytes, description, imported_ms, path FROM templates ORDER BY name LIMIT ?1",
        |row| {
            Ok(TemplateRow {
                name: row.get(0)?,
                sha256: row.get(1)?,
                size_bytes: unsigned(row, 2)?,
                description: row.get(3)?,
                imported_ms: unsigned(row, 4)?,
                path: row.get(5)?,
            })
        },
    )
}

pub(super) fn executions(connection: &Connection) -> Result<Vec<ExecutionRow>, StateError> {
    rows(
        connection,
        "SELECT sandbox_id, exec_id, argv, state, started_ms, ended_ms, exit, signal, timeout, cpu_ms, peak_kib,
                language, context
           FROM executions ORDER BY sandbox_id, exec_id LIMIT ?1",
        |row| {
            Ok(ExecutionRow {
                sandbox_id: row.get(0)?,
                exec_id: unsigned(row, 1)?,
                argv: json(row, 2)?,
                state: row.get(3)?,
                started_ms: unsigned(row, 4)?,
                ended_ms: maybe_unsigned(row, 5)?,
                exit: row.get(6)?,
                signal: row.get(7)?,
                timeout: row.get(8)?,
                cpu_ms: maybe_unsigned(row, 9)?,
                peak_kib: maybe_unsigned(row, 10)?,
                language: row.get(11)?,
                context: maybe_unsigned(row, 12)?,
            })
        },
    )
}

pub(super) fn allocations(connection: &Connection) -> Result<Vec<AllocationRow>, StateError> {
    rows(connection, "SELECT sandbox_id, held FROM allocations ORDER BY sandbox_id LIMIT ?1", |row| {
        Ok(AllocationRow { sandbox_id: row.get(0)?, held: row.get(1)? })
    })
}

/// Makes one change; the caller holds the transaction.
pub(super) fn apply(connection: &Connection, change: &Change) -> Result<(), StateError> {
    match change {
        // Not INSERT OR REPLACE: that would delete the old row first, and its executions with it.
        Change::PutSandbox(row) => connection
            .prepare(
                "INSERT INTO sandboxes (id, name, template, template_sha256, state, reason, vcpus, memory_mib,
                                        disk_mib, env, labels, created_ms, started_ms, ended_ms, pid, disks,
                                        disk_iops, disk_mbps, network, net_allow, net_deny, net_mbps, net_address,
                                        owner, cpu_quota, restart, restarts, restarts_in_row, layer, snapshot,
                                        overlay, time_limits, ttl_until_ms, trace, read_only)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20,
                         ?21, ?22, ?23, ?24, ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34, ?35)
                 ON CONFLICT (id) DO UPDATE SET
                     name = excluded.name, template = excluded.template, template_sha256 = excluded.template_sha256,
                     state = excluded.state, reason = excluded.reason, vcpus = excluded.vcpus,
                     memory_mib = excluded.memory_mib, disk_mib = excluded.disk_mib, env = excluded.env,
                     labels = excluded.labels, created_ms = excluded.created_ms, started_ms = excluded.started_ms,
                     ended_ms = excluded.ended_ms, pid = excluded.pid, disks = excluded.disks,
                     disk_iops = excluded.disk_iops, disk_mbps = excluded.disk_mbps, network = excluded.network,
                     net_allow = excluded.net_allow, net_deny = excluded.net_deny, net_mbps = excluded.net_mbps,
                     net_address = excluded.net_address, owner = excluded.owner,
                     cpu_quota = excluded.cpu_quota, restart = excluded.restart, restarts = excluded.restarts,
                     restarts_in_row = excluded.restarts_in_row, layer = excluded.layer,
                     snapshot = excluded.snapshot, overlay = excluded.overlay,
                     time_limits = excluded.time_limits, ttl_until_ms = excluded.ttl_until_ms,
                     trace = excluded.trace, read_only = excluded.read_only",
            )?
            .execute(params![
                row.id,
                row.name,
                row.template,
                row.template_sha256,
                row.state,
                row.reason,
                row.vcpus,
                signed(row.memory_mib),
                signed(row.disk_mib),
                to_json(&row.env)?,
                to_json(&row.labels)?,
                signed(row.created_ms),
                row.started_ms.map(signed),
                row.ended_ms.map(signed),
                row.pid,
                to_json(&row.disks)?,
                row.disk_iops.map(signed),
                row.disk_mbps.map(signed),
                row.network,
                to_json(&row.net_allow)?,
                to_json(&row.net_deny)?,
                row.net_mbps.map(signed),
                row.net_address,
                row.owner,
                row.cpu_quota.map(signed),
                row.restart,
                row.restarts,
                row.restarts_in_row,
                row.layer,
                row.snapshot,
                row.overlay,
                row.time_limits,
                row.ttl_until_ms.map(signed),
                row.trace,
                row.read_only,
            ])?,
        Change::RemoveSandbox { id } => connection.prepare("DELETE FROM sandboxes WHERE id = ?1")?.execute([id])?,
        Change::PutTemplate(row) => connection
            .prepare(
                "INSERT OR REPLACE INTO templates (name, sha256, size_bytes, description, imported_ms, path)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                row.name,
                row.sha256,
                signed(row.size_bytes),
                row.description,
                signed(row.imported_ms),
                row.path,
            ])?,
        Change::RemoveTemplate { name } => {
            connection.prepare("DELETE FROM templates WHERE name = ?1")?.execute([name])?
        }
        Change::PutExecution(row) => connection
            .prepare(
                "INSERT OR REPLACE INTO executions (sandbox_id, exec_id, argv, state, started_ms, ended_ms, exit,
                                                    signal, timeout, cpu_ms, peak_kib, language, context)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            )?
            .execute(params![
                row.sandbox_id,
                signed(row.exec_id),
                to_json(&row.argv)?,
                row.state,
                signed(row.started_ms),
                row.ended_ms.map(signed),
                row.exit,
                row.signal,
                row.timeout,
                row.cpu_ms.map(signed),
                row.peak_kib.map(signed),
                row.language,
                row.context.map(signed),
            ])?,
        Change::RemoveExecution { sandbox_id, exec_id } => connection
            .prepare("DELETE FROM executions WHERE sandbox_id = ?1 AND exec_id = ?2")?
            .execute(params![sandbox_id, signed(*exec_id)])?,
        Change::PutAllocation(row) => connection
            .prepare("INSERT OR REPLACE INTO allocations (sandbox_id, held) VALUES (?1, ?2)")?
            .execute([&row.sandbox_id, &row.held])?,
        Change::RemoveAllocation { sandbox_id } => {
            connection.prepare("DELETE FROM allocations WHERE sandbox_id = ?1")?.execute([sandbox_id])?
        }
        Change::Drain(Some(row)) => {
            let until = row.until_ms.map(|until| until.to_string());
            let words = until.into_iter().chain(row.pauses.then(|| DrainRow::PAUSES.to_string()));
            return set_meta(connection, super::state::DRAIN, &words.collect::<Vec<_>>().join(" "));
        }
        Change::Drain(None) => connection.execute("DELETE FROM meta WHERE key = ?1", [super::state::DRAIN])?,
        Change::PutSnapshot(row) => return snapshots::put_snapshot(connection, row),
        Change::RemoveSnapshot { id } => return snapshots::remove_snapshot(connection, id),
        Change::PutLayer(row) => return snapshots::put_layer(connection, row),
        Change::RemoveLayer { id } => return snapshots::remove_layer(connection, id),
        Change::Rebase { id, layer, snapshot, overlay } => {
            let changed = connection
                .prepare("UPDATE sandboxes SET layer = ?2, snapshot = ?3, overlay = ?4 WHERE id = ?1")?
                .execute(params![id, layer, snapshot, overlay])?;
            if changed == 0 {
                return Err(StateError::Conflict(format!("there is no sandbox {id}")));
            }
            changed
        }
        // The caller's savepoint makes them one.
        Change::Together(changes) => return changes.iter().try_for_each(|change| apply(connection, change)),
        Change::BeginAudit(row) => return audit::begin(connection, row),
        Change::EndAudit(end) => return audit::end(connection, end),
        Change::History(note) => return history::write(connection, note),
        Change::Event(row) => return events::put(connection, row),
    };
    Ok(())
}

/// Reads a table; `sql` takes the greatest number of rows as its one parameter.
pub(super) fn rows<T>(
    connection: &Connection,
    sql: &str,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, StateError> {
    let mut statement = connection.prepare(sql)?;
    let found: rusqlite::Result<Vec<T>> = statement.query_map([signed(MAX_ROWS)], read)?.collect();
    Ok(found?)
}

/// SQLite's integers are signed. No count or time of ours comes near the limit.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(row: &Row<'_>, index: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(index)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(index, value))
}

pub(super) fn maybe_unsigned(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<u64>> {
    match row.get::<_, Option<i64>>(index)? {
        None => Ok(None),
        Some(_) => unsigned(row, index).map(Some),
    }
}

fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, index: usize) -> rusqlite::Result<T> {
    let text: String = row.get(index)?;
    serde_json::from_str(&text)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(index, Type::Text, Box::new(error)))
}

fn to_json(value: &impl serde::Serialize) -> Result<String, StateError> {
    serde_json::to_string(value).map_err(|error| StateError::Database(error.to_string()))
}
