//! `internet`: what is beyond the node's uplink, for tests with real guests: a network namespace with hosts of public and
//! of private addresses, all of which echo on TCP 80 and UDP 53. Prints `ready`, and runs until it is killed.
//!
//! TCP 8000 of the first host and of the third, which is a private one, is a web server of the files below /run/index, by their
//! names as they are asked for, and of `index.html` for directories. While there is a file /run/index/hold nothing is
//! answered. The private one answers only who gives what is in /run/index/authorization, where that is there. What has
//! `endless` in its name has no end.
//!
//! TCP 9 of 93.0.0.2 tells what came: a line `HOST PROTOCOL COUNT` each, where COUNT is octets, datagrams or requests.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qemu_tests::rig::outside;
use qemu_tests::rig::switch_on;

const ROUTER: Ipv4Addr = Ipv4Addr::new(93, 0, 0, 2);
/// Public and private ones.
const HOSTS: [Ipv4Addr; 4] =
    [Ipv4Addr::new(1, 2, 3, 4), Ipv4Addr::new(5, 6, 7, 8), Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::new(192, 168, 1, 1)];

/// What the web server has.
const INDEX: &str = "/run/index";

type Counts = Arc<Mutex<BTreeMap<(IpAddr, &'static str), u64>>>;

fn count(counts: &Counts, host: IpAddr, protocol: &'static str, more: u64) {
    *counts.lock().unwrap_or_else(PoisonError::into_inner).entry((host, protocol)).or_default() += more;
}

pub fn run(_: &[&str]) {
    let (namespace, ready) = std::sync::mpsc::channel();
    let (go, joined) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        namespace.send(outside::new_namespace()).expect("it is waited for");
        joined.recv().expect("the pair is made");
        serve();
    });
    let namespace = ready.recv().expect("a thread may have a network namespace");
    outside::veth("up0", "outer0", &namespace);
    switch_on("up0", "93.0.0.1/24");
    let added = Command::new("ip").args(["route", "add", "default", "via", &ROUTER.to_string()]).status();
    assert!(added.is_ok_and(|status| status.success()), "a default route");
    go.send(()).expect("the thread waits");
    thread.join().expect("the internet stays up");
}

fn serve() {
    switch_on("lo", "127.0.0.1/8");
    switch_on("outer0", &format!("{ROUTER}/24"));
    for host in HOSTS {
        switch_on("lo", &format!("{host}/32"));
    }
    let counts = Counts::default();
    let told = TcpListener::bind((ROUTER, 9)).expect("the port is free");
    for host in HOSTS {
        let (tcp, udp) = (TcpListener::bind((host, 80)), UdpSocket::bind((host, 53)));
        let (tcp, udp) = (tcp.expect("the port is free"), udp.expect("the port is free"));
        let own = Arc::clone(&counts);
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                let own = Arc::clone(&own);
                std::thread::spawn(move || echo(stream, &own));
            }
        });
        let own = Arc::clone(&counts);
        std::thread::spawn(move || {
            let mut octets = [0; 2048];
            while let Ok((len, from)) = udp.recv_from(&mut octets) {
                count(&own, host.into(), "udp", 1);
                let _ = udp.send_to(&octets[..len], from);
            }
        });
    }
    for host in [HOSTS[0], HOSTS[2]] {
        let (own, web) = (Arc::clone(&counts), TcpListener::bind((host, 8000)).expect("the port is free"));
        std::thread::spawn(move || {
            for stream in web.incoming().flatten() {
                let own = Arc::clone(&own);
                std::thread::spawn(move || answer(stream, host, &own));
            }
        });
    }
    println!("ready");
    for stream in told.incoming().flatten() {
        let counts = counts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lines = counts.iter().map(|((host, protocol), count)| format!("{host} {protocol} {count}\n"));
        let mut stream = stream;
        let _ = stream.write_all(lines.collect::<String>().as_bytes());
    }
}

fn echo(mut stream: TcpStream, counts: &Counts) {
    let Ok(local) = stream.local_addr() else { return };
    let mut octets = [0; 4096];
    while let Ok(len @ 1..) = stream.read(&mut octets) {
        count(counts, local.ip(), "tcp", len as u64);
        if stream.write_all(&octets[..len]).is_err() {
            return;
        }
    }
}

/// One request, and the file that is asked for.
fn answer(mut stream: TcpStream, host: Ipv4Addr, counts: &Counts) {
    let (mut request, mut octet) = (Vec::new(), [0]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut octet) {
            Ok(1) => request.push(octet[0]),
            _ => return,
        }
    }
    count(counts, host.into(), "http", 1);
    let held = Path::new(INDEX).join("hold");
    while held.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let said = request.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("authorization").then(|| value.trim().to_string())
    });
    let asked = std::fs::read_to_string(Path::new(INDEX).join("authorization")).ok().filter(|_| host.is_private());
    if asked.is_some_and(|asked| said.is_none_or(|said| said != asked.trim())) {
        let refusal = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"index\"\r\nContent-Length: 0\r\n";
        let _ = stream.write_all(format!("{refusal}Connection: close\r\n\r\n").as_bytes());
        return;
    }
    let line = request.lines().next().unwrap_or_default().to_string();
    let name = line.split(' ').nth(1).unwrap_or("/").trim_matches('/').to_string();
    let path = Path::new(INDEX).join(&name);
    let path = if path.is_dir() { path.join("index.html") } else { path };
    let found = std::fs::read(&path).ok().filter(|_| !name.contains(".."));
    let kind = if path.ends_with("index.html") { "text/html" } else { "application/octet-stream" };
    if name.contains("endless") && !path.exists() {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n");
        let mut sent = stream.write_all(head.as_bytes());
        while sent.is_ok() {
            sent = stream.write_all(&[b' '; 65536]);
        }
        return;
    }
    let (status, content) = found.map_or(("404 Not Found", Vec::new()), |content| ("200 OK", content));
    let length = content.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(&[head.as_bytes(), &content].concat());
}
