//! The ledger: every resource that a sandbox holds on the node, each with how far it is on its way from asked for to given
//! back. The states and the moves between them are data.
//!
//! An account is written to the state database before the first of its resources is taken, with all that the sandbox is to
//! have, and erased after the last was given back. So whatever instant a supervisor is killed at, the database names at
//! least all that is there; what it names and the kernel does not have, or the other way round, the next supervisor
//! settles (`node/adopt.rs`).

use std::fmt;

macro_rules! words {
    ($(#[$outer:meta])* $type:ident { $($(#[$doc:meta])* $name:ident = $text:literal,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $type { $($(#[$doc])* $name,)* }

        impl $type {
            /// All of them, in order.
            pub const ALL: &'static [$type] = &[$($type::$name,)*];

            /// As written on the wire and in the database.
            pub fn as_str(self) -> &'static str {
                match self { $($type::$name => $text,)* }
            }

            /// What is written so, where there is one.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some($type::$name),)* _ => None }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// How far a resource is.
    Holding {
        /// It will be needed.
        Pending = "pending",
        /// It is chosen, and being written to the database.
        Scheduled = "scheduled",
        /// It is in the database: it may be taken.
        Allocated = "allocated",
        /// It is taken; its sandbox does not use it yet.
        Reserved = "reserved",
        /// Its sandbox has it.
        Active = "active",
        /// It is being given back.
        Releasing = "releasing",
        /// It is given back.
        Released = "released",
        /// It was lost, or could not be taken or given back.
        Error = "error",
    }
}

/// Every legal move.
const MOVES: &[(Holding, Holding)] = &[
    (Holding::Pending, Holding::Scheduled),
    (Holding::Pending, Holding::Error),
    (Holding::Scheduled, Holding::Allocated),
    (Holding::Scheduled, Holding::Error),
    (Holding::Allocated, Holding::Reserved),
    (Holding::Allocated, Holding::Error),
    (Holding::Reserved, Holding::Active),
    (Holding::Reserved, Holding::Releasing),
    (Holding::Active, Holding::Releasing),
    (Holding::Active, Holding::Error),
    (Holding::Releasing, Holding::Released),
    (Holding::Releasing, Holding::Error),
    (Holding::Error, Holding::Releasing),
    (Holding::Error, Holding::Released),
];

impl Holding {
    /// Whether a resource may go from here to `next`.
    pub fn may_become(self, next: Self) -> bool {
        MOVES.contains(&(self, next))
    }

    /// Whether the kernel must have it.
    pub fn is_held(self) -> bool {
        matches!(self, Self::Active)
    }

    /// Whether the kernel must not have it. Between this and `is_held` it may or may not.
    pub fn is_free(self) -> bool {
        matches!(self, Self::Released)
    }
}

words! {
    /// What a sandbox holds, in the order in which it is taken.
    Resource {
        /// The user id of its worker; its value.
        User = "user",
        /// Its place in the network: TAP device, addresses, entries of the packet policy; its value is the number.
        Slot = "slot",
        /// Its directory on the data partition.
        Directory = "directory",
        /// The overlay; its value is the disk's size in MiB.
        Disk = "disk",
        /// The socket of its worker.
        Socket = "socket",
        /// Its control group.
        Cgroup = "cgroup",
        /// What the control group lets it have; its value is the guest's memory in MiB.
        Memory = "memory",
        /// Its worker; its value is the process id.
        Process = "process",
    }
}

/// What goes with a worker's end.
pub const OF_WORKER: &[Resource] =
    &[Resource::User, Resource::Slot, Resource::Socket, Resource::Cgroup, Resource::Memory, Resource::Process];

/// One resource of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What.
    pub resource: Resource,
    /// How far.
    pub holding: Holding,
    /// Which or how much, once that is known: see `Resource`.
    pub value: Option<u64>,
}

/// What one sandbox holds: an entry for each resource that it is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account(Vec<Entry>);

/// A move that the table has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalMove {
    /// Of what.
    pub resource: Resource,
    /// Where it is, and stays.
    pub from: Holding,
    /// Where it was to go.
    pub to: Holding,
}

