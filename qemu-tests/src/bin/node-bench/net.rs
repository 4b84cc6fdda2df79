//! How fast a guest's network is, from the guest to the node over a TAP: the node counts what arrives, by its clock.

use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use qemu_tests::client::Client;
use qemu_tests::rig::{Setup, Tap, TapFlags, put_guest_tool, switch_on};
use warren::wire::Request;

use crate::{MEMORY_MIB, Peer, exec, peer_cmdline, print};

const NODE: &str = "10.8.0.0";
const GUEST: &str = "10.8.0.1";
const MAC: &str = "02:00:00:00:08:01";
const TAP: &str = "bench";
const STREAM_MIB: usize = 32;
/// Packets of 18 octets, the least that fills an Ethernet frame.
const PACKETS: usize = 10_000;
/// So long a silence is the end of what is not lost.
const QUIET: Duration = Duration::from_secs(2);

/// A worker's guest, and after it the peer's.
pub fn measure(peer: Option<&str>) -> io::Result<()> {
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
        let (_peer, agent, _) = Peer::start(program, &peer_cmdline()?, Some((TAP, MAC)))?;
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

    let listener = TcpListener::bind((NODE, 0))?;
    let port = listener.local_addr()?.port();
    let sink = thread::spawn(move || take_stream(&listener));
    let before = exits();
    run("tcp-send", port, format!("mib={STREAM_MIB}"))?;
    let exits = exits() - before;
    let time = sink.join().expect("a sink does not panic")?;
    let condition = "TCP from the guest to the node over a TAP, MTU 1500, offloads as agreed on, 32 MiB";
    print(&format!("{prefix}net_mib_per_s"), STREAM_MIB as f64 / time.as_secs_f64(), "MiB/s", condition);

    let socket = UdpSocket::bind((NODE, 0))?;
    let port = socket.local_addr()?.port();
    hold_all(&socket)?;
    let sink = thread::spawn(move || take_packets(&socket));
    run("udp-send", port, format!("count={PACKETS}"))?;
    let (count, time) = sink.join().expect("a sink does not panic")?;
    let condition = format!("UDP of 18 octets from the guest to the node over a TAP; {count} of {PACKETS} arrived");
    let rate = count.saturating_sub(1) as f64 / time.as_secs_f64();
    print(&format!("{prefix}net_small_packets_per_s"), rate, "1/s", &condition);
    Ok(exits as f64 / STREAM_MIB as f64)
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

/// Makes room for every packet, so that none that reached the node is lost there.
fn hold_all(socket: &UdpSocket) -> io::Result<()> {
    let octets: libc::c_int = 64 << 20;
    // SAFETY: the option is an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const octets).cast(),
            size_of_val(&octets) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Counts packets until all are there or none comes any more; the time is from the first to the last.
fn take_packets(socket: &UdpSocket) -> io::Result<(usize, Duration)> {
    let mut octets = [0; 64];
    socket.set_read_timeout(Some(QUIET))?;
    socket.recv(&mut octets)?;
    let (start, mut count) = (Instant::now(), 1);
    let mut last = start;
    while count < PACKETS && socket.recv(&mut octets).is_ok() {
        (count, last) = (count + 1, Instant::now());
    }
    Ok((count, last - start))
}
