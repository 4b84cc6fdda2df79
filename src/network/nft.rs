//! Messages to nf_tables, of the few kinds that Warren's rules need (<linux/netfilter/nf_tables.h>;
//! net/netfilter/nf_tables_api.c says what each must hold). Numbers are in network order but for what packets are
//! compared with, which is as the kernel holds it.

use std::net::Ipv4Addr;

use super::netlink::{self, APPEND, Attributes, CREATE, KernelError, Received, Request, Socket};

/// NFNL_SUBSYS_NFTABLES, in the upper half of a message's type.
const SUBSYSTEM: u16 = 10 << 8;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
/// NFPROTO_INET: IPv4 and IPv6.
const INET: u8 = 1;
/// NFPROTO_IPV4, as `meta nfproto` gives it.
const IPV4: u8 = 2;

// enum nf_tables_msg_types
const NEWTABLE: u16 = SUBSYSTEM;
const DELTABLE: u16 = SUBSYSTEM | 2;
const NEWCHAIN: u16 = SUBSYSTEM | 3;
const GETCHAIN: u16 = SUBSYSTEM | 4;
const DELCHAIN: u16 = SUBSYSTEM | 5;
const NEWRULE: u16 = SUBSYSTEM | 6;
const DELRULE: u16 = SUBSYSTEM | 8;
const NEWSET: u16 = SUBSYSTEM | 9;
const GETSET: u16 = SUBSYSTEM | 10;
const DELSET: u16 = SUBSYSTEM | 11;
const NEWSETELEM: u16 = SUBSYSTEM | 12;
const GETSETELEM: u16 = SUBSYSTEM | 13;
const DELSETELEM: u16 = SUBSYSTEM | 14;

/// Registers of four octets each (NFT_REG32_00); the first of them are where the older, longer ones are.
const REGISTER: u32 = 8;
/// NFT_REG_VERDICT.
const VERDICT_REGISTER: u32 = 0;

/// Elements of one message at most: an attribute is shorter than 64 KiB.
const ELEMENTS: usize = 500;

/// Types of keys as nft(8) numbers them (`enum datatypes` in its source); the kernel only keeps them.
pub mod key {
    /// An IPv4 address.
    pub const IPV4: u32 = 7;
    /// A hardware address.
    pub const ETHER: u32 = 9;
    /// A port of TCP or UDP.
    pub const PORT: u32 = 13;
    /// An interface by its index.
    pub const INTERFACE: u32 = 20;

    /// Several parts one after the other.
    pub const fn of(parts: [u32; 3]) -> u32 {
        parts[0] << 12 | parts[1] << 6 | parts[2]
    }
}

/// Where packets come by (enum nf_inet_hooks).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Whatever arrived.
    Prerouting = 0,
    /// For this machine.
    Input = 1,
    /// For another one.
    Forward = 2,
    /// From this machine.
    Output = 3,
    /// Whatever leaves.
    Postrouting = 4,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// It passes this chain's hook.
    Accept,
    /// It is gone.
    Drop,
    /// The calling chain goes on.
    Return,
    /// That chain decides, and this one goes on where it does not.
    Jump(&'a str),
    /// That chain decides.
    Goto(&'a str),
}

impl Verdict<'_> {
    fn attributes(self) -> Attributes {
        let (code, chain) = match self {
            Verdict::Drop => (0, None),
            Verdict::Accept => (1, None),
            Verdict::Jump(chain) => (-3, Some(chain)),
            Verdict::Goto(chain) => (-4, Some(chain)),
            Verdict::Return => (-5, None),
        };
        let verdict = Attributes::new().be32(1, code as u32); // NFTA_VERDICT_CODE
        let verdict = chain.into_iter().fold(verdict, |verdict, chain| verdict.text(2, chain)); // NFTA_VERDICT_CHAIN
        Attributes::new().nest(2, verdict) // NFTA_DATA_VERDICT
    }
}

/// What a rule looks at, in the order of its expressions.
#[derive(Debug, Clone, Default)]
pub struct Rule(Attributes);

impl Rule {
    /// Of every packet.
    pub fn new() -> Self {
        Self::default()
    }

    fn expression(self, name: &str, data: Attributes) -> Self {
        let expression = Attributes::new().text(1, name).nest(2, data); // NFTA_EXPR_NAME, NFTA_EXPR_DATA
        Self(self.0.nest(1, expression)) // NFTA_LIST_ELEM
    }

