//! The node's packet policy: one table of nf_tables.
//!
//! Packets of sandboxes are known by the group of the interface that they come from or go to, which every TAP device has
//! before it is up: what holds for all sandboxes needs no entry of any one of them, so that a device without an entry
//! reaches nothing. Each sandbox with a network has an entry in `pins` and, while it may reach anything, one in
//! `egress`, and, where it has lists, a chain and a set of its own. docs/network.md shows the whole as nft(8) does.

use super::cidr::Cidr;
use super::netlink::{KernelError, Socket};
use super::nft::{Batch, ESTABLISHED, Element, Hook, RELATED, Rule, SetKind, Verdict, key};
use super::plan::Slot;
use super::policy::{Policy, SPECIAL};

/// The table's name.
pub const TABLE: &str = "warren";
/// The group of the sandboxes' interfaces: "warr". Other programs use small numbers.
pub const GROUP: u32 = 0x7761_7272;

/// Sources that are taken: interface, hardware address, IPv4 address.
pub(super) const PINS: &str = "pins";
/// What nobody reaches.
const NEVER: &str = "never";
/// TCP services that single sandboxes reach, private ones too: interface, IPv4 address, port.
pub(super) const SERVICES: &str = "services";
/// Where each interface's packets to the outside go on.
pub(super) const EGRESS: &str = "egress";
/// Packets of sandboxes, as they arrive.
const SOURCE: &str = "source";
/// Packets of sandboxes to others.
const OUTWARD: &str = "outward";
/// Packets to sandboxes.
const INWARD: &str = "inward";
/// IPPROTO_ICMP
const ICMP: u8 = 1;
/// IPPROTO_TCP
const TCP: u8 = 6;

/// What the names of sandboxes' own chains and sets begin with; the slot's number follows.
const CHAIN_PREFIX: &str = "slot";
const SET_PREFIX: &str = "reach";

/// Whether a chain or set of that name is one sandbox's.
pub(super) fn is_of_slot(name: &str) -> bool {
    let number = name.strip_prefix(CHAIN_PREFIX).or_else(|| name.strip_prefix(SET_PREFIX));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The objects of the table that are one sandbox's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parts {
    /// Its key in `PINS`.
    pub pin: Vec<u8>,
    /// Its key in `EGRESS`, while it may reach anything.
    pub egress: Option<Vec<u8>>,
    /// Its keys in `SERVICES`.
    pub services: Vec<Vec<u8>>,
    /// Its chain and its set, where it has lists.
    pub lists: Option<(String, String)>,
}

/// A sandbox's part of the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the plan.
    pub slot: Slot,
    /// Its interface.
    pub index: u32,
    /// What it may reach.
    pub policy: Policy,
}

impl Entry {
    fn pin_key(&self) -> Vec<u8> {
        [&self.index.to_ne_bytes()[..], &self.slot.mac, &[0; 2], &self.slot.guest.octets()].concat()
    }

    fn pin(&self) -> Element {
        Element::key(&self.pin_key())
    }

    fn service_keys(&self) -> Vec<Vec<u8>> {
        let index = self.index.to_ne_bytes();
        let key = |service: std::net::SocketAddrV4| {
            [&index[..], &service.ip().octets(), &service.port().to_be_bytes(), &[0; 2]].concat()
        };
        self.policy.services().map(key).collect()
    }

    fn services(&self) -> Vec<Element> {
        self.service_keys().iter().map(|key| Element::key(key)).collect()
    }

    /// What of it the kernel has to hold.
    pub(super) fn parts(&self) -> Parts {
        Parts {
            pin: self.pin_key(),
            egress: self.policy.on.then(|| self.index.to_ne_bytes().to_vec()),
            services: self.service_keys(),
            lists: self.has_lists().then(|| (self.chain(), self.set())),
        }
    }

    /// Whether it needs a chain of its own.
    fn has_lists(&self) -> bool {
        self.policy.on && !self.policy.is_open()
    }

