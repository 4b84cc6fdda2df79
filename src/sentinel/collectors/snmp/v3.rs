//! Messages of v3 under the user-based security model (RFC 3412, RFC 3414).

use std::time::Instant;

use zeroize::Zeroizing;

use super::ber::{self, BerError, Reader};
use super::crypto::{Auth, Key, Privacy, same};
use super::message::{Pdu, PduKind, V3};
use super::oid::Oid;

/// What we say we can take, in octets.
const MAX_SIZE: i64 = 65_507;
/// Flags of a message.
const AUTH: u8 = 1;
const PRIV: u8 = 2;
const REPORTABLE: u8 = 4;
/// The user-based security model's number.
const USM: i32 = 3;
/// Longest engine id (RFC 3411 §5).
const MAX_ENGINE: usize = 32;

/// Who asks, with the passwords' keys (not yet those of an engine).
#[derive(Clone)]
pub struct User {
    /// Its name.
    pub name: String,
    /// How it signs.
    pub auth: Option<(Auth, Key)>,
    /// How it hides; needs `auth`.
    pub privacy: Option<(Privacy, Key)>,
    /// Context that the variables are in.
    pub context: String,
}

/// An agent's engine, as far as it is known.
#[derive(Clone)]
pub struct Engine {
    id: Vec<u8>,
    boots: u32,
    time: u32,
    /// When `time` was so.
    at: Instant,
    auth_key: Zeroizing<Vec<u8>>,
    privacy_key: Zeroizing<Vec<u8>>,
}

impl Engine {
    /// An engine that just told its id, and its time if it is to be believed already.
    pub fn new(id: &[u8], boots: u32, time: u32, user: &User, now: Instant) -> Self {
        let auth_key = user.auth.as_ref().map(|(auth, key)| auth.localized(key, id)).unwrap_or_default();
        let privacy_key = match (&user.auth, &user.privacy) {
            (Some((auth, _)), Some((privacy, key))) => privacy.localized(*auth, key, id),
            _ => Vec::new(),
        };
        Self { id: id.to_vec(), boots, time, at: now, auth_key: auth_key.into(), privacy_key: privacy_key.into() }
    }

    /// Its time now: it goes on by itself between messages.
    fn time_at(&self, now: Instant) -> u32 {
        let since = now.saturating_duration_since(self.at).as_secs();
        self.time.saturating_add(u32::try_from(since).unwrap_or(u32::MAX)) & 0x7fff_ffff
    }

    /// Takes the time of a message that is signed, where it is later (RFC 3414 §3.2 7b).
    pub fn learn(&mut self, boots: u32, time: u32, now: Instant) {
        if (boots, time) > (self.boots, self.time) {
            (self.boots, self.time, self.at) = (boots, time, now);
        }
    }
}

/// A message as far as it can be read without keys.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// Names the message.
    pub id: i32,
    flags: u8,
    /// Who answers.
    pub engine: &'a [u8],
    /// How often it started.
    pub boots: u32,
    /// Seconds since it did.
    pub time: u32,
    user: &'a [u8],
    signature: &'a [u8],
    /// Where the signature is in the datagram.
    signature_at: usize,
    salt: &'a [u8],
    datagram: &'a [u8],
    data: Scoped<'a>,
}

