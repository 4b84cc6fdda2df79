use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::scratch;
use crate::vmm::devices::console::{KEEP_BYTES, LOG_BYTES, PENDING_BYTES};
use crate::vmm::devices::serial::{INPUT_BYTES, Serial};

fn port() -> (File, Serial) {
    let file = scratch(0);
    // A second description of the same file that appends, as the supervisor opens it.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let append = OpenOptions::new().read(true).append(true).open(path).unwrap();
    (file, Serial::new(append).unwrap())
}

fn text(file: &File) -> Vec<u8> {
    let mut octets = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut octets, 0).unwrap();
    octets
}

fn until(holds: impl Fn() -> bool) {
    let hang = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < hang, "it never comes");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn print(port: &Serial, octets: &[u8]) {
    octets.iter().for_each(|&octet| port.write(0, octet));
}

#[test]
fn lines_are_logged_at_once_and_unfinished_ones_a_little_later() {
    let (file, port) = port();
    print(&port, b"one\n");
    until(|| text(&file) == b"one\n");
    print(&port, b"two");
    until(|| text(&file) == b"one\ntwo");
    print(&port, b"three");
    port.flush();
    assert_eq!(text(&file), b"one\ntwothree");
}

#[test]
fn the_log_stays_within_its_bound_and_keeps_the_newest() {
    let (file, port) = port();
    let line = [&[b'x'; 99][..], b"\n"].concat();
    for n in 0..30_000u32 {
        let mut numbered = line.clone();
        numbered[..6].copy_from_slice(format!("{n:06}").as_bytes());
        print(&port, &numbered);
        if n % 100 == 99 {
            port.flush();
        }
        assert!(file.metadata().unwrap().len() <= LOG_BYTES);
    }
    let text = text(&file);
    assert!(text.len() as u64 > KEEP_BYTES / 2);
    // Whole lines without a gap up to the last.
    let numbers: Vec<u32> =
        text.split_inclusive(|&o| o == b'\n').map(|l| String::from_utf8_lossy(&l[..6]).parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert_eq!(numbers.last(), Some(&29_999));
}

#[test]
fn one_endless_line_stays_within_the_bound_too() {
    let (file, port) = port();
    for n in 0..(2 * LOG_BYTES) {
        port.write(0, b'y');
        if n % 50_000 == 0 {
            port.flush();
        }
    }
    port.flush();
    assert!(file.metadata().unwrap().len() <= LOG_BYTES);
    assert_eq!(port.output_dropped(), 0);
}

#[test]
fn a_log_that_cannot_be_written_does_not_stop_the_guest() {
    let port = Serial::new(File::open("/dev/null").unwrap()).unwrap();
    print(&port, b"lost\nlost\n");
    port.flush();
    assert_eq!(port.read(5), 0x60);
}

/// The steps of Linux's autoconfig in drivers/tty/serial/8250/8250_port.c.
#[test]
fn linux_finds_a_16550a() {
    let (file, port) = port();
    let (ier, iir, lcr, mcr, msr, scr) = (1, 2, 3, 4, 6, 7);
    // Interrupt enable bits hold.
    port.write(ier, 0);
    assert_eq!(port.read(ier), 0);
    port.write(ier, 0xff);
    assert_eq!(port.read(ier), 0x0f);
    port.write(ier, 0);
    // Loopback wires OUT2 and RTS to DCD and CTS.
    port.write(mcr, 0x1a);
    assert_eq!(port.read(msr) & 0xf0, 0x90);
    port.write(0, b'!');
    assert_eq!((port.read(5), port.read(0), port.read(5)), (0x61, b'!', 0x60));
    port.write(mcr, 0x08);
    assert_eq!(port.read(msr) & 0xf0, 0xb0);
    assert!(text(&file).is_empty());
    // FIFO bits come with the enable bit.
    port.write(lcr, 0);
    port.write(iir, 0);
    assert_eq!(port.read(iir) >> 6, 0);
    port.write(iir, 1);
    assert_eq!(port.read(iir) >> 6, 3);
    // The scratch register and the divisor hold, the divisor apart from the rest.
    port.write(scr, 0x5a);
    port.write(lcr, 0x83);
    port.write(0, 1);
    port.write(1, 2);
    assert_eq!((port.read(0), port.read(1), port.read(lcr), port.read(scr)), (1, 2, 0x83, 0x5a));
    port.write(lcr, 3);
    assert_eq!(port.read(ier), 0);
}

#[test]
fn the_transmitter_interrupts_when_enabled_and_after_each_octet() {
    let (_, port) = port();
    let interrupted = || port.interrupt().read().is_ok();
    port.write(0, b'a');
    assert!(!interrupted());
    assert_eq!(port.read(2), 0x01);
    port.write(1, 2);
    assert!(interrupted());
    assert_eq!(port.read(2), 0x02);
    assert_eq!(port.read(2), 0x01);
    port.write(0, b'b');
    assert!(interrupted());
    assert_eq!(port.read(2), 0x02);
    // Off and on again: as Linux tests for a broken chip.
    port.write(1, 0);
    assert_eq!(port.read(2), 0x01);
    port.write(1, 2);
    assert!(interrupted());
    assert_eq!(port.read(2), 0x02);
}

#[test]
fn a_guest_that_prints_without_end_loses_octets_and_the_log_says_how_many() {
    let (file, port) = port();
    let started = Instant::now();
    let mut printed = 0u64;
    // The burst, what waits, and more.
    while port.output_dropped() == 0 {
        print(&port, b"again and again and again\n");
        printed += 26;
        assert!(started.elapsed() < Duration::from_secs(60), "nothing is ever dropped");
    }
    print(&port, &[b'z'; PENDING_BYTES]);
    let dropped = port.output_dropped();
    assert!(dropped > 0 && dropped <= printed + PENDING_BYTES as u64);
    port.flush();
    let text = String::from_utf8(text(&file)).unwrap();
    assert!(text.len() as u64 <= LOG_BYTES);
    let told =
        text.lines().filter_map(|line| line.strip_prefix('[')?.strip_suffix(" octets came too fast and are left out]"));
    let told: u64 = told.map(|count| count.parse::<u64>().unwrap()).sum();
    assert_eq!(told, dropped);
}

#[test]
fn a_log_whose_disk_hangs_holds_up_neither_the_guest_nor_the_end() {
    use std::os::fd::FromRawFd;
    let mut ends = [0; 2];
    // SAFETY: the array takes the two descriptors that the call makes.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the call above made them, and nobody else has them.
    let (kept, full) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    // A pipe that nobody reads stands for the disk.
    let port = Serial::new(full).unwrap();
    for _ in 0..4 {
        print(&port, &[b'x'; PENDING_BYTES]);
    }
    until(|| {
        print(&port, b"x\n");
        port.output_dropped() > 0
    });
    port.flush();
    drop(port);
    drop(kept);
}

#[test]
fn input_interrupts_once_and_waits_until_it_is_read() {
    let (_, port) = port();
    let interrupted = || port.interrupt().read().is_ok();
    assert_eq!(port.input(b"early"), 5);
    assert!(!interrupted(), "nobody asked for it");
    assert_eq!((port.read(5), port.read(2)), (0x61, 0x01));
    port.write(1, 1);
    assert!(interrupted());
    for octet in b"early" {
        assert_eq!(port.read(2), 0x04);
        assert_eq!(port.read(0), *octet);
    }
    assert_eq!((port.read(2), port.read(5), port.read(0)), (0x01, 0x60, 0));
    assert_eq!(port.input(b"\r"), 1);
    assert!(interrupted());
    // The receiver goes first, the transmitter is not forgotten.
    port.write(1, 3);
    assert_eq!((port.read(2), port.read(0), port.read(2), port.read(2)), (0x04, b'\r', 0x02, 0x01));
}

#[test]
fn input_beyond_the_ring_is_refused_and_counted() {
    let (_, port) = port();
    assert_eq!(port.input(&[7; INPUT_BYTES - 1]), INPUT_BYTES - 1);
    assert_eq!(port.input(b"ab"), 1);
    assert_eq!(port.input(b"c"), 0);
    let counters = port.input_counters();
    assert_eq!((counters.taken, counters.overruns), (INPUT_BYTES as u64, 2));
    assert_eq!(port.read(5), 0x61, "the sender was told: that is no overrun of the guest's");
    // What the guest sends to itself is lost as on the chip.
    port.write(4, 0x10);
    port.write(0, b'd');
    assert_eq!((port.read(5), port.read(5)), (0x63, 0x61));
    // Clearing counts what is thrown away.
    port.write(2, 3);
    assert_eq!((port.read(5), port.input_counters().cleared), (0x60, INPUT_BYTES as u64));
}
