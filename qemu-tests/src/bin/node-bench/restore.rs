//! How fast sandboxes start from a snapshot of their template, and how fast they are forked.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use qemu_tests::bench::median;
use qemu_tests::connection::Connection;
use warren::wire::{Fields, Request};

use super::{CONTROL, MEMORY_MIB, ask, exec, exec_time, milliseconds, print};

const STARTS: usize = 11;
const FORKS: u64 = 10;
/// What a guest writes before it is taken, in MiB.
const DIRTY_MIB: u64 = 4;
/// The pools are full again by then.
const AFTERWARDS: Duration = Duration::from_millis(500);

/// Sandboxes that had started before they were asked for.
pub fn warm() -> io::Result<()> {
    let mut control = Connection::open(Path::new(CONTROL))?;
    let shape = |request: Request| request.set("memory_mib", MEMORY_MIB).set("network", "on");
    ask(&mut control, shape(Request::new("t", "template.snapshot").arg("base")))?;
    let (mut ready, mut done) = (Vec::new(), Vec::new());
    for _ in 0..=STARTS {
        // The pool is full again by then.
        std::thread::sleep(AFTERWARDS * 4);
        let begin = Instant::now();
        let (_, fields) = ask(&mut control, shape(Request::new("c", "sandbox.create")))?;
        ready.push(milliseconds(begin.elapsed()));
        let id = fields.get("id").unwrap_or_default().to_string();
        exec_time(&mut control, exec(Some(&id), &["true"]))?;
        done.push(milliseconds(begin.elapsed()));
        ask(&mut control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
        println!("#");
    }
    // The first was booted.
    ready.remove(0);
    done.remove(0);
    let condition = format!("base, 1 vCPU, {MEMORY_MIB} MiB, network, jailed, started before; create sent to ");
    let of = format!("median of {STARTS}");
    print("warm_create_ms", median(&mut ready), "ms", &format!("{condition}its ok, the agent configured; {of}"));
    print("warm_create_exec_ms", median(&mut done), "ms", &format!("{condition}the exit status of true; {of}"));
    Ok(())
}

/// Sandboxes that start from a snapshot, one after the other, and ten at once from one that runs.
pub fn measure() -> io::Result<()> {
    let mut control = Connection::open(Path::new(CONTROL))?;
    let (mut ready, mut done) = (Vec::new(), Vec::new());
    let mut create = |control: &mut Connection| -> io::Result<String> {
        let begin = Instant::now();
        let request = Request::new("c", "sandbox.create").set("memory_mib", MEMORY_MIB).set("network", "on");
        let (_, fields) = ask(control, request)?;
        ready.push(milliseconds(begin.elapsed()));
        let id = fields.get("id").unwrap_or_default().to_string();
        exec_time(control, exec(Some(&id), &["true"]))?;
        done.push(milliseconds(begin.elapsed()));
        Ok(id)
    };
    let snapshot =
        Request::new("t", "template.snapshot").arg("base").set("memory_mib", MEMORY_MIB).set("network", "on");
    ask(&mut control, snapshot)?;
    for _ in 0..STARTS {
        std::thread::sleep(AFTERWARDS);
        let id = create(&mut control)?;
        ask(&mut control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
        println!("#");
    }
    let parent = create(&mut control)?;
    // The first is the one that finds nothing in any cache.
    ready.remove(0);
    done.remove(0);
    let condition = format!("base, 1 vCPU, {MEMORY_MIB} MiB, network, jailed; create sent to ");
    let of = format!("median of {STARTS}");
    print("restore_ms", median(&mut ready), "ms", &format!("{condition}its ok, the agent configured; {of}"));
    print("restore_exec_ms", median(&mut done), "ms", &format!("{condition}the exit status of true; {of}"));
    std::thread::sleep(AFTERWARDS);
    let begin = Instant::now();
    let (forks, _) = ask(&mut control, Request::new("f", "snapshot.fork").arg(&parent).set("n", FORKS))?;
    let time = milliseconds(begin.elapsed());
    if forks.len() as u64 != FORKS {
        return Err(io::Error::other(format!("{} of {FORKS} forks", forks.len())));
    }
    let condition =
        format!("one processor: a running sandbox's snapshot, and {FORKS} that go on from it, all configured");
    print("fork_10_ms", time, "ms", &condition);
    for fork in forks.iter().filter_map(|fork| fork.get("id")) {
        ask(&mut control, Request::new("r", "sandbox.remove").arg(fork).set("force", true))?;
    }
    kept(&mut control, &parent)
}

/// Octets that the first of these files takes that is there.
fn room(paths: &[String]) -> u64 {
    paths.iter().find_map(|path| std::fs::metadata(path).ok()).map_or(0, |meta| meta.blocks() * 512)
}

/// What snapshots and pauses of a sandbox that went on from its template's snapshot write, and how long they take.
fn kept(control: &mut Connection, id: &str) -> io::Result<()> {
    let dirty = |control: &mut Connection| {
        let script = format!("dd if=/dev/urandom of=/dev/shm/dirty bs=1M count={DIRTY_MIB} 2>/dev/null");
        exec_time(control, exec(Some(id), &["sh", "-c", &script]))
    };
    let timed = |control: &mut Connection, request: Request| -> io::Result<(f64, Fields)> {
        let begin = Instant::now();
        let (_, fields) = ask(control, request)?;
        Ok((milliseconds(begin.elapsed()), fields))
    };
    let with = format!("base, 1 vCPU, {MEMORY_MIB} MiB, {DIRTY_MIB} MiB written before");
    for round in ["", "again_"] {
        std::thread::sleep(AFTERWARDS);
        dirty(control)?;
        let (time, fields) = timed(control, Request::new("s", "snapshot.create").arg(id))?;
        let snapshot = fields.get("id").unwrap_or_default();
        let memory = ["difference", "memory"].map(|name| format!("/data/snapshots/{snapshot}/{name}"));
        let bytes = room(&memory) as f64;
        let of = if round.is_empty() { "of one that went on from a snapshot" } else { "of the same" };
        print(&format!("snapshot_{round}ms"), time, "ms", &format!("snapshot.create sent to its ok, {of}; {with}"));
        print(
            &format!("snapshot_{round}bytes_written"),
            bytes,
            "octets",
            &format!("memory that is there by then; {with}"),
        );
        println!("#");
    }
    for round in ["", "again_", "third_"] {
        std::thread::sleep(AFTERWARDS);
        dirty(control)?;
        let (time, _) = timed(control, Request::new("p", "sandbox.pause").arg(id))?;
        let bytes = room(&["difference", "memory"].map(|name| format!("/data/sandboxes/{id}/paused/{name}"))) as f64;
        let of = if round.is_empty() { "of one that went on from a snapshot" } else { "of one that was paused before" };
        print(&format!("pause_{round}ms"), time, "ms", &format!("sandbox.pause sent to its ok, {of}; {with}"));
        print(
            &format!("pause_{round}bytes_written"),
            bytes,
            "octets",
            &format!("memory that is there by then; {with}"),
        );
        let (time, _) = timed(control, Request::new("u", "sandbox.resume").arg(id))?;
        print(
            &format!("resume_{round}ms"),
            time,
            "ms",
            &format!("sandbox.resume sent to its ok, right after that; {with}"),
        );
        println!("#");
    }
    Ok(())
}