impl fmt::Display for IllegalMove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} that is {} cannot become {}", self.resource, self.from, self.to)
    }
}

impl std::error::Error for IllegalMove {}

impl Account {
    /// An account of these, all pending.
    pub fn new(resources: impl IntoIterator<Item = Resource>) -> Self {
        Self::of(resources.into_iter().map(|resource| (resource, Holding::Pending)))
    }

    /// An account of these, each as it is.
    pub fn of(entries: impl IntoIterator<Item = (Resource, Holding)>) -> Self {
        Self(entries.into_iter().map(|(resource, holding)| Entry { resource, holding, value: None }).collect())
    }

    /// What an earlier supervisor left without writing it down: nothing of it is in order.
    pub fn of_strays() -> Self {
        Self::of(Resource::ALL.iter().map(|resource| (*resource, Holding::Error)))
    }

    /// Its entries.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// The entry of a resource.
    pub fn get(&self, resource: Resource) -> Option<Entry> {
        self.0.iter().copied().find(|entry| entry.resource == resource)
    }

    /// How far a resource is; one that the sandbox never had is free.
    pub fn holding(&self, resource: Resource) -> Holding {
        self.get(resource).map_or(Holding::Released, |entry| entry.holding)
    }

    /// Whether all was given back.
    pub fn is_settled(&self) -> bool {
        self.0.iter().all(|entry| entry.holding.is_free())
    }

    /// The sandbox is not to have this, and has not.
    pub fn strike(&mut self, resource: Resource) {
        self.0.retain(|entry| entry.resource != resource);
    }

    /// Says which, or how much.
    pub fn note(&mut self, resource: Resource, value: impl Into<u64>) {
        let value = value.into();
        self.0.iter_mut().filter(|entry| entry.resource == resource).for_each(|entry| entry.value = Some(value));
    }

