//! Rows of snapshots and frozen layers in the state database.

use std::fmt;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ValueRef};
use rusqlite::{Connection, Row, params};

use crate::storage::schema::{rows, signed, unsigned};
use crate::storage::state::StateError;

pub(in crate::storage) const MIGRATION: &str = "
    CREATE TABLE snapshots (
        id              TEXT PRIMARY KEY,
        name            TEXT,
        owner           TEXT NOT NULL,
        sandbox         TEXT,               -- that it was taken of
        template        TEXT NOT NULL,
        template_sha256 TEXT NOT NULL,
        created_ms      INTEGER NOT NULL,
        vcpus           INTEGER NOT NULL,
        memory_bytes    INTEGER NOT NULL,
        disk_bytes      INTEGER NOT NULL,
        kind            TEXT NOT NULL,      -- pause, snapshot, template, export, fork, step
        state           TEXT NOT NULL,      -- making, ready, removing
        memory_below    TEXT,               -- the snapshot whose memory shows in this one's holes
        memory_seal     TEXT,               -- digest of its memory file by fs-verity, in hex
        layer           TEXT,               -- newest frozen layer of its disk
        next_overlay    TEXT,               -- while it is made: the overlay that its sandbox goes on with
        bytes           INTEGER NOT NULL,   -- on the disk
        settings        TEXT NOT NULL       -- of its sandbox
    ) STRICT, WITHOUT ROWID;
    CREATE UNIQUE INDEX snapshots_name ON snapshots (owner, name) WHERE state != 'removing';
    CREATE TABLE layers (
        id    TEXT PRIMARY KEY,
        below TEXT,                         -- the layer under it; NULL over the base
        bytes INTEGER NOT NULL              -- on the disk
    ) STRICT, WITHOUT ROWID;
    ALTER TABLE sandboxes ADD COLUMN layer TEXT;     -- newest frozen layer under its own overlay
    ALTER TABLE sandboxes ADD COLUMN snapshot TEXT;  -- where it is paused, or whose memory it maps
    ALTER TABLE sandboxes ADD COLUMN overlay TEXT;   -- name of its own overlay; NULL: overlay
";

/// Words of an enum as the database has them.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$what:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub enum $name {
            $($(#[$what])* $variant,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As the database and the protocol have it.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }

            /// Reads what `word` gives.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.word() == word)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                Self::from_word(value.as_str()?).ok_or(FromSqlError::InvalidType)
            }
        }
    };
}

words! {
    /// What a snapshot is there for.
    SnapshotKind {
        /// A sandbox is paused in it, and it goes when that goes on.
        Pause = "pause",
        /// Somebody asked for it; it stays until somebody removes it or retention does.
        #[default]
        Snapshot = "snapshot",
        /// Sandboxes of a template start from it; it goes with the template.
        Template = "template",
        /// Made to be exported; it goes afterwards.
        Export = "export",
        /// Made for sandboxes to go on from; it goes when they have it.
        Fork = "fork",
        /// A template was being built: the same build goes on from there. Its name is its key. It goes with the template
        /// that was built on, or when there are too many.
        Step = "step",
    }
}

words! {
    /// How far it is with a snapshot.
    SnapshotState {
        /// Being made. After a start of the supervisor nobody makes it any more, and it goes.
        #[default]
        Making = "making",
        /// All of it is on the medium.
        Ready = "ready",
        /// Removed. Nobody sees it; its memory file stays while others need it.
        Removing = "removing",
    }
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotRow {
    /// Primary key, and the name of its directory.
    pub id: String,
    /// Unique among its owner's that are not being removed.
    pub name: Option<String>,
    /// Whose it is.
    pub owner: String,
    /// The sandbox that it was taken of; that may be gone.
    pub sandbox: Option<String>,
    /// Name of the sandbox's template.
    pub template: String,
    /// Hash of the template's image, in hex: the base of its disk.
    pub template_sha256: String,
    /// Unix time in milliseconds.
    pub created_ms: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory of the guest, which is the length of the memory file.
    pub memory_bytes: u64,
    /// Size of the root disk.
    pub disk_bytes: u64,
    /// What it is for.
    pub kind: SnapshotKind,
    /// How far it is.
    pub state: SnapshotState,
    /// The snapshot whose memory shows in the holes of this one's; `None` for a flat file.
    pub memory_below: Option<String>,
    /// What fs-verity has to measure of the memory file, in hex, where it was sealed.
    pub memory_seal: Option<String>,
    /// The newest frozen layer of its disk; `None` where its disk is the base, or, paused, what its sandbox has.
    pub layer: Option<String>,
    /// While it is made: the name of the overlay that its sandbox goes on with. See `files`.
    pub next_overlay: Option<String>,
    /// Room that its files take on the disk, without layers.
    pub bytes: u64,
    /// Further settings of its sandbox, as the node writes them.
    pub settings: String,
}

/// One frozen layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerRow {
    /// Primary key, and the name of its file.
    pub id: String,
    /// The layer under it; `None` over the base.
    pub below: Option<String>,
    /// Room that it takes on the disk.
    pub bytes: u64,
}

