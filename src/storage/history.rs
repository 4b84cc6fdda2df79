//! The history of executions: a record for each program and code run, which outlives its sandbox. It lives in the state
//! database, is written behind what happens, and holds what is neither too old nor too many of one owner's.

use std::path::PathBuf;

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Deserialize;

use super::ring::Ring;
use super::schema::{maybe_unsigned, signed, unsigned};
use super::state::StateError;

/// Records that one sweep takes away at most: the thread that writes them has more to do.
const SWEEP: u64 = 2000;
/// Octets of results in which files are looked for.
const RESULTS_READ: u64 = 1024 * 1024;
/// Longest list of files that is kept, in octets of JSON.
const MAX_ARTIFACTS: usize = 64 * 1024;
/// Characters that are kept of why an execution failed.
pub const MESSAGE_CHARS: usize = 1024;

/// One execution. Times are Unix time in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RecordRow {
    /// Counts up from 1; never given again.
    pub id: u64,
    /// The sandbox's id; it may be gone.
    pub sandbox: String,
    /// Its number in that sandbox.
    pub exec: u64,
    /// Whose it is.
    pub owner: String,
    /// It is a code run.
    pub is_code: bool,
    /// Of a code run.
    pub language: Option<String>,
    /// The context that a code run ran in.
    pub context: Option<u64>,
    /// The program and its arguments as a line.
    pub command: String,
    /// `pending`, `running`, `completed` or `failed`.
    pub state: String,
    /// When it was asked for.
    pub started_ms: u64,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// Exit code.
    pub exit: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Code of the error that it ended with.
    pub code: Option<String>,
    /// That error's sentence.
    pub message: Option<String>,
    /// CPU time used.
    pub cpu_ms: Option<u64>,
    /// Peak memory in KiB.
    pub peak_kib: Option<u64>,
    /// Octets of its source; `None` where it has none or that is not kept.
    pub source_bytes: Option<u64>,
    /// Octets that it ever wrote to standard output, known at its end.
    pub stdout_bytes: Option<u64>,
    /// The same of standard error.
    pub stderr_bytes: Option<u64>,
    /// What it spent its time on, as `sandbox::trace` writes it; empty until it has ended.
    pub trace: String,
}

/// A record with all that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// The rest.
    pub row: RecordRow,
    /// The start of its source.
    pub source: Option<Vec<u8>>,
    /// The end of its standard output.
    pub stdout: Option<Vec<u8>>,
    /// The end of its standard error.
    pub stderr: Option<Vec<u8>>,
    /// Files that it made or changed.
    pub artifacts: Vec<Artifact>,
}

/// A file that a code run made or changed, as the sandbox says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, serde::Serialize)]
pub struct Artifact {
    /// Where.
    pub path: String,
    /// Octets.
    pub size: u64,
    /// Of its content, in hex.
    pub sha256: String,
}

/// A record of an execution that had not ended when the database was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRecord {
    /// Its number.
    pub id: u64,
    /// Where.
    pub sandbox: String,
    /// Which.
    pub exec: u64,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Adds a record or replaces what is in its row; what it ran and wrote stays.
    Put(Box<RecordRow>),
    /// What it ran.
    Source {
        /// Which record.
        id: u64,
        /// The start of it.
        octets: Vec<u8>,
        /// How long all of it is.
        size: u64,
    },
    /// What it wrote, read from the files where its output is kept.
    Outputs {
        /// Which record.
        id: u64,
        /// Of standard output, standard error and results.
        files: [PathBuf; 3],
        /// Octets of each output that are kept.
        limit: u64,
    },
    /// Nobody saw how it ended.
    Lost {
        /// Which record.
        id: u64,
        /// When that was found.
        ended_ms: u64,
        /// Why.
        message: String,
    },
    /// Takes some of those away that are too many or too old.
    Sweep {
        /// Those that started before.
        before_ms: Option<u64>,
        /// Of each owner's those beyond the newest of that number.
        keep: Option<u64>,
    },
}

