//! The audit log: a row for each request that changes something, written when it is taken and once more when it has its
//! answer. It lives in the state database and holds the newest rows only.

use rusqlite::{Connection, params};

use super::schema::{maybe_unsigned, signed, unsigned};
use super::state::StateError;

/// Rows that are kept.
pub const KEPT: u64 = 100_000;
/// How often older ones are taken away, in rows.
const SWEEP: u64 = 256;
/// Result of a request whose answer the supervisor did not live to give.
pub const INTERRUPTED: &str = "INTERRUPTED";

/// One request. Times are Unix time in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AuditRow {
    /// Counts up from 1, without gaps.
    pub id: u64,
    /// When it was taken.
    pub began_ms: u64,
    /// When it was answered.
    pub ended_ms: Option<u64>,
    /// How the client came: `uid=N pid=N` or `port`.
    pub peer: String,
    /// The client's owner.
    pub owner: String,
    /// The client's role.
    pub role: String,
    /// The verb.
    pub verb: String,
    /// The sandbox that it is about.
    pub sandbox: Option<String>,
    /// The arguments as they were written, without values of environment variables.
    pub arguments: String,
    /// `ok`, or the code of the error.
    pub result: Option<String>,
}

/// Rows to read, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditQuery {
    /// Only rows with smaller ids.
    pub before: Option<u64>,
    /// Only this owner's clients'.
    pub owner: Option<String>,
    /// At most that many.
    pub limit: u64,
}

/// The end of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEnd {
    /// Of which row.
    pub id: u64,
    /// When.
    pub ended_ms: u64,
    /// `ok`, or the code of the error.
    pub result: String,
    /// The sandbox, for a row that names none.
    pub sandbox: Option<String>,
}

pub(super) const MIGRATION: &str = "
    CREATE TABLE audit (
        id        INTEGER PRIMARY KEY,
        began_ms  INTEGER NOT NULL,
        ended_ms  INTEGER,
        peer      TEXT NOT NULL,
        owner     TEXT NOT NULL,
        role      TEXT NOT NULL,
        verb      TEXT NOT NULL,
        sandbox   TEXT,
        arguments TEXT NOT NULL,
        result    TEXT
    ) STRICT;
";

/// Writes that a request was taken.
pub(super) fn begin(connection: &Connection, row: &AuditRow) -> Result<(), StateError> {
    connection
        .prepare(
            "INSERT OR REPLACE INTO audit (id, began_ms, ended_ms, peer, owner, role, verb, sandbox, arguments, result)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?
        .execute(params![
            signed(row.id),
            signed(row.began_ms),
            row.ended_ms.map(signed),
            row.peer,
            row.owner,
            row.role,
            row.verb,
            row.sandbox,
            row.arguments,
            row.result,
        ])?;
    if row.id > KEPT && row.id.is_multiple_of(SWEEP) {
        connection.execute("DELETE FROM audit WHERE id <= ?1", [signed(row.id - KEPT)])?;
    }
    Ok(())
}

/// Writes how a request ended.
pub(super) fn end(connection: &Connection, end: &AuditEnd) -> Result<(), StateError> {
    connection
        .prepare(
            "UPDATE audit SET ended_ms = ?2, result = ?3, sandbox = coalesce(sandbox, ?4) WHERE id = ?1 AND result IS NULL",
        )?
        .execute(params![signed(end.id), signed(end.ended_ms), end.result, end.sandbox])?;
    Ok(())
}

/// What an earlier supervisor left unanswered is marked; gives the id that the next row gets.
pub(super) fn take_up(connection: &Connection) -> Result<u64, StateError> {
    connection.execute("UPDATE audit SET result = ?1 WHERE result IS NULL", [INTERRUPTED])?;
    Ok(connection.query_row("SELECT coalesce(max(id), 0) + 1 FROM audit", [], |row| unsigned(row, 0))?)
}

/// Reads rows, newest first.
pub(super) fn read(connection: &Connection, query: &AuditQuery) -> Result<Vec<AuditRow>, StateError> {
    let mut statement = connection.prepare(
        "SELECT id, began_ms, ended_ms, peer, owner, role, verb, sandbox, arguments, result FROM audit
          WHERE id < ?1 AND (?2 IS NULL OR owner = ?2) ORDER BY id DESC LIMIT ?3",
    )?;
    let before = query.before.map_or(i64::MAX, signed);
    let rows = statement.query_map(params![before, query.owner, signed(query.limit)], |row| {
        Ok(AuditRow {
            id: unsigned(row, 0)?,
            began_ms: unsigned(row, 1)?,
            ended_ms: maybe_unsigned(row, 2)?,
            peer: row.get(3)?,
            owner: row.get(4)?,
            role: row.get(5)?,
            verb: row.get(6)?,
            sandbox: row.get(7)?,
            arguments: row.get(8)?,
            result: row.get(9)?,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}
