//! Copies of the state database: made while it is written to, and put in its place.
//!
//! A copy is made by the database's own thread between two batches, as one transaction sees it. One that is to be put in
//! place lies beside the database until the next start, which takes it in by renames: whichever of them the power fails
//! after, the start after that goes on.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::audit::{self, AuditRow};
use super::schema;
use super::state::{self, StateError};

/// What a file of SQLite begins with (<https://sqlite.org/fileformat2.html>, 1.3).
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// What a copy holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Ids of its sandboxes.
    pub sandboxes: BTreeSet<String>,
    /// The node that it was made on.
    pub node_id: String,
    /// Its length in octets.
    pub bytes: u64,
}

/// `PATH.SUFFIX`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Where a copy is made before somebody reads it.
pub fn copy_of(path: &Path) -> PathBuf {
    beside(path, ".backup")
}

/// Where a copy is gathered before it is checked.
pub fn part_of(path: &Path) -> PathBuf {
    beside(path, ".restore-part")
}

/// Where a checked copy waits for the next start.
pub fn staged(path: &Path) -> PathBuf {
    beside(path, ".restore")
}

/// Where the database before the last restore is.
pub fn replaced(path: &Path) -> PathBuf {
    beside(path, ".replaced")
}

/// Writes a copy of an open database, without free pages and log.
pub(super) fn make(connection: &Connection, to: &Path) -> Result<(), StateError> {
    let made = remove(to).and_then(|()| {
        let name = to.to_str().ok_or_else(|| StateError::Io(format!("{} is not UTF-8", to.display())))?;
        connection.execute("VACUUM INTO ?1", [name])?;
        Ok(())
    });
    if made.is_err() {
        // What there is of it takes the room that was missing.
        let _ = remove(to);
    }
    made
}

/// Checks a file that is to become the state database, brings it to this program's schema and writes down who put it there.
/// Blocks for as long as reading the whole of it takes.
pub fn check(path: &Path, by: &AuditRow) -> Result<Contents, StateError> {
    let io = |e: io::Error| StateError::Io(format!("{}: {e}", path.display()));
    let mut head = [0; 16];
    let read = File::open(path).map_err(io)?.read_exact(&mut head);
    if read.is_err() || head != *MAGIC {
        return Err(StateError::Corrupt("it is no SQLite database".to_string()));
    }
    {
        let connection = Connection::open(path)?;
        let ours: bool = connection.query_row(
            "SELECT count(*) = 3 FROM sqlite_master WHERE name IN ('meta', 'sandboxes', 'templates')",
            [],
            |row| row.get(0),
        )?;
        if !ours {
            return Err(StateError::Corrupt("it is a database, but none of Warren's".to_string()));
        }
    }
    let (connection, snapshot) = state::open_file(path)?;
    audit::begin(&connection, &AuditRow { id: snapshot.next_audit, ..by.clone() })?;
    // One file from here on.
    let mode: String = connection.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get(0))?;
    if mode != "delete" {
        return Err(StateError::Database(format!("the copy's log cannot be folded into it: journal_mode={mode}")));
    }
    let found = schema::meta(&connection, "node_id")?.unwrap_or_default();
    drop(connection);
    let file = File::open(path).map_err(io)?;
    file.sync_all().map_err(io)?;
    Ok(Contents {
        sandboxes: snapshot.sandboxes.into_iter().map(|row| row.id).collect(),
        node_id: found,
        bytes: file.metadata().map_err(io)?.len(),
    })
}

/// Makes a checked copy the one that the next start takes.
pub fn stage(path: &Path) -> io::Result<()> {
    fs::rename(part_of(path), staged(path))?;
    sync_folder(path)
}

