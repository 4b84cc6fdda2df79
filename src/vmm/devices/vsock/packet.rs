//! Headers of vsock packets (virtio 1.2 §5.10.6).

/// Octets of a header.
pub const HEADER: usize = 44;
/// Context identifier of the host.
pub const HOST_CID: u64 = 2;
/// The only socket type here.
pub const TYPE_STREAM: u16 = 1;
/// The sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = 3;

/// What a packet is for (§5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Refuses or aborts it.
    Reset = 3,
    /// Ends one direction or both.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    fn parse(op: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest].into_iter().find(|&o| o as u16 == op)
    }
}

/// A header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's context identifier.
    pub src_cid: u64,
    /// Receiver's context identifier.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Octets that follow the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// What the packet is for; `None` for an operation that does not exist.
    pub op: Option<Op>,
    /// Of the operation.
    pub flags: u32,
    /// Octets that the sender's buffer for this connection holds.
    pub buf_alloc: u32,
    /// Octets that the sender has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn decode(octets: &[u8; HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([octets[at], octets[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: Op::parse(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes a header.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut octets = [0; HEADER];
        octets[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        octets[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        octets[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        octets[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        octets[24..28].copy_from_slice(&self.len.to_le_bytes());
        octets[28..30].copy_from_slice(&self.kind.to_le_bytes());
        octets[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        octets[32..36].copy_from_slice(&self.flags.to_le_bytes());
        octets[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        octets[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        octets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way_there_and_back() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0xdead_beef,
            dst_port: 1024,
            len: 0x1_0001,
            kind: TYPE_STREAM,
            op: Some(Op::CreditUpdate),
            flags: SHUTDOWN_BOTH,
            buf_alloc: 0x0004_0000,
            fwd_cnt: u32::MAX,
        };
        assert_eq!(Header::decode(&header.encode()), header);
    }

    #[test]
    fn operations_that_do_not_exist_are_none() {
        for op in [0u16, 8, 0xffff] {
            let mut octets = [0; HEADER];
            octets[30..32].copy_from_slice(&op.to_le_bytes());
            assert_eq!(Header::decode(&octets).op, None);
        }
    }
}