/// Records to read, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HistoryQuery {
    /// Only smaller numbers.
    pub before: Option<u64>,
    /// Only this owner's.
    pub owner: Option<String>,
    /// Only in this sandbox.
    pub sandbox: Option<String>,
    /// Only that number in its sandbox.
    pub exec: Option<u64>,
    /// Only code runs, or only programs.
    pub is_code: Option<bool>,
    /// Only of this language.
    pub language: Option<String>,
    /// Only in this state.
    pub state: Option<String>,
    /// Only those that started then or later.
    pub since_ms: Option<u64>,
    /// Only those that started before.
    pub until_ms: Option<u64>,
    /// At most that many.
    pub limit: u64,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordQuery {
    /// Its number.
    pub id: u64,
    /// For whom no other's record is there; `None` for whoever sees all.
    pub owner: Option<String>,
}

pub(super) const MIGRATION: &str = "
    CREATE TABLE history (
        id           INTEGER PRIMARY KEY AUTOINCREMENT,
        sandbox      TEXT NOT NULL,
        exec         INTEGER NOT NULL,
        owner        TEXT NOT NULL,
        is_code      INTEGER NOT NULL,
        language     TEXT,
        context      INTEGER,
        command      TEXT NOT NULL,
        state        TEXT NOT NULL,
        started_ms   INTEGER NOT NULL,
        ended_ms     INTEGER,
        exit         INTEGER,
        signal       INTEGER,
        code         TEXT,
        message      TEXT,
        cpu_ms       INTEGER,
        peak_kib     INTEGER,
        source_bytes INTEGER,
        stdout_bytes INTEGER,
        stderr_bytes INTEGER,
        source       BLOB,
        stdout       BLOB,
        stderr       BLOB,
        artifacts    TEXT                   -- JSON array
    ) STRICT;
    CREATE INDEX history_owner ON history (owner, id);
    CREATE INDEX history_started ON history (started_ms);
    CREATE INDEX history_open ON history (id) WHERE ended_ms IS NULL;
";

pub(super) const TRACE_MIGRATION: &str = "
    ALTER TABLE history ADD COLUMN trace TEXT NOT NULL DEFAULT '';          -- spans, as `sandbox::trace` writes them
";

/// The columns of a row, in the order that `row_of` reads.
const COLUMNS: &str =
    "id, sandbox, exec, owner, is_code, language, context, command, state, started_ms, ended_ms, exit,
    signal, code, message, cpu_ms, peak_kib, source_bytes, stdout_bytes, stderr_bytes, trace";

/// Makes one write; the caller holds the transaction.
pub(super) fn write(connection: &Connection, note: &Note) -> Result<(), StateError> {
    match note {
        Note::Put(row) => put(connection, row)?,
        Note::Source { id, octets, size } => connection
            .prepare("UPDATE history SET source = ?2, source_bytes = ?3 WHERE id = ?1")?
            .execute(params![signed(*id), octets, signed(*size)])?,
        Note::Outputs { id, files, limit } => put_outputs(connection, *id, files, *limit)?,
        Note::Lost { id, ended_ms, message } => connection
            .prepare(
                "UPDATE history SET state = 'failed', ended_ms = max(?2, started_ms), code = 'LINK_LOST', message = ?3
                  WHERE id = ?1 AND ended_ms IS NULL",
            )?
            .execute(params![signed(*id), signed(*ended_ms), message])?,
        Note::Sweep { before_ms, keep } => sweep(connection, *before_ms, *keep)?,
    };
    Ok(())
}

fn put(connection: &Connection, row: &RecordRow) -> rusqlite::Result<usize> {
    connection
        .prepare(
            "INSERT INTO history (id, sandbox, exec, owner, is_code, language, context, command, state, started_ms,
                                  ended_ms, exit, signal, code, message, cpu_ms, peak_kib, trace)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)
             ON CONFLICT (id) DO UPDATE SET
                 language = coalesce(language, excluded.language), state = excluded.state, ended_ms = excluded.ended_ms, exit = excluded.exit,
                 signal = excluded.signal, code = excluded.code, message = excluded.message,
                 cpu_ms = excluded.cpu_ms, peak_kib = excluded.peak_kib, trace = excluded.trace",
        )?
        .execute(params![
            signed(row.id),
            row.sandbox,
            signed(row.exec),
            row.owner,
            row.is_code,
            row.language,
            row.context.map(signed),
            row.command,
            row.state,
            signed(row.started_ms),
            row.ended_ms.map(signed),
            row.exit,
            row.signal,
            row.code,
            row.message,
            row.cpu_ms.map(signed),
            row.peak_kib.map(signed),
            row.trace,
        ])
}

