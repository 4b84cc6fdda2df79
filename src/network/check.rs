//! What the kernel has of the sandboxes' network, and where that differs from what the network holds.

use std::collections::{BTreeMap, BTreeSet};

use super::link;
use super::netlink::{KernelError, Socket};
use super::nft;
use super::plan::number_of;
use super::rules::{self, Entry, GROUP};

/// Something that the network's own books and the kernel do not agree on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Whose slot it is, where it is somebody's.
    pub owner: Option<String>,
    /// Which object of the kernel: an interface, an element, chain or set of the packet policy.
    pub name: String,
    /// Whether the network has it written down.
    pub recorded: bool,
}

/// What the network holds, as the check needs it.
#[derive(Debug)]
pub struct Books<'a> {
    /// Slots in use, by owner.
    pub held: Vec<(&'a str, &'a Entry)>,
    /// Numbers of slots that are ready for somebody.
    pub ready: BTreeSet<u32>,
    /// Numbers of slots whose devices are being destroyed: they may be there or not.
    pub going: BTreeSet<u32>,
}

/// Compares. Reads three lists of the kernel's, and the elements of three sets.
pub fn differences(
    route: &mut Socket,
    netfilter: &mut Socket,
    books: &Books<'_>,
) -> Result<BTreeSet<Difference>, KernelError> {
    let mut all = BTreeSet::new();
    interfaces(&link::list(route)?, books, &mut all);
    policy(&Policy::read(netfilter)?, books, &mut all);
    Ok(all)
}

fn interfaces(links: &[link::Link], books: &Books<'_>, all: &mut BTreeSet<Difference>) {
    let found: BTreeSet<&str> = links
        .iter()
        .filter(|link| link.group == GROUP || number_of(&link.name).is_some())
        .map(|link| link.name.as_str())
        .collect();
    let held: BTreeMap<&str, &str> =
        books.held.iter().map(|(owner, entry)| (entry.slot.name.as_str(), *owner)).collect();
    for (name, owner) in &held {
        if !found.contains(name) {
            all.insert(difference(Some(owner), format!("interface {name}"), true));
        }
    }
    for number in &books.ready {
        let name = format!("{}{number}", super::plan::NAME_PREFIX);
        if !found.contains(name.as_str()) {
            all.insert(difference(None, format!("interface {name}"), true));
        }
    }
    for name in found {
        let number = number_of(name);
        let known = number.is_some_and(|number| books.ready.contains(&number) || books.going.contains(&number));
        if !known && !held.contains_key(name) {
            all.insert(difference(None, format!("interface {name}"), false));
        }
    }
}

/// The sandboxes' parts of the table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Policy {
    pins: BTreeSet<Vec<u8>>,
    egress: BTreeSet<Vec<u8>>,
    services: BTreeSet<Vec<u8>>,
    chains: BTreeSet<String>,
    sets: BTreeSet<String>,
}

impl Policy {
    fn read(netfilter: &mut Socket) -> Result<Self, KernelError> {
        let keys = |socket: &mut Socket, set| nft::keys(socket, rules::TABLE, set).map_err(|e| e.during("list a set"));
        let pins = keys(netfilter, rules::PINS)?;
        let egress = keys(netfilter, rules::EGRESS)?;
        let services = keys(netfilter, rules::SERVICES)?;
        let chains = nft::chains(netfilter, rules::TABLE).map_err(|e| e.during("list chains"))?;
        let sets = nft::sets(netfilter, rules::TABLE).map_err(|e| e.during("list sets"))?;
        let own = |names: Vec<String>| names.into_iter().filter(|name| rules::is_of_slot(name)).collect();
        Ok(Self {
            pins: pins.into_iter().collect(),
            egress: egress.into_iter().collect(),
            services: services.into_iter().collect(),
            chains: own(chains),
            sets: own(sets),
        })
    }
}

