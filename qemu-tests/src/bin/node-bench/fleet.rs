//! What sandboxes cost the node: the processor's time for one from its creation to its removal, the supervisor's memory
//! with many of them, and how fast its successor takes them over.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use qemu_tests::bench::median;
use qemu_tests::connection::Connection;
use warren::wire::{Message, Request};

use super::{CONTROL, ask, exec, exec_time, milliseconds, print};

/// Sandboxes one after the other.
const CYCLES: u32 = 10;
/// What follows an answer (a pool that is filled again, what is taken down) is over by then.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// Sandboxes at once.
const MANY: u32 = 100;
/// How long these do nothing.
const IDLE_MINUTES: u32 = 4;
/// Each of them has this much memory.
const SMALL_MIB: u64 = 64;

/// How long the processors of the node have had nothing to do since its boot (proc(5), /proc/uptime).
fn idle() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/uptime")?;
    text.split_whitespace().nth(1).and_then(|word| word.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The processor's time of one sandbox, from `sandbox.create` over one program to what follows its removal. The node
/// has one processor.
pub fn cycle() -> io::Result<()> {
    let mut control = Connection::open(Path::new(CONTROL))?;
    let mut started = Vec::new();
    let mut round = || -> io::Result<()> {
        let id = create(&mut control, &mut started)?;
        exec_time(&mut control, exec(Some(&id), &["true"]))?;
        ask(&mut control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
        Ok(())
    };
    round()?;
    std::thread::sleep(AFTERWARDS);
    let (begin, before) = (Instant::now(), idle()?);
    for _ in 0..CYCLES {
        round()?;
        still_there();
    }
    std::thread::sleep(AFTERWARDS);
    let busy = begin.elapsed().as_secs_f64() - (idle()? - before);
    let condition =
        format!("one processor, all that it did; base, 1 vCPU, {} MiB; mean of {CYCLES}", super::MEMORY_MIB);
    print("create_exec_remove_cpu_ms", busy * 1e3 / f64::from(CYCLES), "ms", &condition);
    let condition = format!("create sent to its worker having all that it needs; median of {}", started.len());
    print("create_to_start_ms", median(&mut started), "ms", &condition);
    Ok(())
}

/// Creates a sandbox; adds how long it took until its worker was told to start.
fn create(control: &mut Connection, started: &mut Vec<f64>) -> io::Result<String> {
    let create = Request::new("c", "sandbox.create").set("memory_mib", super::MEMORY_MIB).set("disk_mib", 512);
    let begin = Instant::now();
    control.send(&Message::Request(create.set("progress", true)))?;
    loop {
        match control.receive()? {
            Message::Item { fields, .. } if fields.get("state") == Some("starting") => {
                started.push(milliseconds(begin.elapsed()));
            }
            Message::Ok { fields, .. } => return Ok(fields.get("id").unwrap_or_default().to_string()),
            Message::Err { error, .. } => return Err(io::Error::other(format!("create failed: {error}"))),
            _ => {}
        }
    }
}

/// A line that is no row: who waits for the rows sees that it goes on.
fn still_there() {
    println!("#");
}

/// The process id of the supervisor.
fn supervisor() -> io::Result<u32> {
    let group = fs::read_to_string("/sys/fs/cgroup/supervise/cgroup.procs")?;
    group.lines().next().and_then(|line| line.parse().ok()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Kills the supervisor; how long until the next one answers with as many sandboxes running.
fn restart(running: u32) -> io::Result<f64> {
    let killed = i32::try_from(supervisor()?).map_err(|_| io::ErrorKind::InvalidData)?;
    let begin = Instant::now();
    // SAFETY: takes plain numbers.
    unsafe { libc::kill(killed, libc::SIGKILL) };
    loop {
        // The socket is there again before who answers on it has looked at everything.
        let answer = Connection::open(Path::new(CONTROL))
            .and_then(|mut control| ask(&mut control, Request::new("l", "sandbox.list").set("state", "running")));
        match answer {
            Ok((rows, _)) if rows.len() as u64 == u64::from(running) => return Ok(milliseconds(begin.elapsed())),
            Ok((rows, _)) => return Err(io::Error::other(format!("{} sandboxes run on, not {running}", rows.len()))),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// A value of /proc/PID/status in KiB.
fn status_kib(pid: u32, key: &str) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Processor time of the supervisor's control group so far: that of all supervisors since the boot.
fn processor_time() -> io::Result<Duration> {
    let text = fs::read_to_string("/sys/fs/cgroup/supervise/cpu.stat")?;
    let used = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    used.map(Duration::from_micros).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Many sandboxes at once.
pub fn many() -> io::Result<()> {
    let alone = restart(0)?;
    let mut control = Connection::open(Path::new(CONTROL))?;
    let idle_kib = status_kib(supervisor()?, "VmRSS")?;
    for _ in 0..MANY {
        let create = Request::new("c", "sandbox.create").set("memory_mib", SMALL_MIB);
        let (_, fields) = ask(&mut control, create)?;
        let id = fields.get("id").unwrap_or_default().to_string();
        exec_time(&mut control, exec(Some(&id), &["true"]))?;
        still_there();
    }
    std::thread::sleep(AFTERWARDS);
    let pid = supervisor()?;
    let (all, anonymous) = (status_kib(pid, "VmRSS")?, status_kib(pid, "RssAnon")?);
    let condition =
        format!("VmRSS with {MANY} sandboxes after a program in each; anonymous {anonymous}; without any {idle_kib}");
    print("supervisor_rss_kib", all as f64, "KiB", &condition);
    // Whole rounds of probes: `health.probe_interval_s` is 30 by default.
    let before = processor_time()?;
    for _ in 0..IDLE_MINUTES {
        std::thread::sleep(Duration::from_secs(60));
        still_there();
    }
    let used = (processor_time()? - before).as_secs_f64();
    let condition = format!(
        "processor time of the supervisor with {MANY} sandboxes that do nothing, {IDLE_MINUTES} minutes, for each of them and \
         minute; {:.4} % of a processor in all",
        used / f64::from(60 * IDLE_MINUTES) * 100.0
    );
    print("supervisor_idle_us", used * 1e6 / f64::from(MANY * IDLE_MINUTES), "us", &condition);
    let each = (restart(MANY)? - alone) / f64::from(MANY);
    let condition =
        format!("kill -9 to the list of {MANY} that run, less the same without any ({alone:.1} ms), for each");
    print("adopt_ms", each, "ms", &condition);
    Ok(())
}
