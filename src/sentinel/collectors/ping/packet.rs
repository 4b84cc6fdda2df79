//! ICMP echo (RFC 792, RFC 4443), as far as pinging needs it. What comes in is from anybody.

/// What an echo request carries to know its answer by: nobody else's request has our cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo {
    /// Of the process.
    pub cookie: u64,
    /// Of the request.
    pub number: u64,
}

/// Octets of an [`Echo`] in a packet.
const ECHO: usize = 16;
/// Octets of an ICMP header.
const HEADER: usize = 8;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// An answer.
    Reply(Echo),
    /// A router or the host says that the request cannot be delivered; identifier and sequence of the request.
    Unreachable(u16, u16),
}

/// An echo request. ICMPv6 checksums are the kernel's (RFC 3542 §3.1).
pub fn request(v6: bool, identifier: u16, sequence: u16, echo: Echo, size: usize) -> Vec<u8> {
    let mut packet = vec![if v6 { 128 } else { 8 }, 0, 0, 0];
    packet.extend(identifier.to_be_bytes());
    packet.extend(sequence.to_be_bytes());
    packet.extend(echo.cookie.to_be_bytes());
    packet.extend(echo.number.to_be_bytes());
    packet.resize(HEADER + size.max(ECHO), 0x55);
    if !v6 {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The internet checksum (RFC 1071).
fn checksum(octets: &[u8]) -> u16 {
    let sum: u64 = octets.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum();
    let mut sum = sum;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Reads what a raw socket received. With IPv4 the IP header comes first, with its time to live.
pub fn heard(v6: bool, datagram: &[u8]) -> Option<(Heard, Option<u8>)> {
    let (packet, ttl) = if v6 { (datagram, None) } else { without_header(datagram)? };
    let kind = *packet.first()?;
    let heard = match (v6, kind) {
        (false, 0) | (true, 129) => {
            let data = packet.get(HEADER..HEADER + ECHO)?;
            let number = |at: usize| data[at..at + 8].try_into().map(u64::from_be_bytes).ok();
            Heard::Reply(Echo { cookie: number(0)?, number: number(8)? })
        }
        // Destination unreachable, time exceeded: with the start of what was sent.
        (false, 3 | 11) => quoted(without_header(packet.get(HEADER..)?)?.0, 8)?,
        (true, 1 | 3) => quoted(packet.get(HEADER + 40..)?, 128)?,
        _ => return None,
    };
    Some((heard, ttl))
}

fn quoted(packet: &[u8], kind: u8) -> Option<Heard> {
    let header = packet.get(..HEADER).filter(|header| header[0] == kind)?;
    let identifier = u16::from_be_bytes([header[4], header[5]]);
    Some(Heard::Unreachable(identifier, u16::from_be_bytes([header[6], header[7]])))
}

fn without_header(datagram: &[u8]) -> Option<(&[u8], Option<u8>)> {
    let first = datagram.first().filter(|first| *first >> 4 == 4)?;
    let packet = datagram.get(usize::from(first & 15).max(5) * 4..)?;
    Some((packet, datagram.get(8).copied()))
}

/// Round-trip times of one run, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The shortest.
    pub min: f64,
    /// Their mean.
    pub avg: f64,
    /// The longest.
    pub max: f64,
    /// Their standard deviation (of all, not of a sample).
    pub stddev: f64,
}

/// Sums up; `None` of nothing.
pub fn summary(times: &[f64]) -> Option<Summary> {
    if times.is_empty() {
        return None;
    }
    let count = times.len() as f64;
    let avg = times.iter().sum::<f64>() / count;
    let variance = times.iter().map(|time| (time - avg).powi(2)).sum::<f64>() / count;
    Some(Summary {
        min: times.iter().copied().fold(f64::INFINITY, f64::min),
        avg,
        max: times.iter().copied().fold(0.0, f64::max),
        stddev: variance.sqrt(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECHO: Echo = Echo { cookie: 7, number: 9 };

    fn v4(packet: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0x46, 0, 0, 0, 0, 0, 0, 0, 63, 1];
        datagram.resize(24, 0);
        datagram.extend(packet);
        datagram
    }

    #[test]
    fn a_checksum_makes_the_whole_sum_up_to_nothing() {
        for size in [0, 24, 57] {
            let packet = request(false, 1, 2, ECHO, size);
            assert_eq!(packet.len(), 8 + size.max(16));
            assert_eq!(checksum(&packet), 0);
        }
        // RFC 1071 §3
        assert_eq!(checksum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn replies_and_errors_are_told_from_the_rest() {
        let mut reply = request(false, 1, 2, ECHO, 24);
        assert_eq!(heard(false, &v4(&reply)), None, "our own request");
        let error = [&[3, 1, 0, 0, 0, 0, 0, 0][..], &v4(&reply[..8])].concat();
        assert_eq!(heard(false, &v4(&error)), Some((Heard::Unreachable(1, 2), Some(63))));
        reply[0] = 0;
        assert_eq!(heard(false, &v4(&reply)), Some((Heard::Reply(ECHO), Some(63))));
        let mut reply = request(true, 3, 4, ECHO, 24);
        let error = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[0; 40], &reply[..8]].concat();
        assert_eq!(heard(true, &error), Some((Heard::Unreachable(3, 4), None)));
        reply[0] = 129;
        assert_eq!(heard(true, &reply), Some((Heard::Reply(ECHO), None)));
        for cut in 0..30 {
            // No length is too short to be looked at.
            let _ = (heard(false, &v4(&reply)[..cut]), heard(true, &error[..cut]));
        }
    }

    #[test]
    fn times_are_summed_up() {
        assert_eq!(summary(&[]), None);
        let of = summary(&[0.002, 0.004, 0.004, 0.004, 0.005, 0.005, 0.007, 0.009]).unwrap();
        assert_eq!((of.min, of.max), (0.002, 0.009));
        assert!((of.avg - 0.005).abs() < 1e-12 && (of.stddev - 0.002).abs() < 1e-12, "{of:?}");
    }
}
