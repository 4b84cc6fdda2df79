//! What the jail costs a start: a program that closes its jail as a worker does, beside one that does nothing.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use qemu_tests::bench::median;
use qemu_tests::files::TempDir;
use qemu_tests::rig::Worker;
use warren::sandbox::spawn::{Parent, Spawner};

use super::{milliseconds, print};

const PROBE: &str = "/test/bin/jail-probe";
const STARTS: usize = 51;

pub fn measure() -> io::Result<()> {
    let home = TempDir::new()?;
    let path = |name: &str| home.path().join(name);
    let listener = UnixListener::bind(path("socket"))?;
    let last_words = File::create(path("last-words"))?;
    let spawner = Spawner::of(File::open(PROBE)?, &["jail-probe", "close"], Parent::Caller)?;
    let spawned = |spawner: &Spawner| {
        times(|| {
            let mut worker = Worker::by(spawner, &listener, &last_words, &path("log"));
            match worker.end() {
                Some(status) if status.success() => Ok(()),
                other => Err(io::Error::other(format!("jail-probe ended with {other:?}"))),
            }
        })
    };
    let jailed = spawned(&spawner)?;
    let confined = spawned(&spawner.another(File::open(PROBE)?, &["jail-probe", "nothing"])?)?;
    let plain = times(|| {
        let status = Command::new(PROBE).arg("nothing").stdin(Stdio::null()).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("jail-probe ended with {status}"))) }
    })?;
    print(
        "jail_cost_ms",
        jailed - plain,
        "ms",
        "a program that closes a worker's jail and ends, less one that only ends; medians of 51",
    );
    print(
        "jail_spawn_cost_ms",
        confined - plain,
        "ms",
        "the part of it that is before the program runs, and after its end: namespaces, user, limits; medians of 51",
    );
    Ok(())
}

fn times(mut start: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    let mut all = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        let begin = Instant::now();
        start()?;
        all.push(milliseconds(begin.elapsed()));
        // What the kernel does after a process' end is nobody's waiting time.
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(median(&mut all))
}
