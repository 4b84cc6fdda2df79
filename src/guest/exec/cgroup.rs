//! One cgroup (version 2) for each program: by it a program's daemons are found and killed, and its use
//! of CPU and memory is counted. Where there is no writable cgroup2 everything here is absent.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// The cgroup above the programs' cgroups.
#[derive(Debug)]
pub(crate) struct Users {
    path: PathBuf,
    /// Cgroups whose program has ended while daemons of it live on; removed when those have gone.
    inhabited: Vec<PathBuf>,
}

impl Users {
    /// Makes the cgroup `name` below the root of cgroup2 and gives it the controllers that programs
    /// need. `None` when cgroups cannot be used.
    pub(crate) fn prepare(name: &str) -> Option<Self> {
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .into_iter()
            .map(Path::new)
            .find(|path| statfs(*path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC))?;
        let path = root.join(name);
        enable_controllers(root);
        match nix::unistd::mkdir(&path, nix::sys::stat::Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(_) => return None,
        }
        enable_controllers(&path);
        Some(Self { path, inhabited: Vec::new() })
    }

    /// Bounds the tasks of all programs together, so that a fork bomb leaves the agent room for threads.
    pub(crate) fn leave_room_for_tasks(&self) {
        let most = read_number(Path::new("/proc/sys/kernel/threads-max"));
        if let Some(most) = most {
            let _ = fs::write(self.path.join("pids.max"), (most / 4 * 3).max(64).to_string());
        }
    }

    /// Orders all programs to stand still, or to go on. Whether they do stand still, `are_frozen` tells.
    pub(crate) fn order(&self, still: bool) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), if still { "1" } else { "0" })
    }

    /// A file for `are_frozen`, which is also announced as having priority data (poll(2)) when the answer changes.
    pub(crate) fn events(&self) -> io::Result<File> {
        File::open(self.path.join("cgroup.events"))
    }

    /// Tasks of all programs, threads counted each; `None` when the kernel does not count them.
    pub(crate) fn tasks(&self) -> Option<u64> {
        read_number(&self.path.join("pids.current"))
    }

    /// A fresh cgroup for one program.
    pub(crate) fn create(&mut self, id: u64) -> Option<Cgroup> {
        self.create_named(&format!("exec-{id}"))
    }

    /// A fresh cgroup of that name.
    pub(crate) fn create_named(&mut self, name: &str) -> Option<Cgroup> {
        let path = self.path.join(name);
        // One that daemons of an earlier program of this number keep is not reused.
        nix::unistd::mkdir(&path, nix::sys::stat::Mode::from_bits_truncate(0o755)).ok()?;
        match File::open(&path) {
            Ok(directory) => Some(Cgroup { path, directory }),
            Err(_) => {
                let _ = fs::remove_dir(&path);
                None
            }
        }
    }

    /// Removes a program's cgroup, now or when its last daemon has gone.
    pub(crate) fn retire(&mut self, cgroup: Cgroup) {
        self.sweep();
        if is_inhabited(&cgroup.path) {
            self.inhabited.push(cgroup.path);
        }
    }

    /// Tries the cgroups again that were still inhabited. Orphans that the keeper reaps nobody hears of: the next program's
    /// end is soon enough.
    pub(crate) fn sweep(&mut self) {
        self.inhabited.retain(|path| is_inhabited(path));
    }

    /// Kills every program, and removes all cgroups. For the end of an agent that is not PID 1.
    pub(crate) fn abolish(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        for _ in 0..100 {
            if let Ok(entries) = fs::read_dir(&self.path) {
                for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
                    let _ = fs::remove_dir(entry.path());
                }
            }
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Whether everything in the group that `events` is of stands still.
pub(crate) fn are_frozen(events: &File) -> bool {
    let mut text = [0; 256];
    let len = events.read_at(&mut text, 0).unwrap_or(0);
    text.get(..len).unwrap_or_default().split(|&b| b == b'\n').any(|line| line == b"frozen 1")
}

/// Removes a cgroup unless processes are in it.
fn is_inhabited(path: &Path) -> bool {
    fs::remove_dir(path).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

fn enable_controllers(path: &Path) {
    let control = path.join("cgroup.subtree_control");
    // All at once, or, when the kernel lacks one, each that it has.
    if fs::write(&control, "+memory +pids +cpu").is_err() {
        for controller in ["+memory", "+pids", "+cpu"] {
            let _ = fs::write(&control, controller);
        }
    }
}

/// The cgroup of one program.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: File,
}

impl Cgroup {
    /// For CLONE_INTO_CGROUP.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Bounds what is in it: octets of memory, at whose end all of it is killed together, and tasks.
    pub(crate) fn limit(&self, memory: u64, tasks: u64) -> io::Result<()> {
        // Where there is no swap there is no such file.
        let _ = fs::write(self.path.join("memory.swap.max"), "0");
        fs::write(self.path.join("memory.oom.group"), "1")?;
        fs::write(self.path.join("memory.max"), memory.to_string())?;
        fs::write(self.path.join("pids.max"), tasks.to_string())
    }

    /// How often the bound of its tasks refused one.
    pub(crate) fn refused_tasks(&self) -> u64 {
        let events = read_small(&self.path.join("pids.events")).unwrap_or_default();
        events.lines().find_map(|line| line.strip_prefix("max ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Kills everything in it. `false` when the kernel cannot (before 5.14).
    pub(crate) fn kill(&self) -> bool {
        fs::write(self.path.join("cgroup.kill"), "1").is_ok()
    }

    /// CPU time used in it so far, in microseconds.
    pub(crate) fn cpu_us(&self) -> Option<u64> {
        let stat = read_small(&self.path.join("cpu.stat"))?;
        stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())
    }

    /// The most memory that was used in it, in KiB. Page cache that it filled counts.
    pub(crate) fn peak_kib(&self) -> Option<u64> {
        Some(read_number(&self.path.join("memory.peak"))?.div_ceil(1024))
    }

    /// Whether something in it was killed because there was no memory.
    pub(crate) fn ran_out(&self) -> bool {
        let events = read_small(&self.path.join("memory.events")).unwrap_or_default();
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok());
        kills.is_some_and(|kills| kills > 0)
    }
}

fn read_number(path: &Path) -> Option<u64> {
    read_small(path)?.trim().parse().ok()
}

fn read_small(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(4096).read_to_string(&mut text).ok()?;
    Some(text)
}