/// A program that wrote nothing to an output has no file of it, and neither has one that is forgotten already.
fn put_outputs(connection: &Connection, id: u64, files: &[PathBuf; 3], limit: u64) -> Result<usize, StateError> {
    let [stdout, stderr] = [&files[0], &files[1]].map(|file| Ring::tail(file, limit).unwrap_or_default());
    let results = Ring::tail(&files[2], RESULTS_READ).unwrap_or_default().0;
    let (artifacts, message) = (artifacts_of(&results), exception_of(&results));
    let artifacts = if artifacts.is_empty() {
        None
    } else {
        Some(serde_json::to_string(&artifacts).map_err(|e| StateError::Database(e.to_string()))?)
    };
    let kept = |octets: Vec<u8>| (limit > 0).then_some(octets);
    let changed = connection
        .prepare(
            "UPDATE history SET stdout = ?2, stdout_bytes = ?3, stderr = ?4, stderr_bytes = ?5, artifacts = ?6,
                 message = CASE state WHEN 'failed' THEN coalesce(message, ?7) ELSE message END
              WHERE id = ?1",
        )?
        .execute(params![
            signed(id),
            kept(stdout.0),
            signed(stdout.1),
            kept(stderr.0),
            signed(stderr.1),
            artifacts,
            message
        ])?;
    Ok(changed)
}

/// The files among results. They come from within a sandbox: what is none is passed over.
fn artifacts_of(results: &[u8]) -> Vec<Artifact> {
    let mut room = MAX_ARTIFACTS;
    let lines = results.split(|octet| *octet == b'\n').filter(|line| line.starts_with(b"{\"type\":\"artifact\""));
    let parsed = lines.filter(|line| line.len() <= MAX_ARTIFACTS).filter_map(|line| serde_json::from_slice(line).ok());
    parsed
        .take_while(|artifact: &Artifact| {
            // With room for escapes.
            let size = 2 * (artifact.path.len() + artifact.sha256.len()) + 64;
            room = room.saturating_sub(size);
            room > 0
        })
        .collect()
}

/// The last exception among results, as its name and text. It comes from within a sandbox too.
fn exception_of(results: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Exception {
        name: String,
        value: String,
    }
    // What is displayed may be long, and is none.
    let says_error = |line: &&[u8]| line.get(..20).unwrap_or(line).windows(7).any(|octets| octets == b"\"error\"");
    let mut lines = results.rsplit(|octet| *octet == b'\n').filter(says_error);
    let exception = lines.find_map(|line| serde_json::from_slice::<Exception>(line).ok())?;
    let text =
        if exception.value.is_empty() { exception.name } else { format!("{}: {}", exception.name, exception.value) };
    Some(text.chars().take(MESSAGE_CHARS).collect())
}

fn sweep(connection: &Connection, before_ms: Option<u64>, keep: Option<u64>) -> rusqlite::Result<usize> {
    let mut gone = 0;
    if let Some(before) = before_ms {
        gone += connection
            .prepare(
                "DELETE FROM history WHERE id IN (SELECT id FROM history WHERE started_ms < ?1
                  ORDER BY started_ms LIMIT ?2) AND ended_ms IS NOT NULL",
            )?
            .execute([signed(before), signed(SWEEP)])?;
    }
    if let Some(keep) = keep {
        gone += connection
            .prepare(
                "DELETE FROM history WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER
                  (PARTITION BY owner ORDER BY id DESC) AS place FROM history) WHERE place > ?1 LIMIT ?2)
                  AND ended_ms IS NOT NULL",
            )?
            .execute([signed(keep), signed(SWEEP)])?;
    }
    Ok(gone)
}

/// The number of the next record.
pub(super) fn next(connection: &Connection) -> Result<u64, StateError> {
    let sql = "SELECT 1 + max(coalesce((SELECT max(id) FROM history), 0),
                              coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'history'), 0))";
    Ok(connection.query_row(sql, [], |row| unsigned(row, 0))?)
}

