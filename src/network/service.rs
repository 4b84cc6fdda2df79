//! The network's own thread: it holds the slots, and speaks with the kernel about them, so that the supervisor's loop
//! waits for neither. Orders come in by a channel, reports go out by a function; each order is answered by one report.
//!
//! The kernel is the memory of what is there, the state database of whose it is. A new supervisor gives the slots of the
//! sandboxes that it took over; the table is put in place again as a whole, in one step, and interfaces that belong to
//! none of these sandboxes are taken down.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::check::{self, Books};
use super::cidr::Cidr;
use super::conntrack;
use super::link;
use super::netlink::{Family, KernelError, Socket};
use super::plan::{Plan, Slot, number_of};
use super::policy::Policy;
use super::rules::{self, Common, Entry, GROUP};
use super::tap;
use crate::pool::{Item, Limits, Pool, Shown};

/// Longest frame's content of every link, in octets.
pub const MTU: u32 = 1500;
/// Longest batch of rules, in octets: more than the table of a full node.
const LONGEST_BATCH: usize = 16 << 20;
/// Switches the passing on of packets for all interfaces.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// What the network is made with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whose addresses are whose.
    pub plan: Plan,
    /// Bounds of the pool of slots.
    pub limits: Limits,
    /// What no sandbox reaches beside the special addresses.
    pub never: Vec<Cidr>,
    /// A directory that is empty after each boot.
    pub run: PathBuf,
}

/// A slot of a sandbox that was taken over.
#[derive(Debug, Clone)]
pub struct Adopted {
    /// Whose it is.
    pub owner: String,
    /// Its number.
    pub number: u32,
    /// What the sandbox may reach.
    pub policy: Policy,
}

/// What is asked of the network. An owner has one slot at most.
#[derive(Debug)]
enum Order {
    Lease { owner: String, policy: Policy },
    Change { owner: String, policy: Policy, ticket: u64 },
    Release { owner: String },
    Check { ticket: u64 },
    Destroyed { number: u32 },
    End,
}

/// What an owner gets.
#[derive(Debug)]
pub struct Lease {
    /// Its addresses.
    pub slot: Slot,
    /// The queue of its TAP device.
    pub tap: File,
}

/// What the network did.
#[derive(Debug)]
pub enum Report {
    /// An owner has a slot, with its rules, or has none.
    Leased {
        /// Who.
        owner: String,
        /// What, or why not.
        result: Result<Lease, NetworkError>,
    },
    /// A policy was changed: no packet passes any more that the new one forbids. Or it is as it was.
    Changed {
        /// Whose.
        owner: String,
        /// Of the order.
        ticket: u64,
        /// How many connections ended by it, or why it could not be.
        result: Result<usize, NetworkError>,
    },
    /// Nothing of the owner is left.
    Released {
        /// Who.
        owner: String,
    },
    /// The kernel was compared with what the network holds.
    Checked {
        /// Of the order.
        ticket: u64,
        /// What was found.
        result: Result<Checked, NetworkError>,
    },
    /// Interfaces of an earlier supervisor that belonged to nobody were taken down.
    Reclaimed {
        /// How many.
        count: usize,
    },
}

/// What a check brings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Slots in use: owner and number.
    pub held: Vec<(String, u32)>,
    /// Where kernel and network differ.
    pub differences: BTreeSet<check::Difference>,
}

/// Why there is no network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkError {
    /// All slots are in use.
    Exhausted {
        /// How many there are.
        max: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// The kernel refused.
    Kernel(KernelError),
    /// A TAP device could not be made.
    Tap(String),
    /// The owner has no slot.
    Unknown,
}

impl fmt::Display for NetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted { max, waited } => {
                write!(f, "all {max} network slots are in use, and none came free within {} ms", waited.as_millis())
            }
            Self::Kernel(error) => write!(f, "network: {error}"),
            Self::Tap(error) => write!(f, "network: no TAP device: {error}"),
            Self::Unknown => f.write_str("the sandbox has no network device"),
        }
    }
}

impl std::error::Error for NetworkError {}

impl From<KernelError> for NetworkError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

