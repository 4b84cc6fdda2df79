//! Where packages come from: `packages.pip_index` and `packages.npm_registry` (docs/configuration.md). Such a setting is a
//! secret text, because it may hold a user and a password; what is shown anywhere, and what a key is made of, has neither.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, ToSocketAddrs, UdpSocket};

use crate::network::cidr::Cidr;
use crate::network::policy;
use crate::sentinel::config::secret;
use crate::sentinel::secret::{Secret, base64};
use crate::wire::{Code, Error};

/// Longest address of an index, in octets.
const MAX_URL: usize = 1024;
/// Addresses of an index's name that an installation reaches at most.
const MAX_ADDRESSES: usize = 16;

/// An index of packages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Its address without user and password.
    pub address: String,
    /// Name or address of its host.
    pub host: String,
    port: u16,
    /// `USER:PASSWORD` as the address has it, percent-encoded; empty where there is none.
    login: Secret,
}

/// Takes `http[s]://[USER[:PASSWORD]@]HOST[:PORT]/PATH` apart. An error repeats nothing that may be secret.
impl std::str::FromStr for Index {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_URL {
            return Err(format!("{} octets are over the limit of {MAX_URL}", text.len()));
        }
        let schemes = [("https://", 443), ("http://", 80)];
        let found = schemes.iter().find_map(|(scheme, port)| Some((*scheme, *port, text.strip_prefix(scheme)?)));
        let Some((scheme, usual, rest)) = found else {
            return Err("is no URL of an index: it begins neither with https:// nor with http://".to_string());
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (login, authority) =
            authority.rsplit_once('@').map_or((None, authority), |(login, host)| (Some(login), host));
        let bad = |what: &str| Err(format!("is no URL of an index: {what}"));
        let in_login = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&()*+,;=%:".contains(&b);
        if login.is_some_and(|login| login.is_empty() || login.starts_with(':') || !login.bytes().all(in_login)) {
            return bad("its user and password are not percent-encoded, or there is a password without a user");
        }
        let (host, port) = authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
        let in_host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
        if host.is_empty() || host.len() > 253 || !host.bytes().all(in_host) || host.starts_with('-') {
            return bad("its host is not one of letters, digits, . and -");
        }
        let port = port.map_or(Some(usual), |port| {
            port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok().filter(|port| *port > 0)).flatten()
        });
        let Some(port) = port else { return bad("its port is no number from 1 to 65535") };
        let in_path = |b: u8| b.is_ascii_alphanumeric() || b"/._~-+%@".contains(&b);
        if !path.bytes().all(in_path) {
            return bad("its path has more than letters, digits and /._~-+%@");
        }
        let login = Secret::new(login.unwrap_or_default().to_string());
        Ok(Self { host: host.to_string(), port, login, address: format!("{scheme}{authority}{path}") })
    }
}

/// Checks a setting as far as the configuration goes by itself: whether environment and files have a secret is seen when it
/// is used.
pub fn check(given: &Secret) -> Result<(), String> {
    if given.is_empty() || is_elsewhere(given) { Ok(()) } else { given.reveal().parse::<Index>().map(|_| ()) }
}

fn is_elsewhere(given: &Secret) -> bool {
    given.reveal().starts_with("${") || given.reveal().starts_with("file:")
}

/// Whether a password stands in the configuration file itself.
pub fn is_plain_secret(given: &Secret) -> bool {
    !is_elsewhere(given) && given.reveal().parse::<Index>().is_ok_and(|index| !index.login.is_empty())
}

impl Index {
    /// The index that a setting names, itself, by `${NAME}` or by `file:/path`.
    pub fn of_setting(setting: &'static str, given: &Secret) -> Result<Self, Error> {
        let found = secret(setting, given);
        let found = found.and_then(|url| url.reveal().parse().map_err(|why| format!("{setting}: {why}")));
        found.map_err(|message| Error::new(Code::NoIndex, message).with("setting", setting))
    }

    /// What an installer is told on its standard input: `USER:PASSWORD`, percent-encoded, in a line, or nothing.
    pub fn login_line(&self) -> Secret {
        let login = self.login.reveal();
        Secret::new(if login.is_empty() { String::new() } else { format!("{login}\n") })
    }

    /// A text in which nothing secret is any more, should an installer have said it.
    pub fn without_secrets(&self, text: String) -> String {
        let login = self.login.reveal();
        let (user, password) = login.split_once(':').unwrap_or(("", login));
        let (plain_user, plain) = (Secret::new(decoded(user)), Secret::new(decoded(password)));
        let header = Secret::new(base64(format!("{}:{}", plain_user.reveal(), plain.reveal()).as_bytes()));
        let secrets = [login, header.reveal(), password, plain.reveal()];
        secrets
            .iter()
            .filter(|secret| !secret.is_empty() && !login.is_empty())
            .fold(text, |text, secret| text.replace(secret, "***"))
    }

