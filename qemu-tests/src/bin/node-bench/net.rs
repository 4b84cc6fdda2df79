//! How fast a guest's network is, from the guest to the node over a TAP: the node counts what arrives, by its clock.

use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use qemu_tests::bench::median;
use qemu_tests::client::Client;
use qemu_tests::rig::{Setup, Tap, TapFlags, own_network, put_guest_tool, switch_on};
use warren::wire::Request;

use crate::peer::{Peer, peer_cmdline};
use crate::{MEMORY_MIB, exec, print};

const NODE: &str = "10.8.0.0";
const GUEST: &str = "10.8.0.1";
const MAC: &str = "02:00:00:00:08:01";
const TAP: &str = "bench";
/// Of which the median is taken.
const RUNS: usize = 7;
const STREAM_MIB: usize = 64;
/// Packets of 18 octets, the least that fills an Ethernet frame.
const PACKETS: usize = 10_000;
/// So long a silence is the end of what is not lost.
const QUIET: Duration = Duration::from_secs(2);

/// <asm-generic/sockios.h>
const SIOCGSTAMPNS: libc::c_ulong = 0x8907;

/// A worker's guest, and after it the peer's.
pub fn measure(peer: Option<&str>) -> io::Result<()> {
    // A sandbox needs a template that was hashed whole: nothing else runs on the node's one processor from here on.
    let cmdline = peer_cmdline()?;
    own_network();
    let tap = Tap::create(TAP, TapFlags { vnet_header: 12, offloads: 0 });
    tap.up(&format!("{NODE}/31"));
    let setup = Setup::new().memory_mib(MEMORY_MIB).descriptor("tap", tap.file.try_clone()?);
    let vm = setup.set("mac", MAC).set("ipv4", GUEST).set("mtu", 1500).start();
    let exits = rates("", vm.agent(), || vm.stat("kvm_exits"))?;
    print("net_exits_per_mib", exits, "1/MiB", "exits of the guest during net_mib_per_s");
    vm.stop();
    // It goes with its last descriptor, and the peer makes its own of the same name.
    drop(tap);

    if let Some(program) = peer {
        let (_peer, agent, _) = Peer::start(program, &cmdline, Some((TAP, MAC)))?;
        switch_on(TAP, &format!("{NODE}/31"));
        rates("peer_", &Client::over(agent.stream().try_clone()?), || 0)?;
        agent.stream().shutdown(std::net::Shutdown::Both)?;
    }
    Ok(())
}

/// Prints the rows; gives by how much `exits` grew for each MiB of the stream.
fn rates(prefix: &str, agent: &Client, exits: impl Fn() -> u64) -> io::Result<f64> {
    agent.ok(Request::new("", "system.configure").set("address", format!("{GUEST}/31")));
    let tool = put_guest_tool(agent);
    let run = |command: &str, port: u16, amount: String| {
        let to = format!("to={NODE}:{port}");
        let reply = agent.ok(exec(None, &[tool, command, &to, &amount]));
        match reply.field("exit") {
            "0" => Ok(()),
            exit => Err(io::Error::other(format!("{command} ended with {exit}: {}", reply.text("stderr")))),
        }
    };

    let way = "guest to node over a TAP, MTU 1500";

    let (before, mut speeds) = (exits(), Vec::new());
    for _ in 0..RUNS {
        let listener = TcpListener::bind((NODE, 0))?;
        let port = listener.local_addr()?.port();
        let sink = thread::spawn(move || take_stream(&listener));
        run("tcp-send", port, format!("mib={STREAM_MIB}"))?;
        let time = sink.join().expect("a sink does not panic")?;
        speeds.push(STREAM_MIB as f64 / time.as_secs_f64());
    }
    let exits = (exits() - before) as f64 / (RUNS * STREAM_MIB) as f64;
    let condition = format!("{STREAM_MIB} MiB of TCP, {way}, with offloads; median of {RUNS}");
    print(&format!("{prefix}net_mib_per_s"), median(&mut speeds), "MiB/s", &condition);

    let (mut arrived, mut rates) = (0, Vec::new());
    for _ in 0..RUNS {
        let socket = UdpSocket::bind((NODE, 0))?;
        let port = socket.local_addr()?.port();
        hold_all(&socket)?;
        run("udp-send", port, format!("count={PACKETS}"))?;
        let (count, time) = take_packets(&socket)?;
        arrived += count;
        rates.push(count.saturating_sub(1) as f64 / time.as_secs_f64());
    }
    let sent = RUNS * PACKETS;
    let condition = format!("UDP of 18 octets, {way}; median of {RUNS}; {arrived} of {sent} arrived");
    print(&format!("{prefix}net_small_packets_per_s"), median(&mut rates), "1/s", &condition);
    Ok(exits)
}

/// Reads a connection to its end, and answers how much came.
fn take_stream(listener: &TcpListener) -> io::Result<Duration> {
    let (mut stream, _) = listener.accept()?;
    let start = Instant::now();
    let mut buffer = vec![0; 256 * 1024];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            n => received += n,
        }
    }
    let time = start.elapsed();
    stream.write_all(format!("{received}\n").as_bytes())?;
    Ok(time)
}

/// Makes room for every packet, and has the kernel note when each arrives. They are read at the end only: on a node of
/// one processor the rate would say when the scheduler lets a reader run.
fn hold_all(socket: &UdpSocket) -> io::Result<()> {
    let room: libc::c_int = 64 << 20;
    let len = size_of_val(&room) as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE);
    // SAFETY: the option is an int, which lives through the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const room).cast(), len) })?;
    // Asked for the first time the kernel has none, and notes them from then on.
    match arrival(socket) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// How many packets came, and the time from the first to the last.
fn take_packets(socket: &UdpSocket) -> io::Result<(usize, Duration)> {
    socket.set_read_timeout(Some(QUIET))?;
    let first = take_packet(socket)?;
    let (mut count, mut last) = (1, first);
    while count < PACKETS {
        match take_packet(socket) {
            Ok(time) => (count, last) = (count + 1, time),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    Ok((count, last.saturating_sub(first)))
}

/// Takes one packet and gives the time of its arrival.
fn take_packet(socket: &UdpSocket) -> io::Result<Duration> {
    socket.recv(&mut [0; 64])?;
    arrival(socket)
}

/// When the packet arrived that was taken last.
fn arrival(socket: &UdpSocket) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: SIOCGSTAMPNS writes a timespec, which lives through the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSTAMPNS, &raw mut time) })?;
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
