//! A process that never outlives the test, however the test ends.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A running process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Arc<Mutex<Child>>,
    /// Keeps the thread that started the process alive.
    _keeper: Sender<()>,
}

impl Process {
    /// Starts a program that the kernel kills when this process dies, even by a signal.
    ///
    /// The kernel ties that promise to the *thread* that started the program, and each test runs in a short
    /// one: so a thread is made for it that lives as long as the `Process`.
    pub fn spawn(mut command: Command) -> io::Result<Self> {
        let (keeper, until_dropped) = channel::<()>();
        let (started, start) = channel();
        std::thread::spawn(move || {
            // SAFETY: prctl with these constants only sets a flag of the calling process and is
            // async-signal-safe, as code between fork and exec has to be.
            unsafe {
                command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                });
            }
            let _ = started.send(command.spawn());
            let _ = until_dropped.recv();
        });
        let child = start.recv().map_err(io::Error::other)??;
        Ok(Self { child: Arc::new(Mutex::new(child)), _keeper: keeper })
    }

    /// Its exit status once it has ended.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().expect("no thread panics with this lock").try_wait().ok().flatten()
    }

    /// Waits for its end at most that long.
    pub fn wait(&self, time: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + time;
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if Instant::now() >= end {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What it writes to standard output, where that is a pipe that nobody has taken yet.
    pub fn take_output(&self) -> Option<ChildStdout> {
        self.child.lock().expect("no thread panics with this lock").stdout.take()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.lock().expect("no thread panics with this lock").id()
    }

    /// Ends it at once, and waits until it is gone.
    pub fn kill(&self) {
        let mut child = self.child.lock().expect("no thread panics with this lock");
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
