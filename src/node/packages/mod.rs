//! Packages that code runs ask for (docs/code.md): installed once in a builder, kept as a file of the node, and unpacked in the
//! sandbox of the run before it begins. The node looks into none of it.
//!
//! A request that asks for packages waits, with what its client sends meanwhile, for a thread (`install`) that is a client of
//! the node itself; then it goes on as one that asks for none.

pub mod index;
mod install;
mod layers;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use mio::net::UnixStream as Watched;

use self::index::Index;
use self::install::Order;
use self::layers::Layers;
use super::config::Config;
use super::requests::Job;
use super::supervisor::{Done, Supervisor};
use super::tracing::PACKAGES;
use crate::cli::client::Client as Caller;
use crate::control::access::Identity;
use crate::control::client::Client;
use crate::control::code::{Bounds, RunAsk};
use crate::sandbox::id::SandboxId;
use crate::sandbox::packages;
use crate::sandbox::trace::Trace;
use crate::storage::languages::Installing;
use crate::wire::{Code, Error, Fields, INITIAL_CREDIT, Message};

/// Requests that wait for packages at once.
const MOST: usize = 64;
/// Those of one owner, whose sandboxes may be the ones that do not come to an end.
const MOST_OF_OWNER: usize = 16;
/// Requests of one such thread under way.
const JOBS: usize = 8;
/// Where packages are in sandboxes: a directory for each set, in one by its key.
const DIRECTORY: &str = "/var/lib/warren/packages";

/// What is kept, and who waits.
pub(super) struct Packages {
    layers: Arc<Layers>,
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
}

/// A request that waits for packages.
struct Waiting {
    client: u64,
    tag: String,
    /// The thread's own connection.
    link: u64,
    what: What,
    sandbox: SandboxId,
    owner: String,
    /// What the request has waited for so far.
    trace: Trace,
}

/// What goes on when they are there.
pub(super) enum What {
    Run(Box<RunAsk>),
    Context { language: String, bounds: Bounds },
}

impl What {
    fn bounds(&mut self) -> &mut Bounds {
        match self {
            Self::Run(ask) => &mut ask.bounds,
            Self::Context { bounds, .. } => bounds,
        }
    }
}

/// What a client of such a request has sent so far.
#[derive(Debug, Default)]
pub struct Early {
    pieces: Vec<Vec<u8>>,
    octets: u64,
    ended: bool,
}

impl Early {
    /// A piece of the source. More than may be sent before the first credit is refused.
    pub fn take(&mut self, octets: Vec<u8>) -> Result<(), Error> {
        self.octets += octets.len() as u64;
        if self.octets > INITIAL_CREDIT {
            let message = format!("{} octets on channel source, and {INITIAL_CREDIT} are allowed", self.octets);
            return Err(Error::new(Code::CreditExceeded, message));
        }
        self.pieces.push(octets);
        Ok(())
    }

    /// All of it was sent.
    pub fn end(&mut self) {
        self.ended = true;
    }
}

impl Packages {
    pub fn new(config: &Config) -> Self {
        let settings = &config.packages;
        let bytes = settings.cache_mib.saturating_mul(1 << 20);
        let layers = Layers::new(config.paths.data.join("packages"), settings.cache_count, bytes);
        Self { layers: Arc::new(layers), waiting: BTreeMap::new(), next: 1 }
    }
}

/// The value of a variable, with a directory before what is in it.
fn before(directory: &str, value: Option<&[u8]>) -> Vec<u8> {
    match value.filter(|value| !value.is_empty()) {
        Some(value) => [directory.as_bytes(), b":", value].concat(),
        None => directory.as_bytes().to_vec(),
    }
}

impl Supervisor {
    /// What an earlier supervisor left of packages goes.
    pub(super) fn sweep_packages(&self) {
        if let Err(e) = self.packages.layers.sweep() {
            log::warn!("what is kept of packages: {e}");
        }
    }

