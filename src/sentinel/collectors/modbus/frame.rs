//! Frames: Modbus TCP (MODBUS Messaging on TCP/IP 1.0b) and RTU (MODBUS over Serial Line 1.02). A device's answer is
//! read as hostile input.

/// Registers in one request, at most (MODBUS Application Protocol 1.1b3 §6.3).
pub const MOST_REGISTERS: u16 = 125;
/// Coils in one request, at most (§6.1).
pub const MOST_COILS: u16 = 2000;
/// Longest PDU, in octets.
const MOST_PDU: usize = 253;

/// How frames look on the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// With a header that has a transaction id and a length.
    Tcp,
    /// With a checksum and nothing else.
    Rtu,
}

/// What is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Bits that can be written.
    Coil,
    /// Bits that cannot.
    Discrete,
    /// Registers that can be written.
    Holding,
    /// Registers that cannot.
    Input,
}

impl Table {
    fn function(self) -> u8 {
        match self {
            Self::Coil => 1,
            Self::Discrete => 2,
            Self::Holding => 3,
            Self::Input => 4,
        }
    }

    /// Whether it holds bits.
    pub fn is_bits(self) -> bool {
        matches!(self, Self::Coil | Self::Discrete)
    }

    /// Most values in one request.
    pub fn most(self) -> u16 {
        if self.is_bits() { MOST_COILS } else { MOST_REGISTERS }
    }
}

/// A request: these values of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Which table.
    pub table: Table,
    /// The first value.
    pub address: u16,
    /// How many.
    pub count: u16,
}

impl Ask {
    /// Octets that the answer holds.
    fn octets(&self) -> usize {
        if self.table.is_bits() { usize::from(self.count).div_ceil(8) } else { usize::from(self.count) * 2 }
    }

    /// The request as it travels.
    pub fn encode(&self, framing: Framing, transaction: u16, unit: u8) -> Vec<u8> {
        let mut pdu = vec![unit, self.table.function()];
        pdu.extend(self.address.to_be_bytes());
        pdu.extend(self.count.to_be_bytes());
        match framing {
            Framing::Tcp => {
                let mut frame = transaction.to_be_bytes().to_vec();
                frame.extend([0, 0]);
                frame.extend((pdu.len() as u16).to_be_bytes());
                frame.extend(pdu);
                frame
            }
            Framing::Rtu => {
                let sum = crc(&pdu);
                pdu.extend(sum.to_le_bytes());
                pdu
            }
        }
    }
}

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The values' octets.
    Data(Vec<u8>),
    /// The device refuses, with this code.
    Exception(u8),
    /// A late answer to another request: to be left out.
    Other,
}

/// Why the connection cannot be used any more.
pub type Desync = &'static str;

/// Takes one answer off the front of what came; `None` where it has not all come yet.
pub fn answer(
    buffer: &mut Vec<u8>,
    framing: Framing,
    transaction: u16,
    unit: u8,
    ask: &Ask,
) -> Result<Option<Answer>, Desync> {
    let (from, pdu, total) = match framing {
        Framing::Tcp => {
            let Some(header) = buffer.get(..7) else { return Ok(None) };
            if header[2..4] != [0, 0] {
                return Err("an answer is of another protocol");
            }
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            if !(3..=MOST_PDU + 1).contains(&length) {
                return Err("an answer has a length that cannot be");
            }
            let other = u16::from_be_bytes([header[0], header[1]]) != transaction;
            let Some(frame) = buffer.get(..6 + length) else { return Ok(None) };
            if other {
                buffer.drain(..6 + length);
                return Ok(Some(Answer::Other));
            }
            (frame[6], frame[7..].to_vec(), 6 + length)
        }
        Framing::Rtu => {
            let Some(&[unit, function, third]) = buffer.first_chunk::<3>() else { return Ok(None) };
            let length = if function & 0x80 != 0 { 3 } else { 3 + usize::from(third) };
            let Some(frame) = buffer.get(..length + 2) else { return Ok(None) };
            let (content, sum) = frame.split_at(length);
            if sum != crc(content).to_le_bytes() {
                return Err("an answer's checksum is wrong");
            }
            (unit, content[1..].to_vec(), length + 2)
        }
    };
    buffer.drain(..total);
    if from != unit {
        return Err("an answer is from another unit");
    }
    let function = ask.table.function();
    match pdu[..] {
        [said, code] if said == function | 0x80 => Ok(Some(Answer::Exception(code))),
        [said, count, ref data @ ..] if said == function => {
            if usize::from(count) != data.len() || data.len() != ask.octets() {
                return Err("an answer has another number of values than was asked for");
            }
            Ok(Some(Answer::Data(data.to_vec())))
        }
        _ => Err("an answer is to another function"),
    }
}

