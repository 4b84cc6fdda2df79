//! What a sandbox holds on the node: a directory, a socket, a cgroup. Made in one place, taken down in one place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::paused::MAPPED;
use super::id::SandboxId;
use crate::storage::snapshots::files::OVERLAY;

mod paused;

pub use self::paused::Settling;

/// Where sandboxes keep their things.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directories of sandboxes, on the data partition.
    pub disks: PathBuf,
    /// Sockets of workers, in memory: they end with the node's boot.
    pub sockets: PathBuf,
    /// Parent of the sandboxes' cgroups.
    pub cgroups: PathBuf,
}

impl Places {
    /// Makes the parents that are not there.
    pub fn prepare(&self) -> io::Result<()> {
        for dir in [&self.disks, &self.sockets, &self.cgroups] {
            // What is above may be for others too: the control socket is in the same place.
            if let Some(above) = dir.parent() {
                fs::create_dir_all(above)?;
            }
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        Ok(())
    }

    /// The places of one sandbox.
    pub fn of(&self, id: &SandboxId) -> Home {
        Home {
            dir: self.disks.join(id.as_str()),
            socket: self.sockets.join(format!("{id}.sock")),
            cgroup: self.cgroups.join(id.as_str()),
            overlay: OVERLAY.to_string(),
        }
    }
}

/// The places of one sandbox.
#[derive(Debug, Clone)]
pub struct Home {
    dir: PathBuf,
    socket: PathBuf,
    cgroup: PathBuf,
    /// Name of the private disk's file, which each snapshot changes.
    overlay: String,
}

/// Descriptors of a freshly made home, for its worker.
#[derive(Debug)]
pub struct Opened {
    /// Takes the guest's serial log; opened for appending.
    pub serial: File,
    /// Where the worker leaves why it ended.
    pub last_words: File,
    /// Takes what the worker says.
    pub log: File,
    /// The worker's listening socket.
    pub listener: UnixListener,
    /// The cgroup's directory.
    pub cgroup: File,
}

impl Home {
    /// The sandbox's id.
    pub fn id(&self) -> Option<&str> {
        self.dir.file_name()?.to_str()
    }

    /// Whether its directory is there, which is made first and taken down last.
    pub fn is_there(&self) -> bool {
        self.dir.exists()
    }

    /// Whether there is something of its worker.
    pub fn holds_worker(&self) -> bool {
        self.socket.exists() || self.cgroup.exists()
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The private disk.
    pub fn overlay(&self) -> PathBuf {
        self.dir.join(&self.overlay)
    }

    /// Name of the private disk's file.
    pub fn overlay_name(&self) -> &str {
        &self.overlay
    }

    /// The private disk's file is this one from now on.
    pub fn use_overlay(&mut self, name: &str) {
        self.overlay = name.to_string();
    }

    /// The files of private disks: one, or two while a snapshot or rollback changes it.
    pub fn overlays(&self) -> Vec<PathBuf> {
        overlays_in(&self.dir)
    }

    /// The cgroup's directory.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A disk of that size, in octets, that goes with the sandbox; empty when it is new.
    pub fn make_disk(&self, name: &str, bytes: u64) -> io::Result<File> {
        let disks = self.disks();
        match fs::DirBuilder::new().mode(0o700).create(&disks) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let mut options = OpenOptions::new();
        // There already where the sandbox is started again.
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(disks.join(name))?;
        file.set_len(bytes)?;
        Ok(file)
    }

    /// Its own disks beside the private one.
    fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    /// The serial log.
    pub fn serial_log(&self) -> PathBuf {
        self.dir.join("serial.log")
    }

    /// What its programs log by the guest's own service.
    pub fn guest_log(&self) -> PathBuf {
        self.dir.join("guest.log")
    }

    /// The end of the serial log: that many octets at most, nothing where it cannot be read.
    pub fn console_tail(&self, octets: usize) -> Vec<u8> {
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(self.serial_log())?;
            let length = file.metadata()?.len();
            let mut tail = vec![0; octets.min(usize::try_from(length).unwrap_or(usize::MAX))];
            let start = length - tail.len() as u64;
            file.read_exact_at(&mut tail, start)?;
            Ok(tail)
        };
        read().unwrap_or_default()
    }