    fn meta(self, key: u32, register: u32) -> Self {
        self.expression("meta", Attributes::new().be32(2, key).be32(1, REGISTER + register))
    }

    /// Octets of a header: of the link's (0), the network's (1) or the transport's (2).
    fn payload(self, base: u32, offset: u32, len: u32, register: u32) -> Self {
        let data = Attributes::new().be32(1, REGISTER + register).be32(2, base).be32(3, offset).be32(4, len);
        self.expression("payload", data)
    }

    fn compare(self, equal: bool, value: &[u8]) -> Self {
        let value = Attributes::new().octets(1, value); // NFTA_DATA_VALUE
        self.expression("cmp", Attributes::new().be32(1, REGISTER).be32(2, u32::from(!equal)).nest(3, value))
    }

    /// The bits of the first register that are in the mask.
    fn masked(self, mask: [u8; 4]) -> Self {
        let data = Attributes::new().be32(1, REGISTER).be32(2, REGISTER).be32(3, 4);
        let data = data.nest(4, Attributes::new().octets(1, &mask)).nest(5, Attributes::new().octets(1, &[0; 4]));
        self.expression("bitwise", data)
    }

    /// It came in by an interface of this group, or did not.
    pub fn from_group(self, group: u32, is: bool) -> Self {
        self.meta(21, 0).compare(is, &group.to_ne_bytes()) // NFT_META_IIFGROUP
    }

    /// It goes out by an interface of this group, or does not.
    pub fn to_group(self, group: u32, is: bool) -> Self {
        self.meta(22, 0).compare(is, &group.to_ne_bytes()) // NFT_META_OIFGROUP
    }

    /// It is IPv4, or is not.
    pub fn ipv4(self, is: bool) -> Self {
        self.meta(15, 0).compare(is, &[IPV4]) // NFT_META_NFPROTO
    }

    /// It is of this protocol over IP.
    pub fn protocol(self, number: u8) -> Self {
        self.meta(16, 0).compare(true, &[number]) // NFT_META_L4PROTO
    }

    /// It is IPv4 over Ethernet, and interface, source hardware address and source IPv4 address are one of that set.
    pub fn source_in(self, set: &str) -> Self {
        let rule = self.meta(8, 0).compare(true, &libc::ARPHRD_ETHER.to_ne_bytes()).ipv4(true); // NFT_META_IIFTYPE
        // NFT_META_IIF; the source address of an Ethernet header, of an IPv4 header.
        rule.meta(4, 0).payload(0, 6, 6, 1).payload(1, 12, 4, 3).lookup(set)
    }

    /// It is IPv4, to a destination in that set.
    pub fn destination_in(self, set: &str) -> Self {
        self.ipv4(true).payload(1, 16, 4, 0).lookup(set)
    }

    /// Interface, destination and destination's port are one of that set; it is IPv4 and of a protocol with ports.
    pub fn service_in(self, set: &str) -> Self {
        self.meta(4, 0).payload(1, 16, 4, 1).payload(2, 2, 2, 2).lookup(set) // NFT_META_IIF
    }

    /// It is IPv4, from a range.
    pub fn source_within(self, first: Ipv4Addr, mask: Ipv4Addr) -> Self {
        self.ipv4(true).payload(1, 12, 4, 0).masked(mask.octets()).compare(true, &first.octets())
    }

    /// Its connection has one of these states: `ESTABLISHED`, `RELATED`.
    pub fn state(self, bits: u32) -> Self {
        let rule = self.expression("ct", Attributes::new().be32(2, 0).be32(1, REGISTER)); // NFT_CT_STATE
        rule.masked(bits.to_ne_bytes()).compare(false, &[0; 4])
    }

    fn lookup(self, set: &str) -> Self {
        self.expression("lookup", Attributes::new().text(1, set).be32(2, REGISTER))
    }

    /// The interface that it came in by has its verdict in that map.
    pub fn verdict_by_interface(self, map: &str) -> Self {
        let rule = self.meta(4, 0); // NFT_META_IIF
        rule.expression("lookup", Attributes::new().text(1, map).be32(2, REGISTER).be32(3, VERDICT_REGISTER))
    }

    /// It is counted.
    pub fn count(self) -> Self {
        self.expression("counter", Attributes::new())
    }

    /// It leaves with the node's own address (net/netfilter/nft_masq.c).
    pub fn masquerade(self) -> Self {
        self.expression("masq", Attributes::new())
    }

    /// What becomes of it.
    pub fn then(self, verdict: Verdict<'_>) -> Self {
        let data = Attributes::new().be32(1, VERDICT_REGISTER).nest(2, verdict.attributes());
        self.expression("immediate", data)
    }
}

