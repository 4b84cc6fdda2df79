//! A microVM as files and back, below the supervisor: how long a guest stands still for a snapshot, how large that is, how
//! fast a worker makes a guest of it, and what many of those cost.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use qemu_tests::bench::median;
use qemu_tests::connection::Connection;
use qemu_tests::rig::{Setup, Snapshot, Tap, TapFlags, Vm, own_network};
use warren::sandbox::worker::AGENT_PORT;
use warren::wire::{Message, Request};

use crate::{MEMORY_MIB, ask, exec, exec_time, milliseconds, print};

const MAC: &str = "02:00:00:00:08:02";
const OTHER_MAC: &str = "02:00:00:00:08:03";
const GUEST: &str = "10.8.1.1/31";
const OTHER: (&str, &str) = ("10.8.2.1/31", "10.8.2.0");
/// Restores, of which the median is taken.
const RESTORES: usize = 7;
/// Snapshots of one guest that runs on.
const STOPS: usize = 7;
/// What it changes before each.
const DIRTY_MIB: u64 = 10;
/// Clones at once.
const CLONES: usize = 32;
/// By then a guest has told what it has free, and does nothing.
const REST: Duration = Duration::from_secs(10);

/// All of it.
pub fn measure() -> io::Result<()> {
    own_network();
    let flags = TapFlags { vnet_header: 12, offloads: 0 };
    let taps: Vec<Tap> = (0..CLONES).map(|n| Tap::create(&format!("clone{n}"), flags)).collect();
    let with_tap = |setup: Setup, tap: &Tap| -> io::Result<Setup> {
        Ok(setup.memory_mib(MEMORY_MIB).descriptor("tap", tap.file.try_clone()?).set("mac", MAC))
    };

    let vm = with_tap(Setup::new(), &taps[0])?.start();
    vm.agent().ok(Request::new("", "system.configure").set("address", GUEST));
    vm.sh("true");
    let frozen = vm.agent().ok(Request::new("", "system.freeze").set("wait_ms", 1000));
    if frozen.field("frozen") != "true" {
        return Err(io::Error::other("the guest's programs do not stand still"));
    }
    std::thread::sleep(REST);
    let template = vm.freeze(true);
    let state = fs::metadata(template.path("state"))?.blocks() * 512;
    let bytes = (template.memory_bytes() + state) as f64;
    let condition = format!("base after its boot, {MEMORY_MIB} MiB: memory and state, {state} of it state");
    print("snapshot_bytes", bytes, "octets", &condition);

    let clone = |tap| with_tap(Setup::new().cloned(&template), tap).map(Setup::start);
    restores("", "", || clone(&taps[0]))?;
    let (set, pages) = {
        let vm = clone(&taps[0])?;
        thaw(&mut agent(&vm)?.0)?;
        vm.working_set()
    };
    let prepared =
        |tap| -> io::Result<Vm> { Ok(with_tap(Setup::new().cloned(&template).working_set(&set), tap)?.start()) };
    restores("prepared_", &format!("; {pages} pages prepared"), || prepared(&taps[0]))?;
    let ready =
        |tap| Ok::<_, io::Error>(with_tap(Setup::new().cloned(&template).working_set(&set).prepared(), tap)?.start());
    let first = ready(&taps[0])?;
    let (fields, took) = first.prepared.as_ref().ok_or_else(|| io::Error::other("nothing was prepared"))?;
    let number = |key| fields.number(key).unwrap_or(0);
    let how = format!("; made before, {} pages its own, {} mapped", number("own"), number("mapped"));
    print("prepare_ms", milliseconds(*took), "ms", &format!("vm.prepare sent to its ok, of a worker that waits{how}"));
    drop(first);
    restores("ready_", &how, || ready(&taps[0]))?;
    stops(&clone(&taps[0])?)?;
    clones(&template, || taps.iter().map(clone).collect())
}

/// A restored guest's agent, after its greeting, and when that came.
fn agent(vm: &Vm) -> io::Result<(Connection, Duration)> {
    let mut agent = Connection::open(&vm.socket())?;
    ask(&mut agent, Request::new("v", "vsock.accept").set("port", AGENT_PORT))?;
    match agent.receive()? {
        Message::Ok { fields, .. } if fields.get("resumed") == Some("true") => Ok((agent, vm.began().elapsed())),
        other => Err(io::Error::other(format!("the agent greets with {other:?}"))),
    }
}

/// Makes it another machine. How long that takes.
fn thaw(agent: &mut Connection) -> io::Result<Duration> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let thaw = Request::new("t", "system.thaw")
        .set("id", "clone")
        .set("hostname", "clone")
        .set("clock_ns", clock)
        .set_bytes("seed", &[7; 64])
        .set("mac", OTHER_MAC)
        .set("address", OTHER.0)
        .set("gateway", OTHER.1)
        .set("mtu", 1500);
    let begin = Instant::now();
    ask(agent, thaw)?;
    Ok(begin.elapsed())
}

