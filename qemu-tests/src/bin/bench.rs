//! `make bench`: boots the node in virtual time, measures inside, writes build/bench.tsv and shows it.
//!
//! One instruction is one virtual nanosecond, so that rows repeat within a percent on any machine. Exits, caches
//! and TLB misses cost nothing there: rows compare with each other and with `PEER`, not with real hardware. A guest of
//! several processors runs on a second node, by wall time: virtual time has one CPU.
//!
//! `bench PART…` measures only some of it: `boot`, `measure`, `jail`, `cycle`, `restore`, `warm`, `clones`, `peer`, `net`, `many`,
//! `code`, `wall`, `template`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use qemu_tests::artefacts::{self, Artefact, node_tool};
use qemu_tests::bench::{Row, table, verdicts};
use qemu_tests::files::TempDir;
use qemu_tests::machine::{self, Clock, EMULATED_CPU};
use qemu_tests::node::{Boot, root_exec};
use qemu_tests::{Node, templates, timing};

fn main() -> ExitCode {
    let mut rows = Vec::new();
    let condition = machine::description(Clock::Virtual);
    let warren = Artefact::Warren.path();
    match fs::metadata(&warren) {
        Ok(meta) => rows.push(Row::new("binary_bytes", meta.len() as f64, "octets", &warren.display().to_string())),
        Err(e) => return fail(&format!("{}: {e}", warren.display())),
    }
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let asked = |part: &str| parts.is_empty() || parts.iter().any(|asked| asked == part);
    if asked("boot") {
        match host_boot() {
            Ok(row) => rows.push(row),
            Err(e) => return fail(&e.to_string()),
        }
    }

    let mut boot = Boot::diskless().virtual_time();
    for tool in ["node-bench", "guest-tool", "jail-probe"] {
        boot = boot.file(&format!("/test/bin/{tool}"), 0o755, bytes(&node_tool(tool)));
    }
    let peer = std::env::var("PEER").ok().filter(|peer| !peer.is_empty());
    if let Some(peer) = &peer {
        boot = boot.file("/test/peer", 0o755, bytes(Path::new(peer)));
    }
    let node = boot.power_on();
    // By way of the root port alone: while the node waits for the world outside, its virtual clock runs ahead.
    node.run(&["sh", "-c", "until [ -S /run/warren/control.sock ]; do sleep 0.01; done"]);
    let mut complete = true;
    let (mut beside, mut net) = (vec!["node-bench", "peer"], vec!["node-bench", "net"]);
    beside.extend(peer.iter().map(|_| "/test/peer"));
    net.extend(peer.iter().map(|_| "/test/peer"));
    let parts = ["measure", "jail", "cycle", "restore", "clones"].map(|part| vec!["node-bench", part]);
    for argv in parts.into_iter().chain([beside, net]) {
        if asked(argv[1]) && (argv[1] != "peer" || peer.is_some()) {
            complete &= measure(&node, &argv, &mut rows);
        }
    }
    node.power_cut();

    if asked("warm") {
        let config = "[[warm]]\ntemplate = \"base\"\nmemory_mib = 128\nnetwork = true\n";
        let node = Boot::diskless().virtual_time().file("/etc/warren/warren.toml", 0o644, config.as_bytes().to_vec());
        let node = node.file("/test/bin/node-bench", 0o755, bytes(&node_tool("node-bench"))).power_on();
        node.run(&["sh", "-c", "until [ -S /run/warren/control.sock ]; do sleep 0.01; done"]);
        complete &= measure(&node, &["node-bench", "warm"], &mut rows);
        node.power_cut();
    }

    if asked("many") {
        // A node of its own: a hundred guests have more memory than the others need.
        let node = Boot::diskless().virtual_time().memory_mib(8 * 1024);
        let node = node.file("/test/bin/node-bench", 0o755, bytes(&node_tool("node-bench"))).power_on();
        node.run(&["sh", "-c", "until [ -S /run/warren/control.sock ]; do sleep 0.01; done"]);
        complete &= measure(&node, &["node-bench", "many"], &mut rows);
        node.power_cut();
    }

    if asked("code") {
        // A node of its own: it imports a template first.
        let node = Boot::diskless().virtual_time().template_disk(&Artefact::TemplateDisk.path());
        let node = node.file("/test/bin/node-bench", 0o755, bytes(&node_tool("node-bench"))).power_on();
        node.run(&["sh", "-c", "until [ -S /run/warren/control.sock ]; do sleep 0.01; done"]);
        complete &= measure(&node, &["node-bench", "code"], &mut rows);
        node.power_cut();
    }

    let mut by_wall = Vec::new();
    if asked("wall") {
        let node = Boot::diskless().file("/test/bin/node-bench", 0o755, bytes(&node_tool("node-bench"))).start();
        complete &= measure(&node, &["node-bench", "wall"], &mut by_wall);
        node.power_cut();
    }

    if asked("template") {
        let node = Boot::diskless().start();
        match template_build(&node) {
            Some(row) => by_wall.push(row),
            None => complete = false,
        }
        node.power_cut();
    }

    for row in &mut rows {
        row.condition = if row.name == "binary_bytes" {
            "release build, static, stripped".to_string()
        } else {
            format!("{condition}; {}", row.condition)
        };
    }
    let condition = machine::description(Clock::Wall);
    rows.extend(by_wall.into_iter().map(|row| Row { condition: format!("{condition}; {}", row.condition), ..row }));
    let file = artefacts::build_directory().join("bench.tsv");
    let text: String = rows.iter().map(|row| row.to_tsv() + "\n").collect();
    if let Err(e) = fs::write(&file, format!("name\tvalue\tunit\tcondition\n{text}")) {
        return fail(&format!("{}: {e}", file.display()));
    }
    print!("{}", table(&rows));
    println!("\nTargets:");
    for verdict in verdicts(&rows) {
        println!("  {verdict}");
    }
    println!("\n{}", file.display());
    if complete { ExitCode::SUCCESS } else { fail("not every row could be measured") }
}