/// The supervisor's end.
#[derive(Debug)]
pub struct Network {
    orders: Sender<Order>,
    thread: JoinHandle<()>,
    shown: Arc<Mutex<Shown>>,
}

impl Network {
    /// Starts the thread. `report` is called on it.
    pub fn start(
        settings: Settings,
        adopted: Vec<Adopted>,
        report: impl FnMut(Report) + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, receiver) = channel();
        let (own, shown) = (orders.clone(), Arc::<Mutex<Shown>>::default());
        let told = Arc::clone(&shown);
        let thread =
            std::thread::Builder::new().name("network".to_string()).stack_size(512 * 1024).spawn(move || {
                Service::new(settings, own, report, told).run(adopted, &receiver);
            })?;
        Ok(Self { orders, thread, shown })
    }

    /// The pool of slots as it was when its thread last looked after it.
    pub fn pool(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks for a slot; answered by `Report::Leased`.
    pub fn lease(&self, owner: &str, policy: Policy) {
        self.send(Order::Lease { owner: owner.to_string(), policy });
    }

    /// Asks for another policy; answered by `Report::Changed`.
    pub fn change(&self, owner: &str, policy: Policy, ticket: u64) {
        self.send(Order::Change { owner: owner.to_string(), policy, ticket });
    }

    /// Asks where the kernel differs from what the network holds; answered by `Report::Checked`.
    pub fn check(&self, ticket: u64) {
        self.send(Order::Check { ticket });
    }

    /// Gives a slot back, or stops waiting for one; nothing else may have its TAP device open any more. Answered by
    /// `Report::Released`.
    pub fn release(&self, owner: &str) {
        self.send(Order::Release { owner: owner.to_string() });
    }

    /// Ends the thread after all that was asked for before. Slots in use stay as they are: the next one takes them over.
    pub fn end(&self) {
        self.send(Order::End);
    }

    /// Whether the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    fn send(&self, order: Order) {
        // Nobody asks for anything after the thread has ended.
        let _ = self.orders.send(order);
    }
}

/// A slot in use.
#[derive(Debug)]
struct Held {
    entry: Entry,
    /// `None` where an earlier supervisor made it: only the worker has it open.
    item: Option<Item<File>>,
}

struct Kernel {
    route: Socket,
    netfilter: Socket,
}

struct Service<F> {
    settings: Settings,
    orders: Sender<Order>,
    report: F,
    pool: Pool<File, String>,
    held: HashMap<String, Held>,
    /// Policies of those who wait.
    asked: HashMap<String, Policy>,
    /// Open once the table is in place.
    kernel: Option<Kernel>,
    /// Slots whose devices are being destroyed.
    going: BTreeSet<u32>,
    /// The pool as others see it.
    shown: Arc<Mutex<Shown>>,
}

impl<F: FnMut(Report)> Service<F> {
    fn new(settings: Settings, orders: Sender<Order>, report: F, shown: Arc<Mutex<Shown>>) -> Self {
        let pool = Pool::new(settings.limits);
        let (held, asked) = (HashMap::new(), HashMap::new());
        Self { settings, orders, report, pool, held, asked, kernel: None, going: BTreeSet::new(), shown }
    }

