//! HTTP/1.1 (RFC 9112): a small client over plain TCP or TLS, which is what senders and the core need, with every wait
//! bounded, and a smaller server.

mod client;
mod date;
pub mod response;
mod server;
mod tls;
mod url;

use std::fmt;
use std::io;

pub use client::{Abort, Client, KEPT_BODY, Request};
pub use date::parse as parse_date;
pub use response::Response;
pub use server::{Answer, Server, ServerRequest};
pub use tls::TlsOptions;
pub use url::Url;

/// Why there is no answer.
#[derive(Debug)]
pub enum HttpError {
    /// The host has no address, or none that can be connected to.
    Connect(io::Error),
    /// The connection failed or took too long.
    Io(io::Error),
    /// The TLS settings cannot be used.
    Tls(String),
    /// What came is no HTTP response.
    Malformed(&'static str),
}

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(e) => write!(f, "cannot connect: {e}"),
            Self::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                f.write_str("no answer in time")
            }
            Self::Io(e) => write!(f, "connection failed: {e}"),
            Self::Tls(reason) => write!(f, "TLS: {reason}"),
            Self::Malformed(what) => write!(f, "the answer is no HTTP: {what}"),
        }
    }
}

impl std::error::Error for HttpError {}
