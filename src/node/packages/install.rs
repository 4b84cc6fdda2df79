//! What the thread of one request does: has packages installed in a builder where no run had them before, and unpacked in the
//! sandbox of the run where that has not been done. It is a client of the node like any other; when its connection ends, so
//! does all that it has begun.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use super::index::Index;
use super::layers::{Claim, Layer, Layers, Making};
use crate::cli::client::{CLIENT_TIMEOUT, Call, Client, Event, TOO_MANY_ROWS};
use crate::network::cidr::Cidr;
use crate::recipe::key::{Key, hex};
use crate::storage::languages::{IndexKind, Installing};
use crate::storage::templates::Manifest;
use crate::wire::{Code, Error, Fields, Request};
use sha2::{Digest, Sha256};

/// Warren's own installers: what stands for them in a manifest, their names and texts.
const INSTALLERS: [(&str, &str, &[u8]); 2] = [
    ("{pip}", "/run/warren/pip.py", include_bytes!("pip.py")),
    ("{npm}", "/run/warren/npm.js", include_bytes!("npm.js")),
];
/// So much of the end of what an installer says is part of its error, in octets.
const TAIL: usize = 4096;
/// Exit code of a program that was ended by SIGKILL, as shells have it.
const KILLED: u64 = 128 + 9;
/// How long a sandbox may take to answer, beside what it does, and octets of rows in its answers.
const ANSWER: Duration = Duration::from_secs(120);
const ROWS: usize = 256 * 1024;
/// How long a sandbox may take to unpack packages.
const UNPACK: Duration = Duration::from_secs(600);

/// Packages that a run is to have.
#[derive(Debug, Clone)]
pub(super) struct Order {
    /// What they are: the same key is the same files.
    pub key: Key,
    /// The template that they are for, and what its builder's disk is to have, in MiB.
    pub template: String,
    /// What that must be still when they are installed: what comes of it is kept for all sandboxes of such a template.
    pub base: String,
    /// Who asks for them.
    pub owner: String,
    pub disk_mib: u64,
    pub how: Installing,
    /// Where they come from.
    pub index: Index,
    /// Addresses of sandboxes, at which no index is.
    pub range: Cidr,
    /// As `packages::check` gives them.
    pub names: Vec<String>,
    /// What the builder reaches beside the index; empty: the public internet.
    pub allow: Vec<String>,
    pub timeout: Duration,
    /// Octets that they may take.
    pub most: u64,
    /// Where they are to be.
    pub sandbox: String,
    pub directory: String,
}

/// What files come of an installation depends on all of this; also on the environment, which may name a proxy, and on the text
/// of Warren's own installer.
pub(super) fn key_of(template: &Manifest, language: &str, how: &Installing, index: &str, names: &[String]) -> Key {
    let own = INSTALLERS.iter().filter(|(stands, ..)| how.installer.iter().any(|word| word == stands));
    let key = Key::new().then(&[b"packages", &template.sha256, language.as_bytes(), index.as_bytes()]);
    let key = key.then(&template.defaults.env.iter().map(String::as_bytes).collect::<Vec<_>>());
    let key = key.then(&how.installer.iter().map(String::as_bytes).collect::<Vec<_>>());
    let key = key.then(&own.map(|(_, _, text)| *text).collect::<Vec<_>>());
    key.then(&names.iter().map(String::as_bytes).collect::<Vec<_>>())
}

/// How a program of a request ended.
struct Ended {
    fields: Fields,
    /// The end of what it said on standard error.
    said: String,
}

/// Has the packages of an order be in its sandbox. `installing` is called where they have to be installed first.
pub(super) fn provide(
    client: &mut Client,
    layers: &Layers,
    order: &Order,
    installing: impl FnOnce(),
) -> Result<(), Error> {
    let request = Request::new("", "file.stat").arg(&order.sandbox).set("path", &order.directory);
    client.bound(ANSWER, ROWS);
    match client.transfer(request, None, &mut |_, _| Ok(())).map_err(in_time) {
        Ok(_) => return Ok(()),
        // There is no such file: an error of the sandbox's own is another.
        Err(error) if error.fields.get("errno").is_some() => {}
        Err(error) => return Err(error),
    }
    let mut installing = Some(installing);
    let mut tell = || installing.take().map_or((), |installing| installing());
    loop {
        let layer = match layers.claim(&order.key, &order.owner, || {
            tell();
            client.check()
        })? {
            Claim::There(layer) => layer,
            Claim::Make(making) => {
                tell();
                client.bound(order.timeout + ANSWER, ROWS);
                install(client, order, making).map_err(in_time)?
            }
        };
        client.bound(UNPACK + ANSWER, ROWS);
        if unpack(client, order, &layer).map_err(in_time)? {
            return Ok(());
        }
    }
}

