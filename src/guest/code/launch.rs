//! From a language's start command to a running process.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use mio::Interest;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use super::context::{Context, Process, Start};
use super::{Agent, TASKS_MAX};
use crate::guest::agent::Kind;
use crate::guest::exec::{self, Cgroup, Plan};
use crate::guest::files;
use crate::guest::settings::variable;
use crate::guest::verbs::{candidates, string, strings};
use crate::wire::{Code, Error};

/// Where runners and sources are: a file system of the agent's own, in memory.
const DIRECTORY: &str = "/run/warren";
/// Warren's own runners, by the words that stand for them.
const RUNNERS: [(&str, &str, &[u8]); 3] = [
    ("{python}", "runner.py", include_bytes!("runners/runner.py")),
    ("{javascript}", "runner.js", include_bytes!("runners/runner.js")),
    ("{bash}", "runner.sh", include_bytes!("runners/runner.sh")),
];
/// The word that stands for the source of a language without a runner.
const SOURCE: &str = "{source}";
/// Memory of a context when nothing is said, in MiB, where the sandbox has so much.
const MEMORY_MIB: u64 = 512;

impl Agent {
    /// Starts a context's process. `source` is for one that is no runner.
    ///
    /// # Errors
    /// `NO_CAPACITY` when it cannot be started; what its arguments ask for and cannot be had.
    pub(super) fn launch(&mut self, number: u64, source: &[u8]) -> Result<(), Error> {
        let lost = || Error::new(Code::NotFound, format!("there is no context {number}")).with("context", number);
        let context = self.contexts.get_mut(&number).ok_or_else(lost)?;
        context.starts += 1;
        let (starts, start) = (context.starts, context.start.clone());
        let no_room = |what: &str, e: &dyn std::fmt::Display| {
            Error::new(Code::NoCapacity, format!("cannot start {}: {what}: {e}", start.language))
        };
        let source_file = PathBuf::from(DIRECTORY).join(format!("source-{number}"));
        if !start.runner {
            put(&source_file, source).map_err(|e| no_room("its source", &e))?;
            context.source = Some(source_file.clone());
        }
        let argv = start.argv.iter().map(|word| replaced(word, &source_file)).collect::<io::Result<Vec<_>>>();
        let argv = argv.map_err(|e| no_room("its runner", &e))?;

        let identity = self.settings.identity(start.user.as_deref())?;
        let env = self.settings.environment(identity.as_ref(), false, start.env.clone());
        let cwd = match &start.cwd {
            Some(cwd) => files::resolve(&self.settings.cwd, cwd)?,
            None => self.settings.cwd.clone(),
        };
        if let (true, None, Err(_)) = (self.pid1, &start.cwd, fs::metadata(&cwd)) {
            // A run may have taken it away; the next one is to work again.
            let owner = self.settings.owner(start.user.as_deref())?;
            let _ = files::make_directory(&cwd, 0o755, owner, true);
        }
        let (control, theirs) = UnixStream::pair().map_err(|e| no_room("its control channel", &e))?;
        control.set_nonblocking(true).map_err(|e| no_room("its control channel", &e))?;
        let (result, result_of_child) = pipe2(OFlag::O_CLOEXEC).map_err(|e| no_room("its results", &e))?;
        fcntl(&result, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| no_room("its results", &e))?;
        let program = argv.first().cloned().unwrap_or_default();
        let confined = self.confines(identity.as_ref(), start.user.as_deref())?;
        let plan = Plan {
            candidates: strings("start", candidates(&program, variable(&env, b"PATH").unwrap_or_default()))?,
            argv: strings("start", argv)?,
            env: strings("env", env)?,
            cwd: string("cwd", cwd.into_os_string().into_encoded_bytes())?,
            identity,
            terminal: None,
            stdin: false,
            confined: self.pid1,
            isolated: !start.network,
            passed: vec![OwnedFd::from(theirs), result_of_child],
        };
        let memory_mib = start.memory_mib.unwrap_or(MEMORY_MIB);
        let mut cgroup = self.users.as_mut().and_then(|users| users.create_named(&format!("code-{number}.{starts}")));
        let limited = match &cgroup {
            Some(cgroup) if self.pid1 => cgroup.limit(memory_mib << 20, TASKS_MAX),
            None if self.pid1 => Err(io::Error::from(io::ErrorKind::Unsupported)),
            // A machine that is no sandbox may have other cgroups than these.
            _ => Ok(()),
        };
        // Without its bounds code does not run.
        let spawned = limited.map_err(|e| no_room("its bounds", &e)).and_then(|()| {
            exec::spawn(
                &plan,
                &self.null,
                cgroup.as_ref().map(Cgroup::directory),
                self.realm.as_ref().filter(|_| confined),
            )
            .map_err(|errno| no_room("its process", &errno.desc()).with("errno", format!("{errno:?}")))
        });
        let spawned = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                if let (Some(cgroup), Some(users)) = (cgroup.take(), &mut self.users) {
                    users.retire(cgroup);
                }
                return Err(error);
            }
        };
        let both = Interest::READABLE | Interest::WRITABLE;
        let watched = self.watch(&spawned.birth.status, Kind::Context, number, Interest::READABLE);
        let watched = watched.and_then(|()| self.watch(&control, Kind::Context, number, both));
        let stderr =
            spawned.stderr.map_or_else(|| self.null.try_clone(), Ok).map_err(|e| no_room("its streams", &e))?;
        let pipes = [spawned.stdout, stderr, std::fs::File::from(result)];
        let control = start.runner.then_some(control);
        let process = Process::new(spawned.pid, spawned.birth, control, pipes, cgroup, !start.network);
        if let Err(e) = watched {
            process.kill();
            self.forget_process(Some(process));
            return Err(no_room("its streams", &e));
        }
        if let Some(context) = self.contexts.get_mut(&number) {
            context.ended = None;
            context.start.memory_mib = Some(memory_mib);
            context.process = Some(process);
        }
        self.busy_contexts.insert(number);
        Ok(())
    }

    /// Enters a context and starts it.
    pub(super) fn new_context(&mut self, start: Start, kept: bool, source: &[u8]) -> Result<u64, Error> {
        // Those that are kept are what clients see: 1, 2, 3.
        let next = if kept { &mut self.next_context } else { &mut self.next_own_context };
        let number = *next;
        *next += 1;
        self.contexts.insert(number, Context::new(start, kept));
        match self.launch(number, source) {
            Ok(()) => Ok(number),
            Err(error) => {
                self.contexts.remove(&number);
                Err(error)
            }
        }
    }
}