    fn run(&mut self, adopted: Vec<Adopted>, receiver: &Receiver<Order>) {
        self.take_over(adopted);
        loop {
            self.look_after();
            *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = self.pool.shown();
            let received = match self.pool.next_look() {
                Some(next) => receiver.recv_timeout(next.saturating_duration_since(Instant::now())),
                None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match received {
                Ok(Order::End) => return,
                Ok(order) => self.take(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Lease { owner, policy } => {
                let now = Instant::now();
                self.asked.insert(owner.clone(), policy);
                match self.pool.take(now) {
                    Some(item) => self.lease(owner, item),
                    None => self.pool.wait(owner, now),
                }
            }
            Order::Change { owner, policy, ticket } => {
                let result = self.change(&owner, &policy);
                (self.report)(Report::Changed { owner, ticket, result });
            }
            Order::Release { owner } => {
                self.pool.forget(&owner);
                self.asked.remove(&owner);
                if let Some(held) = self.held.remove(&owner) {
                    self.release(held);
                }
                (self.report)(Report::Released { owner });
            }
            Order::Check { ticket } => {
                let result = self.check();
                (self.report)(Report::Checked { ticket, result });
            }
            Order::Destroyed { number } => {
                self.going.remove(&number);
                self.pool.freed(number);
            }
            Order::End => {}
        }
    }

    /// Finds what an earlier supervisor left, and puts the table in place.
    fn take_over(&mut self, adopted: Vec<Adopted>) {
        for Adopted { owner, number, policy } in adopted {
            let slot = self.settings.plan.slot(number);
            let found = slot.and_then(|slot| Some((link::index(&slot.name)?, slot)));
            let Some((index, slot)) = found else {
                log::error!("sandbox {owner}: its network slot {number} is gone");
                continue;
            };
            self.pool.adopt(number);
            self.held.insert(owner, Held { entry: Entry { slot, index, policy }, item: None });
        }
        if let Err(error) = self.open() {
            log::warn!("{error}; sandboxes with a network cannot be started");
            return;
        }
        match self.reclaim() {
            Ok(0) => {}
            Ok(count) => (self.report)(Report::Reclaimed { count }),
            Err(error) => log::error!("leftovers of the network cannot be taken down: {error}"),
        }
    }

    /// Opens the sockets and puts the table in place, where that is not done.
    fn open(&mut self) -> Result<(), NetworkError> {
        if self.kernel.is_some() {
            return Ok(());
        }
        let opened =
            |family| Socket::open(family).map_err(|errno| KernelError::from(errno).during("open a netlink socket"));
        let mut kernel = Kernel { route: opened(Family::Route)?, netfilter: opened(Family::Netfilter)? };
        if let Err(errno) = kernel.netfilter.allow_long_requests(LONGEST_BATCH) {
            log::warn!("requests to the packet filter cannot be long: {errno}");
        }
        install(&mut kernel, &self.settings, self.held.values())?;
        fs::write(FORWARDING, "1").map_err(|e| NetworkError::Tap(format!("{FORWARDING}: {e}")))?;
        // What an earlier supervisor changed and did not come to cut.
        for held in self.held.values() {
            cut(&mut kernel, &held.entry, &self.settings.never)?;
        }
        self.kernel = Some(kernel);
        Ok(())
    }

    /// Takes down interfaces of sandboxes, and connections from addresses, that belong to nobody.
    fn reclaim(&mut self) -> Result<usize, KernelError> {
        let Some(kernel) = &mut self.kernel else { return Ok(0) };
        let known: Vec<u32> = self.held.values().map(|held| held.entry.index).collect();
        let mut count = 0;
        for found in link::list(&mut kernel.route)? {
            let ours = found.group == GROUP || number_of(&found.name).is_some();
            if !ours || known.contains(&found.index) {
                continue;
            }
            match link::delete(&mut kernel.route, found.index) {
                Ok(()) => count += 1,
                // It went with its worker meanwhile.
                Err(error) if error.errno == Errno::ENODEV => {}
                Err(error) => log::error!("{}: {error}", found.name),
            }
        }
        let range = self.settings.plan.range();
        let owners: Vec<_> = self.held.values().map(|held| held.entry.slot.guest).collect();
        let flows = conntrack::list(&mut kernel.netfilter, None)?;
        let strays = flows.iter().filter(|flow| range.contains(flow.source) && !owners.contains(&flow.source));
        conntrack::end(&mut kernel.netfilter, strays)?;
        Ok(count)
    }

    /// Compares the kernel with what is written down here. A host without a packet filter has no network, and nothing of it.
    fn check(&mut self) -> Result<Checked, NetworkError> {
        let Some(kernel) = &mut self.kernel else { return Ok(Checked::default()) };
        let books = Books {
            held: self.held.iter().map(|(owner, held)| (owner.as_str(), &held.entry)).collect(),
            ready: self.pool.ready_numbers().collect(),
            going: self.going.clone(),
        };
        let differences = check::differences(&mut kernel.route, &mut kernel.netfilter, &books)?;
        let held = self.held.iter().map(|(owner, held)| (owner.clone(), held.entry.slot.number)).collect();
        Ok(Checked { held, differences })
    }

    /// Makes what is wanted, serves who waits, destroys what nobody needs.
    fn look_after(&mut self) {
        let now = Instant::now();
        loop {
            // Who waits comes before the pool.
            while let Some((owner, item)) = self.pool.serve(now) {
                self.lease(owner, item);
            }
            let Some(number) = self.pool.wanted(now) else { break };
            match self.make(number) {
                Ok(item) => self.pool.made(item, now),
                Err(error) => {
                    log::error!("{error}");
                    self.pool.failed(number, error.to_string(), now);
                    for owner in self.asked.keys().cloned().collect::<Vec<_>>() {
                        self.pool.forget(&owner);
                        self.asked.remove(&owner);
                        (self.report)(Report::Leased { owner, result: Err(error.clone()) });
                    }
                }
            }
        }
        for item in self.pool.expired(now) {
            self.destroy(item);
        }
        for owner in self.pool.too_late(now) {
            self.asked.remove(&owner);
            let Limits { max, wait: waited, .. } = self.settings.limits;
            let result = Err(NetworkError::Exhausted { max, waited });
            (self.report)(Report::Leased { owner, result });
        }
    }

    /// Makes a slot's TAP device.
    fn make(&mut self, number: u32) -> Result<Item<File>, NetworkError> {
        self.open()?;
        let slot = self.settings.plan.slot(number).ok_or_else(|| NetworkError::Tap(format!("no slot {number}")))?;
        let tap = tap::create(&slot.name).map_err(|e| NetworkError::Tap(format!("{}: {e}", slot.name)))?;
        let index = link::index(&slot.name).ok_or_else(|| NetworkError::Tap(format!("{} is gone again", slot.name)))?;
        let Some(kernel) = &mut self.kernel else { return Err(NetworkError::Unknown) };
        link::prepare(&mut kernel.route, index, &slot, MTU)?;
        Ok(Item { number, thing: tap, made: Instant::now() })
    }

    /// Gives a slot to who asked for it.
    fn lease(&mut self, owner: String, item: Item<File>) {
        let Some(policy) = self.asked.remove(&owner) else {
            self.put_back(item);
            return;
        };
        let result = self.enter(&item, policy).and_then(|entry| {
            let tap = item.thing.try_clone().map_err(|e| NetworkError::Tap(e.to_string()));
            tap.map(|tap| (entry, tap))
        });
        match result {
            Ok((entry, tap)) => {
                let slot = entry.slot.clone();
                self.held.insert(owner.clone(), Held { entry, item: Some(item) });
                (self.report)(Report::Leased { owner, result: Ok(Lease { slot, tap }) });
            }
            Err(error) => {
                self.put_back(item);
                (self.report)(Report::Leased { owner, result: Err(error) });
            }
        }
    }

    /// Makes the rules of a slot.
    fn enter(&mut self, item: &Item<File>, policy: Policy) -> Result<Entry, NetworkError> {
        let slot = self.settings.plan.slot(item.number).ok_or(NetworkError::Unknown)?;
        let index = link::index(&slot.name).ok_or_else(|| NetworkError::Tap(format!("{} is gone", slot.name)))?;
        let entry = Entry { slot, index, policy };
        self.with_rules(|socket| rules::add(socket, &entry))?;
        Ok(entry)
    }

    /// Changes the rules. Where the table is not there any more, or not as it was made, it is put in place first.
    fn with_rules(&mut self, act: impl Fn(&mut Socket) -> Result<(), KernelError>) -> Result<(), NetworkError> {
        self.open()?;
        let Some(kernel) = &mut self.kernel else { return Err(NetworkError::Unknown) };
        match act(&mut kernel.netfilter) {
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::EEXIST) => {
                log::error!("{error}: somebody changed the table {}; it is put in place again", rules::TABLE);
                install(kernel, &self.settings, self.held.values())?;
                Ok(act(&mut kernel.netfilter)?)
            }
            acted => Ok(acted?),
        }
    }

    fn change(&mut self, owner: &str, policy: &Policy) -> Result<usize, NetworkError> {
        let Some(held) = self.held.get(owner) else { return Err(NetworkError::Unknown) };
        let entry = held.entry.clone();
        self.with_rules(|socket| rules::change(socket, &entry, policy))?;
        let Some(held) = self.held.get_mut(owner) else { return Err(NetworkError::Unknown) };
        held.entry.policy = policy.clone();
        let Some(kernel) = &mut self.kernel else { return Err(NetworkError::Unknown) };
        Ok(cut(kernel, &held.entry, &self.settings.never)?)
    }

    /// Takes a slot's rules and connections away; its TAP device goes back into the pool.
    fn release(&mut self, held: Held) {
        let number = held.entry.slot.number;
        if let Err(error) = self.leave(&held.entry) {
            // Nobody gets it: what is left of the one before is not known.
            log::error!("network slot {number} is not used again: {error}");
            return;
        }
        match held.item {
            Some(item) => self.put_back(item),
            None => {
                // It went with the worker, unless something holds on to it.
                if let (Some(kernel), Some(index)) = (&mut self.kernel, link::index(&held.entry.slot.name))
                    && let Err(error) = link::delete(&mut kernel.route, index)
                    && error.errno != Errno::ENODEV
                {
                    log::error!("network slot {number} is not used again: {error}");
                    return;
                }
                self.pool.freed(number);
            }
        }
    }

    /// Takes the rules and the connections of a slot away.
    fn leave(&mut self, entry: &Entry) -> Result<(), NetworkError> {
        self.open()?;
        let Some(kernel) = &mut self.kernel else { return Err(NetworkError::Unknown) };
        match rules::remove(&mut kernel.netfilter, entry) {
            Err(error) if error.errno == Errno::ENOENT => {
                log::error!("{error}: somebody changed the table {}; it is put in place again", rules::TABLE);
                install(kernel, &self.settings, self.held.values())?;
            }
            removed => removed?,
        }
        let nothing = Entry { policy: Policy::off(), ..entry.clone() };
        cut(kernel, &nothing, &[])?;
        Ok(())
    }

    fn put_back(&mut self, item: Item<File>) {
        if let Err(e) = tap::drain(&item.thing) {
            log::warn!("network slot {}: {e}; it is made anew", item.number);
            self.destroy(item);
            return;
        }
        if let Some(old) = self.pool.put_back(item, Instant::now()) {
            self.destroy(old);
        }
    }

    /// Destroys a TAP device on a thread of its own: the kernel waits for all processors at that.
    fn destroy(&mut self, item: Item<File>) {
        let (orders, number) = (self.orders.clone(), item.number);
        self.going.insert(number);
        let started =
            std::thread::Builder::new().name("network-down".to_string()).stack_size(64 * 1024).spawn(move || {
                drop(item.thing);
                let _ = orders.send(Order::Destroyed { number });
            });
        if let Err(e) = started {
            // The device went with the closure that was not run.
            log::warn!("no thread to take network slot {number} down: {e}");
            self.going.remove(&number);
            self.pool.freed(number);
        }
    }
}

fn install<'a>(
    kernel: &mut Kernel,
    settings: &Settings,
    held: impl Iterator<Item = &'a Held>,
) -> Result<(), NetworkError> {
    let common = Common { range: settings.plan.range(), never: settings.never.clone(), closed: was_closed(settings) };
    let entries: Vec<Entry> = held.map(|held| held.entry.clone()).collect();
    Ok(rules::install(&mut kernel.netfilter, &common, &entries)?)
}

/// Whether this node passed nobody's packets on before Warren did. A mark remembers it until the next boot.
fn was_closed(settings: &Settings) -> bool {
    let mark = settings.run.join("forwarding-was-off");
    let is_off = fs::read_to_string(FORWARDING).is_ok_and(|text| text.trim() == "0");
    if is_off && let Err(e) = OpenOptions::new().write(true).create(true).truncate(false).open(&mark) {
        log::warn!("{}: {e}", mark.display());
    }
    is_off || mark.exists()
}

/// Ends a sandbox's connections that its policy forbids.
fn cut(kernel: &mut Kernel, entry: &Entry, never: &[Cidr]) -> Result<usize, KernelError> {
    conntrack::cut(&mut kernel.netfilter, entry.slot.guest, |to| entry.policy.may_permit(to, never))
}