/// The records of what had not ended.
pub(super) fn open(connection: &Connection) -> Result<Vec<OpenRecord>, StateError> {
    super::schema::rows(
        connection,
        "SELECT id, sandbox, exec FROM history WHERE ended_ms IS NULL ORDER BY id LIMIT ?1",
        |row| Ok(OpenRecord { id: unsigned(row, 0)?, sandbox: row.get(1)?, exec: unsigned(row, 2)? }),
    )
}

fn row_of(row: &Row<'_>) -> rusqlite::Result<RecordRow> {
    Ok(RecordRow {
        id: unsigned(row, 0)?,
        sandbox: row.get(1)?,
        exec: unsigned(row, 2)?,
        owner: row.get(3)?,
        is_code: row.get(4)?,
        language: row.get(5)?,
        context: maybe_unsigned(row, 6)?,
        command: row.get(7)?,
        state: row.get(8)?,
        started_ms: unsigned(row, 9)?,
        ended_ms: maybe_unsigned(row, 10)?,
        exit: row.get(11)?,
        signal: row.get(12)?,
        code: row.get(13)?,
        message: row.get(14)?,
        cpu_ms: maybe_unsigned(row, 15)?,
        peak_kib: maybe_unsigned(row, 16)?,
        source_bytes: maybe_unsigned(row, 17)?,
        stdout_bytes: maybe_unsigned(row, 18)?,
        stderr_bytes: maybe_unsigned(row, 19)?,
        trace: row.get(20)?,
    })
}