/// What its client is told where a sandbox keeps the node waiting.
fn in_time(error: Error) -> Error {
    match error.code.as_str() {
        CLIENT_TIMEOUT => {
            Error::new(Code::Timeout, "a sandbox that packages are for or come from did not answer in time")
        }
        TOO_MANY_ROWS => {
            Error::new(Code::InstallFailed, "a sandbox that packages are for or come from answers without end")
        }
        _ => error,
    }
}

/// A program's words, with the place of Warren's installer where that is one; what is to be put there.
fn command(how: &Installing) -> (Vec<&str>, Option<(&'static str, &'static [u8])>) {
    let of = |word: &String| INSTALLERS.iter().find(|(stands, ..)| stands == word);
    let words = how.installer.iter().map(|word| of(word).map_or(word.as_str(), |(_, path, _)| path)).collect();
    let own = how.installer.iter().find_map(of).map(|(_, path, text)| (*path, *text));
    (words, own)
}

/// Runs the installer in a sandbox. `source` goes to its standard input, what it writes to `sink`.
fn run(
    client: &mut Client,
    sandbox: &str,
    how: &Installing,
    (arguments, timeout): (&[&str], Duration),
    source: &mut dyn Read,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<Ended, Error> {
    let (words, own) = command(how);
    if let Some((path, text)) = own {
        let request = Request::new("", "file.write").arg(sandbox).set("path", path).set("user", 0).set("mode", "0644");
        client.transfer(request, Some(("content", &mut &text[..])), &mut |_, _| Ok(()))?;
    }
    let request = Request::new("", "exec.start").arg(sandbox);
    let request = words.iter().chain(arguments).fold(request, |request, word| request.arg(*word));
    let request = request.set("user", 0).set("cwd", "/").set("timeout_ms", timeout.as_millis());
    let request = request.set("stdin", true);
    let mut tail = VecDeque::new();
    let done = client.transfer(request, Some(("stdin", source)), &mut |channel, octets| {
        if channel == "stdout" {
            return sink(octets);
        }
        tail.extend(octets.iter().copied());
        let over = tail.len().saturating_sub(TAIL);
        tail.drain(..over);
        Ok(())
    })?;
    let said = String::from_utf8_lossy(tail.make_contiguous()).trim_end().to_string();
    Ok(Ended { fields: done.fields, said })
}

/// What its client is told of an installer that did not end well.
fn failure(what: &str, ended: &Ended, timeout: Duration) -> Error {
    let Ended { fields, said } = ended;
    let ms = timeout.as_millis();
    let last = said.lines().last().unwrap_or_default();
    let error = match fields.get("timeout") {
        Some(_) => Error::new(Code::Timeout, format!("{what} within {ms} ms")).with("timeout_ms", ms),
        // Nothing else kills it: what its index sends is more than it can hold.
        None if fields.number("exit") == Some(KILLED) => {
            Error::new(Code::OutOfMemory, format!("{what}: the memory of the sandbox was not enough"))
        }
        None if last.starts_with(Code::NoCapacity.as_str()) => {
            Error::disk_full(format!("{what}: the disk of the sandbox is full"))
        }
        None => {
            let exit = fields.get("exit").unwrap_or("unknown").to_string();
            let message = format!("{what}: exit code {exit}; {}", last.chars().take(300).collect::<String>());
            Error::new(Code::InstallFailed, message).with("exit", exit)
        }
    };
    error.with("output", said)
}

/// Installs packages in a builder of its own and keeps what comes of it.
fn install<'a>(client: &mut Client, order: &Order, making: Making<'a>) -> Result<Layer<'a>, Error> {
    let name = format!("packages-{}", &order.key.as_str()[..32]);
    let request = Request::new("", "template.build").arg(name).set("from", &order.template);
    let request = request.set("base", &order.base).set("disk_mib", order.disk_mib).set("network", "on");
    let request = order.allow.iter().fold(request, |request, range| request.set("allow", range));
    let services = order.index.services(order.range)?;
    let request = services.iter().fold(request, |request, service| request.set("service", service));
    let call = client.start(request)?;
    let layers = making.layers();
    let made = install_in(client, order, making, &services, &call).map_err(|error| {
        // A builder whose writes find no room on the node fails in one way or another.
        let own = [Code::Cancelled, Code::Timeout, Code::NoCapacity].iter().any(|code| error.is(*code));
        if own || !layers.is_full() {
            return error;
        }
        let message = format!("the node's disk is full: {}", error.message);
        let output = error.fields.get("output").unwrap_or_default().to_string();
        Error::disk_full(message).with("output", output)
    });
    // Its end takes the builder away.
    client.abandon(&call);
    made
}

