//! `node.backup` and `node.restore`: the state database as a file, made while the node runs, and put back.
//!
//! A restore is gathered and checked on a thread of its own. Then this supervisor ends, and the next one, which init starts
//! within milliseconds, begins with the restored database and takes over what runs, as after a kill.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::logs::Reader;
use super::requests::Job;
use super::supervisor::{Done, Supervisor, now_ms};
use super::transfer::{self, CHANNEL, Feed};
use crate::storage::audit::AuditRow;
use crate::storage::backup::{self, Contents};
use crate::storage::state::{StateError, Ticket};
use crate::wire::{Code, Error, Fields, Message};

/// Longest database that is taken.
const MAX_BYTES: u64 = 1 << 30;

/// What of backups and restores is under way.
#[derive(Debug, Default)]
pub(super) struct Backups {
    making: HashMap<Ticket, (u64, String)>,
    /// Whose restore it is: one at a time.
    restoring: Option<(u64, String)>,
    /// A database waits to be taken in: this supervisor ends.
    staged: bool,
}

fn to_error(error: &StateError) -> Error {
    let code = match error {
        StateError::DiskFull(_) => return Error::disk_full(error.to_string()),
        StateError::Corrupt(_) | StateError::Newer { .. } | StateError::Database(_) => Code::Corrupt,
        _ => Code::Internal,
    };
    Error::new(code, error.to_string())
}

impl Supervisor {
    fn database_path(&self) -> PathBuf {
        self.config.paths.data.join("state.db")
    }

    /// Begins a backup.
    pub(super) fn ask_backup(&mut self, key: u64, tag: &str) -> Result<(), Error> {
        if !self.backups.making.is_empty() {
            return Err(Error::new(Code::InUse, "another backup is being made"));
        }
        let ticket = self.database.copy(backup::copy_of(&self.database_path()));
        self.backups.making.insert(ticket, (key, tag.to_string()));
        self.add_job(key, tag, Job::Backup);
        Ok(())
    }

    /// A copy of the database is made; `false` when the ticket is another's.
    pub(super) fn backed_up(&mut self, ticket: Ticket, result: &Result<(), StateError>) -> bool {
        let Some((key, tag)) = self.backups.making.remove(&ticket) else { return false };
        let path = backup::copy_of(&self.database_path());
        let opened = result.as_ref().map_err(to_error).and_then(|()| {
            fs::File::open(&path).map_err(|e| Error::new(Code::Internal, format!("{}: {e}", path.display())))
        });
        // It is there for as long as it is read.
        if let Err(e) = backup::remove(&path) {
            log::warn!("backup: {e}");
        }
        let wanted = self.clients.get(&key).is_some_and(|client| client.jobs.contains_key(&tag));
        match opened {
            Ok(file) if wanted => self.add_job(key, &tag, Job::Logs(Box::new(Reader::of_file(CHANNEL, file)))),
            Ok(_) => {}
            Err(error) if wanted => self.finish(key, &Message::err(&tag, error)),
            Err(error) => log::error!("backup: {error}"),
        }
        true
    }

    /// Begins to take a database from a client.
    pub(super) fn ask_restore(&mut self, key: u64, tag: &str, force: bool) -> Result<(), Error> {
        if self.backups.restoring.is_some() || self.backups.staged {
            return Err(Error::new(Code::InUse, "another restore is under way"));
        }
        let Some(client) = self.clients.get(&key) else { return Ok(()) };
        let who = client.identity().clone();
        let by = AuditRow {
            began_ms: now_ms(),
            ended_ms: Some(now_ms()),
            peer: who.peer,
            owner: who.owner,
            role: who.role.to_string(),
            verb: "node.restore".to_string(),
            result: Some("ok".to_string()),
            ..AuditRow::default()
        };
        let (path, report) = (self.database_path(), self.background.reporter());
        let (upload, feed) = transfer::upload(MAX_BYTES, move || report(Done::Moved(key)));
        let whose = (key, tag.to_string());
        self.background
            .run("restore", move || {
                let part = backup::part_of(&path);
                let gathered = gather(&part, feed);
                let result = gathered.and_then(|()| backup::check(&part, &by));
                if result.is_err()
                    && let Err(e) = backup::remove(&part)
                {
                    log::warn!("restore: {e}");
                }
                Done::Restored { client: whose.0, tag: whose.1, result }
            })
            .map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))?;
        self.backups.restoring = Some((key, tag.to_string()));
        self.add_job(key, tag, Job::Restore { upload, force });
        Ok(())
    }

    /// A database was gathered and checked, or was not.
    pub(super) fn restored(&mut self, key: u64, tag: &str, result: Result<Contents, StateError>) {
        self.backups.restoring = None;
        let job = self.clients.get_mut(&key).and_then(|client| client.jobs.remove(tag));
        let Some(Job::Restore { force, .. }) = job else {
            // Nobody waits for it any more.
            return self.discard_restore();
        };
        let staged = result.map_err(|e| to_error(&e)).and_then(|contents| {
            self.refuse_loss(&contents.sandboxes, force)?;
            let failed = |e: io::Error| Error::new(Code::Internal, format!("the copy cannot be put in place: {e}"));
            backup::stage(&self.database_path()).map_err(failed)?;
            Ok(contents)
        });
        match staged {
            Ok(contents) => {
                log::warn!("the state database is restored; the next supervisor begins with it");
                self.backups.staged = true;
                let fields = Fields::new().with("sandboxes", contents.sandboxes.len()).with("size", contents.bytes);
                self.finish(key, &Message::ok(tag, fields.with("node", contents.node_id)));
                self.hand_over();
            }
            Err(error) => {
                self.discard_restore();
                self.finish(key, &Message::err(tag, error));
            }
        }
    }

    /// What the next supervisor does not know, it takes down.
    fn refuse_loss(&self, known: &BTreeSet<String>, force: bool) -> Result<(), Error> {
        let lost = self.sandboxes.keys().filter(|id| !known.contains(id.as_str())).count();
        if lost == 0 || force {
            return Ok(());
        }
        let message = format!("{lost} sandboxes of this node are not in it and would be taken down; force to do so");
        Err(Error::new(Code::BadState, message).with("sandboxes", lost))
    }

    fn discard_restore(&self) {
        if let Err(e) = backup::remove(&backup::part_of(&self.database_path())) {
            log::warn!("restore: {e}");
        }
    }
}

/// Writes what comes. A client that is gone before the end is an error.
fn gather(part: &Path, mut feed: Feed) -> Result<(), StateError> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StateError::DiskFull(e.to_string()),
        io::ErrorKind::ConnectionAborted => StateError::Closed,
        _ => StateError::Io(format!("{}: {e}", part.display())),
    };
    backup::remove(part)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(part).map_err(failed)?;
    io::copy(&mut feed, &mut file).map_err(failed)?;
    file.sync_all().map_err(failed)
}