/// Reads records, newest first.
pub(super) fn list(connection: &Connection, query: &HistoryQuery) -> Result<Vec<RecordRow>, StateError> {
    let mut statement = connection.prepare(&format!(
        "SELECT {COLUMNS} FROM history
          WHERE id < ?1 AND (?2 IS NULL OR owner = ?2) AND (?3 IS NULL OR sandbox = ?3) AND (?4 IS NULL OR exec = ?4)
            AND (?5 IS NULL OR is_code = ?5) AND (?6 IS NULL OR language = ?6) AND (?7 IS NULL OR state = ?7)
            AND started_ms >= ?8 AND started_ms < ?9
          ORDER BY id DESC LIMIT ?10"
    ))?;
    let given = params![
        query.before.map_or(i64::MAX, signed),
        query.owner,
        query.sandbox,
        query.exec.map(signed),
        query.is_code,
        query.language,
        query.state,
        query.since_ms.map_or(0, signed),
        query.until_ms.map_or(i64::MAX, signed),
        signed(query.limit),
    ];
    let rows = statement.query_map(given, row_of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Reads one record.
pub(super) fn record(connection: &Connection, query: &RecordQuery) -> Result<Option<Box<Record>>, StateError> {
    let mut statement = connection.prepare(&format!(
        "SELECT {COLUMNS}, source, stdout, stderr, artifacts FROM history
          WHERE id = ?1 AND (?2 IS NULL OR owner = ?2)"
    ))?;
    let found = statement.query_row(params![signed(query.id), query.owner], |row| {
        let artifacts: Option<String> = row.get(24)?;
        Ok(Box::new(Record {
            row: row_of(row)?,
            source: row.get(21)?,
            stdout: row.get(22)?,
            stderr: row.get(23)?,
            artifacts: artifacts.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default(),
        }))
    });
    Ok(found.optional()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> Connection {
        let connection = Connection::open_in_memory().expect("memory");
        connection
            .execute_batch(MIGRATION)
            .and_then(|()| connection.execute_batch(TRACE_MIGRATION))
            .expect("migration");
        connection
    }

    fn row(id: u64, owner: &str, started_ms: u64) -> RecordRow {
        RecordRow {
            id,
            sandbox: "s".to_string(),
            exec: id,
            owner: owner.to_string(),
            command: "true".to_string(),
            state: "running".to_string(),
            started_ms,
            ..RecordRow::default()
        }
    }

    fn end(row: RecordRow) -> RecordRow {
        RecordRow { state: "completed".to_string(), ended_ms: Some(row.started_ms + 1), exit: Some(0), ..row }
    }

    fn ids(connection: &Connection, query: HistoryQuery) -> Vec<u64> {
        let found = list(connection, &HistoryQuery { limit: 100, ..query }).expect("list");
        found.iter().map(|row| row.id).collect()
    }

    #[test]
    fn a_record_is_begun_ended_and_read_by_its_owner_only() {
        let db = database();
        write(&db, &Note::Put(Box::new(row(1, "ann", 5)))).expect("begin");
        write(&db, &Note::Source { id: 1, octets: b"1+1".to_vec(), size: 3 }).expect("source");
        write(&db, &Note::Put(Box::new(end(row(1, "ann", 5))))).expect("end");
        let ask =
            |owner: Option<&str>| record(&db, &RecordQuery { id: 1, owner: owner.map(str::to_string) }).expect("read");
        let found = ask(Some("ann")).expect("hers");
        assert_eq!((found.source.as_deref(), found.row.source_bytes), (Some(&b"1+1"[..]), Some(3)));
        assert_eq!((found.row.state.as_str(), found.row.ended_ms), ("completed", Some(6)));
        assert!(ask(None).is_some() && ask(Some("bob")).is_none());
    }

    #[test]
    fn filters_and_pages() {
        let db = database();
        for id in 1..=6 {
            let mut row = row(id, if id % 2 == 0 { "ann" } else { "bob" }, id * 10);
            row.is_code = id > 4;
            write(&db, &Note::Put(Box::new(if id < 3 { end(row) } else { row }))).expect("put");
        }
        let all = HistoryQuery::default;
        let owner = || Some("ann".to_string());
        assert_eq!(ids(&db, all()), [6, 5, 4, 3, 2, 1]);
        assert_eq!(ids(&db, HistoryQuery { before: Some(4), owner: owner(), ..all() }), [2]);
        assert_eq!(ids(&db, HistoryQuery { is_code: Some(true), ..all() }), [6, 5]);
        assert_eq!(ids(&db, HistoryQuery { state: Some("completed".to_string()), ..all() }), [2, 1]);
        assert_eq!(ids(&db, HistoryQuery { since_ms: Some(20), until_ms: Some(40), ..all() }), [3, 2]);
        assert_eq!(ids(&db, HistoryQuery { exec: Some(3), ..all() }), [3]);
        assert_eq!(open(&db).expect("open").len(), 4);
    }

    #[test]
    fn what_is_too_old_or_too_many_of_an_owners_goes_and_what_runs_stays() {
        let db = database();
        for id in 1..=10 {
            let row = row(id, if id == 2 { "bob" } else { "ann" }, id);
            write(&db, &Note::Put(Box::new(if id == 1 { row } else { end(row) }))).expect("put");
        }
        write(&db, &Note::Sweep { before_ms: Some(4), keep: None }).expect("sweep");
        assert_eq!(ids(&db, HistoryQuery::default()), [10, 9, 8, 7, 6, 5, 4, 1]);
        write(&db, &Note::Sweep { before_ms: None, keep: Some(3) }).expect("sweep");
        assert_eq!(ids(&db, HistoryQuery::default()), [10, 9, 8, 1]);
        write(&db, &Note::Lost { id: 1, ended_ms: 50, message: "gone".to_string() }).expect("lost");
        write(&db, &Note::Sweep { before_ms: Some(100), keep: None }).expect("sweep");
        assert!(ids(&db, HistoryQuery::default()).is_empty());
        assert_eq!(next(&db).expect("next"), 11, "no number is given twice");
    }

    #[test]
    fn files_are_found_among_results_and_garbage_is_passed_over() {
        let results = b"{\"type\":\"value\",\"forms\":{}}\n{\"type\":\"artifact\",\"path\":\"/a\\\"b\",\"size\":3,\"sha256\":\"00\"}\n\
            {\"type\":\"artifact\",\"path\":7}\n{\"type\":\"artifact\"\n\xff\n";
        let found = artifacts_of(results);
        assert_eq!(found, [Artifact { path: "/a\"b".to_string(), size: 3, sha256: "00".to_string() }]);
        let line =
            format!("{{\"type\":\"artifact\",\"path\":\"{}\",\"size\":3,\"sha256\":\"00\"}}\n", "x".repeat(1000));
        let many = artifacts_of(line.repeat(1000).as_bytes());
        assert!(many.len() > 20 && serde_json::to_string(&many).expect("json").len() <= MAX_ARTIFACTS);
    }
}
