use super::*;
use crate::vmm::devices::driver::Seed;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: [u8; 4] = [10, 0, 0, 2];
const ALL: u64 = features::OFFLOADS | features::USO;

fn rules(ipv4: bool) -> Rules {
    Rules { mac: MAC, ipv4: ipv4.then(|| OWN.into()), mtu: 1500 }
}

fn ethernet(source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &source[..], &kind.to_be_bytes(), payload].concat()
}

fn ip(source: [u8; 4], protocol: u8, len: usize) -> Vec<u8> {
    let mut octets = vec![0; len];
    octets[0] = 0x45;
    octets[9] = protocol;
    octets[12..16].copy_from_slice(&source);
    octets
}

fn arp(mac: [u8; 6], source: [u8; 4]) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &source, &[0; 6], &[10, 0, 0, 1]].concat()
}

const PLAIN: Header = Header { flags: 0, gso_type: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0 };

/// A header that asks for TCP over IPv4 to be cut.
const TSO4: Header =
    Header { flags: 1, gso_type: gso::TCPV4, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };

/// What `Rules::check` says of a frame, and the header that is sent.
fn check(rules: Rules, header: Header, frame: &[u8], driver: u64) -> Result<(u64, Header), Refusal> {
    let mut octets = [&header.encode()[..], frame].concat();
    octets.truncate(HEADER + CHECKED);
    let packets = rules.check(&mut octets, frame.len(), driver)?;
    Ok((packets, Header::decode(octets.first_chunk().unwrap())))
}

fn source(ipv4: bool, frame: &[u8]) -> Result<u64, Refusal> {
    check(rules(ipv4), PLAIN, frame, 0).map(|(packets, _)| packets)
}

#[test]
fn frames_from_the_guests_own_addresses_pass() {
    assert_eq!(source(true, &ethernet(MAC, IPV4, &ip(OWN, TCP, 100))), Ok(1));
    assert_eq!(source(true, &ethernet(MAC, ARP, &arp(MAC, OWN))), Ok(1));
    assert_eq!(source(true, &ethernet(MAC, ARP, &arp(MAC, [0; 4]))), Ok(1), "it looks for others with its address");
    assert_eq!(source(false, &ethernet(MAC, IPV6, &[0x60; 60])), Ok(1));
    assert_eq!(source(false, &ethernet(MAC, IPV4, &ip([8, 8, 8, 8], UDP, 60))), Ok(1), "no address is fixed");
    assert_eq!(source(false, &ethernet(MAC, 0x88cc, &[])), Ok(1));
}

#[test]
fn forged_addresses_are_told_by_their_kind() {
    for fixed in [false, true] {
        assert_eq!(source(fixed, &ethernet(OTHER, IPV4, &ip(OWN, TCP, 60))), Err(Refusal::Mac));
        assert_eq!(source(fixed, &ethernet(MAC, ARP, &arp(OTHER, OWN))), Err(Refusal::Mac), "inside of ARP");
        for tag in [0x8100, 0x88a8, 0x9100] {
            assert_eq!(source(fixed, &ethernet(MAC, tag, &[0; 60])), Err(Refusal::Vlan));
        }
        assert_eq!(source(fixed, &ethernet(MAC, ARP, &arp(MAC, OWN)[..27])), Err(Refusal::Length));
        let mut odd = arp(MAC, OWN);
        odd[4] = 8;
        assert_eq!(source(fixed, &ethernet(MAC, ARP, &odd)), Err(Refusal::Protocol), "addresses elsewhere");
    }
    for address in [[10, 0, 0, 3], [0; 4], [255; 4]] {
        assert_eq!(source(true, &ethernet(MAC, IPV4, &ip(address, TCP, 60))), Err(Refusal::Address));
    }
    assert_eq!(source(true, &ethernet(MAC, ARP, &arp(MAC, [10, 0, 0, 3]))), Err(Refusal::Address));
    assert_eq!(source(true, &ethernet(MAC, IPV4, &ip(OWN, TCP, 20)[..19])), Err(Refusal::Address));
    assert_eq!(source(true, &ethernet(MAC, IPV4, &[0x65; 40])), Err(Refusal::Address), "not version 4");
    for kind in [IPV6, 0x88cc, 0, 1500] {
        assert_eq!(source(true, &ethernet(MAC, kind, &[0x60; 60])), Err(Refusal::Protocol));
    }
}

