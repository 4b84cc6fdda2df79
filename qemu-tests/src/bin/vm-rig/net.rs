//! `net`: guests that talk to each other over the node. `net tcp`, `net packets`, `net forged`, `net limits`.

use std::fs;
use std::time::Instant;

use qemu_tests::client::Call;
use qemu_tests::rig::{Setup, Tap, TapFlags, Vm, own_network};
use warren::wire::Request;

/// A guest with its TAP device. Each has a network of two addresses with the node: even is the node's, odd the guest's.
struct Guest {
    vm: Vm,
    tap: Tap,
    address: String,
}

impl Guest {
    fn start(number: u8, mtu: u32, set: impl Fn(Setup) -> Setup) -> Self {
        let tap = Tap::create(&format!("guest{number}"), TapFlags { vnet_header: 12, offloads: 0 });
        tap.mtu(mtu);
        // Nothing is to pass that nobody asked for.
        let ipv6 = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.name());
        fs::write(ipv6, "1").expect("root may set it");
        let node = format!("10.9.{number}.0");
        let address = format!("10.9.{number}.1");
        tap.up(&format!("{node}/31"));
        let setup = Setup::new()
            .descriptor("tap", tap.file.try_clone().expect("a descriptor can be copied"))
            .set("mac", format!("02:00:00:00:00:{number:02x}"))
            .set("ipv4", &address)
            .set("mtu", mtu);
        let vm = set(setup).start();
        let configure = Request::new("", "system.configure").set("address", format!("{address}/31"));
        vm.agent().ok(configure.set("gateway", node).set("mtu", mtu));
        vm.put_guest_tool();
        Self { vm, tap, address }
    }

    /// Starts the guest tool; it is ready when it says that it listens.
    fn listen(&self, arguments: &str) -> Call {
        let line = format!("/run/guest-tool {arguments}");
        let mut call = self.vm.agent().start(self.vm.exec_request(&["sh", "-c", &line]));
        call.read_until("stdout", "listening=");
        call
    }

    fn tool(&self, arguments: &str) -> String {
        self.vm.sh(&format!("/run/guest-tool {arguments}"))
    }

    /// A counter of the TAP device: what the host's kernel saw. What it receives is what the guest sends.
    fn tap(&self, name: &str) -> u64 {
        // Of this network namespace, which /sys is not.
        let text = fs::read_to_string("/proc/thread-self/net/dev").expect("the node has /proc");
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(self.tap.name())?.strip_prefix(':'));
        let counters: Vec<&str> = line.expect("the device is there").split_whitespace().collect();
        let column = match name {
            "rx_bytes" => 0,
            "rx_packets" => 1,
            "tx_bytes" => 8,
            "tx_packets" => 9,
            _ => panic!("{name} is no counter of a device"),
        };
        counters[column].parse().expect("it is a number")
    }

    /// A counter of the guest's own driver.
    fn driver(&self, name: &str) -> u64 {
        self.vm.sh(&format!("cat /sys/class/net/eth0/statistics/{name}")).trim().parse().expect("it is a number")
    }

    /// The device, the guest's driver and the host's kernel counted the same. They are asked one after the other, so a
    /// frame in between makes it worth another look.
    fn assert_counters_agree(&self) {
        for (device, driver, tap) in [
            ("net_tx_packets", "tx_packets", "rx_packets"),
            ("net_tx_bytes", "tx_bytes", "rx_bytes"),
            ("net_rx_packets", "rx_packets", "tx_packets"),
            ("net_rx_bytes", "rx_bytes", "tx_bytes"),
        ] {
            let count = || [self.vm.stat(device), self.driver(driver), self.tap(tap)];
            let agree = |counts: [u64; 3]| counts.iter().all(|&one| one == counts[0]);
            assert!((0..20).any(|_| agree(count())), "{device}, driver, TAP: {:?}", count());
        }
        let stats = self.vm.stats();
        for (key, value) in stats.0.iter().filter(|(key, _)| key.starts_with("net_") && key.contains("dropped")) {
            assert_eq!(value, b"0", "{key}");
        }
    }
}

pub fn run(arguments: &[&str]) {
    own_network();
    match arguments {
        ["tcp"] => tcp(),
        ["packets"] => packets(),
        ["forged"] => forged(),
        ["limits"] => limits(),
        _ => panic!("usage: vm-rig net tcp | packets | forged | limits"),
    }
}

/// Streams both ways with offloads, without, and with long frames.
fn tcp() {
    for (mtu, plain, mib) in [(1500, false, 32), (1500, true, 8), (9000, false, 32), (9000, true, 8)] {
        let set = |setup: Setup| if plain { setup.set("plain_frames", "true") } else { setup };
        let (a, b) = (Guest::start(1, mtu, set), Guest::start(2, mtu, set));
        for (from, to) in [(&a, &b), (&b, &a)] {
            let before = (from.vm.stat("net_tx_bytes"), from.vm.stat("net_tx_packets"));
            let receiver = to.listen("tcp-receive port=5001");
            from.tool(&format!("tcp-send to={}:5001 mib={mib}", to.address));
            let reply = receiver.finish_ok();
            assert_eq!(reply.field("exit"), "0", "{}", reply.text("stderr"));
            let (bytes, packets) = (from.vm.stat("net_tx_bytes") - before.0, from.vm.stat("net_tx_packets") - before.1);
            assert!(bytes > mib << 20, "{bytes} octets sent");
            println!("mtu={mtu} plain={plain} octets={bytes} frames={packets}");
            let average = bytes / packets;
            assert!(if plain { average <= u64::from(mtu) + 14 } else { average > u64::from(mtu) }, "{average} a frame");
        }
        // What was on its way has arrived when nothing changes any more.
        settle(&[&a, &b]);
        a.assert_counters_agree();
        b.assert_counters_agree();
        assert_eq!(a.vm.stop().reason, "stopped");
        assert_eq!(b.vm.stop().reason, "stopped");
    }
}