/// Prints the rows of restores; `prefix` stands before their names, `how` in their conditions.
fn restores(prefix: &str, how: &str, start: impl Fn() -> io::Result<Vm>) -> io::Result<()> {
    let (mut running, mut greeted, mut thawed, mut ran) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RESTORES {
        let vm = start()?;
        running.push(milliseconds(vm.took()));
        let (mut agent, time) = agent(&vm)?;
        greeted.push(milliseconds(time));
        thawed.push(milliseconds(thaw(&mut agent)?));
        ran.push(milliseconds(exec_time(&mut agent, exec(None, &["/bin/true"]))?));
    }
    let with = format!("worker that waits, base, {MEMORY_MIB} MiB, disk, network{how}; median of {RESTORES}");
    let first = greeted.first().copied().unwrap_or_default();
    let row = |name: &str, values: &mut [f64], condition: &str| {
        print(&format!("{prefix}{name}"), median(values), "ms", condition);
    };
    row("worker_resume_ms", &mut running, &format!("vm.start sent to its ok, the guest runs; {with}"));
    let condition = format!("vm.start sent to the agent's greeting; {with}; the first {first:.2}");
    row("worker_restore_ms", &mut greeted, &condition);
    let condition = format!("system.thaw with clock, seed, names and network{how}; median of {RESTORES}");
    row("thaw_ms", &mut thawed, &condition);
    let condition =
        format!("the first /bin/true of a restored guest, straight to its agent{how}; median of {RESTORES}");
    row("restored_exec_ms", &mut ran, &condition);
    Ok(())
}

fn stops(vm: &Vm) -> io::Result<()> {
    let (mut agent, _) = agent(vm)?;
    thaw(&mut agent)?;
    let mut stops = Vec::new();
    let mut written = 0;
    for _ in 0..STOPS {
        let dirty = format!("dd if=/dev/urandom of=/run/dirty bs=1M count={DIRTY_MIB} 2>/dev/null");
        exec_time(&mut agent, exec(None, &["sh", "-c", &dirty]))?;
        let (_, captured) = vm.capture(true, false, true);
        let number = |key| captured.number(key).ok_or_else(|| io::Error::other(format!("no {key} in {captured:?}")));
        stops.push(number("stopped_us")? as f64 / 1e3);
        written = number("memory_bytes")?;
    }
    let all = stops.iter().map(|ms| format!("{ms:.2}")).collect::<Vec<_>>().join(" ");
    let condition = format!(
        "its processors stand still; a restored guest, {MEMORY_MIB} MiB, {DIRTY_MIB} MiB written, {} KiB differ; median of {all}",
        written >> 10
    );
    print("pause_stop_ms", median(&mut stops), "ms", &condition);
    Ok(())
}

/// What the node has for programs, in KiB.
fn available_kib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let value =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    value.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn clones(template: &Snapshot, start: impl Fn() -> io::Result<Vec<Vm>>) -> io::Result<()> {
    std::thread::sleep(REST);
    let before = available_kib()?;
    let all = start()?;
    let mut agents = Vec::new();
    for vm in &all {
        let (mut agent, _) = agent(vm)?;
        thaw(&mut agent)?;
        agents.push(agent);
    }
    std::thread::sleep(REST);
    // A node has these on its disk.
    let files: u64 = all.iter().map(Vm::files_kib).sum();
    let each = before.saturating_sub(available_kib()?).saturating_sub(files) as f64 / all.len() as f64;
    let condition = format!(
        "MemAvailable, before and after {CLONES} idle clones of one memory file ({} KiB), {} s after their start, less {files} KiB \
         of their disks' and logs' files, which are in memory here; each",
        template.memory_bytes() >> 10,
        REST.as_secs()
    );
    print("clone_private_kib", each, "KiB", &condition);
    let workers: u64 = all.iter().map(|vm| vm.process().overhead_kib(MEMORY_MIB)).sum::<io::Result<u64>>()?;
    let condition = "of clone_private_kib: private pages of the worker outside of its guest's memory; mean";
    print("clone_worker_kib", workers as f64 / all.len() as f64, "KiB", condition);
    let guests = all.iter().map(|vm| vm.process().guest_kib(MEMORY_MIB)).sum::<io::Result<u64>>()?;
    let condition = "of clone_private_kib: pages of the guest's memory that are its own; mean";
    print("clone_guest_kib", guests as f64 / all.len() as f64, "KiB", condition);
    Ok(())
}
