//! What a paused sandbox is: its state and its memory, in its home.
//!
//! The memory may be a difference to what the sandbox was paused as before, or to a snapshot's. Its file has a name that says
//! so, and what it is over has one beside it, until the one is made whole of the other (`settle_paused`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::{Home, absent_is_fine};
use crate::storage::memory_file::{self, MemoryFileError};

/// A point between two steps of `settle_paused`: where a test has it fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settling {
    /// The memory is a difference.
    Begun,
    /// The whole memory is on the medium.
    Copied,
    /// It is what it is paused as.
    Renamed,
}

/// The files of a pause, for its worker.
#[derive(Debug)]
pub struct PauseFiles {
    /// Readable and writable.
    pub state: File,
    /// Readable and writable, of the memory's length.
    pub memory: File,
    /// What the memory may be a difference to, for reading.
    pub below: Option<File>,
}

/// Directories of a sandbox that is paused, and of one that is about to be.
const PAUSED: &str = "paused";
const PAUSING: &str = "pausing";
/// In those: the memory; or where it is a difference, that, and what it is over: a file of the sandbox's own, or one that others
/// have, too.
const MEMORY: &str = "memory";
const DIFFERENCE: &str = "difference";
const OWN: &str = "own";
const BELOW: &str = "below";
/// The memory that the sandbox was paused as before, and that its worker has mapped since: nobody else has.
pub(super) const MAPPED: &str = "mapped";

impl Home {
    /// Makes the files of a pause: state, and memory of that length, which may be a difference to that of the snapshot that
    /// the sandbox went on from, or where it was paused before, to what it was then. Nothing of them counts before
    /// `commit_pause`.
    pub fn begin_pause(&self, memory_bytes: u64, snapshot: Option<&Path>) -> io::Result<PauseFiles> {
        let dir = self.dir.join(PAUSING);
        absent_is_fine(fs::remove_dir_all(&dir))?;
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let (state, memory) = (options.open(dir.join("state"))?, options.open(dir.join(MEMORY))?);
        memory_file::create(&memory, memory_bytes).map_err(MemoryFileError::into_io)?;
        let mut below = None;
        if memory_file::keeps_holes(&memory, memory_bytes).map_err(MemoryFileError::into_io)? {
            // By a name of its own it stays for as long as it is needed, whatever becomes of the snapshot.
            let (from, name) = match snapshot {
                Some(snapshot) => (snapshot.to_path_buf(), BELOW),
                None => (self.dir.join(MAPPED), OWN),
            };
            let linked = fs::hard_link(from, dir.join(name)).and_then(|()| File::open(dir.join(name)));
            below = match linked {
                Err(e) if e.kind() == ErrorKind::NotFound => None,
                Err(e) => {
                    log::warn!("{}: all of its memory is written: {e}", self.dir.display());
                    None
                }
                Ok(file) => Some(file),
            };
        }
        Ok(PauseFiles { state, memory, below })
    }

    /// Puts the files of a pause on the medium; then they are what the sandbox is paused as. Where the memory is a difference,
    /// `settle_paused` has to follow before it goes on. Blocks.
    pub fn commit_pause(&self, files: &PauseFiles, is_difference: bool) -> io::Result<()> {
        let pausing = self.dir.join(PAUSING);
        if is_difference {
            fs::rename(pausing.join(MEMORY), pausing.join(DIFFERENCE))?;
        } else {
            [OWN, BELOW].into_iter().try_for_each(|name| absent_is_fine(fs::remove_file(pausing.join(name))))?;
        }
        files.state.sync_all()?;
        files.memory.sync_all()?;
        // What its programs said so far goes with them.
        let outputs = self.dir.join("exec");
        for output in fs::read_dir(&outputs)? {
            absent_is_fine(File::open(output?.path()).and_then(|output| output.sync_all()))?;
        }
        File::open(outputs)?.sync_all()?;
        File::open(&pausing)?.sync_all()?;
        absent_is_fine(fs::remove_dir_all(self.dir.join(PAUSED)))?;
        fs::rename(pausing, self.dir.join(PAUSED))?;
        File::open(&self.dir)?.sync_all()
    }

