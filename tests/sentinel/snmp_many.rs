//! Two thousand devices, one in twenty silent: the others are asked on schedule, by one socket.
//!
//! The devices are addresses of the loopback network; one thread answers for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};

use crate::measure::{processor_time, resident_kib};
use crate::process::{QUICK, Sentinel, target, until};
use crate::receiver::Receiver;

const DEVICES: usize = 2000;
const SILENT: usize = 20;
const INTERVAL_MS: usize = 10_000;
/// Runs of each device that are looked at.
const RUNS: usize = 3;
/// Interfaces of each device.
const INTERFACES: u8 = 4;

fn address(device: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 20, (device / 200) as u8, (device % 200) as u8 + 1)
}

fn device(address: Ipv4Addr) -> usize {
    let [_, _, tens, ones] = address.octets();
    usize::from(tens) * 200 + usize::from(ones) - 1
}

/// What device and interface say of themselves: different everywhere.
fn octets_in(device: usize, interface: u8) -> u32 {
    (device * 100 + usize::from(interface)) as u32
}

fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match content.len() {
        len @ ..128 => out.push(len as u8),
        len => out.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    out.extend_from_slice(content);
    out
}

/// Tag and content of the next element.
fn take<'a>(rest: &mut &'a [u8]) -> (u8, &'a [u8]) {
    let (tag, first) = (rest[0], rest[1]);
    let (len, start) = match first {
        ..=127 => (usize::from(first), 2),
        0x81 => (usize::from(rest[2]), 3),
        _ => (usize::from(rest[2]) << 8 | usize::from(rest[3]), 4),
    };
    let (element, after) = rest.split_at(start + len);
    *rest = after;
    (tag, &element[start..])
}

/// What a device has: by identifiers, which are in order as their octets are, since none of their numbers is above 127.
fn values(device: usize) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let uptime = ([0x2b, 6, 1, 2, 1, 1, 3, 0].to_vec(), tlv(0x43, &[1, 0]));
    let interfaces = (1..=INTERFACES).map(|interface| {
        let number = octets_in(device, interface).to_be_bytes();
        ([0x2b, 6, 1, 2, 1, 2, 2, 1, 10, interface].to_vec(), tlv(0x41, &[&[0], &number[..]].concat()))
    });
    interfaces.chain([uptime]).collect()
}

/// A device's answer to a request of version 2c (RFC 3416): get, get-next and get-bulk.
fn answer(device: usize, mut request: &[u8]) -> Vec<u8> {
    let (_, mut message) = take(&mut request);
    let (_, version) = take(&mut message);
    let (_, community) = take(&mut message);
    let (kind, mut pdu) = take(&mut message);
    let [(_, id), (_, _), (_, repetitions), (_, mut asked)] =
        [take(&mut pdu), take(&mut pdu), take(&mut pdu), take(&mut pdu)];
    let values = values(device);
    let mut said = Vec::new();
    while !asked.is_empty() {
        let (_, mut pair) = take(&mut asked);
        let (_, identifier) = take(&mut pair);
        let pair = |identifier: &[u8], value: &[u8]| tlv(0x30, &[tlv(6, identifier), value.to_vec()].concat());
        if kind == 0xa0 {
            let absent = tlv(0x80, &[]);
            said.extend(pair(identifier, values.get(identifier).unwrap_or(&absent)));
            continue;
        }
        let most = if kind == 0xa5 { usize::from(*repetitions.last().unwrap()) } else { 1 };
        let after = values.range(identifier.to_vec()..).filter(|(known, _)| *known != identifier);
        let before = said.len();
        after.take(most).for_each(|(identifier, value)| said.extend(pair(identifier, value)));
        if said.len() == before {
            said.extend(pair(identifier, &tlv(0x82, &[])));
        }
    }
    let zero = tlv(2, &[0]);
    let pdu = tlv(0xa2, &[tlv(2, id), zero.clone(), zero, tlv(0x30, &said)].concat());
    tlv(0x30, &[tlv(2, version), tlv(4, community), pdu].concat())
}