    fn chain(&self) -> String {
        format!("{CHAIN_PREFIX}{}", self.slot.number)
    }

    fn set(&self) -> String {
        format!("{SET_PREFIX}{}", self.slot.number)
    }

    fn add_pin(&self, batch: &mut Batch) {
        batch.elements(PINS, &[self.pin()]);
    }

    fn add_egress(&self, batch: &mut Batch) {
        batch.elements(SERVICES, &self.services());
        let key = Element::key(&self.index.to_ne_bytes());
        if self.policy.is_open() {
            batch.elements(EGRESS, &[key.leads_to(Verdict::Accept)]);
        } else if self.policy.on {
            let (chain, set) = (self.chain(), self.set());
            batch.set(&set, SetKind::Ranges);
            let ranges = self.policy.ranges();
            let elements: Vec<Element> =
                ranges.iter().flat_map(|(first, last)| Element::range(*first, *last)).collect();
            batch.elements(&set, &elements);
            batch.chain(&chain);
            batch.rule(&chain, Rule::new().destination_in(&set).then(Verdict::Accept));
            batch.rule(&chain, Rule::new().count().then(Verdict::Drop));
            batch.elements(EGRESS, &[key.leads_to(Verdict::Goto(&chain))]);
        }
    }

    fn remove_egress(&self, batch: &mut Batch) {
        batch.delete_elements(SERVICES, &self.services());
        if self.policy.on {
            batch.delete_elements(EGRESS, &[Element::key(&self.index.to_ne_bytes())]);
        }
        if self.has_lists() {
            batch.delete_chain(&self.chain());
            batch.delete_set(&self.set());
        }
    }
}

/// What is the same for all sandboxes of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Common {
    /// The plan's addresses.
    pub range: Cidr,
    /// What no sandbox reaches beside the special addresses.
    pub never: Vec<Cidr>,
    /// Packets that are no sandbox's are not passed on: the node did not do that before it passed those of sandboxes.
    pub closed: bool,
}

/// Puts the whole table in place of whatever is there by its name.
pub fn install(socket: &mut Socket, common: &Common, entries: &[Entry]) -> Result<(), KernelError> {
    whole(common, entries).commit(socket).map_err(|e| e.during("install the packet policy"))
}

/// Adds a sandbox.
pub fn add(socket: &mut Socket, entry: &Entry) -> Result<(), KernelError> {
    let mut batch = Batch::new(TABLE);
    entry.add_pin(&mut batch);
    entry.add_egress(&mut batch);
    batch.commit(socket).map_err(|e| e.during("add a sandbox to the packet policy"))
}

/// Gives a sandbox another policy.
pub fn change(socket: &mut Socket, entry: &Entry, policy: &Policy) -> Result<(), KernelError> {
    let new = Entry { policy: policy.clone(), ..entry.clone() };
    let mut batch = Batch::new(TABLE);
    entry.remove_egress(&mut batch);
    new.add_egress(&mut batch);
    batch.commit(socket).map_err(|e| e.during("change the packet policy"))
}

/// Takes a sandbox out.
pub fn remove(socket: &mut Socket, entry: &Entry) -> Result<(), KernelError> {
    let mut batch = Batch::new(TABLE);
    entry.remove_egress(&mut batch);
    batch.delete_elements(PINS, &[entry.pin()]);
    batch.commit(socket).map_err(|e| e.during("take a sandbox out of the packet policy"))
}