/// Waits until the guests' devices carry nothing any more.
fn settle(guests: &[&Guest]) {
    let count = || -> u64 {
        let one = |guest: &&Guest| guest.vm.stat("net_tx_packets") + guest.vm.stat("net_rx_packets");
        guests.iter().map(one).sum()
    };
    let mut last = count();
    loop {
        std::thread::sleep(std::time::Duration::from_millis(300));
        match count() {
            now if now == last => return,
            now => last = now,
        }
    }
}

/// A hundred thousand of the smallest packets, and where each of them went.
fn packets() {
    const COUNT: u64 = 100_000;
    let (a, b) = (Guest::start(1, 1500, |setup| setup), Guest::start(2, 1500, |setup| setup));
    let receiver = b.listen(&format!("udp-receive port=5002 count={COUNT}"));
    a.tool(&format!("udp-send to={}:5002 count={COUNT}", b.address));
    let received = receiver.finish_ok().text("stdout");
    settle(&[&a, &b]);
    // None is lost on its way into the host.
    let sent = a.vm.stat("net_tx_packets");
    assert!((COUNT..COUNT + 100).contains(&sent), "{sent} packets for {COUNT}");
    a.assert_counters_agree();
    b.assert_counters_agree();
    println!("sent={sent} delivered={} {received}", b.vm.stat("net_rx_packets"));
    a.vm.stop();
    b.vm.stop();
}

/// Addresses that are not the guest's own reach nobody.
fn forged() {
    let a = Guest::start(1, 1500, |setup| setup);
    let dropped = |reason: &str| a.vm.stat(&format!("net_tx_dropped_{reason}"));
    a.vm.sh("ping -c 1 -W 20 10.9.1.0");
    assert_eq!((dropped("address"), dropped("mac")), (0, 0));
    let passed = a.tap("rx_packets");
    a.vm.sh("ip addr add 10.9.7.7/32 dev eth0; ! ping -c 3 -W 1 -I 10.9.7.7 10.9.1.0");
    assert!(dropped("address") >= 3, "{}", dropped("address"));
    a.vm.sh("ip link set dev eth0 address 02:00:00:00:00:99; ! ping -c 3 -W 1 10.9.1.0");
    assert!(dropped("mac") >= 1, "{}", dropped("mac"));
    assert_eq!(a.tap("rx_packets"), passed, "nothing reached the host");
    a.vm.sh("ip link set dev eth0 address 02:00:00:00:00:01; ping -c 1 -W 20 10.9.1.0");
    // The agent takes the address away again, and its own is back.
    a.vm.agent().ok(Request::new("", "system.configure").set("address", "10.9.1.1/31").set("gateway", "10.9.1.0"));
    let addresses = a.vm.sh("ip -4 addr show dev eth0");
    assert!(addresses.contains("10.9.1.1/31") && !addresses.contains("10.9.7.7"), "{addresses}");
    println!("address={} mac={}", dropped("address"), dropped("mac"));
    a.vm.stop();
}

/// What passes is bounded by the rate, however long it takes; and the stream arrives whole.
fn limits() {
    const RATE: u64 = 2 << 20;
    let begun = Instant::now();
    let a = Guest::start(1, 1500, |setup| setup.set("net_tx_bytes_per_s", RATE).set("net_rx_packets_per_s", 2000));
    let b = Guest::start(2, 1500, |setup| setup);
    for (from, to) in [(&a, &b), (&b, &a)] {
        let receiver = to.listen("tcp-receive port=5003");
        from.tool(&format!("tcp-send to={}:5003 mib=6", to.address));
        assert_eq!(receiver.finish_ok().field("exit"), "0");
    }
    let (bytes, packets) = (a.vm.stat("net_tx_bytes"), a.vm.stat("net_rx_packets"));
    let seconds = begun.elapsed().as_secs_f64();
    // Rate, burst of a tenth of a second, and one frame.
    assert!(bytes as f64 <= RATE as f64 * (seconds + 0.1) + 65_550.0, "{bytes} octets in {seconds} s");
    assert!(packets as f64 <= 2000.0 * (seconds + 0.1) + 1.0, "{packets} packets in {seconds} s");
    assert!(a.vm.stat("net_tx_waits") > 0, "the bucket was never empty");
    println!("octets={bytes} seconds={seconds:.1} waits={}", a.vm.stat("net_tx_waits"));
    a.vm.stop();
    b.vm.stop();
}