    /// Has packages put into a sandbox for a request, which goes on then.
    pub(super) fn ask_packages(
        &mut self,
        key: u64,
        tag: &str,
        id: &SandboxId,
        language: &str,
        mut what: What,
    ) -> Result<(), Error> {
        let (order, path) = self.order(id, language, what.bounds())?;
        let owner = self.sandboxes.get(id).map(|sandbox| sandbox.owner.clone()).unwrap_or_default();
        let waiting = self.packages.waiting.values();
        let own = waiting.clone().filter(|waiting| waiting.owner == owner).count();
        if let Some(most) = [(own, MOST_OF_OWNER), (waiting.len(), MOST)].iter().find(|(there, most)| there >= most) {
            let message = format!("{} requests wait for packages, the most at once", most.1);
            return Err(Error::new(Code::NoCapacity, message).with("resource", "packages").with("max", most.1));
        }
        self.add_path(id, what.bounds(), &path, &order.directory);
        let failed = |e: std::io::Error| Error::new(Code::NoCapacity, format!("a thread's connection: {e}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut caller = Caller::of(theirs).map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let link = self.add_client(Client::socket(Watched::from_std(ours), Identity::node(), JOBS));
        let (layers, report) = (Arc::clone(&self.packages.layers), self.background.reporter());
        let (client, own) = (key, tag.to_string());
        let ticket = self.packages.next;
        let work = move || {
            let installing = || report(Done::Installing { client, tag: own.clone() });
            let result = install::provide(&mut caller, &layers, &order, installing);
            Done::Packages { ticket, result }
        };
        let started = self.background.run("packages", work);
        if let Err(e) = started {
            self.drop_client(link);
            return Err(Error::new(Code::NoCapacity, format!("no thread: {e}")));
        }
        self.packages.next += 1;
        let mut trace = self.new_trace();
        trace.next(PACKAGES);
        let waiting = Waiting { client: key, tag: tag.to_string(), link, what, sandbox: id.clone(), owner, trace };
        self.packages.waiting.insert(ticket, waiting);
        self.add_job(key, tag, Job::Packages { ticket, early: Early::default() });
        Ok(())
    }

    /// What is to be installed for a request, and the variable that names its place.
    fn order(&self, id: &SandboxId, language: &str, bounds: &Bounds) -> Result<(Order, String), Error> {
        let Some(sandbox) = self.sandboxes.get(id) else {
            return Err(Error::new(Code::NotFound, format!("no sandbox {id}")));
        };
        let template = self.catalogue.get(&sandbox.spec.template)?;
        let manifest = &template.manifest;
        let how = manifest.languages.get(language).and_then(|language| language.packages.clone());
        let Some(how @ Installing { index: kind, .. }) = how else {
            let message = format!("template {} does not say how packages of {language} are installed", manifest.name);
            return Err(Error::new(Code::NoInstaller, message).with("language", language));
        };
        if let Some(asked) = bounds.index.filter(|asked| *asked != kind) {
            let message =
                format!("packages of {language} come from {}, and not from {}", kind.as_str(), asked.as_str());
            return Err(Error::new(Code::BadArgument, message).with("argument", "index"));
        }
        let names = packages::check(kind, &bounds.dependencies)?;
        let settings = &self.config.packages;
        let (given, setting) = settings.index(kind);
        if given.is_empty() {
            let message =
                format!("packages of {language} need an index, and the node's configuration has no {setting}");
            let error = Error::new(Code::NoIndex, message).with("argument", "dependency");
            return Err(error.with("setting", setting));
        }
        let index = Index::of_setting(setting, given)?;
        let key = install::key_of(manifest, language, &how, &index.address, &names);
        let directory = format!("{DIRECTORY}/{}/{}", &key.as_str()[..32], kind.folder());
        let path = how.path.clone();
        let order = Order {
            key,
            template: manifest.name.clone(),
            base: manifest.fingerprint().map_err(|error| Error::new(Code::Internal, error.to_string()))?,
            owner: sandbox.owner.clone(),
            // As they come, and installed.
            disk_mib: (manifest.size_bytes >> 20) + 2 * settings.max_mib + 64,
            how,
            index,
            range: self.network_settings.plan.range(),
            names,
            allow: settings.allow.clone(),
            timeout: Duration::from_secs(settings.timeout_s),
            most: settings.max_mib << 20,
            sandbox: id.to_string(),
            directory,
        };
        Ok((order, path))
    }

    /// Code of a request looks for packages where they are, and then where it would have.
    fn add_path(&self, id: &SandboxId, bounds: &mut Bounds, variable: &str, directory: &str) {
        let prefix = format!("{variable}=");
        let own = |entries: &[String]| {
            entries.iter().rev().find_map(|entry| entry.strip_prefix(&prefix).map(|value| value.as_bytes().to_vec()))
        };
        let sandbox = self.sandboxes.get(id);
        let said = bounds.env.iter().rev().find_map(|entry| entry.strip_prefix(prefix.as_bytes()).map(<[u8]>::to_vec));
        let value = said.or_else(|| own(&sandbox?.spec.env)).or_else(|| {
            let template = self.catalogue.get(&sandbox?.spec.template).ok()?;
            own(&template.manifest.defaults.env)
        });
        bounds.env.retain(|entry| !entry.starts_with(prefix.as_bytes()));
        bounds.env.push([prefix.as_bytes(), &before(directory, value.as_deref())].concat());
        bounds.dependencies.clear();
        bounds.index = None;
    }

    /// Packages are not there yet: that takes a while, which a client is told.
    pub(super) fn installing(&mut self, client: u64, tag: &str) {
        let waits = self.clients.get(&client).and_then(|client| client.jobs.get(tag));
        if matches!(waits, Some(Job::Packages { .. })) {
            self.answer(client, &Message::item(tag, Fields::new().with("state", "installing")));
        }
    }

    /// The packages of a request are in its sandbox, or cannot be.
    pub(super) fn packages_there(&mut self, ticket: u64, result: Result<(), Error>) {
        let Some(waiting) = self.packages.waiting.remove(&ticket) else { return };
        let Waiting { client: key, tag, link, what, sandbox, trace, .. } = waiting;
        self.drop_client(link);
        let job = self.clients.get_mut(&key).and_then(|client| client.jobs.remove(&tag));
        let Some(Job::Packages { early, .. }) = job else { return };
        self.went_on = Some(trace);
        let gone_on = result.and_then(|()| match what {
            What::Run(ask) => self.run_code(key, &tag, sandbox.as_str(), *ask),
            What::Context { language, bounds } => self.create_context(key, &tag, sandbox.as_str(), &language, bounds),
        });
        self.went_on = None;
        if let Err(error) = gone_on {
            return self.finish(key, &Message::err(&tag, error));
        }
        for piece in early.pieces {
            self.take_data(key, &tag, "source", piece);
        }
        if early.ended {
            self.take_end(key, &tag, "source");
        }
    }

    /// Nobody waits for packages any more: what their thread has begun ends with its connection.
    pub(super) fn forget_packages(&mut self, ticket: u64) {
        if let Some(waiting) = self.packages.waiting.remove(&ticket) {
            self.drop_client(waiting.link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_sends_more_than_it_may_is_refused() {
        let mut early = Early::default();
        early.take(vec![0; INITIAL_CREDIT as usize]).unwrap();
        assert!(early.take(vec![0]).unwrap_err().is(Code::CreditExceeded));
    }

    #[test]
    fn a_directory_comes_before_what_is_there() {
        assert_eq!(before("/a", None), b"/a");
        assert_eq!(before("/a", Some(b"")), b"/a");
        assert_eq!(before("/a", Some(b"/b:/c")), b"/a:/b:/c");
    }
}