    /// What the worker said.
    pub fn worker_log(&self) -> PathBuf {
        self.dir.join("worker.log")
    }

    /// Why the worker ended.
    pub fn last_words(&self) -> PathBuf {
        self.dir.join("last-words")
    }

    /// The worker's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Output of a program: `channel` is `stdout` or `stderr`.
    pub fn output(&self, exec: u64, channel: &str) -> PathBuf {
        self.dir.join("exec").join(format!("{exec}.{channel}"))
    }

    /// Makes directory, files, socket and cgroup; the private disk is `take_overlay`'s. On failure the caller takes down
    /// what was made.
    pub fn make(&self) -> io::Result<Opened> {
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        private.create(&self.dir)?;
        private.create(self.dir.join("exec"))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let last_words = options.open(self.last_words())?;
        let append = |path: PathBuf| OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path);
        let (serial, log) = (append(self.serial_log())?, append(self.worker_log())?);
        let listener = UnixListener::bind(&self.socket)?;
        listener.set_nonblocking(true)?;
        fs::create_dir(&self.cgroup)?;
        let cgroup = File::open(&self.cgroup)?;
        Ok(Opened { serial, last_words, log, listener, cgroup })
    }

    /// Makes socket and cgroup again, for another worker of a sandbox that has its directory. On failure the caller takes
    /// down what was made, and keeps the disks.
    pub fn renew(&self) -> io::Result<Opened> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).mode(0o600);
        let last_words = options.clone().truncate(true).open(self.last_words())?;
        let append = |path: PathBuf| OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path);
        let (serial, log) = (append(self.serial_log())?, append(self.worker_log())?);
        absent_is_fine(fs::remove_file(&self.socket))?;
        let listener = UnixListener::bind(&self.socket)?;
        listener.set_nonblocking(true)?;
        fs::create_dir(&self.cgroup)?;
        let cgroup = File::open(&self.cgroup)?;
        Ok(Opened { serial, last_words, log, listener, cgroup })
    }

    /// Takes a file on the same file system as the private disk.
    pub fn take_overlay(&self, file: &Path) -> io::Result<()> {
        fs::rename(file, self.overlay())
    }

    /// Processes in the sandbox's cgroup, as pids of the node. Empty when there is no such cgroup.
    pub fn processes(&self) -> Vec<i32> {
        let listed = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap_or_default();
        listed.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills everything in the sandbox's cgroup.
    pub fn kill(&self) -> io::Result<()> {
        absent_is_fine(fs::write(self.cgroup.join("cgroup.kill"), "1"))
    }

    /// Takes down socket, cgroup and disks; log and outputs stay to be read. Blocks until the cgroup is empty,
    /// 10 s at most: not for the supervisor's loop.
    pub fn release(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(&self.socket))?;
        self.overlays().into_iter().try_for_each(|overlay| absent_is_fine(fs::remove_file(overlay)))?;
        absent_is_fine(fs::remove_dir_all(self.disks()))?;
        absent_is_fine(fs::remove_file(self.dir.join(MAPPED)))?;
        self.release_cgroup()
    }

    /// Takes down socket and cgroup and keeps the disks. Blocks like `release`.
    pub fn release_worker(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(&self.socket))?;
        absent_is_fine(fs::remove_file(self.dir.join(MAPPED)))?;
        self.release_cgroup()
    }

    /// Takes down everything. Blocks like `release`.
    pub fn remove(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(&self.socket))?;
        self.release_cgroup()?;
        absent_is_fine(fs::remove_dir_all(&self.dir))
    }

    fn release_cgroup(&self) -> io::Result<()> {
        self.kill()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match absent_is_fine(fs::remove_dir(&self.cgroup)) {
                Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }
}

/// The files of private disks in a sandbox's directory.
pub fn overlays_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_overlay = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.starts_with(OVERLAY));
    entries.filter(is_overlay).map(|entry| entry.path()).collect()
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