    /// Whether there is what a paused sandbox is.
    pub fn has_paused(&self) -> bool {
        self.dir.join(PAUSED).exists()
    }

    /// Whether the memory of a paused sandbox is whole, and alone: it can go on.
    pub fn is_settled(&self) -> bool {
        let has = |name: &str| self.dir.join(PAUSED).join(name).exists();
        has(MEMORY) && ![DIFFERENCE, OWN, BELOW].into_iter().any(has)
    }

    /// Makes the memory of a paused sandbox whole; it is on the medium on return. What is its own takes what differs from it,
    /// of what others have it takes what is the same. Its worker is gone, and nobody else touches these files meanwhile.
    /// May be interrupted anywhere and done again. Blocks.
    pub fn settle_paused(
        &self,
        memory_bytes: u64,
        reached: &mut dyn FnMut(Settling) -> io::Result<()>,
    ) -> Result<(), MemoryFileError> {
        let io = |doing| move |cause| MemoryFileError::Io { doing, cause };
        let dir = self.dir.join(PAUSED);
        let of = |name: &str| dir.join(name);
        let open = |name: &str| OpenOptions::new().read(true).write(true).open(of(name));
        if !of(MEMORY).exists() {
            reached(Settling::Begun).map_err(io("opening the diff"))?;
            let difference = open(DIFFERENCE).map_err(io("opening the diff"))?;
            let whole = match open(OWN) {
                Ok(own) => {
                    memory_file::apply(&difference, &own, memory_bytes)?;
                    OWN
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    let below = File::open(of(BELOW)).map_err(io("opening what is below the diff"))?;
                    memory_file::flatten(&difference, &below, memory_bytes)?;
                    DIFFERENCE
                }
                Err(e) => return Err(io("opening what is below the diff")(e)),
            };
            reached(Settling::Copied).map_err(io("syncing the memory file"))?;
            fs::rename(of(whole), of(MEMORY)).map_err(io("renaming the memory file"))?;
        }
        File::open(&dir).and_then(|dir| dir.sync_all()).map_err(io("syncing its directory"))?;
        reached(Settling::Renamed).map_err(io("syncing its directory"))?;
        let mut rest = [DIFFERENCE, OWN, BELOW].into_iter();
        rest.try_for_each(|name| absent_is_fine(fs::remove_file(of(name)))).map_err(io("tidying up"))
    }

    /// State and memory of a paused sandbox.
    pub fn open_paused(&self) -> io::Result<(File, File)> {
        let dir = self.dir.join(PAUSED);
        Ok((File::open(dir.join("state"))?, File::open(dir.join(MEMORY))?))
    }

    /// The sandbox is no longer what it was paused as, also after a power cut. A worker that has the files keeps them, and
    /// the memory has a name for the next pause. Fine where there are none. Blocks.
    pub fn leave_paused(&self) -> io::Result<()> {
        let gone = self.dir.join(PAUSING);
        absent_is_fine(fs::remove_dir_all(&gone))?;
        absent_is_fine(fs::rename(self.dir.join(PAUSED), &gone))?;
        File::open(&self.dir)?.sync_all()?;
        absent_is_fine(fs::rename(gone.join(MEMORY), self.dir.join(MAPPED)))?;
        absent_is_fine(fs::remove_dir_all(gone))
    }

