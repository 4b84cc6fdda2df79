//! Measures the node from inside, where the virtual clock runs: `node-bench PART [PROGRAM]`.
//!
//! Rows go to standard output, tab-separated. All files are in RAM: a disk's speed has no meaning in virtual time.

mod clones;
mod code;
mod fleet;
mod jail;
mod net;
mod peer;
mod restore;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qemu_tests::bench::{Row, median};
use qemu_tests::connection::Connection;
use qemu_tests::rig::overhead_kib;
use warren::wire::{FRAME, Fields, INITIAL_CREDIT, Message, Request};

const CONTROL: &str = "/run/warren/control.sock";
const BOOTS: usize = 5;
/// Wall time scatters.
const WALL_BOOTS: usize = 11;
const EXECS: usize = 21;
const REQUESTS: u32 = 2000;
const STREAM_MIB: usize = 64;
const BLOCK_MIB: usize = 64;
/// Requests of 4 KiB, one at a time.
const SMALL: usize = 2048;
const MEMORY_MIB: u64 = 128;

/// Programs started without the supervisor.
static NEXT: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["boot"] => boot(),
        ["measure"] => measure(),
        ["wall"] => wall(),
        ["jail"] => jail::measure(),
        ["code"] => code::measure(),
        ["cycle"] => fleet::cycle(),
        ["restore"] => restore::measure(),
        ["warm"] => restore::warm(),
        ["many"] => fleet::many(),
        ["clones"] => clones::measure(),
        ["net"] => net::measure(None),
        ["net", peer] => net::measure(Some(peer)),
        ["peer", program] => peer::Peer::measure(program),
        _ => Err(io::Error::other(
            "usage: node-bench boot | measure | wall | jail | code | cycle | restore | warm | clones | many | net [PROGRAM] | peer PROGRAM",
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("node-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn print(name: &str, value: f64, unit: &str, condition: &str) {
    println!("{}", Row::new(name, value, unit, condition).to_tsv());
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Says on the console at which count of the time stamp counter the control socket answered. With QEMU's
/// -icount that counter is nanoseconds since the machine was switched on.
fn boot() -> io::Result<()> {
    let mut connection = loop {
        match Connection::open(Path::new(CONTROL)) {
            Ok(connection) => break connection,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    ask(&mut connection, Request::new("1", "hello"))?;
    // SAFETY: every x86-64 CPU has this instruction, and Linux lets programs use it.
    let counter = unsafe { std::arch::x86_64::_rdtsc() };
    writeln!(File::options().write(true).open("/dev/console")?, "\nbench: control socket answered at {counter}")?;
    // Whoever started this would start it again.
    loop {
        std::thread::park();
    }
}

/// Sends a request and waits for its end; gives its rows and the final fields.
fn ask(connection: &mut Connection, request: Request) -> io::Result<(Vec<Fields>, Fields)> {
    let (tag, verb) = (request.tag.clone(), request.verb.clone());
    connection.send(&Message::Request(request))?;
    let mut items = Vec::new();
    loop {
        match connection.receive()? {
            message if message.tag() != tag => {}
            Message::Item { fields, .. } => items.push(fields),
            Message::Data { channel, payload, .. } => {
                connection.send(&Message::credit(&tag, &channel, payload.len() as u64))?;
            }
            Message::Ok { fields, .. } => return Ok((items, fields)),
            Message::Err { error, .. } => return Err(io::Error::other(format!("{verb} failed: {error}"))),
            _ => {}
        }
    }
}

/// How an exec is asked for: over the control socket with a sandbox's id, of an agent without.
fn exec(sandbox: Option<&str>, argv: &[&str]) -> Request {
    let words = sandbox.into_iter().chain(argv.iter().copied());
    let request = words.fold(Request::new("e", "exec.start"), |request, word| request.arg(word)).set("user", 0);
    match sandbox {
        Some(_) => request,
        // The supervisor numbers programs from 1 and must not meet ours.
        None => request.set("id", 1_000_000 + NEXT.fetch_add(1, Ordering::Relaxed)),
    }
}

fn exec_time(connection: &mut Connection, request: Request) -> io::Result<Duration> {
    let start = Instant::now();
    let (_, fields) = ask(connection, request)?;
    let time = start.elapsed();
    match fields.get("exit") {
        Some("0") => Ok(time),
        other => Err(io::Error::other(format!("the program in the guest ended with {other:?}"))),
    }
}

/// Streams octets into a program that throws them away; MiB per second.
fn stream(connection: &mut Connection, sandbox: Option<&str>) -> io::Result<f64> {
    let frame = vec![0x5a_u8; FRAME];
    let mut left = STREAM_MIB << 20;
    let mut credit = INITIAL_CREDIT as usize;
    let start = Instant::now();
    let discard = exec(sandbox, &["sh", "-c", "cat > /dev/null"]);
    connection.send(&Message::Request(discard.set("stdin", true)))?;
    loop {
        while left > 0 && credit >= FRAME {
            connection.send(&Message::data("e", "stdin", frame.as_slice()))?;
            credit -= FRAME;
            left -= FRAME;
            if left == 0 {
                connection.send(&Message::end("e", "stdin"))?;
            }
        }
        match connection.receive()? {
            Message::Credit { octets, .. } => credit += octets as usize,
            Message::Ok { .. } => return Ok(STREAM_MIB as f64 / start.elapsed().as_secs_f64()),
            Message::Err { error, .. } => return Err(io::Error::other(format!("the stream failed: {error}"))),
            _ => {}
        }
    }
}

/// Writes a file through the control socket, with a sync, and reads it back; MiB per second each.
fn file_rates(connection: &mut Connection, id: &str) -> io::Result<(f64, f64)> {
    let frame = vec![0x5a_u8; FRAME];
    let request = |verb: &str| Request::new("f", verb).arg(id).set("path", "/workspace/rate");
    let failed = |message: &Message| match message {
        Message::Err { error, .. } => Err(io::Error::other(format!("the file failed: {error}"))),
        _ => Ok(()),
    };
    let (mut left, mut credit, start) = (STREAM_MIB << 20, INITIAL_CREDIT as usize, Instant::now());
    connection.send(&Message::Request(request("file.write")))?;
    let write = loop {
        while left > 0 && credit >= FRAME {
            connection.send(&Message::data("f", "content", frame.as_slice()))?;
            (credit, left) = (credit - FRAME, left - FRAME);
            if left == 0 {
                connection.send(&Message::end("f", "content"))?;
            }
        }
        let message = connection.receive()?;
        failed(&message)?;
        match message {
            Message::Credit { octets, .. } => credit += octets as usize,
            Message::Ok { .. } => break STREAM_MIB as f64 / start.elapsed().as_secs_f64(),
            _ => {}
        }
    };
    let start = Instant::now();
    connection.send(&Message::Request(request("file.read")))?;
    loop {
        let message = connection.receive()?;
        failed(&message)?;
        match message {
            Message::Data { payload, .. } => {
                connection.send(&Message::credit("f", "content", payload.len() as u64))?;
            }
            Message::Ok { .. } => return Ok((write, STREAM_MIB as f64 / start.elapsed().as_secs_f64())),
            _ => {}
        }
    }
}

/// How fast a guest's disk is.
struct BlockRates {
    write_mib_per_s: f64,
    read_mib_per_s: f64,
    reads_4k_per_s: f64,
    writes_4k_per_s: f64,
}

impl BlockRates {
    /// Prints a row each.
    fn print(&self, prefix: &str, below: &str) {
        let row = |name: &str, value, unit, how: &str| {
            print(&format!("{prefix}block_{name}"), value, unit, &format!("{how}, ext4, {below}"));
        };
        row("write_mib_per_s", self.write_mib_per_s, "MiB/s", "dd bs=1M conv=fsync in the guest");
        row("read_mib_per_s", self.read_mib_per_s, "MiB/s", "dd bs=1M in the guest, cold guest cache");
        row("4k_iops", self.reads_4k_per_s, "1/s", "dd bs=4k iflag=direct in the guest, one at a time");
        row("4k_write_iops", self.writes_4k_per_s, "1/s", "dd bs=4k oflag=direct in the guest, one at a time");
    }
}

/// Writes and reads a file in the guest, past its page cache.
fn block(connection: &mut Connection, sandbox: Option<&str>) -> io::Result<BlockRates> {
    let write = format!("dd if=/dev/zero of=/bench bs=1M count={BLOCK_MIB} conv=fsync 2>/dev/null");
    let write = exec_time(connection, exec(sandbox, &["sh", "-c", &write]))?;
    exec_time(connection, exec(sandbox, &["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"]))?;
    let read = exec_time(connection, exec(sandbox, &["sh", "-c", "dd if=/bench of=/dev/null bs=1M 2>/dev/null"]))?;
    let small = format!("dd if=/bench of=/dev/null bs=4k count={SMALL} iflag=direct 2>/dev/null");
    let small_read = exec_time(connection, exec(sandbox, &["sh", "-c", &small]))?;
    let small = format!("dd if=/dev/zero of=/bench bs=4k count={SMALL} oflag=direct conv=notrunc 2>/dev/null");
    let small_write = exec_time(connection, exec(sandbox, &["sh", "-c", &small]))?;
    let per_second = |amount: usize, time: Duration| amount as f64 / time.as_secs_f64();
    Ok(BlockRates {
        write_mib_per_s: per_second(BLOCK_MIB, write),
        read_mib_per_s: per_second(BLOCK_MIB, read),
        reads_4k_per_s: per_second(SMALL, small_read),
        writes_4k_per_s: per_second(SMALL, small_write),
    })
}

/// How often a sandbox's guest has left for KVM.
fn exits(id: &str) -> io::Result<f64> {
    let mut worker = Connection::open(Path::new(&format!("/run/warren/sandboxes/{id}.sock")))?;
    let (_, fields) = ask(&mut worker, Request::new("s", "vm.stats"))?;
    fields.get("kvm_exits").and_then(|n| n.parse().ok()).ok_or_else(|| io::Error::other("the worker counts no exits"))
}

fn first_line(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.lines().next().unwrap_or_default().to_string())
}

/// Creates sandboxes one after the other and prints the median of the times; gives the last one's id.
fn boots(control: &mut Connection, row: &str, vcpus: u64, count: usize) -> io::Result<String> {
    let mut times = Vec::new();
    let mut id = String::new();
    for run in 0..count {
        let create = Request::new("c", "sandbox.create").set("template", "base").set("vcpus", vcpus);
        let create = create.set("memory_mib", MEMORY_MIB).set("disk_mib", 512);
        let start = Instant::now();
        let (_, fields) = ask(control, create)?;
        times.push(milliseconds(start.elapsed()));
        id = fields.get("id").unwrap_or_default().to_string();
        if run + 1 < count {
            ask(control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
        }
    }
    let all = times.iter().map(|ms| format!("{ms:.1}")).collect::<Vec<_>>().join(" ");
    let condition = format!("create received to agent ready; base, {vcpus} vCPU, {MEMORY_MIB} MiB; median of {all}");
    print(row, median(&mut times), "ms", &condition);
    Ok(id)
}

/// What needs several processors of the node, by wall time. The rows of one processor are for comparison.
fn wall() -> io::Result<()> {
    let mut control = Connection::open(Path::new(CONTROL))?;
    for (row, vcpus) in [("boot_smp1_ms", 1), ("boot_smp4_ms", 4)] {
        let id = boots(&mut control, row, vcpus, WALL_BOOTS)?;
        ask(&mut control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
    }
    Ok(())
}

/// How long a node that has just started is at work by itself: its templates are hashed, its pools filled.
const START: Duration = Duration::from_secs(3);

fn measure() -> io::Result<()> {
    let mut control = Connection::open(Path::new(CONTROL))?;
    std::thread::sleep(START);
    let id = boots(&mut control, "cold_boot_ms", 1, BOOTS)?;

    let mut times = Vec::new();
    for _ in 0..EXECS {
        times.push(milliseconds(exec_time(&mut control, exec(Some(&id), &["true"]))?));
    }
    print("exec_true_ms", median(&mut times), "ms", &format!("control socket to exit status; median of {EXECS}"));

    let worker = first_line(&format!("/sys/fs/cgroup/sandboxes/{id}/cgroup.procs"))?;
    let worker = worker.parse().map_err(|_| io::Error::other(format!("sandbox {id} has no worker")))?;
    print(
        "worker_overhead_kib",
        overhead_kib(worker, MEMORY_MIB)? as f64,
        "KiB",
        "private pages outside guest memory; idle after boot and execs",
    );

    let start = Instant::now();
    for _ in 0..REQUESTS {
        ask(&mut control, Request::new("i", "sandbox.inspect").arg(&id))?;
    }
    let rate = f64::from(REQUESTS) / start.elapsed().as_secs_f64();
    print("control_requests_per_s", rate, "1/s", "sandbox.inspect, one client, one at a time");

    let rate = stream(&mut control, Some(&id))?;
    print("exec_stdin_mib_per_s", rate, "MiB/s", "control socket to a program's stdin");
    let mut agent = Connection::open(Path::new(&format!("/run/warren/sandboxes/{id}.sock")))?;
    ask(&mut agent, Request::new("v", "vsock.connect").set("port", 1024))?;
    agent.receive()?; // the agent's greeting: from here on the connection is the vsock stream
    print("vsock_mib_per_s", stream(&mut agent, None)?, "MiB/s", "worker's socket to a program's stdin");
    drop(agent);

    let (write, read) = file_rates(&mut control, &id)?;
    print("file_write_mib_per_s", write, "MiB/s", "control socket to a file in the guest, synced");
    print("file_read_mib_per_s", read, "MiB/s", "a file in the guest's page cache to the control socket");

    let before = exits(&id)?;
    block(&mut control, Some(&id))?.print("", "overlay in tmpfs");
    let moved = (2 * BLOCK_MIB + 2 * SMALL * 4096 / (1 << 20)) as f64;
    let rate = (exits(&id)? - before) / moved;
    print("block_exits_per_mib", rate, "1/MiB", "exits of the guest during the block rows above");
    ask(&mut control, Request::new("r", "sandbox.remove").arg(&id).set("force", true))?;
    Ok(())
}