/// All devices at one port; ends when it is dropped.
struct Devices {
    port: u16,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Devices {
    fn new() -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        // The address that was asked is the one that has to answer.
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).unwrap();
        let _ = setsockopt(&socket, sockopt::RcvBuf, &(4 << 20));
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let (port, ended) = (socket.local_addr().unwrap().port(), Arc::new(AtomicBool::new(false)));
        let for_thread = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            while !for_thread.load(Ordering::Acquire) {
                serve(&socket);
            }
        });
        Self { port, ended, thread: Some(thread) }
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One request; returns at the socket's timeout too.
fn serve(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let (length, from, info) = {
        let mut into = [IoSliceMut::new(&mut buffer)];
        let Ok(got) = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::empty())
        else {
            return;
        };
        let info = got.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
            _ => None,
        });
        (got.bytes, got.address.unwrap(), info.unwrap())
    };
    let asked = device(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)));
    if asked % SILENT == SILENT - 1 {
        return;
    }
    let said = answer(asked, &buffer[..length]);
    let back = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: info.ipi_addr, ipi_addr: info.ipi_addr };
    let to = SockaddrIn::from(SocketAddrV4::new(from.ip(), from.port()));
    let message = [ControlMessage::Ipv4PacketInfo(&back)];
    // A full queue is a lost datagram, as on any network.
    let _ = sendmsg(socket.as_raw_fd(), &[IoSlice::new(&said)], &message, MsgFlags::empty(), Some(&to));
}

#[test]
fn of_two_thousand_devices_those_that_answer_are_asked_on_schedule_whatever_the_others_do() {
    let devices = Devices::new();
    let receiver = Receiver::new();
    let mut config = format!("{QUICK}{}", target("one", "prometheus", &receiver.url()));
    for n in 0..DEVICES {
        config.push_str(&format!(
            "[[task]]\nid = \"d{n}\"\nplugin = \"snmp\"\ninterval_ms = {INTERVAL_MS}\n\
             device = {{ host = \"{}\", port = {} }}\n[task.config]\n\
             fields = [{{ oid = \"1.3.6.1.2.1.1.3.0\", name = \"uptime\" }}]\n\
             tables = [{{ index = \"n\", columns = [{{ oid = \"1.3.6.1.2.1.2.2.1.10\", name = \"octets_in\" }}] }}]\n",
            address(n),
            devices.port
        ));
    }
    let mut sentinel = Sentinel::new(&config);
    sentinel.start();

    let answers = |n: usize| n % SILENT != SILENT - 1;
    // Times of the values of each device, by its first interface.
    let times = || {
        let mut times: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
        for (series, time) in receiver.got.lock().unwrap().samples.keys() {
            if series.contains("__name__=\"octets_in\"") && series.contains("n=\"1\"") {
                let instance = series.split("instance=\"").nth(1).unwrap().split(':').next().unwrap();
                times.entry(instance.to_string()).or_default().insert(*time);
            }
        }
        times
    };
    let answering = (0..DEVICES).filter(|&n| answers(n)).count();
    until("three runs of every device", || {
        let times = times();
        let enough = times.values().filter(|times| times.len() >= RUNS).count();
        (enough == answering).then_some(())
    });

    // Every value is the device's own.
    for ((series, _), (bits, repeats)) in &receiver.got.lock().unwrap().samples {
        if let Some((_, rest)) = series.split_once("__name__=\"octets_in\"") {
            let of = |label: &str| rest.split(&format!("{label}=\"")).nth(1).unwrap().split(['"', ':']).next().unwrap();
            let device = device(of("instance").parse().unwrap());
            assert!(answers(device));
            // A device that a slow moment silenced would show a staleness marker here.
            assert_eq!(f64::from_bits(*bits), f64::from(octets_in(device, of("n").parse().unwrap())), "{series}");
            assert_eq!(*repeats, 1);
        }
    }
    // No slot was left out, no run failed but those of silent devices, and theirs all did.
    let tasks: Vec<serde_json::Value> = serde_json::from_slice(&sentinel.command("tasks").stdout).unwrap();
    assert_eq!(tasks.len(), DEVICES);
    for task in &tasks {
        let n: usize = task["id"].as_str().unwrap()[1..].parse().unwrap();
        assert_eq!(task["skipped"], serde_json::json!({}), "{task}");
        let counts = [&task["success"], &task["failed"]].map(|count| count.as_u64().unwrap());
        match answers(n) {
            true => assert!(counts[0] >= RUNS as u64 && counts[1] == 0, "{task}"),
            false => {
                assert!(counts[0] == 0 && counts[1] > 0, "{task}");
                assert!(task["last_error"].as_str().unwrap().contains("no answer from"), "{task}");
            }
        }
    }
    let status = sentinel.status().unwrap();
    let (uptime, cpu) = (status["uptime_s"].as_f64().unwrap(), processor_time(sentinel.pid()));
    println!(
        "ROW\tsentinel_snmp_cpu_percent\t{:.3}\t%\t{DEVICES} devices each {} s, 1 in {SILENT} silent\n\
         ROW\tsentinel_snmp_rss_kib\t{:.0}\tKiB\tthe same",
        cpu * 100.0 / uptime.max(1.0),
        INTERVAL_MS / 1000,
        resident_kib(sentinel.pid()),
    );
    assert_eq!(sentinel.stop(), 0);
}