const COLUMNS: &str =
    "id, name, owner, sandbox, template, template_sha256, created_ms, vcpus, memory_bytes, disk_bytes,
    kind, state, memory_below, memory_seal, layer, next_overlay, bytes, settings";

pub(in crate::storage) fn snapshots(connection: &Connection) -> Result<Vec<SnapshotRow>, StateError> {
    let read = |row: &Row<'_>| -> rusqlite::Result<SnapshotRow> {
        Ok(SnapshotRow {
            id: row.get(0)?,
            name: row.get(1)?,
            owner: row.get(2)?,
            sandbox: row.get(3)?,
            template: row.get(4)?,
            template_sha256: row.get(5)?,
            created_ms: unsigned(row, 6)?,
            vcpus: row.get(7)?,
            memory_bytes: unsigned(row, 8)?,
            disk_bytes: unsigned(row, 9)?,
            kind: row.get(10)?,
            state: row.get(11)?,
            memory_below: row.get(12)?,
            memory_seal: row.get(13)?,
            layer: row.get(14)?,
            next_overlay: row.get(15)?,
            bytes: unsigned(row, 16)?,
            settings: row.get(17)?,
        })
    };
    rows(connection, &format!("SELECT {COLUMNS} FROM snapshots ORDER BY created_ms, id LIMIT ?1"), read)
}

pub(in crate::storage) fn layers(connection: &Connection) -> Result<Vec<LayerRow>, StateError> {
    rows(connection, "SELECT id, below, bytes FROM layers ORDER BY id LIMIT ?1", |row| {
        Ok(LayerRow { id: row.get(0)?, below: row.get(1)?, bytes: unsigned(row, 2)? })
    })
}

pub(in crate::storage) fn put_snapshot(connection: &Connection, row: &SnapshotRow) -> Result<(), StateError> {
    // Not INSERT OR REPLACE: that would take away another one of the same name.
    let set: Vec<String> =
        COLUMNS.split(',').skip(1).map(|column| format!("{0} = excluded.{0}", column.trim())).collect();
    let sql = format!(
        "INSERT INTO snapshots ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16,
                                                   ?17, ?18)
         ON CONFLICT (id) DO UPDATE SET {}",
        set.join(", ")
    );
    connection.prepare(&sql)?.execute(params![
        row.id,
        row.name,
        row.owner,
        row.sandbox,
        row.template,
        row.template_sha256,
        signed(row.created_ms),
        row.vcpus,
        signed(row.memory_bytes),
        signed(row.disk_bytes),
        row.kind.word(),
        row.state.word(),
        row.memory_below,
        row.memory_seal,
        row.layer,
        row.next_overlay,
        signed(row.bytes),
        row.settings,
    ])?;
    Ok(())
}

pub(in crate::storage) fn remove_snapshot(connection: &Connection, id: &str) -> Result<(), StateError> {
    connection.prepare("DELETE FROM snapshots WHERE id = ?1")?.execute([id])?;
    Ok(())
}

pub(in crate::storage) fn put_layer(connection: &Connection, row: &LayerRow) -> Result<(), StateError> {
    connection.prepare("INSERT OR REPLACE INTO layers (id, below, bytes) VALUES (?1, ?2, ?3)")?.execute(params![
        row.id,
        row.below,
        signed(row.bytes)
    ])?;
    Ok(())
}

pub(in crate::storage) fn remove_layer(connection: &Connection, id: &str) -> Result<(), StateError> {
    connection.prepare("DELETE FROM layers WHERE id = ?1")?.execute([id])?;
    Ok(())
}
