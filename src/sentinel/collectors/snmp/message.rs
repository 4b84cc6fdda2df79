//! PDUs and the messages of v1 and v2c (RFC 1157, RFC 1901, RFC 3416).

use super::ber::{self, BerError, Reader, Value};
use super::oid::Oid;

/// Variables in a PDU that is read, at most.
const MAX_VARIABLES: usize = 4096;

/// What a PDU asks or says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PduKind {
    /// The values of these.
    Get,
    /// The values of what follows these.
    GetNext,
    /// What follows these, many times over.
    GetBulk,
    /// The answer.
    Response,
    /// Why the engine did not take the message (v3).
    Report,
}

impl PduKind {
    fn tag(self) -> u8 {
        match self {
            Self::Get => 0xa0,
            Self::GetNext => 0xa1,
            Self::Response => 0xa2,
            Self::GetBulk => 0xa5,
            Self::Report => 0xa8,
        }
    }

    fn of(tag: u8) -> Option<Self> {
        [Self::Get, Self::GetNext, Self::Response, Self::GetBulk, Self::Report]
            .into_iter()
            .find(|kind| kind.tag() == tag)
    }
}

/// The response is too big for one datagram.
pub const TOO_BIG: i32 = 1;
/// v1: there is no such variable, or none after it.
pub const NO_SUCH_NAME: i32 = 2;

/// One request or answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Pdu {
    /// What it asks or says.
    pub kind: PduKind,
    /// Names the request.
    pub id: i32,
    /// error-status; of GetBulk: non-repeaters.
    pub status: i32,
    /// error-index; of GetBulk: max-repetitions.
    pub index: i32,
    /// Names with values.
    pub variables: Vec<(Oid, Value)>,
}

impl Pdu {
    /// A request for these names.
    pub fn request(kind: PduKind, names: impl IntoIterator<Item = Oid>) -> Self {
        let variables = names.into_iter().map(|name| (name, Value::Null)).collect();
        Self { kind, id: 0, status: 0, index: 0, variables }
    }

    /// Appends the PDU.
    pub fn encode(&self, out: &mut Vec<u8>) {
        ber::element(out, self.kind.tag(), |out| {
            ber::put_int(out, self.id.into());
            ber::put_int(out, self.status.into());
            ber::put_int(out, self.index.into());
            ber::element(out, ber::SEQUENCE, |out| {
                for (name, value) in &self.variables {
                    ber::element(out, ber::SEQUENCE, |out| {
                        ber::put_oid(out, name);
                        ber::put_value(out, value);
                    });
                }
            });
        });
    }

    /// Reads a PDU.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, BerError> {
        let (tag, content) = reader.next()?;
        let kind = PduKind::of(tag).ok_or(BerError::Tag(tag))?;
        let mut content = Reader(content);
        let (id, status, index) = (content.int()?, content.int()?, content.int()?);
        let mut list = content.sequence()?;
        let mut variables = Vec::new();
        while !list.is_empty() {
            if variables.len() == MAX_VARIABLES {
                return Err(BerError::Length);
            }
            let mut pair = list.sequence()?;
            let name = ber::oid(pair.expect(ber::OID)?)?;
            variables.push((name, pair.value()?));
        }
        Ok(Self { kind, id, status, index, variables })
    }
}

/// What error-status means (RFC 3416 §3).
pub fn status_name(status: i32) -> &'static str {
    match status {
        1 => "tooBig",
        2 => "noSuchName",
        3 => "badValue",
        4 => "readOnly",
        5 => "genErr",
        6 => "noAccess",
        16 => "authorizationError",
        _ => "an error",
    }
}

/// Version number in a message: v1.
pub const V1: i32 = 0;
/// v2c.
pub const V2C: i32 = 1;
/// v3.
pub const V3: i32 = 3;

/// Any message, as far as it can be read without keys.
#[derive(Debug)]
pub enum Message<'a> {
    /// v1 or v2c, whole.
    Community {
        /// [`V1`] or [`V2C`].
        version: i32,
        /// Says who may read.
        community: &'a [u8],
        /// What is said.
        pdu: Pdu,
    },
    /// v3: see `v3`.
    V3(super::v3::Envelope<'a>),
}

impl<'a> Message<'a> {
    /// Reads a datagram.
    pub fn decode(datagram: &'a [u8]) -> Result<Self, BerError> {
        let mut outer = Reader(datagram);
        let mut message = outer.sequence()?;
        // Octets behind the message are allowed by none of the RFCs, but some agents pad.
        match message.int()? {
            version @ (V1 | V2C) => {
                let community = message.expect(ber::OCTETS)?;
                Ok(Self::Community { version, community, pdu: Pdu::decode(&mut message)? })
            }
            V3 => Ok(Self::V3(super::v3::Envelope::decode(datagram, message)?)),
            _ => Err(BerError::Number),
        }
    }
}

/// A message of v1 or v2c.
pub fn community_message(version: i32, community: &[u8], pdu: &Pdu) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    ber::element(&mut out, ber::SEQUENCE, |out| {
        ber::put_int(out, version.into());
        ber::put_octets(out, community);
        pdu.encode(out);
    });
    out
}