fn policy(found: &Policy, books: &Books<'_>, all: &mut BTreeSet<Difference>) {
    let mut known = Policy::default();
    for (owner, entry) in &books.held {
        let parts = entry.parts();
        let mut check = |name: String, present: bool| {
            if !present {
                all.insert(difference(Some(owner), name, true));
            }
        };
        check(format!("element of {} for {}", rules::PINS, entry.slot.name), found.pins.contains(&parts.pin));
        known.pins.insert(parts.pin);
        if let Some(key) = parts.egress {
            check(format!("element of {} for {}", rules::EGRESS, entry.slot.name), found.egress.contains(&key));
            known.egress.insert(key);
        }
        for key in parts.services {
            let name = format!("element of {} for {}", rules::SERVICES, entry.slot.name);
            check(name, found.services.contains(&key));
            known.services.insert(key);
        }
        if let Some((chain, set)) = parts.lists {
            check(format!("chain {chain}"), found.chains.contains(&chain));
            check(format!("set {set}"), found.sets.contains(&set));
            known.chains.insert(chain);
            known.sets.insert(set);
        }
    }
    let hex = |key: &[u8]| key.iter().map(|octet| format!("{octet:02x}")).collect::<String>();
    for key in found.pins.difference(&known.pins) {
        all.insert(difference(None, format!("element {} of {}", hex(key), rules::PINS), false));
    }
    for key in found.egress.difference(&known.egress) {
        all.insert(difference(None, format!("element {} of {}", hex(key), rules::EGRESS), false));
    }
    for key in found.services.difference(&known.services) {
        all.insert(difference(None, format!("element {} of {}", hex(key), rules::SERVICES), false));
    }
    for name in found.chains.difference(&known.chains) {
        all.insert(difference(None, format!("chain {name}"), false));
    }
    for name in found.sets.difference(&known.sets) {
        all.insert(difference(None, format!("set {name}"), false));
    }
}

fn difference(owner: Option<&str>, name: String, recorded: bool) -> Difference {
    Difference { owner: owner.map(str::to_string), name, recorded }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Plan;
    use super::super::policy;
    use super::*;

    fn entry(number: u32, policy: policy::Policy) -> Entry {
        let plan = Plan::new("10.201.0.0/16".parse().unwrap()).unwrap();
        Entry { slot: plan.slot(number).unwrap(), index: number + 10, policy }
    }

    fn names(all: &BTreeSet<Difference>) -> Vec<String> {
        let sign = |recorded| if recorded { '-' } else { '+' };
        let owner = |owner: &Option<String>| owner.clone().unwrap_or_default();
        all.iter()
            .map(|d| format!("{}{} {}", sign(d.recorded), d.name, owner(&d.owner)).trim_end().to_string())
            .collect()
    }

    #[test]
    fn interfaces_are_somebodys_ready_or_going() {
        let link = |name: &str, group| link::Link { index: 1, name: name.to_string(), group };
        let used = entry(0, policy::Policy::off());
        let lost = entry(1, policy::Policy::off());
        let books = Books {
            held: vec![("a", &used), ("b", &lost)],
            ready: BTreeSet::from([2, 3]),
            going: BTreeSet::from([4, 5]),
        };
        let found = [
            link("eth0", 0),
            link("wt0", GROUP),
            link("wt2", GROUP),
            link("wt4", GROUP),
            link("wt9", 0),
            link("x", GROUP),
        ];
        let mut all = BTreeSet::new();
        interfaces(&found, &books, &mut all);
        assert_eq!(names(&all), ["-interface wt3", "+interface wt9", "+interface x", "-interface wt1 b"]);
    }

    #[test]
    fn each_part_of_the_policy_is_somebodys() {
        let open = policy::Policy::on(BTreeSet::new(), BTreeSet::new()).unwrap();
        let open = entry(0, open.with_services(BTreeSet::from(["10.0.0.5:443".parse().unwrap()])).unwrap());
        let listed =
            entry(1, policy::Policy::on(BTreeSet::from(["1.1.1.1".parse().unwrap()]), BTreeSet::new()).unwrap());
        let off = entry(2, policy::Policy::off());
        let books = Books {
            held: vec![("a", &open), ("b", &listed), ("c", &off)],
            ready: BTreeSet::new(),
            going: BTreeSet::new(),
        };
        let whole = || Policy {
            pins: [&open, &listed, &off].iter().map(|entry| entry.parts().pin).collect(),
            egress: [&open, &listed].iter().filter_map(|entry| entry.parts().egress).collect(),
            services: open.parts().services.into_iter().collect(),
            chains: BTreeSet::from(["slot1".to_string()]),
            sets: BTreeSet::from(["reach1".to_string()]),
        };
        let compared = |found: Policy| {
            let mut all = BTreeSet::new();
            policy(&found, &books, &mut all);
            names(&all)
        };
        assert_eq!(compared(whole()), Vec::<String>::new());
        let mut more = whole();
        more.pins.insert(vec![1, 2]);
        more.chains.insert("slot7".to_string());
        more.services.insert(vec![3]);
        assert_eq!(compared(more), ["+chain slot7", "+element 0102 of pins", "+element 03 of services"]);
        let mut less = whole();
        less.egress.clear();
        less.sets.clear();
        less.services.clear();
        assert_eq!(
            compared(less),
            [
                "-element of egress for wt0 a",
                "-element of services for wt0 a",
                "-element of egress for wt1 b",
                "-set reach1 b"
            ]
        );
    }
}
