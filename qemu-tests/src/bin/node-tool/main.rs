//! What the tests ask of the node from inside: `processes`, `state`, `talk SOCKET`, `disk OVERLAY BASE`, `claim VERSION
//! REAL SOCKET`, `pose MODE REAL SOCKET`; and what they run in a sandbox: `registers ROUNDS`.

mod stand_in;

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use qemu_tests::connection::Connection;
use warren::storage::overlay::Overlay;
use warren::wire::{Fields, Message, Request};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["processes"] => {
            for (pid, argv) in processes() {
                println!("{pid} {argv}");
            }
        }
        ["state"] => {
            let mut lines = state();
            lines.sort();
            println!("{}", lines.join("\n"));
        }
        ["talk", socket] => {
            if let Err(e) = talk(socket) {
                eprintln!("node-tool: {socket}: {e}");
                return ExitCode::FAILURE;
            }
        }
        ["disk", overlay, base] => {
            if let Err(e) = disk(overlay, base) {
                eprintln!("node-tool: {overlay} over {base}: {e}");
                return ExitCode::FAILURE;
            }
        }
        ["claim", version, real, socket] => {
            if let Err(e) = stand_in::claim(version, real, socket) {
                eprintln!("node-tool: {socket}: {e}");
                return ExitCode::FAILURE;
            }
        }
        ["pose", mode, real, socket] => {
            if let Err(e) = stand_in::pose(mode, real, socket) {
                eprintln!("node-tool: {socket}: {e}");
                return ExitCode::FAILURE;
            }
        }
        ["registers", rounds] => match rounds.parse().map_err(Into::into).and_then(registers) {
            Ok(kind) => println!("{kind} kept"),
            Err(e) => {
                eprintln!("node-tool: {e}");
                return ExitCode::FAILURE;
            }
        },
        _ => {
            eprintln!(
                "usage: node-tool processes | state | talk SOCKET | disk OVERLAY BASE | claim VERSION REAL SOCKET | pose MODE REAL SOCKET | registers ROUNDS"
            );
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// Every process with its arguments, but this one and the kernel's own threads (those have none).
fn processes() -> Vec<(u32, String)> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found: Vec<(u32, String)> = pids
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| {
            let octets = fs::read(format!("/proc/{pid}/cmdline")).ok().filter(|octets| !octets.is_empty())?;
            let text = String::from_utf8_lossy(&octets);
            Some((pid, text.trim_end_matches('\0').replace('\0', " ")))
        })
        .collect();
    found.sort_unstable();
    found
}

