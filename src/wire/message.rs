//! One unit of the protocol as data.

use super::error::Error;

/// One argument of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arg {
    /// A value by position.
    Positional(Vec<u8>),
    /// `key=value`.
    Named(String, Vec<u8>),
}

/// A client's request: `tag verb arg…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the client; every answer carries it.
    pub tag: String,
    /// `noun.verb`, or a bare word such as `hello`.
    pub verb: String,
    /// In the order they were written.
    pub args: Vec<Arg>,
}

impl Request {
    /// A request without arguments.
    pub fn new(tag: impl Into<String>, verb: impl Into<String>) -> Self {
        Self { tag: tag.into(), verb: verb.into(), args: Vec::new() }
    }

    /// Adds a positional argument.
    pub fn arg(mut self, value: impl AsRef<[u8]>) -> Self {
        self.args.push(Arg::Positional(value.as_ref().to_vec()));
        self
    }

    /// Adds `key=value`; the key must be a protocol word (`[a-z0-9_.]+`).
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.args.push(Arg::Named(key.to_string(), value.to_string().into_bytes()));
        self
    }

    /// Whether it has `key=true`.
    pub fn has(&self, key: &str) -> bool {
        self.args.iter().any(|arg| matches!(arg, Arg::Named(name, value) if name == key && value == b"true"))
    }

    /// Adds `key=value` with a value of raw octets.
    pub fn set_bytes(mut self, key: &str, value: &[u8]) -> Self {
        self.args.push(Arg::Named(key.to_string(), value.to_vec()));
        self
    }
}

/// The `key=value` pairs of a reply, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(pub Vec<(String, Vec<u8>)>);

impl Fields {
    /// No fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a field and returns the whole, for chaining.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.0.push((key.to_string(), value.to_string().into_bytes()));
        self
    }

    /// Adds a field of raw octets (a file name, say).
    pub fn with_bytes(mut self, key: &str, value: &[u8]) -> Self {
        self.0.push((key.to_string(), value.to_vec()));
        self
    }

    /// Adds other fields behind these.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// The first value of `key`, as octets.
    pub fn bytes(&self, key: &str) -> Option<&[u8]> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_slice())
    }

    /// The first value of `key`, where it is UTF-8.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.bytes(key).and_then(|v| std::str::from_utf8(v).ok())
    }

    /// The first value of `key` as a number, where it is one.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.get(key)?.parse().ok()
    }
}

/// One unit of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// `tag verb arg…`
    Request(Request),
    /// `tag cancel`: the client no longer wants this request.
    Cancel {
        /// Of the request.
        tag: String,
    },
    /// `tag ok key=value…`: ends the request.
    Ok {
        /// Of the request.
        tag: String,
        /// The result.
        fields: Fields,
    },
    /// `tag err CODE "sentence" key=value…`: ends the request.
    Err {
        /// Of the request, or `-` for a line that could not be parsed.
        tag: String,
        /// What went wrong.
        error: Error,
    },
    /// `tag item key=value…`: one row of a list or a stream.
    Item {
        /// Of the request.
        tag: String,
        /// The row.
        fields: Fields,
    },
    /// `tag data channel length`, then that many octets and LF.
    Data {
        /// Of the request.
        tag: String,
        /// Which of the request's streams.
        channel: String,
        /// At most `MAX_DATA` octets.
        payload: Vec<u8>,
    },
    /// `tag end channel`: nothing more comes on this channel.
    End {
        /// Of the request.
        tag: String,
        /// Which of the request's streams.
        channel: String,
    },
    /// `tag credit channel octets`: the receiver allows that many more octets.
    Credit {
        /// Of the request.
        tag: String,
        /// Which of the request's streams.
        channel: String,
        /// More octets that may be sent.
        octets: u64,
    },
}

impl Message {
    /// An `ok` reply.
    pub fn ok(tag: &str, fields: Fields) -> Self {
        Self::Ok { tag: tag.to_string(), fields }
    }

    /// An `err` reply.
    pub fn err(tag: &str, error: Error) -> Self {
        Self::Err { tag: tag.to_string(), error }
    }

    /// An `item` reply.
    pub fn item(tag: &str, fields: Fields) -> Self {
        Self::Item { tag: tag.to_string(), fields }
    }

    /// A `data` frame.
    pub fn data(tag: &str, channel: &str, payload: impl Into<Vec<u8>>) -> Self {
        Self::Data { tag: tag.to_string(), channel: channel.to_string(), payload: payload.into() }
    }

    /// An `end` of a channel.
    pub fn end(tag: &str, channel: &str) -> Self {
        Self::End { tag: tag.to_string(), channel: channel.to_string() }
    }

    /// A `credit` for a channel.
    pub fn credit(tag: &str, channel: &str, octets: u64) -> Self {
        Self::Credit { tag: tag.to_string(), channel: channel.to_string(), octets }
    }

    /// The tag that every message carries.
    pub fn tag(&self) -> &str {
        match self {
            Self::Request(request) => &request.tag,
            Self::Cancel { tag }
            | Self::Ok { tag, .. }
            | Self::Err { tag, .. }
            | Self::Item { tag, .. }
            | Self::Data { tag, .. }
            | Self::End { tag, .. }
            | Self::Credit { tag, .. } => tag,
        }
    }

    /// Puts another tag in place (the bridge and the supervisor relay messages under tags of their own).
    pub fn retag(&mut self, new: &str) {
        let tag = match self {
            Self::Request(request) => &mut request.tag,
            Self::Cancel { tag }
            | Self::Ok { tag, .. }
            | Self::Err { tag, .. }
            | Self::Item { tag, .. }
            | Self::Data { tag, .. }
            | Self::End { tag, .. }
            | Self::Credit { tag, .. } => tag,
        };
        new.clone_into(tag);
    }

    /// Whether this message ends its request (`ok` or `err`).
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Ok { .. } | Self::Err { .. })
    }
}