/// What a word of a start command means.
fn replaced(word: &[u8], source: &Path) -> io::Result<Vec<u8>> {
    if word == SOURCE.as_bytes() {
        return Ok(source.as_os_str().as_encoded_bytes().to_vec());
    }
    let Some((_, name, content)) = RUNNERS.iter().find(|(stands, ..)| stands.as_bytes() == word) else {
        return Ok(word.to_vec());
    };
    let path = PathBuf::from(DIRECTORY).join(name);
    if !fs::metadata(&path).is_ok_and(|meta| meta.len() == content.len() as u64) {
        put(&path, content)?;
    }
    Ok(path.into_os_string().into_encoded_bytes())
}

/// A file that every user of the sandbox may read.
fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(DIRECTORY) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    file.write_all(content)
}

/// Most memory that a context may have, in MiB: what the sandbox has, but for what its kernel and agent need.
pub(super) fn memory_limit_mib() -> u64 {
    // SAFETY: sysinfo is plain data for which all zeros is a valid value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: sysinfo fills one sysinfo.
    if unsafe { libc::sysinfo(&mut info) } != 0 {
        return MEMORY_MIB;
    }
    let total = info.totalram.saturating_mul(u64::from(info.mem_unit)) >> 20;
    total.saturating_sub((total / 16).max(24)).max(16)
}

/// The memory of a context: what is asked for, if there is so much; the default, or what there is.
pub(super) fn memory(asked: Option<u64>) -> Result<u64, Error> {
    let most = memory_limit_mib();
    match asked {
        Some(mib) if mib > most => {
            let message = format!("memory_mib={mib} is out of range: 16 to {most}, which is what the sandbox can give");
            Err(Error::new(Code::OutOfRange, message).with("argument", "memory_mib").with("min", 16).with("max", most))
        }
        Some(mib) => Ok(mib),
        None => Ok(MEMORY_MIB.min(most)),
    }
}

/// Checks that words can be arguments of a program.
pub(super) fn check_words(words: &[Vec<u8>]) -> Result<(), Error> {
    words.iter().try_for_each(|word| match CString::new(word.as_slice()) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(Code::BadArgument, "start has a NUL").with("argument", "start")),
    })
}
