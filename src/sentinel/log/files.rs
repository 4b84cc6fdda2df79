//! The file operations that the log needs, and no others, so that a disk, memory and a disk that fails (in tests)
//! stand behind the same log.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg, posix_fallocate};

/// One directory of files.
pub trait Files: Send + Sync {
    /// Names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A new, empty file with `size` octets of space that nobody can take any more. An existing one is an error.
    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn LogFile>>;
    /// An existing file.
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;
    /// Removes a file. Who has it open may go on reading it.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations and removals durable.
    fn sync_directory(&self) -> io::Result<()>;
    /// Octets that may still be allocated.
    fn free(&self) -> io::Result<u64>;
}

/// One file.
pub trait LogFile: Send + Sync {
    /// May read less than asked for; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// May write less than asked for.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize>;
    /// Makes everything written durable. After an error nothing is known about what was written since the last success.
    fn sync(&self) -> io::Result<()>;
    /// Its length.
    fn length(&self) -> io::Result<u64>;
    /// Cuts it or fills it up with zeroes.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

/// Reads until `buffer` is full or the file ends; gives how much.
pub fn read_full(file: &dyn LogFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Writes all of `data`.
pub fn write_full(file: &dyn LogFile, data: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        match file.write_at(&data[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A directory on a disk.
pub struct Disk {
    directory: PathBuf,
    handle: File,
    /// Kept for its lock, which ends with it.
    _lock: Option<Flock<File>>,
}

const LOCK: &str = "lock";

impl Disk {
    /// Makes the directory where it is missing (mode 0700) and takes it for this process alone.
    pub fn take(directory: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(directory.join(LOCK))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => io::Error::other("another sentinel uses it"),
            errno => errno.into(),
        })?;
        Ok(Self { handle: File::open(directory)?, directory: directory.into(), _lock: Some(lock) })
    }

    /// For looking at a directory, whoever uses it.
    pub fn look(directory: &Path) -> io::Result<Self> {
        Ok(Self { handle: File::open(directory)?, directory: directory.into(), _lock: None })
    }
}

impl Files for Disk {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            match entry.file_name().into_string() {
                Ok(name) if name != LOCK && entry.file_type()?.is_file() => names.push(name),
                _ => {}
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn LogFile>> {
        let path = self.directory.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let len = i64::try_from(size).map_err(io::Error::other)?;
        if size > 0
            && let Err(errno) = posix_fallocate(&file, 0, len)
        {
            let _ = fs::remove_file(&path);
            return Err(errno.into());
        }
        Ok(Arc::new(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let path = self.directory.join(name);
        let writable = self._lock.is_some();
        Ok(Arc::new(OpenOptions::new().read(true).write(writable).open(path)?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.directory.join(name))
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn free(&self) -> io::Result<u64> {
        let stat = nix::sys::statvfs::fstatvfs(&self.handle)?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }
}

impl LogFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
}

/// A directory in memory: what the buffer mode `memory` keeps its log in. Gone with the process.
#[derive(Default)]
pub struct Memory(Mutex<BTreeMap<String, Arc<MemoryFile>>>);

/// Its octets.
#[derive(Default)]
struct MemoryFile(Mutex<Vec<u8>>);

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Files for Memory {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(hold(&self.0).keys().cloned().collect())
    }

    fn create(&self, name: &str, _size: u64) -> io::Result<Arc<dyn LogFile>> {
        let file = Arc::new(MemoryFile::default());
        if hold(&self.0).contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        hold(&self.0).insert(name.to_string(), Arc::clone(&file));
        Ok(file)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        match hold(&self.0).get(name) {
            Some(file) => Ok(Arc::clone(file) as Arc<dyn LogFile>),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        hold(&self.0).remove(name).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_directory(&self) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

impl LogFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let data = hold(&self.0);
        let there = data.get(offset as usize..).unwrap_or_default();
        let count = there.len().min(buffer.len());
        buffer[..count].copy_from_slice(&there[..count]);
        Ok(count)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        let mut file = hold(&self.0);
        let end = offset as usize + data.len();
        if file.len() < end {
            file.resize(end, 0);
        }
        file[offset as usize..end].copy_from_slice(data);
        Ok(data.len())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(hold(&self.0).len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        hold(&self.0).resize(len as usize, 0);
        Ok(())
    }
}