fn whole(common: &Common, entries: &[Entry]) -> Batch {
    let mut batch = Batch::new(TABLE);
    // What is not there cannot be deleted.
    batch.table();
    batch.delete_table();
    batch.table();

    batch.set(PINS, SetKind::Plain(key::of([key::INTERFACE, key::ETHER, key::IPV4]), 16));
    batch.set(SERVICES, SetKind::Plain(key::of([key::INTERFACE, key::IPV4, key::PORT]), 12));
    batch.set(NEVER, SetKind::Ranges);
    batch.set(EGRESS, SetKind::Verdicts);
    let never =
        merged(SPECIAL.iter().map(|(range, _)| *range).chain(common.never.iter().copied()).chain([common.range]));
    batch.elements(NEVER, &never);

    for chain in [SOURCE, OUTWARD, INWARD] {
        batch.chain(chain);
    }
    // Every fragment has its source checked, before the whole is put together (NF_IP_PRI_CONNTRACK_DEFRAG, -400): the
    // rules behind see no fragments.
    batch.base_chain("prerouting", false, Hook::Prerouting, -450);
    batch.rule("prerouting", Rule::new().from_group(GROUP, true).then(Verdict::Jump(SOURCE)));
    batch.rule(SOURCE, Rule::new().ipv4(false).count().then(Verdict::Drop));
    batch.rule(SOURCE, Rule::new().source_in(PINS).then(Verdict::Return));
    batch.rule(SOURCE, Rule::new().count().then(Verdict::Drop));

    // The node itself: whatever address of it is meant.
    batch.base_chain("input", false, Hook::Input, 0);
    batch.rule("input", Rule::new().from_group(GROUP, true).count().then(Verdict::Drop));
    // What it says to a sandbox by itself is about packets of that sandbox: too long, unreachable.
    batch.base_chain("output", false, Hook::Output, 0);
    let errors = Rule::new().to_group(GROUP, true).ipv4(true).protocol(ICMP).state(RELATED);
    batch.rule("output", errors.then(Verdict::Accept));
    batch.rule("output", Rule::new().to_group(GROUP, true).count().then(Verdict::Drop));

    batch.base_chain("forward", false, Hook::Forward, 0);
    batch.rule("forward", Rule::new().from_group(GROUP, true).then(Verdict::Goto(OUTWARD)));
    batch.rule("forward", Rule::new().to_group(GROUP, true).then(Verdict::Goto(INWARD)));
    if common.closed {
        batch.rule("forward", Rule::new().count().then(Verdict::Drop));
    }
    batch.rule(OUTWARD, Rule::new().to_group(GROUP, true).count().then(Verdict::Drop));
    batch.rule(OUTWARD, Rule::new().ipv4(false).count().then(Verdict::Drop));
    batch.rule(OUTWARD, Rule::new().ipv4(true).protocol(TCP).service_in(SERVICES).then(Verdict::Accept));
    batch.rule(OUTWARD, Rule::new().destination_in(NEVER).count().then(Verdict::Drop));
    batch.rule(OUTWARD, Rule::new().verdict_by_interface(EGRESS));
    batch.rule(OUTWARD, Rule::new().count().then(Verdict::Drop));
    batch.rule(INWARD, Rule::new().ipv4(true).state(ESTABLISHED | RELATED).then(Verdict::Accept));
    batch.rule(INWARD, Rule::new().count().then(Verdict::Drop));

    batch.base_chain("postrouting", true, Hook::Postrouting, 100);
    let outside = Rule::new().to_group(GROUP, false);
    batch.rule("postrouting", outside.source_within(common.range.first(), common.range.mask()).masquerade());

    for entry in entries {
        entry.add_pin(&mut batch);
        entry.add_egress(&mut batch);
    }
    batch
}

/// Ranges as elements: those that touch or lie within each other are one, as the kernel wants it.
fn merged(ranges: impl Iterator<Item = Cidr>) -> Vec<Element> {
    let mut ranges: Vec<Cidr> = ranges.collect();
    ranges.sort();
    let mut found: Vec<(u32, u32)> = Vec::new();
    for range in ranges {
        let (first, last) = (u32::from(range.first()), u32::from(range.last()));
        match found.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => found.push((first, last)),
        }
    }
    found.into_iter().flat_map(|(first, last)| Element::range(first.into(), last.into())).collect()
}