#[test]
fn lengths_are_those_of_the_mtu_or_of_a_datagram() {
    let of = |len: usize| ethernet(MAC, IPV4, &ip(OWN, TCP, len));
    assert_eq!(source(true, &of(1500)), Ok(1));
    assert_eq!(source(true, &of(1501)), Err(Refusal::Length));
    assert_eq!(source(true, &ethernet(MAC, IPV4, &[])[..13]), Err(Refusal::Length));
    assert_eq!(source(true, &[]), Err(Refusal::Length));
    assert_eq!(check(rules(true), TSO4, &of(65_535), ALL).unwrap().0, 46);
    assert_eq!(check(rules(true), TSO4, &of(65_536), ALL), Err(Refusal::Length));
    let mut short = [0; HEADER - 1];
    assert_eq!(rules(true).check(&mut short, 0, ALL), Err(Refusal::Length));
    let mut part = [0; HEADER + 20];
    assert_eq!(rules(true).check(&mut part, 60, ALL), Err(Refusal::Length), "less than is to be checked");
}

#[test]
fn checksums_are_completed_inside_the_frame_only() {
    let frame = ethernet(MAC, IPV4, &ip(OWN, UDP, 100));
    let with = |start, offset| Header { flags: 1, csum_start: start, csum_offset: offset, ..PLAIN };
    let of = |header| check(rules(true), header, &frame, features::CSUM);
    assert_eq!(of(with(34, 6)), Ok((1, with(34, 6))));
    assert_eq!(of(with(112, 0)), Ok((1, with(112, 0))));
    for (start, offset) in [(113, 0), (34, 79), (13, 2), (0, 0), (u16::MAX, u16::MAX), (1, u16::MAX)] {
        assert_eq!(of(with(start, offset)), Err(Refusal::Header), "{start}+{offset}");
    }
    assert_eq!(check(rules(true), with(34, 6), &frame, 0), Err(Refusal::Header), "not negotiated");
}

#[test]
fn what_a_driver_may_not_say_is_not_passed_on() {
    let frame = ethernet(MAC, IPV4, &ip(OWN, UDP, 100));
    let loud = Header { flags: 0xfe, hdr_len: 9, gso_size: 8, csum_start: 7, csum_offset: 6, ..PLAIN };
    assert_eq!(check(rules(true), loud, &frame, ALL), Ok((1, PLAIN)));
}