    /// Moves one resource; one that the sandbox never had stays where it is.
    pub fn advance(&mut self, resource: Resource, to: Holding) -> Result<(), IllegalMove> {
        match self.0.iter_mut().find(|entry| entry.resource == resource) {
            Some(entry) if !entry.holding.may_become(to) => Err(IllegalMove { resource, from: entry.holding, to }),
            Some(entry) => {
                entry.holding = to;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Moves all that are in one state to another. The error is the first refusal; the others are moved all the same.
    pub fn advance_all(&mut self, from: Holding, to: Holding) -> Result<(), IllegalMove> {
        let here: Vec<Resource> = self.0.iter().filter(|e| e.holding == from).map(|e| e.resource).collect();
        let moved: Vec<_> = here.into_iter().map(|resource| self.advance(resource, to)).collect();
        moved.into_iter().collect()
    }

    /// These are being given back from now on, however far they were. What was not taken yet is a failure first.
    pub fn give_back(&mut self, resources: &[Resource]) {
        for entry in self.0.iter_mut().filter(|entry| resources.contains(&entry.resource)) {
            if matches!(entry.holding, Holding::Pending | Holding::Scheduled | Holding::Allocated) {
                entry.holding = Holding::Error;
            }
            if entry.holding.may_become(Holding::Releasing) {
                entry.holding = Holding::Releasing;
            }
        }
    }

    /// Of these, those that were being given back are, or could not be.
    pub fn given_back(&mut self, resources: &[Resource], done: bool) {
        let end = if done { Holding::Released } else { Holding::Error };
        let entries = self.0.iter_mut().filter(|entry| resources.contains(&entry.resource));
        entries.filter(|entry| entry.holding == Holding::Releasing).for_each(|entry| entry.holding = end);
    }

    /// The account as the database has it: `RESOURCE=HOLDING[:VALUE]`, with spaces between.
    pub fn to_text(&self) -> String {
        let word = |entry: &Entry| match entry.value {
            Some(value) => format!("{}={}:{value}", entry.resource, entry.holding),
            None => format!("{}={}", entry.resource, entry.holding),
        };
        self.0.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    /// Reads what `to_text` wrote. `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut entries: Vec<Entry> = Vec::new();
        for word in text.split(' ').filter(|word| !word.is_empty()) {
            let (resource, rest) = word.split_once('=')?;
            let (holding, value) = match rest.split_once(':') {
                Some((holding, value)) => (holding, Some(value.parse().ok()?)),
                None => (rest, None),
            };
            let entry = Entry { resource: Resource::parse(resource)?, holding: Holding::parse(holding)?, value };
            if entries.iter().any(|other| other.resource == entry.resource) {
                return None;
            }
            entries.push(entry);
        }
        Some(Self(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Holding::{Active, Allocated, Error, Pending, Released, Releasing, Reserved, Scheduled};

    #[test]
    fn the_table_is_the_one_of_the_requirements() {
        let legal = |from: Holding| Holding::ALL.iter().copied().filter(|&to| from.may_become(to)).collect::<Vec<_>>();
        assert_eq!(legal(Pending), [Scheduled, Error]);
        assert_eq!(legal(Scheduled), [Allocated, Error]);
        assert_eq!(legal(Allocated), [Reserved, Error]);
        assert_eq!(legal(Reserved), [Active, Releasing]);
        assert_eq!(legal(Active), [Releasing, Error]);
        assert_eq!(legal(Releasing), [Released, Error]);
        assert_eq!(legal(Released), []);
        assert_eq!(legal(Error), [Releasing, Released]);
        assert_eq!(Holding::ALL.len(), 8);
    }

    #[test]
    fn an_illegal_move_is_refused_and_changes_nothing() {
        for &from in Holding::ALL {
            for &to in Holding::ALL {
                let mut account = Account(vec![Entry { resource: Resource::Cgroup, holding: from, value: None }]);
                let legal = from.may_become(to);
                let moved = account.advance(Resource::Cgroup, to);
                assert_eq!(moved.is_ok(), legal, "{from} to {to}");
                assert_eq!(account.holding(Resource::Cgroup), if legal { to } else { from });
            }
        }
    }

    #[test]
    fn whatever_instant_it_ends_at_everything_comes_back() {
        for &from in Holding::ALL {
            let mut account = Account(vec![Entry { resource: Resource::User, holding: from, value: Some(7) }]);
            account.give_back(&[Resource::Cgroup]);
            assert_eq!(account.holding(Resource::User), from, "it was not asked to");
            account.give_back(Resource::ALL);
            account.given_back(Resource::ALL, false);
            assert_eq!(account.is_settled(), from == Released, "{from}: what could not be given back is not free");
            account.give_back(Resource::ALL);
            account.given_back(Resource::ALL, true);
            assert!(account.is_settled(), "{from}");
        }
    }

    #[test]
    fn an_account_is_written_as_it_is_read() {
        let mut account = Account::new(Resource::ALL.iter().copied());
        account.note(Resource::User, 100_000u32);
        account.note(Resource::Process, u64::MAX);
        assert_eq!(account.advance_all(Pending, Scheduled), Ok(()));
        assert_eq!(account.advance(Resource::User, Allocated), Ok(()));
        let text = account.to_text();
        assert!(text.starts_with("user=allocated:100000 slot=scheduled "), "{text}");
        assert_eq!(Account::parse(&text), Some(account));
        assert_eq!(Account::parse(""), Some(Account::default()));
        for bad in [
            "user",
            "user=",
            "user=taken",
            "uid=active",
            "user=active:",
            "user=active:-1",
            "user=active:18446744073709551616",
            "user=active user=active",
            "user=active:1:2",
        ] {
            assert_eq!(Account::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_account_knows_only_what_its_sandbox_is_to_have() {
        let mut account = Account::new([Resource::Cgroup]);
        assert_eq!(account.advance(Resource::Slot, Active), Ok(()));
        assert_eq!((account.get(Resource::Slot), account.holding(Resource::Slot)), (None, Released));
    }
}