    /// Takes away what there is of a pause. Best effort: what stays goes with the sandbox, or with its next pause.
    pub fn drop_paused(&self) {
        for name in [PAUSED, PAUSING] {
            if let Err(e) = absent_is_fine(fs::remove_dir_all(self.dir.join(name))) {
                log::warn!("{}/{name} cannot be removed: {e}", self.dir.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Places;
    use super::*;
    use crate::sandbox::id::SandboxId;
    use crate::storage::memory_file::PAGE;
    use std::os::unix::fs::{FileExt, MetadataExt};

    const LEN: u64 = 16 * PAGE;

    fn fill(file: &File, page: u64, octet: u8) {
        file.write_all_at(&[octet; PAGE as usize], page * PAGE).unwrap();
    }

    /// The first octet of each page.
    fn pages(home: &Home) -> Vec<u8> {
        let (_, memory) = home.open_paused().unwrap();
        let mut octets = vec![0; LEN as usize];
        memory.read_exact_at(&mut octets, 0).unwrap();
        octets.chunks(PAGE as usize).map(|page| page[0]).collect()
    }

    fn home(name: &str) -> Home {
        let root = std::env::temp_dir().join(format!("warren-home-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let places = Places { disks: root.join("disks"), sockets: root.join("sockets"), cgroups: root.join("cgroups") };
        let home = places.of(&SandboxId::random().unwrap());
        fs::create_dir_all(home.dir().join("exec")).unwrap();
        home
    }

    /// Pauses it as what differs from `snapshot` or from what it was paused as before: pages 1 and 2, the latter given up.
    fn pause(home: &Home, snapshot: Option<&Path>, octet: u8) {
        let files = home.begin_pause(LEN, snapshot).unwrap();
        assert!(files.below.is_some());
        fill(&files.memory, 1, octet);
        fill(&files.memory, 2, 0);
        home.commit_pause(&files, true).unwrap();
        assert!(home.has_paused() && !home.is_settled() && home.open_paused().is_err());
    }

    /// Makes it whole, dying at each point before.
    fn settle(home: &Home) {
        for at in [Settling::Begun, Settling::Copied, Settling::Renamed] {
            let died = home.settle_paused(LEN, &mut |point| match point == at {
                true => Err(io::Error::other("killed")),
                false => Ok(()),
            });
            assert!(died.is_err() && !home.is_settled(), "{at:?}");
        }
        home.settle_paused(LEN, &mut |_| Ok(())).unwrap();
        assert!(home.is_settled());
        let left = fs::read_dir(home.dir().join(PAUSED)).unwrap().map(|entry| entry.unwrap().file_name());
        let mut left: Vec<_> = left.collect();
        left.sort();
        assert_eq!(left, ["memory", "state"]);
    }

    #[test]
    fn a_pause_is_what_differs_from_the_one_before_or_from_a_snapshot_and_becomes_whole() {
        let home = home("pause");
        let snapshot = home.dir().parent().unwrap().join("memory");
        let file = File::options().read(true).write(true).create_new(true).open(&snapshot).unwrap();
        memory_file::create(&file, LEN).unwrap();
        (0..4).for_each(|page| fill(&file, page, 7));

        // Nothing is mapped that it could be over.
        let files = home.begin_pause(LEN, None).unwrap();
        assert!(files.below.is_none());

        pause(&home, Some(&snapshot), 8);
        settle(&home);
        assert_eq!(pages(&home)[..5], [7, 8, 0, 7, 0]);
        home.leave_paused().unwrap();
        assert!(!home.has_paused());

        let mapped = fs::metadata(home.dir().join(MAPPED)).unwrap().ino();
        pause(&home, None, 9);
        settle(&home);
        assert_eq!(pages(&home)[..5], [7, 9, 0, 7, 0]);
        let (_, memory) = home.open_paused().unwrap();
        assert_eq!(memory.metadata().unwrap().ino(), mapped, "only what differs was copied");
        assert_eq!(memory_file::taken(&memory).unwrap(), 3 * PAGE, "what was given up is a hole");
        home.leave_paused().unwrap();

        // One that comes to nothing leaves what is mapped; one that is whole needs nothing else.
        drop(home.begin_pause(LEN, None).unwrap());
        home.drop_paused();
        let files = home.begin_pause(LEN, None).unwrap();
        fill(&files.memory, 3, 1);
        home.commit_pause(&files, false).unwrap();
        assert!(home.is_settled());
        assert_eq!(pages(&home)[..5], [0, 0, 0, 1, 0]);
        let mut octet = [0];
        file.read_exact_at(&mut octet, PAGE).unwrap();
        assert_eq!(octet, [7], "the snapshot is as it was");
        home.release_worker().unwrap();
        assert!(!home.dir().join(MAPPED).exists());
        fs::remove_dir_all(home.dir().parent().unwrap().parent().unwrap()).unwrap();
    }
}