fn install_in<'a>(
    client: &mut Client,
    order: &Order,
    mut making: Making<'a>,
    services: &BTreeSet<SocketAddrV4>,
    call: &Call,
) -> Result<Layer<'a>, Error> {
    let builder = loop {
        match client.next(call, None)? {
            Event::Item(fields) => break fields.get("sandbox").unwrap_or_default().to_string(),
            Event::Done(Err(error)) => return Err(error),
            Event::Done(Ok(_)) => return Err(Error::new(Code::Internal, "a builder ended before it began")),
            _ => {}
        }
    };
    name_index(client, &builder, &order.index, services)?;
    let arguments: Vec<&str> =
        ["install", order.index.address.as_str()].into_iter().chain(order.names.iter().map(String::as_str)).collect();
    let (mut hash, mut size, mut refused) = (Sha256::new(), 0u64, None);
    let login = order.index.login_line();
    let mut input = login.reveal().as_bytes();
    let ended = run(client, &builder, &order.how, (&arguments, order.timeout), &mut input, &mut |octets| {
        size += octets.len() as u64;
        if size > order.most {
            let message = format!("the packages are more than {} MiB", order.most >> 20);
            let error = Error::new(Code::NoCapacity, message).with("resource", "packages");
            refused = Some(error.with("max_mib", order.most >> 20).with("setting", "packages.max_mib"));
            return Err(io::Error::other("too much"));
        }
        hash.update(octets);
        making.write(octets).inspect_err(|e| {
            refused = Some(Error::of_io(Code::Internal, format!("the packages cannot be written: {e}"), e));
        })
    });
    let mut ended = match (ended, refused) {
        (Err(_), Some(error)) => return Err(error),
        (ended, _) => ended?,
    };
    ended.said = order.index.without_secrets(ended.said);
    let names = order.names.join(", ");
    if ended.fields.number("exit") != Some(0) || ended.fields.get("timeout").is_some() {
        let tool = if order.how.index == IndexKind::Pip { "pip" } else { "npm" };
        return Err(failure(&format!("{tool} packages {names} were not installed"), &ended, order.timeout)
            .with("index", &order.index.address));
    }
    log::info!("packages {names} for {}: {size} octets", order.template);
    making.keep(&hex(&hash.finalize()))
}

/// A builder finds its index by the addresses that the node found, which are those that it reaches: the name servers of
/// sandboxes need not know it.
fn name_index(
    client: &mut Client,
    builder: &str,
    index: &Index,
    services: &BTreeSet<SocketAddrV4>,
) -> Result<(), Error> {
    if services.is_empty() || index.host.parse::<Ipv4Addr>().is_ok() {
        return Ok(());
    }
    let lines = services.iter().map(|service| format!("{} {}\n", service.ip(), index.host));
    let text = format!("127.0.0.1 localhost\n{}", lines.collect::<String>());
    let request =
        Request::new("", "file.write").arg(builder).set("path", "/etc/hosts").set("user", 0).set("mode", "0644");
    client.transfer(request, Some(("content", &mut text.as_bytes())), &mut |_, _| Ok(())).map(|_| ())
}

/// Gives out a file; its last octets only when all of it is what it was.
struct Checked<'a> {
    file: &'a File,
    hash: Sha256,
    left: u64,
    expected: &'a str,
    damaged: bool,
}

impl Read for Checked<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let most = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.file.read(&mut into[..most])?;
        self.hash.update(&into[..got]);
        self.left -= got as u64;
        self.damaged = got == 0 || self.left == 0 && hex(&self.hash.clone().finalize()) != self.expected;
        if self.damaged { Err(io::ErrorKind::InvalidData.into()) } else { Ok(got) }
    }
}

/// Has packages unpacked in the sandbox. `false` where the file is damaged.
fn unpack(client: &mut Client, order: &Order, layer: &Layer<'_>) -> Result<bool, Error> {
    let left = layer.file.metadata().map_or(0, |meta| meta.len());
    let (file, expected) = (&layer.file, layer.digest.as_str());
    let mut source = Checked { file, hash: Sha256::new(), left, expected, damaged: left == 0 };
    let arguments = ["unpack", order.directory.as_str()];
    let ended = run(client, &order.sandbox, &order.how, (&arguments, UNPACK), &mut source, &mut |_| Ok(()));
    if source.damaged {
        log::error!("kept packages {} are damaged: they are installed anew", order.names.join(", "));
        layer.discard();
        return Ok(false);
    }
    let ended = ended?;
    if ended.fields.number("exit") == Some(0) {
        return Ok(true);
    }
    let what = format!("packages could not be unpacked in sandbox {}", order.sandbox);
    Err(failure(&what, &ended, UNPACK))
}