/// What the supervisor has made before anybody asked for it. Waits some seconds for pools that are being filled.
fn idle_homes() -> Vec<String> {
    let mut idle = Vec::new();
    for _ in 0..50 {
        let Ok(items) = node_info() else { break };
        let ids = items.iter().flat_map(|item| &item.0).filter(|(key, _)| key == "idle");
        idle = ids.map(|(_, id)| String::from_utf8_lossy(id).into_owned()).collect();
        let full = |item: &Fields| {
            let number = |key: &str| item.number(key).unwrap_or(0);
            item.get("pool") == Some("slots") || (number("making") == 0 && number("ready") >= READY)
        };
        if items.iter().all(full) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    idle
}

/// `min_ready` of workers and overlays.
const READY: u64 = 2;

fn node_info() -> io::Result<Vec<Fields>> {
    let mut control = Connection::open(Path::new("/run/warren/control.sock"))?;
    control.stream().set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    control.send(&Message::Request(Request::new("1", "node.info")))?;
    let mut items = Vec::new();
    loop {
        match control.receive()? {
            Message::Item { fields, .. } => items.push(fields),
            Message::Ok { .. } => return Ok(items),
            other => return Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

fn state() -> Vec<String> {
    let idle = idle_homes();
    let mut lines = Vec::new();
    for (pid, argv) in processes() {
        if argv.ends_with(" supervise") {
            descriptors(pid, &mut lines);
        }
        lines.push(format!("process {argv}"));
    }
    tree("cgroup", Path::new("/sys/fs/cgroup"), true, &mut lines);
    tree("file", Path::new("/data/sandboxes"), false, &mut lines);
    tree("file", Path::new("/data/templates"), false, &mut lines);
    tree("file", Path::new("/run/warren"), false, &mut lines);
    tree("interface", Path::new("/sys/class/net"), false, &mut lines);
    // Homes and overlays of nobody yet, and what the supervisor has open of them.
    lines.retain(|line| !idle.iter().any(|id| line.contains(id.as_str())) && !line.contains("/data/overlays/"));
    for one in
        [&["process warren vmm"][..], &["descriptor socket"], &["descriptor anon_inode:[pidfd]", "descriptor pidfd"]]
    {
        for _ in &idle {
            if let Some(at) = lines.iter().position(|line| one.contains(&line.as_str())) {
                lines.swap_remove(at);
            }
        }
    }
    // The pool of network slots is filled and emptied at its own pace; the network's own tests look at it.
    lines.retain(|line| !line.starts_with("interface /sys/class/net/wt") && !line.contains("/dev/net/tun"));
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    lines.extend(mounts.lines().map(|line| format!("mount {}", line.split(' ').nth(1).unwrap_or_default())));
    lines
}

/// Copies standard input to a Unix socket, half-closes it, and prints what comes back until the peer closes too.
fn talk(socket: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let mut answers = stream.try_clone()?;
    let reader = std::thread::spawn(move || io::copy(&mut answers, &mut io::stdout()));
    io::copy(&mut io::stdin(), &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    reader.join().map_err(|_| io::Error::other("the reading thread panicked"))??;
    Ok(())
}

/// Prints a sandbox's disk: records of offset (8 octets, little endian), length (4 octets) and content, without the
/// pieces that are all zeroes.
fn disk(overlay: &str, base: &str) -> Result<(), Box<dyn Error>> {
    const PIECE: usize = 64 * 1024;
    let file = File::options().read(true).write(true).open(overlay)?;
    let disk = Overlay::open(file, Vec::new(), File::open(base)?)?;
    let mut out = BufWriter::with_capacity(1 << 20, io::stdout().lock());
    let mut piece = vec![0; PIECE];
    let zeroes = vec![0; PIECE];
    let mut offset = 0;
    while offset < disk.disk_bytes() {
        let length = usize::try_from(disk.disk_bytes() - offset)?.min(PIECE);
        disk.read(offset, length, &mut piece[..length])?;
        if piece[..length] != zeroes[..length] {
            out.write_all(&offset.to_le_bytes())?;
            out.write_all(&u32::try_from(length)?.to_le_bytes())?;
            out.write_all(&piece[..length])?;
        }
        offset += length as u64;
    }
    out.flush()?;
    Ok(())
}

/// What the supervisor holds open: paths, and the kinds of what has no path.
fn descriptors(pid: u32, lines: &mut Vec<String>) {
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        let kind = target.split_once(":[").map_or(target.as_ref(), |(kind, rest)| {
            // `anon_inode:[eventpoll]` says what it is, `socket:[1234]` only which.
            if rest.starts_with(|c: char| c.is_ascii_digit()) { kind } else { target.as_ref() }
        });
        lines.push(format!("descriptor {kind}"));
    }
}

fn tree(kind: &str, directory: &Path, only_directories: bool, lines: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("burrow-") {
            continue; // the cgroups of the agent that the tests run on the node
        }
        let is_directory = entry.file_type().is_ok_and(|t| t.is_dir());
        if is_directory || !only_directories {
            lines.push(format!("{kind} {}", entry.path().display()));
        }
        if is_directory {
            tree(kind, &entry.path(), only_directories, lines);
        }
    }
}

/// Holds values of this process' own in all vector registers, gives the processor away `rounds` times, and compares.
/// Gives the kind of registers.
fn registers(rounds: u64) -> Result<&'static str, Box<dyn Error>> {
    let own = u64::from(std::process::id());
    let mut values = [0u64; 64];
    for (value, n) in values.iter_mut().zip(1..) {
        *value = own.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(n);
    }
    let wide = std::arch::is_x86_feature_detected!("avx");
    let mut after = [0u64; 64];
    // SAFETY: the buffers hold 16 registers of 32 octets, more than the narrow ones need; AVX is used only where there is.
    unsafe { if wide { hold_ymm(&values, &mut after, rounds) } else { hold_xmm(&values, &mut after, rounds) } };
    let used = if wide { 64 } else { 32 };
    if values[..used] != after[..used] {
        return Err(format!("registers came back changed: {values:x?} are {after:x?}").into());
    }
    Ok(if wide { "ymm" } else { "xmm" })
}

macro_rules! hold {
    ($name:ident, $move:literal, $register:literal, $size:literal) => {
        /// # Safety
        /// The processor has these registers.
        unsafe fn $name(from: &[u64; 64], to: &mut [u64; 64], rounds: u64) {
            // SAFETY: reads and writes the two buffers only; the system call is sched_yield, which keeps all registers
            // but those named; the stack is not used.
            unsafe {
                std::arch::asm!(
                    ".macro all_registers copy",
                    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                    "\\copy \\n",
                    ".endr",
                    ".endm",
                    ".macro load_one n",
                    concat!($move, " ", $register, "\\n, [{from} + ", $size, " * \\n]"),
                    ".endm",
                    ".macro store_one n",
                    concat!($move, " [{to} + ", $size, " * \\n], ", $register, "\\n"),
                    ".endm",
                    "all_registers load_one",
                    "2:",
                    "mov eax, 24", // sched_yield
                    "syscall",
                    "dec {rounds}",
                    "jnz 2b",
                    "all_registers store_one",
                    ".purgem all_registers",
                    ".purgem load_one",
                    ".purgem store_one",
                    from = in(reg) from.as_ptr(),
                    to = in(reg) to.as_mut_ptr(),
                    rounds = inout(reg) rounds.max(1) => _,
                    out("rax") _, out("rcx") _, out("r11") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nostack),
                );
            }
        }
    };
}

hold!(hold_xmm, "movdqu", "xmm", "16");
hold!(hold_ymm, "vmovdqu", "ymm", "32");