#[test]
fn only_what_was_negotiated_is_cut_and_only_what_it_says_it_is() {
    let four = ethernet(MAC, IPV4, &ip(OWN, TCP, 20 + 20 + 5000));
    let of = |header: Header| check(rules(true), header, &four, ALL).map(|(packets, _)| packets);
    assert_eq!(of(TSO4), Ok(4));
    assert_eq!(of(Header { gso_size: 48, ..TSO4 }), Ok(105));
    assert_eq!(check(rules(true), TSO4, &four, ALL & !features::HOST_TSO4), Err(Refusal::Header));
    let marked = Header { gso_type: gso::TCPV4 | gso::ECN, ..TSO4 };
    assert_eq!(of(marked), Ok(4));
    assert_eq!(check(rules(true), marked, &four, ALL & !features::HOST_ECN), Err(Refusal::Header));
    for bad in [
        Header { flags: 0, ..TSO4 },
        Header { gso_size: 0, ..TSO4 },
        Header { gso_size: 47, ..TSO4 },
        Header { gso_size: 1501, ..TSO4 },
        Header { hdr_len: 5055, ..TSO4 },
        Header { csum_offset: 6, ..TSO4 },
        Header { csum_start: 33, ..TSO4 },
        Header { csum_start: 5035, ..TSO4 },
        Header { gso_type: gso::TCPV6, ..TSO4 },
        Header { gso_type: gso::UDP_L4, csum_offset: 6, ..TSO4 },
        Header { gso_type: 2, ..TSO4 },
        Header { gso_type: gso::ECN, ..TSO4 },
    ] {
        assert_eq!(of(bad), Err(Refusal::Header), "{bad:?}");
    }
    let udp = ethernet(MAC, IPV4, &ip(OWN, UDP, 20 + 8 + 3000));
    let cut = Header { gso_type: gso::UDP_L4, gso_size: 1000, csum_offset: 6, ..TSO4 };
    assert_eq!(check(rules(true), cut, &udp, ALL).unwrap().0, 3);
    assert_eq!(check(rules(true), Header { gso_type: gso::UDP, ..cut }, &udp, ALL).unwrap().0, 3);
    let marked = Header { gso_type: gso::UDP_L4 | gso::ECN, ..cut };
    assert_eq!(check(rules(true), marked, &udp, ALL), Err(Refusal::Header));
    assert_eq!(check(rules(true), TSO4, &udp, ALL), Err(Refusal::Header), "TCP it is not");
    let mut six = ethernet(MAC, IPV6, &[0; 40 + 20 + 3000]);
    six[ETHERNET] = 0x60;
    let tso6 = Header { gso_type: gso::TCPV6, csum_start: 54, ..TSO4 };
    assert_eq!(check(rules(false), tso6, &six, ALL).unwrap().0, 3);
    assert_eq!(check(rules(false), Header { csum_start: 34, ..tso6 }, &six, ALL), Err(Refusal::Header));
    assert_eq!(check(rules(false), TSO4, &six, ALL), Err(Refusal::Header));
    assert_eq!(check(rules(true), tso6, &six, ALL), Err(Refusal::Protocol));
}

#[test]
fn whatever_passes_is_the_guests_own_and_inside_its_frame() {
    let mut passed = 0;
    for seed in 0..20_000 {
        let mut random = Seed(seed);
        let len = random.below(200) as usize;
        let mut frame = random.octets(len);
        // Mostly right, so that it gets far.
        let kind = [IPV4, ARP, IPV6, 0x8100][random.below(4) as usize];
        let good = match kind {
            ARP => ethernet(MAC, ARP, &arp(MAC, OWN)),
            _ => ethernet(MAC, kind, &ip(OWN, [TCP, UDP][random.below(2) as usize], 20)),
        };
        if random.below(8) > 0 {
            let known = frame.len().min(good.len());
            frame[..known].copy_from_slice(&good[..known]);
        }
        if random.below(2) == 0 && !frame.is_empty() {
            let at = random.below(frame.len() as u64) as usize;
            frame[at] = random.number() as u8;
        }
        let header = Header {
            flags: random.below(4) as u8,
            gso_type: if random.below(2) == 0 { 0 } else { random.below(6) as u8 },
            hdr_len: random.below(256) as u16,
            gso_size: random.below(2000) as u16,
            csum_start: random.below(80) as u16,
            csum_offset: [6, 16, random.below(200) as u16][random.below(3) as usize],
        };
        let Ok((packets, sent)) = check(rules(true), header, &frame, ALL) else { continue };
        passed += 1;
        assert_eq!(frame[6..12], MAC);
        let address = if frame[12..14] == [8, 0] { &frame[26..30] } else { &frame[28..32] };
        assert!(address == OWN || (frame[12..14] == [8, 6] && address == [0; 4]));
        assert!(sent.flags <= 1 && usize::from(sent.hdr_len) <= frame.len());
        assert!(usize::from(sent.csum_start) + usize::from(sent.csum_offset) < frame.len());
        assert!(packets as usize <= frame.len());
        assert!(sent.gso_type == 0 || (48..=1500).contains(&sent.gso_size));
    }
    assert!(passed > 1000, "{passed}");
}