#[derive(Debug)]
enum Scoped<'a> {
    Plain(Reader<'a>),
    Hidden(&'a [u8]),
}

impl<'a> Envelope<'a> {
    /// Reads what follows the version number.
    pub fn decode(datagram: &'a [u8], mut message: Reader<'a>) -> Result<Self, BerError> {
        let mut header = message.sequence()?;
        let (id, _max_size) = (header.int()?, header.int()?);
        let flags = *header.expect(ber::OCTETS)?.first().ok_or(BerError::Short)?;
        if header.int()? != USM {
            return Err(BerError::Number);
        }
        let mut outer = Reader(message.expect(ber::OCTETS)?);
        let mut parameters = outer.sequence()?;
        let engine = parameters.expect(ber::OCTETS)?;
        let number = |parameters: &mut Reader<'a>| u32::try_from(parameters.int()?).map_err(|_| BerError::Number);
        let (boots, time) = (number(&mut parameters)?, number(&mut parameters)?);
        let user = parameters.expect(ber::OCTETS)?;
        let signature = parameters.expect(ber::OCTETS)?;
        let salt = parameters.expect(ber::OCTETS)?;
        if engine.len() > MAX_ENGINE {
            return Err(BerError::Length);
        }
        let signature_at = signature.as_ptr() as usize - datagram.as_ptr() as usize;
        let data = match message.next()? {
            (ber::SEQUENCE, content) => Scoped::Plain(Reader(content)),
            (ber::OCTETS, content) => Scoped::Hidden(content),
            (tag, _) => return Err(BerError::Tag(tag)),
        };
        Ok(Self { id, flags, engine, boots, time, user, signature, signature_at, salt, datagram, data })
    }

    /// Whether it says that it is signed.
    pub fn is_signed(&self) -> bool {
        self.flags & AUTH != 0
    }

    /// Checks the signature, shows what is hidden and reads the PDU. A response must be as protected as the request; a
    /// report may be less.
    pub fn open(&self, user: &User, engine: Option<&Engine>) -> Result<Pdu, String> {
        let malformed = |e: BerError| format!("the answer is malformed: {e}");
        if let Some(engine) = engine.filter(|_| self.is_signed()) {
            let Some((auth, _)) = &user.auth else { return Err("the answer is signed, the request was not".into()) };
            if self.engine != engine.id || self.user != user.name.as_bytes() {
                return Err("the answer is from another engine or for another user".into());
            }
            let (before, after) = self.datagram.split_at(self.signature_at);
            let zeroes = vec![0; self.signature.len()];
            let signature = auth.sign(&engine.auth_key, &[before, &zeroes, &after[self.signature.len()..]]);
            if !same(&signature, self.signature) {
                return Err("the answer's signature is wrong".into());
            }
        }
        let shown;
        let mut scoped = match &self.data {
            Scoped::Plain(reader) => *reader,
            Scoped::Hidden(hidden) => {
                let (Some(engine), Some((privacy, _))) = (engine, &user.privacy) else {
                    return Err("the answer is hidden, and there is no key".into());
                };
                let Ok(salt) = <[u8; 8]>::try_from(self.salt) else {
                    return Err("the answer's privacy parameters are no eight octets".into());
                };
                let mut data = hidden.to_vec();
                if !privacy.decrypt(&engine.privacy_key, self.boots, self.time, salt, &mut data) {
                    return Err("the answer cannot be decrypted".into());
                }
                shown = data;
                // Padding may follow.
                Reader(&shown).sequence().map_err(|_| "the answer cannot be decrypted: wrong privacy password?")?
            }
        };
        scoped.expect(ber::OCTETS).map_err(malformed)?;
        scoped.expect(ber::OCTETS).map_err(malformed)?;
        let pdu = Pdu::decode(&mut scoped).map_err(malformed)?;
        if pdu.kind != PduKind::Report {
            let hidden = matches!(self.data, Scoped::Hidden(_));
            if user.auth.is_some() && !self.is_signed() || user.privacy.is_some() && !hidden {
                return Err("the answer is less protected than the request".into());
            }
        }
        Ok(pdu)
    }
}

/// A message that asks an agent for its engine (RFC 3414 §4): empty, unsigned, answered by a report.
pub fn discovery(id: i32) -> Vec<u8> {
    let pdu = Pdu { id, ..Pdu::request(PduKind::Get, []) };
    encode(id, REPORTABLE, &[], 0, 0, b"", &[], &[], |out| scoped(out, &[], "", &pdu))
}

/// A message to a known engine, as protected as the user can. `salt` must be new for every message.
pub fn request(id: i32, user: &User, engine: &Engine, salt: u64, pdu: &Pdu, now: Instant) -> Vec<u8> {
    let time = engine.time_at(now);
    let Some((auth, _)) = &user.auth else {
        let plain = |out: &mut Vec<u8>| scoped(out, &engine.id, &user.context, pdu);
        return encode(id, REPORTABLE, &engine.id, engine.boots, time, user.name.as_bytes(), &[], &[], plain);
    };
    let mut flags = REPORTABLE | AUTH;
    let mut data = Vec::with_capacity(256);
    scoped(&mut data, &engine.id, &user.context, pdu);
    let mut parameters: [u8; 8] = salt.to_be_bytes();
    let mut salt: &[u8] = &[];
    if let Some((privacy, _)) = &user.privacy {
        flags |= PRIV;
        if *privacy == Privacy::Des {
            // RFC 3414 §8.1.1.1: the first half is the engine's boots.
            parameters[..4].copy_from_slice(&engine.boots.to_be_bytes());
        }
        privacy.encrypt(&engine.privacy_key, engine.boots, time, parameters, &mut data);
        salt = &parameters;
    }
    let hidden = !salt.is_empty();
    let zeroes = vec![0; auth.signature_len()];
    let content = |out: &mut Vec<u8>| match hidden {
        true => ber::put_octets(out, &data),
        false => out.extend_from_slice(&data),
    };
    let message = |signature: &[u8]| {
        encode(id, flags, &engine.id, engine.boots, time, user.name.as_bytes(), signature, salt, content)
    };
    let signature = auth.sign(&engine.auth_key, &[&message(&zeroes)]);
    message(&signature)
}

fn scoped(out: &mut Vec<u8>, engine: &[u8], context: &str, pdu: &Pdu) {
    ber::element(out, ber::SEQUENCE, |out| {
        ber::put_octets(out, engine);
        ber::put_octets(out, context.as_bytes());
        pdu.encode(out);
    });
}

#[allow(clippy::too_many_arguments)] // the fields of one message
fn encode(
    id: i32,
    flags: u8,
    engine: &[u8],
    boots: u32,
    time: u32,
    user: &[u8],
    signature: &[u8],
    salt: &[u8],
    data: impl Fn(&mut Vec<u8>),
) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    ber::element(&mut out, ber::SEQUENCE, |out| {
        ber::put_int(out, V3.into());
        ber::element(out, ber::SEQUENCE, |out| {
            ber::put_int(out, id.into());
            ber::put_int(out, MAX_SIZE);
            ber::put_octets(out, &[flags]);
            ber::put_int(out, USM.into());
        });
        ber::element(out, ber::OCTETS, |out| {
            ber::element(out, ber::SEQUENCE, |out| {
                ber::put_octets(out, engine);
                ber::put_int(out, boots.into());
                ber::put_int(out, time.into());
                ber::put_octets(out, user);
                ber::put_octets(out, signature);
                ber::put_octets(out, salt);
            });
        });
        data(out);
    });
    out
}

/// Why an engine did not take a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// It does not know the engine id: ask for it again.
    UnknownEngine,
    /// Our idea of its time is wrong: take the time that it tells.
    NotInTime,
    /// Nothing that another try would mend.
    Refused(&'static str),
}

impl Problem {
    /// What a report says (RFC 3414 §5: usmStats).
    pub fn of(report: &Pdu) -> Self {
        let stats = Oid(vec![1, 3, 6, 1, 6, 3, 15, 1, 1]);
        match report.variables.first().and_then(|(name, _)| name.under(&stats)) {
            Some([1, ..]) => Self::Refused("the agent does not allow this security level for the user"),
            Some([2, ..]) => Self::NotInTime,
            Some([3, ..]) => Self::Refused("the agent does not know the user"),
            Some([4, ..]) => Self::UnknownEngine,
            Some([5, ..]) => {
                Self::Refused("the agent says that the signature is wrong: wrong authentication password?")
            }
            Some([6, ..]) => Self::Refused("the agent cannot decrypt the request: wrong privacy password?"),
            _ => Self::Refused("the agent refused the message with a report that is not of the user-based model"),
        }
    }
}
