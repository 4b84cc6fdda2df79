//! `http://host[:port][/path][?query]` and `https://…`.

use std::fmt;

/// A checked address of a server and a resource on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Whether it is to be spoken to over TLS.
    pub tls: bool,
    /// Name or address; an IPv6 address without its brackets.
    pub host: String,
    /// 1–65,535.
    pub port: u16,
    /// From the first slash on, the query with it; at least `/`.
    pub target: String,
}

impl Url {
    /// Reads an address. What may not stand in a request line is refused, and so is a user name or password: it would
    /// be logged with the address.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err("an address begins with http:// or https://".into()),
        };
        let at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(at);
        if authority.contains('@') {
            return Err("an address may not hold a user name or password".into());
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or("an IPv6 address ends with ]")?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| format!("{host:?} is no IPv6 address"))?;
                (host, after.strip_prefix(':'))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':');
        if host.is_empty() || host.len() > 253 || !host.chars().all(named) {
            return Err(format!("{host:?} is no host"));
        }
        let port = match port {
            Some(port) => port.parse().ok().filter(|&port| port > 0).ok_or(format!("{port:?} is no port (1–65535)"))?,
            None if tls => 443,
            None => 80,
        };
        if target.len() > 8192 || !target.bytes().all(|c| c.is_ascii_graphic()) || target.contains('#') {
            return Err("a path may hold only visible ASCII, no # and at most 8192 of them".into());
        }
        let target = match target {
            "" => "/".to_string(),
            query if query.starts_with('?') => format!("/{query}"),
            path => path.to_string(),
        };
        Ok(Self { tls, host: host.into(), port, target })
    }

    /// The value of the `Host` header.
    pub fn authority(&self) -> String {
        let port = if self.port == if self.tls { 443 } else { 80 } { String::new() } else { format!(":{}", self.port) };
        if self.host.contains(':') { format!("[{}]{port}", self.host) } else { format!("{}{port}", self.host) }
    }

    /// Another resource on the same server, under this one's path.
    pub fn join(&self, path: &str) -> Self {
        Self { target: format!("{}{path}", self.target.trim_end_matches('/')), ..self.clone() }
    }

    /// Where a `Location` leads from here: a whole address, one without its scheme, or a path.
    pub fn redirected(&self, location: &str) -> Result<Self, String> {
        let location = location.split('#').next().unwrap_or_default();
        let scheme = if self.tls { "https" } else { "http" };
        if location.contains("://") {
            return Self::parse(location);
        }
        if location.starts_with("//") {
            return Self::parse(&format!("{scheme}:{location}"));
        }
        let path = self.target.split('?').next().unwrap_or_default();
        let target = match location.bytes().next() {
            None => self.target.clone(),
            Some(b'/') => location.to_string(),
            Some(b'?') => format!("{path}{location}"),
            _ => format!("{}{location}", &path[..=path.rfind('/').unwrap_or(0)]),
        };
        Self::parse(&format!("{scheme}://{}{target}", self.authority()))
    }

    /// Whether the server is this machine.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for Url {
    /// Without the query, which may hold a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.target.split('?').next().unwrap_or_default();
        write!(f, "{}://{}{path}", if self.tls { "https" } else { "http" }, self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_put_together() {
        for (text, host, port, target, shown) in [
            ("http://a", "a", 80, "/", "http://a/"),
            ("https://a.b:9/c?d=e", "a.b", 9, "/c?d=e", "https://a.b:9/c"),
            ("http://[::1]:8080?x", "::1", 8080, "/?x", "http://[::1]:8080/"),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!((&*url.host, url.port, &*url.target, &*url.to_string()), (host, port, target, shown));
        }
        assert_eq!(Url::parse("http://a/b/").unwrap().join("/c").target, "/b/c");
    }

    #[test]
    fn a_redirection_is_a_whole_address_or_a_part_of_one() {
        let from = Url::parse("https://[::1]:9/a/b?c").unwrap();
        for (location, url) in [
            ("http://d/e#f", "http://d/e"),
            ("//d:7", "https://d:7/"),
            ("/x?y", "https://[::1]:9/x?y"),
            ("x", "https://[::1]:9/a/x"),
            ("?z", "https://[::1]:9/a/b?z"),
            ("", "https://[::1]:9/a/b?c"),
        ] {
            assert_eq!(from.redirected(location), Url::parse(url), "{location}");
        }
        for bad in ["ftp://a", "//", "http://u:p@a", "x y", "/\r\nx"] {
            assert!(from.redirected(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let bad =
            ["", "a", "ftp://a", "http://", "http://u:p@a", "http://a:0", "http://a:65536", "http://a b", "http://[1"];
        for text in bad.into_iter().chain(["http://a/\r\nx: y", "http://a/ä", "http://a/#b", "http://[::g]"]) {
            assert!(Url::parse(text).is_err(), "{text}");
        }
    }
}
