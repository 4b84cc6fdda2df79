//! Events of the node: what became of sandboxes, executions and templates, in order. The newest are kept in the state database, so
//! that who watches them can go on after the supervisor was restarted.

use rusqlite::{Connection, params};

use super::schema::{maybe_unsigned, signed, unsigned};
use super::state::StateError;

/// Rows that are kept.
pub const KEPT: u64 = 10_000;
/// Of these, those that a supervisor has in memory.
pub const AT_HAND: u64 = 2048;
/// How often older ones are taken away, in rows.
const SWEEP: u64 = 256;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventRow {
    /// Counts up from 1, without gaps.
    pub seq: u64,
    /// Unix time in milliseconds.
    pub time_ms: u64,
    /// `sandbox.running`, `exec.ended` and so on.
    pub kind: String,
    /// Whose sandbox it is, or who asked for what became of a template; empty where that was the node.
    pub owner: String,
    /// Which; empty for a template's.
    pub sandbox: String,
    /// The template that it is about; empty for a sandbox's.
    pub template: String,
    /// The execution in it.
    pub exec: Option<u64>,
    /// More, for people.
    pub detail: String,
}

pub(super) const MIGRATION: &str = "
    CREATE TABLE events (
        seq     INTEGER PRIMARY KEY,
        time_ms INTEGER NOT NULL,
        kind    TEXT NOT NULL,
        owner   TEXT NOT NULL,
        sandbox TEXT NOT NULL,
        exec    INTEGER,
        detail  TEXT NOT NULL
    ) STRICT;
";

/// Templates have events as well.
pub(super) const TEMPLATES: &str = "
    ALTER TABLE events ADD COLUMN template TEXT NOT NULL DEFAULT '';
";

/// Writes an event.
pub(super) fn put(connection: &Connection, row: &EventRow) -> Result<(), StateError> {
    connection
        .prepare(
            "INSERT OR REPLACE INTO events (seq, time_ms, kind, owner, sandbox, exec, detail, template)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(params![
            signed(row.seq),
            signed(row.time_ms),
            row.kind,
            row.owner,
            row.sandbox,
            row.exec.map(signed),
            row.detail,
            row.template,
        ])?;
    if row.seq > KEPT && row.seq.is_multiple_of(SWEEP) {
        connection.execute("DELETE FROM events WHERE seq <= ?1", [signed(row.seq - KEPT)])?;
    }
    Ok(())
}

/// The newest, oldest first.
pub(super) fn newest(connection: &Connection) -> Result<Vec<EventRow>, StateError> {
    let mut statement = connection.prepare(
        "SELECT seq, time_ms, kind, owner, sandbox, exec, detail, template FROM events ORDER BY seq DESC LIMIT ?1",
    )?;
    let rows = statement.query_map([signed(AT_HAND)], |row| {
        Ok(EventRow {
            seq: unsigned(row, 0)?,
            time_ms: unsigned(row, 1)?,
            kind: row.get(2)?,
            owner: row.get(3)?,
            sandbox: row.get(4)?,
            exec: maybe_unsigned(row, 5)?,
            detail: row.get(6)?,
            template: row.get(7)?,
        })
    })?;
    let mut rows: Vec<EventRow> = rows.collect::<rusqlite::Result<_>>()?;
    rows.reverse();
    Ok(rows)
}
