use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::scratch;
use crate::vmm::devices::serial::{KEEP_BYTES, LOG_BYTES, Serial};

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

fn print(port: &Serial, octets: &[u8]) {
    octets.iter().for_each(|&octet| port.write(0, octet));
}

#[test]
fn lines_are_logged_at_once_and_unfinished_ones_a_little_later() {
    let (file, port) = port();
    print(&port, b"one\ntwo");
    assert_eq!(text(&file), b"one\n");
    std::thread::sleep(super::super::serial::FLUSH_AFTER * 2);
    port.timer_event();
    assert_eq!(text(&file), b"one\ntwo");
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
    for _ in 0..(2 * LOG_BYTES) {
        port.write(0, b'y');
    }
    assert!(file.metadata().unwrap().len() <= LOG_BYTES);
}

#[test]
fn a_log_that_cannot_be_written_does_not_stop_the_guest() {
    let port = Serial::new(File::open("/dev/null").unwrap()).unwrap();
    print(&port, b"lost\nlost\n");
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