/// Takes in a copy that waits for it, and clears away what was left half done. `true` when there was one.
pub(super) fn take_in(path: &Path) -> Result<bool, StateError> {
    remove(&part_of(path))?;
    remove(&copy_of(path))?;
    let staged = staged(path);
    if !staged.exists() {
        return Ok(false);
    }
    let failed = |e: io::Error| StateError::Io(format!("cannot put {} in place: {e}", staged.display()));
    let old = replaced(path);
    // The log first: the copy must never meet the log of another.
    for suffix in ["-wal", "-shm", ""] {
        match fs::rename(beside(path, suffix), beside(&old, suffix)) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
    }
    fs::rename(&staged, path).map_err(failed)?;
    sync_folder(path).map_err(failed)?;
    Ok(true)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Removes a file and its logs, where they are.
pub fn remove(path: &Path) -> Result<(), StateError> {
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let path = beside(path, suffix);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(StateError::Io(format!("{}: {e}", path.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::state::{AllocationRow, Change, SandboxRow, State};
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("warren-backup-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn database(&self) -> PathBuf {
            self.0.join("state.db")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn put(id: &str) -> Change {
        Change::PutSandbox(Box::new(SandboxRow {
            id: id.to_string(),
            state: "stopped".into(),
            ..SandboxRow::default()
        }))
    }

    fn ids(path: &Path) -> Vec<String> {
        let (_, snapshot) = State::open(path, || {}).unwrap();
        snapshot.sandboxes.into_iter().map(|row| row.id).collect()
    }

    fn by() -> AuditRow {
        AuditRow { verb: "node.restore".into(), result: Some("ok".into()), ..AuditRow::default() }
    }

    /// A database with one sandbox, and a copy of it in the place of one that came; the database has another one since.
    fn with_a_copy(folder: &Folder) -> PathBuf {
        let path = folder.database();
        let (mut state, _) = State::open(&path, || {}).unwrap();
        state.submit(put("a"));
        state.copy(copy_of(&path));
        state.submit(put("b"));
        state.submit(Change::PutAllocation(AllocationRow { sandbox_id: "b".into(), held: "cgroup=active".into() }));
        assert!(state.close().iter().all(|(_, result)| result.is_ok()));
        fs::rename(copy_of(&path), part_of(&path)).unwrap();
        path
    }

    #[test]
    fn a_copy_is_the_database_of_its_instant_and_comes_back_at_the_next_start() {
        let folder = Folder::new("whole");
        let path = with_a_copy(&folder);
        let contents = check(&part_of(&path), &by()).unwrap();
        assert_eq!(contents.sandboxes, BTreeSet::from(["a".to_string()]));
        assert_eq!(ids(&path), ["a", "b"], "nothing happens before it is staged");
        fs::write(part_of(&path), "half").unwrap();
        assert_eq!(ids(&path), ["a", "b"], "what was left half done is cleared away");
        assert!(!part_of(&path).exists());
        let folder = Folder::new("staged");
        let path = with_a_copy(&folder);
        let contents = check(&part_of(&path), &by()).unwrap();
        stage(&path).unwrap();
        let (mut state, snapshot) = State::open(&path, || {}).unwrap();
        assert_eq!((snapshot.sandboxes.len(), snapshot.allocations.len(), snapshot.next_audit), (1, 0, 2));
        assert_eq!(snapshot.node_id, contents.node_id);
        state.submit(put("c"));
        drop(state);
        assert_eq!(ids(&path), ["a", "c"]);
        assert_eq!(ids(&replaced(&path)), ["a", "b"], "the one before is kept");
    }

    #[test]
    fn a_power_cut_between_any_two_renames_loses_neither() {
        for done in 0..3 {
            let folder = Folder::new(&format!("cut{done}"));
            let path = with_a_copy(&folder);
            check(&part_of(&path), &by()).unwrap();
            stage(&path).unwrap();
            fs::write(beside(&path, "-wal"), "of the old one").unwrap();
            for suffix in ["-wal", ""].iter().take(done) {
                fs::rename(beside(&path, suffix), beside(&replaced(&path), suffix)).unwrap();
            }
            assert_eq!(ids(&path), ["a"], "after {done} renames");
        }
    }

    #[test]
    fn what_is_no_state_database_is_refused() {
        let folder = Folder::new("refused");
        let path = with_a_copy(&folder);
        let part = part_of(&path);
        let whole = fs::read(&part).unwrap();
        let refused = |octets: &[u8]| {
            remove(&part).unwrap();
            fs::write(&part, octets).unwrap();
            check(&part, &by()).expect_err("it is not whole")
        };
        assert!(matches!(refused(b""), StateError::Corrupt(_)));
        assert!(matches!(refused(&[0; 4096]), StateError::Corrupt(_)));
        assert!(matches!(refused(&whole[..whole.len() / 2]), StateError::Corrupt(_)));
        let mut damaged = whole.clone();
        damaged[4096..8192].fill(0xa5);
        assert!(matches!(refused(&damaged), StateError::Corrupt(_) | StateError::Database(_)));
        let other = folder.0.join("other.db");
        Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
        assert!(matches!(refused(&fs::read(&other).unwrap()), StateError::Corrupt(_)));
        remove(&part).unwrap();
        fs::write(&part, &whole).unwrap();
        Connection::open(&part)
            .unwrap()
            .execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'", [])
            .unwrap();
        assert!(matches!(check(&part, &by()), Err(StateError::Newer { found: 999, .. })));
        assert_eq!(ids(&path), ["a", "b"]);
    }
}