/// State bits of connections (NF_CT_STATE_BIT).
pub const ESTABLISHED: u32 = 2;
/// As above: an answer of another kind to one that is established, such as an ICMP error.
pub const RELATED: u32 = 4;

/// What a set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetKind {
    /// Keys of this type and length.
    Plain(u32, u32),
    /// Ranges of IPv4 addresses.
    Ranges,
    /// A verdict for each interface.
    Verdicts,
}

/// An element of a set.
#[derive(Debug, Clone)]
pub struct Element(Attributes);

impl Element {
    /// A key.
    pub fn key(octets: &[u8]) -> Self {
        Self(Attributes::new().nest(1, Attributes::new().octets(1, octets))) // NFTA_SET_ELEM_KEY
    }

    /// With the verdict that it leads to.
    pub fn leads_to(self, verdict: Verdict<'_>) -> Self {
        Self(self.0.nest(2, verdict.attributes())) // NFTA_SET_ELEM_DATA
    }

    /// A range: the key that begins it, and the one behind it where there is one.
    pub fn range(first: Ipv4Addr, last: Ipv4Addr) -> Vec<Self> {
        let mut elements = vec![Self::key(&first.octets())];
        if let Some(behind) = u32::from(last).checked_add(1) {
            let end = Self::key(&behind.to_be_bytes());
            elements.push(Self(end.0.be32(3, 1))); // NFTA_SET_ELEM_FLAGS: NFT_SET_ELEM_INTERVAL_END
        }
        elements
    }
}

/// Changes to one table that all take effect at once, or none.
#[derive(Debug, Clone)]
pub struct Batch {
    table: &'static str,
    requests: Vec<Request>,
    sets: u32,
}

impl Batch {
    /// Changes to nothing yet.
    pub fn new(table: &'static str) -> Self {
        Self { table, requests: Vec::new(), sets: 0 }
    }

    fn add(&mut self, kind: u16, flags: u16, attributes: Attributes) {
        self.requests.push(Request::new(kind, flags, &header(INET, 0), attributes));
    }

    /// The name of the table as the first attribute, which it is of every object.
    fn named(&self) -> Attributes {
        Attributes::new().text(1, self.table)
    }

    /// Makes the table, where it is not there.
    pub fn table(&mut self) {
        self.add(NEWTABLE, CREATE, self.named().be32(2, 0)); // NFTA_TABLE_FLAGS
    }

    /// Deletes the table with everything in it.
    pub fn delete_table(&mut self) {
        self.add(DELTABLE, 0, self.named());
    }

    /// Makes a chain that packets come by at a hook, from where it is `nat` when told so; they pass where it says nothing.
    pub fn base_chain(&mut self, name: &str, nat: bool, hook: Hook, priority: i32) {
        let place = Attributes::new().be32(1, hook as u32).be32(2, priority as u32); // NFTA_HOOK_*
        let chain = self.named().text(3, name).nest(4, place).be32(5, 1); // NAME, HOOK, POLICY: accept
        self.add(NEWCHAIN, CREATE, chain.text(7, if nat { "nat" } else { "filter" })); // NFTA_CHAIN_TYPE
    }

    /// Makes a chain that others lead to.
    pub fn chain(&mut self, name: &str) {
        self.add(NEWCHAIN, CREATE, self.named().text(3, name));
    }

    /// Deletes a chain with its rules.
    pub fn delete_chain(&mut self, name: &str) {
        self.add(DELRULE, 0, self.named().text(2, name)); // without a handle: all of the chain
        self.add(DELCHAIN, 0, self.named().text(3, name));
    }

    /// Adds a rule behind the others.
    pub fn rule(&mut self, chain: &str, rule: Rule) {
        self.add(NEWRULE, CREATE | APPEND, self.named().text(2, chain).nest(4, rule.0)); // NFTA_RULE_EXPRESSIONS
    }