/// CRC-16 with the polynomial 0xa001 (MODBUS over Serial Line §6.2.2).
pub fn crc(octets: &[u8]) -> u16 {
    octets.iter().fold(0xffff, |sum, octet| {
        (0..8).fold(sum ^ u16::from(*octet), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xa001 } else { sum >> 1 })
    })
}

/// What an exception code means (MODBUS Application Protocol §7).
pub fn exception_name(code: u8) -> &'static str {
    match code {
        1 => "illegal function",
        2 => "illegal data address",
        3 => "illegal data value",
        4 => "device failure",
        5 => "acknowledge",
        6 => "device busy",
        8 => "memory parity error",
        10 => "gateway path unavailable",
        11 => "gateway target does not respond",
        _ => "an exception",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK: Ask = Ask { table: Table::Holding, address: 0x6b, count: 3 };
    const DATA: [u8; 6] = [2, 0x2b, 0, 0, 0, 0x64];

    fn tcp(transaction: u16, unit: u8, pdu: &[u8]) -> Vec<u8> {
        let mut frame = transaction.to_be_bytes().to_vec();
        frame.extend([0, 0, 0, pdu.len() as u8 + 1, unit]);
        frame.extend(pdu);
        frame
    }

    #[test]
    fn requests_are_those_of_the_specification() {
        // The example of §6.3.
        assert_eq!(ASK.encode(Framing::Tcp, 1, 17), [0, 1, 0, 0, 0, 6, 17, 3, 0, 0x6b, 0, 3]);
        let rtu = ASK.encode(Framing::Rtu, 1, 17);
        assert_eq!(rtu, [17, 3, 0, 0x6b, 0, 3, 0x76, 0x87]);
        assert_eq!(crc(b"123456789"), 0x4b37);
    }

    #[test]
    fn answers_come_in_any_parts() {
        for framing in [Framing::Tcp, Framing::Rtu] {
            let pdu = [&[3u8, 6][..], &DATA].concat();
            let frame = match framing {
                Framing::Tcp => [tcp(8, 17, &[3, 2, 0, 0]), tcp(9, 17, &pdu)].concat(),
                Framing::Rtu => {
                    let mut frame = [&[17u8][..], &pdu].concat();
                    let sum = crc(&frame);
                    frame.extend(sum.to_le_bytes());
                    frame
                }
            };
            let mut buffer = Vec::new();
            let mut found = Vec::new();
            for octet in frame {
                buffer.push(octet);
                found.extend(answer(&mut buffer, framing, 9, 17, &ASK).unwrap());
            }
            assert_eq!(found.pop(), Some(Answer::Data(DATA.to_vec())));
            assert!(buffer.is_empty());
            assert_eq!(found, if framing == Framing::Tcp { vec![Answer::Other] } else { vec![] });
        }
    }

    #[test]
    fn what_is_no_answer_ends_the_connection() {
        let of = |mut frame: Vec<u8>, framing| answer(&mut frame, framing, 9, 17, &ASK);
        assert_eq!(of(tcp(9, 17, &[0x83, 2]), Framing::Tcp), Ok(Some(Answer::Exception(2))));
        for frame in [
            vec![0, 9, 0, 1, 0, 3, 17, 3, 0],
            vec![0, 9, 0, 0, 0, 0, 17],
            vec![0, 9, 0, 0, 1, 0, 17],
            tcp(9, 18, &[3, 6, 1, 2, 3, 4, 5, 6]),
            tcp(9, 17, &[4, 6, 1, 2, 3, 4, 5, 6]),
            tcp(9, 17, &[3, 6, 1, 2, 3, 4, 5]),
            tcp(9, 17, &[3, 4, 1, 2, 3, 4]),
            tcp(9, 17, &[0x83, 2, 3]),
        ] {
            assert!(of(frame.clone(), Framing::Tcp).is_err(), "{frame:?}");
        }
        assert_eq!(of(vec![17, 0x83, 2, 0, 0], Framing::Rtu), Err("an answer's checksum is wrong"));
        assert_eq!(of(vec![17, 3], Framing::Rtu), Ok(None));
    }
}
