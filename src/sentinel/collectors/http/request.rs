//! What is asked, of the address of the task and of those that it is sent on to.

use std::sync::{Arc, OnceLock};

use rustls::ClientConfig;
use zeroize::Zeroizing;

use crate::sentinel::http::{TlsOptions, Url};
use crate::sentinel::plugin::{FieldError, Values};

/// What a scrape takes, in the order of its liking.
const ACCEPT: &str = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

/// A request but for its address.
pub struct Asking {
    method: String,
    /// Only for the address of the task: they may say who we are.
    own: Vec<(String, Zeroizing<String>)>,
    accept: &'static str,
    /// Whether the connection may serve the next request too: what a GET asks can be asked again where it was closed.
    keeps: bool,
    body: String,
    tls: TlsOptions,
    /// Read once, and only when somebody speaks TLS.
    loaded: OnceLock<Result<Arc<ClientConfig>, String>>,
}

impl Asking {
    /// Checks what goes into headers.
    pub fn new(config: &Values, scrape: bool, tls: TlsOptions) -> Result<Self, FieldError> {
        let mut own = Vec::new();
        let entries = config.entries("headers").into_iter().map(|(name, value)| ("headers", name.to_string(), value));
        let secret = Some(config.text("authorization")).filter(|value| !value.is_empty());
        let secret = secret.map(|value| ("authorization", "Authorization".to_string(), value.to_string()));
        for (field, name, value) in entries.chain(secret) {
            let value = Zeroizing::new(value);
            let token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c);
            let visible = |c: u8| c == b'\t' || (c >= b' ' && c != 0x7f);
            if name.is_empty() || !name.bytes().all(token) || !value.bytes().all(visible) {
                // The value may be a secret.
                return Err(FieldError::new(format!("config.{field}"), "holds what may not stand in a header"));
            }
            own.retain(|(known, _): &(String, _)| !known.eq_ignore_ascii_case(&name));
            own.push((name, value));
        }
        Ok(Self {
            method: config.text("method").into(),
            own,
            accept: if scrape { ACCEPT } else { "*/*" },
            keeps: scrape && config.text("method") == "GET",
            body: config.text("body").into(),
            tls,
            loaded: OnceLock::new(),
        })
    }

    /// How servers are known.
    pub fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        self.loaded.get_or_init(|| self.tls.load().map_err(|e| e.to_string())).clone()
    }

    /// Whether connections are kept for the next request.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// The first request to an address.
    pub fn to(&self, url: Url) -> Hop {
        Hop { url, method: self.method.clone(), body: true, ours: true, number: 0 }
    }

    /// As it travels. It may hold secrets.
    pub fn octets(&self, hop: &Hop) -> Zeroizing<Vec<u8>> {
        let body = if hop.body { self.body.as_str() } else { "" };
        let agent = format!("warren-sentinel/{}", env!("CARGO_PKG_VERSION"));
        let (host, length) = (hop.url.authority(), body.len().to_string());
        let mut headers = vec![("Host", host.as_str()), ("User-Agent", agent.as_str()), ("Accept", self.accept)];
        if !self.keeps {
            headers.push(("Connection", "close"));
        }
        if !body.is_empty() || !matches!(&*hop.method, "GET" | "HEAD") {
            headers.push(("Content-Length", length.as_str()));
        }
        let own = self.own.iter().filter(|_| hop.ours);
        headers.retain(|(name, _)| !own.clone().any(|(known, _)| known.eq_ignore_ascii_case(name)));
        headers.extend(own.map(|(name, value)| (name.as_str(), value.as_str())));
        let line = format!("{} {} HTTP/1.1\r\n", hop.method, hop.url.target);
        let parts = || headers.iter().flat_map(|(name, value)| [*name, ": ", *value, "\r\n"]);
        // In one allocation: none with a part of a secret is left behind.
        let size = line.len() + parts().map(str::len).sum::<usize>() + 2 + body.len();
        let mut octets = Zeroizing::new(Vec::with_capacity(size));
        [line.as_str()]
            .into_iter()
            .chain(parts())
            .chain(["\r\n", body])
            .for_each(|part| octets.extend(part.as_bytes()));
        octets
    }
}

/// One address on the way to an answer.
pub struct Hop {
    /// Where it is.
    pub url: Url,
    /// `GET`, `POST`, ….
    pub method: String,
    body: bool,
    /// Whether it is the server of the task: only that one hears who we are.
    ours: bool,
    /// Addresses before it.
    pub number: u32,
}

impl Hop {
    /// Where an answer sends us on to (RFC 9110 §15.4): after 303 with GET, after 301 and 302 as everybody does it. Nothing
    /// when it does not.
    pub fn next(&self, status: u16, location: Option<&str>) -> Option<Result<Self, String>> {
        let location = location.filter(|_| matches!(status, 301 | 302 | 303 | 307 | 308))?;
        Some(self.url.redirected(location).and_then(|url| {
            if self.url.tls && !url.tls {
                return Err(format!("the server sends us on to {url}, which is without TLS"));
            }
            let same = (url.tls, &url.host, url.port) == (self.url.tls, &self.url.host, self.url.port);
            let keeps = matches!(status, 307 | 308) || matches!(&*self.method, "GET" | "HEAD");
            Ok(Self {
                url,
                method: if keeps { self.method.clone() } else { "GET".into() },
                body: self.body && keeps,
                // Who was elsewhere once does not hear it on the way back either.
                ours: self.ours && same,
                number: self.number + 1,
            })
        }))
    }
}