    /// Makes a set.
    pub fn set(&mut self, name: &str, kind: SetKind) {
        // NFT_SET_INTERVAL, NFT_SET_MAP.
        let (flags, key, len) = match kind {
            SetKind::Plain(key, len) => (0, key, len),
            SetKind::Ranges => (0x4, key::IPV4, 4),
            SetKind::Verdicts => (0x8, key::INTERFACE, 4),
        };
        self.sets += 1;
        // NFTA_SET_NAME, _FLAGS, _KEY_TYPE, _KEY_LEN
        let mut set = self.named().text(2, name).be32(3, flags).be32(4, key).be32(5, len);
        if kind == SetKind::Verdicts {
            set = set.be32(6, 0xffff_ff00); // NFTA_SET_DATA_TYPE: NFT_DATA_VERDICT
            // NFTA_SET_USERDATA, for nft(8) only: NFTNL_UDATA_SET_KEYBYTEORDER, the machine's own.
            set = set.octets(13, &[&[0, 4][..], &1u32.to_ne_bytes()].concat());
        }
        let set = set.be32(10, self.sets); // NFTA_SET_ID: a number of its own in this batch
        self.add(NEWSET, CREATE, set);
    }

    /// Deletes a set with its elements.
    pub fn delete_set(&mut self, name: &str) {
        self.add(DELSET, 0, self.named().text(2, name));
    }

    /// Puts elements into a set.
    pub fn elements(&mut self, set: &str, elements: &[Element]) {
        self.change_elements(NEWSETELEM, CREATE, set, elements);
    }

    /// Takes elements out of a set; all of them must be there.
    pub fn delete_elements(&mut self, set: &str, elements: &[Element]) {
        self.change_elements(DELSETELEM, 0, set, elements);
    }

    fn change_elements(&mut self, kind: u16, flags: u16, set: &str, elements: &[Element]) {
        for some in elements.chunks(ELEMENTS) {
            let list = some.iter().fold(Attributes::new(), |list, element| list.nest(1, element.0.clone()));
            self.add(kind, flags, self.named().text(2, set).nest(3, list)); // NFTA_SET_ELEM_LIST_*
        }
    }

    /// Makes the changes. Where one fails the table is as it was.
    pub fn commit(self, socket: &mut Socket) -> Result<(), KernelError> {
        let enclose = |kind| Request::new(kind, 0, &header(0, SUBSYSTEM >> 8), Attributes::new());
        socket.batch(&enclose(NFNL_MSG_BATCH_BEGIN), &self.requests, &enclose(NFNL_MSG_BATCH_END))
    }
}

/// `struct nfgenmsg`: family, version 0, a number in network order.
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Reads a message of a list of chains or sets: the object's name, where it is one of that table's.
pub fn name_of(message: &Received<'_>, table: &str, name: u16) -> Option<String> {
    let attributes = message.payload.get(4..)?; // struct nfgenmsg
    let text = |kind| netlink::attribute(attributes, kind)?.split(|&b| b == 0).next();
    if text(1)? != table.as_bytes() {
        return None; // NFTA_CHAIN_TABLE, NFTA_SET_TABLE
    }
    String::from_utf8(text(name)?.to_vec()).ok()
}

/// Reads a message of a list of elements: their keys.
pub fn keys_of(message: &Received<'_>) -> Vec<Vec<u8>> {
    let attributes = message.payload.get(4..).unwrap_or_default();
    let list = netlink::attribute(attributes, 3).unwrap_or_default(); // NFTA_SET_ELEM_LIST_ELEMENTS
    let elements = netlink::attributes(list).filter(|(kind, _)| *kind == 1); // NFTA_LIST_ELEM
    let key = |element| netlink::attribute(netlink::attribute(element, 1)?, 1); // NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE
    elements.filter_map(|(_, element)| Some(key(element)?.to_vec())).collect()
}

/// Names of the table's chains.
pub fn chains(socket: &mut Socket, table: &str) -> Result<Vec<String>, KernelError> {
    names(socket, GETCHAIN, table, 3) // NFTA_CHAIN_NAME
}

/// Names of the table's sets.
pub fn sets(socket: &mut Socket, table: &str) -> Result<Vec<String>, KernelError> {
    names(socket, GETSET, table, 2) // NFTA_SET_NAME
}

fn names(socket: &mut Socket, kind: u16, table: &str, name: u16) -> Result<Vec<String>, KernelError> {
    let request = Request::new(kind, 0, &header(INET, 0), Attributes::new());
    socket.dump(&request, |found: &mut Vec<String>, message| found.extend(name_of(message, table, name)))
}

/// Keys of a set's elements.
pub fn keys(socket: &mut Socket, table: &str, set: &str) -> Result<Vec<Vec<u8>>, KernelError> {
    let request = Request::new(GETSETELEM, 0, &header(INET, 0), Attributes::new().text(1, table).text(2, set));
    socket.dump(&request, |found: &mut Vec<Vec<u8>>, message| found.extend(keys_of(message)))
}