    /// The services that an installation reaches: the index's port at each of its addresses, also at private ones, but never
    /// at the node's own and those of sandboxes (`range`). None where its name has no address here. May wait for name servers.
    pub fn services(&self, range: Cidr) -> Result<BTreeSet<SocketAddrV4>, Error> {
        let found: BTreeSet<Ipv4Addr> = match (self.host.as_str(), self.port).to_socket_addrs() {
            Ok(found) => {
                found.filter_map(|found| if let IpAddr::V4(ip) = found.ip() { Some(ip) } else { None }).collect()
            }
            Err(e) => {
                log::warn!("{}: the node finds no address of {}: {e}", self.address, self.host);
                BTreeSet::new()
            }
        };
        for address in &found {
            let own = || UdpSocket::bind((*address, 0)).is_ok().then_some("an address of the node itself");
            let inside = || range.contains(*address).then_some("sandboxes' own range");
            if let Some(why) = policy::no_service_at(*address).or_else(inside).or_else(own) {
                let message = format!("the index {} is at {address}, which nothing may reach: {why}", self.address);
                return Err(Error::new(Code::NoIndex, message).with("index", &self.address));
            }
        }
        Ok(found.into_iter().take(MAX_ADDRESSES).map(|address| SocketAddrV4::new(address, self.port)).collect())
    }
}

/// Without percent-encoding.
fn decoded(text: &str) -> String {
    let mut octets = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, others)) = rest.split_first() {
        let hex = others.get(..2).filter(|_| *first == b'%').and_then(|two| std::str::from_utf8(two).ok());
        match hex.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(octet) => (octets.push(octet), rest = &others[2..]).1,
            None => (octets.push(*first), rest = others).1,
        }
    }
    String::from_utf8_lossy(&octets).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &str) -> Index {
        text.parse().unwrap()
    }

    #[test]
    fn user_and_password_are_kept_apart_from_the_address() {
        let found = index("https://me:p%40ss@mirror.example:8443/simple");
        assert_eq!(
            (found.address.as_str(), found.host.as_str(), found.port),
            ("https://mirror.example:8443/simple", "mirror.example", 8443)
        );
        assert_eq!(found.login_line().reveal(), "me:p%40ss\n");
        assert_eq!(index("http://a/x").port, 80);
        assert_eq!(index("https://a/x").login_line().reveal(), "");
        assert_eq!(index("https://token@a/x").login_line().reveal(), "token\n");
        assert!(!format!("{found:?}").contains("ss@"), "{found:?}");
        assert!(
            is_plain_secret(&Secret::new("http://a:b@c/".into())) && !is_plain_secret(&Secret::new("http://c/".into()))
        );
        assert!(!is_plain_secret(&Secret::new("file:/a".into())) && check(&Secret::new("${A}".into())).is_ok());
    }

    #[test]
    fn what_is_no_address_of_an_index_is_refused_without_its_secrets() {
        for text in [
            "ftp://a:hidden@b/",
            "http://",
            "http://:hidden@b/",
            "http://a:hid den@b/",
            "http://a:hidden@b:0/",
            "http://a:hidden@b:x/",
            "http://a:hidden@b:65536/",
            "http://a:hidden@-b/",
            "http://a:hidden@b/?q=1",
            "http://a:hidden@b@c/",
            "http://@hidden/",
            "http://a:hid/den@b/",
        ] {
            let error = text.parse::<Index>().unwrap_err();
            assert!(!error.contains("hid"), "{text}: {error}");
        }
    }

    #[test]
    fn what_an_installer_says_has_no_secret() {
        let found = index("http://me:p%40ss@a/");
        let said = "http://me:p%40ss@a/ p@ss p%40ss bWU6cEBzcw== me".to_string();
        assert_eq!(found.without_secrets(said), "http://***@a/ *** *** *** me");
        assert_eq!(index("http://a/").without_secrets("as it is".into()), "as it is");
        assert_eq!(index("http://token@a/").without_secrets("token".into()), "***");
    }

    #[test]
    fn an_index_is_not_the_node_and_no_sandbox() {
        let range: Cidr = "10.201.0.0/16".parse().unwrap();
        assert_eq!(
            index("http://10.1.2.3:8080/").services(range).unwrap(),
            BTreeSet::from(["10.1.2.3:8080".parse().unwrap()])
        );
        for text in ["http://127.0.0.1/", "http://169.254.169.254/", "http://10.201.3.4/", "http://0.0.0.0/"] {
            assert!(index(text).services(range).unwrap_err().is(Code::NoIndex), "{text}");
        }
    }
}