fn fail(why: &str) -> ExitCode {
    eprintln!("bench: {why}");
    ExitCode::FAILURE
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{} cannot be read: {e}", path.display()))
}

/// Runs a command on the node and takes the rows it prints. Whether it ended well.
fn measure(node: &Node, argv: &[&str], rows: &mut Vec<Row>) -> bool {
    let reply = match node.root().call(root_exec(argv)) {
        Ok(reply) => reply,
        Err(e) => {
            eprintln!("bench: {argv:?} does not start: {e}");
            return false;
        }
    };
    rows.extend(reply.text("stdout").lines().filter_map(Row::from_tsv));
    let exit = reply.fields.get("exit").unwrap_or("?");
    if exit != "0" {
        eprintln!("bench: {argv:?} ended with {exit}: {}\n{}", reply.text("stderr"), node.console_tail(20));
    }
    exit == "0"
}

/// Builds of a small template from the command line, by wall time.
fn template_build(node: &Node) -> Option<Row> {
    let path = templates::image("root.tar.gz")?.display().to_string();
    let mut times: Vec<f64> = Vec::new();
    for round in 0..3 {
        let begin = Instant::now();
        let done = templates::warren(node, &templates::small(&format!("built:{round}"), &["--no-cache"], &path));
        if done.code != Some(0) {
            eprintln!("bench: a template cannot be built: {}", done.stderr);
            return None;
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let condition = "root file system with busybox, gzip, disk of 48 MiB, 192 MiB of memory; median of 3";
    Some(Row::new("template_build_base_s", times[1], "s", condition))
}

/// From the kernel's first instruction to the control socket's first answer.
fn host_boot() -> io::Result<Row> {
    let firmware = firmware_time()?;
    let node = Boot::diskless()
        .virtual_time()
        .file("/test/bin/node-bench", 0o755, bytes(&node_tool("node-bench")))
        .only_service("/test/bin/node-bench boot")
        .power_on();
    let end = Instant::now() + timing::hang() * 2;
    let answered = loop {
        let text = node.console_text();
        let line = text.split_once("bench: control socket answered at ").and_then(|(_, rest)| rest.split_once('\n'));
        if let Some((number, _)) = line {
            break number.trim().parse::<u64>().map_err(io::Error::other)?;
        }
        if Instant::now() > end || !node.is_running() {
            return Err(io::Error::other(format!("the node did not come up:\n{}", node.console_tail(40))));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    node.power_cut();
    let time = answered.saturating_sub(firmware) as f64 / 1e6;
    let condition = "kernel entry (firmware excluded) to control socket answering; no disk, 4 GiB";
    Ok(Row::new("host_boot_ms", time, "ms", condition))
}

/// How long the firmware takes until it enters the kernel, in virtual nanoseconds: a kernel of a few octets is
/// booted that does nothing but say what the time stamp counter shows.
fn firmware_time() -> io::Result<u64> {
    let dir = TempDir::new()?;
    let (kernel, console) = (dir.path().join("kernel"), dir.path().join("console"));
    fs::write(&kernel, tiny_kernel())?;
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "pc", "-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", EMULATED_CPU, "-smp", "1"])
        .args(["-m", "4096", "-icount", "shift=0,sleep=off", "-rtc", "clock=vm"])
        .arg("-kernel")
        .arg(&kernel)
        .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
        .args(["-serial", &format!("file:{}", console.display())])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let end = Instant::now() + timing::hang();
    let counter = loop {
        let octets = fs::read(&console).unwrap_or_default();
        // Two marks of the kernel's own around the counter, among whatever else the firmware prints.
        if let Some(at) = octets.windows(10).position(|w| w[0] == 0xa5 && w[9] == 0x5a) {
            let mut counter = [0u8; 8];
            counter.copy_from_slice(&octets[at + 1..at + 9]);
            break Ok(u64::from_le_bytes(counter));
        }
        if Instant::now() > end {
            break Err(io::Error::other("the firmware did not enter the kernel"));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    child.kill()?;
    child.wait()?;
    counter
}

/// A bzImage (Documentation/arch/x86/boot.rst) whose real-mode part writes 0xa5, the time stamp counter and 0x5a
/// to the first serial port.
fn tiny_kernel() -> Vec<u8> {
    let mut image = vec![0u8; 1024 + 512];
    image[0x1f1] = 1; // setup_sects: one beyond the boot sector
    image[0x1f4..0x1f8].copy_from_slice(&32u32.to_le_bytes()); // syssize, in 16 octets
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x7e]); // jmp over the header, to 0x280
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020c_u16.to_le_bytes()); // protocol version
    image[0x211] = 1; // loaded high
    let code: &[u8] = &[
        0xfa, // cli
        0x0f, 0x31, // rdtsc
        0x66, 0x89, 0xc3, // mov ebx, eax
        0x66, 0x89, 0xd1, // mov ecx, edx
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, 0xa5, 0xee, // mov al, 0xa5; out dx, al
        0xbe, 0x02, 0x00, // mov si, 2
        0xbf, 0x04, 0x00, // word: mov di, 4
        0x88, 0xd8, 0xee, // octet: mov al, bl; out dx, al
        0x66, 0xc1, 0xeb, 0x08, // shr ebx, 8
        0x4f, 0x75, 0xf6, // dec di; jnz octet
        0x66, 0x89, 0xcb, // mov ebx, ecx
        0x4e, 0x75, 0xed, // dec si; jnz word
        0xb0, 0x5a, 0xee, // mov al, 0x5a; out dx, al
        0xf4, 0xeb, 0xfd, // hlt, for ever
    ];
    image[0x280..0x280 + code.len()].copy_from_slice(code);
    image
}
