//! The address plan: what belongs to the slot of a number. Nothing of it is written down anywhere else.

use std::net::Ipv4Addr;

use super::cidr::Cidr;

/// Most slots of a plan: what a range of /15 has.
pub const MAX_SLOTS: u32 = 65_536;
/// First octets of every guest's hardware address; its IPv4 address follows. Locally administered.
const GUEST_MAC: [u8; 2] = [0x02, 0x77];
/// The node's end of every link. They are links of their own, so one address serves all, and a guest that was copied to
/// another slot finds its gateway at once.
pub const NODE_MAC: [u8; 6] = [0x02, 0x77, 0, 0, 0, 1];
/// What the names of the node's TAP devices begin with; the slot's number follows.
pub const NAME_PREFIX: &str = "wt";

/// A range of addresses, two for each slot: the even one is the node's, the odd one the guest's (RFC 3021).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    range: Cidr,
}

/// What belongs to one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Counted from 0.
    pub number: u32,
    /// Of its TAP device.
    pub name: String,
    /// The guest's gateway.
    pub node: Ipv4Addr,
    /// The guest's address, with a prefix of /31.
    pub guest: Ipv4Addr,
    /// The guest's hardware address.
    pub mac: [u8; 6],
}

impl Plan {
    /// Takes a range of /15 to /31.
    pub fn new(range: Cidr) -> Option<Self> {
        (15..=31).contains(&range.prefix()).then_some(Self { range })
    }

    /// All addresses.
    pub fn range(&self) -> Cidr {
        self.range
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        1 << (31 - self.range.prefix())
    }

    /// A slot by its number; `None` beyond the range.
    pub fn slot(&self, number: u32) -> Option<Slot> {
        if number >= self.slots() {
            return None;
        }
        let node = u32::from(self.range.first()) + 2 * number;
        let guest = Ipv4Addr::from(node + 1);
        let [a, b, c, d] = guest.octets();
        Some(Slot {
            number,
            name: format!("{NAME_PREFIX}{number}"),
            node: node.into(),
            guest,
            mac: [GUEST_MAC[0], GUEST_MAC[1], a, b, c, d],
        })
    }
}

impl Plan {
    /// The slot whose guest has this address.
    pub fn slot_of(&self, guest: Ipv4Addr) -> Option<Slot> {
        let offset = u32::from(guest).checked_sub(u32::from(self.range.first()))?;
        self.slot(offset / 2).filter(|slot| slot.guest == guest)
    }
}

/// The slot whose TAP device has this name.
pub fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix(NAME_PREFIX)?;
    let number: u32 = digits.parse().ok()?;
    (number < MAX_SLOTS && number.to_string() == digits).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_addresses_of_its_own() {
        let plan = Plan::new("10.201.0.0/16".parse().unwrap()).unwrap();
        assert_eq!(plan.slots(), 32_768);
        let slot = plan.slot(128).unwrap();
        assert_eq!((slot.node, slot.guest), (Ipv4Addr::new(10, 201, 1, 0), Ipv4Addr::new(10, 201, 1, 1)));
        assert_eq!((slot.name.as_str(), slot.mac), ("wt128", [0x02, 0x77, 10, 201, 1, 1]));
        assert_eq!(plan.slot(32_767).unwrap().guest, Ipv4Addr::new(10, 201, 255, 255));
        assert_eq!(plan.slot(32_768), None);
        assert_eq!(plan.slot_of(slot.guest), Some(slot.clone()));
        assert_eq!((plan.slot_of(slot.node), plan.slot_of([10, 202, 0, 1].into())), (None, None));
        assert_eq!(Plan::new("10.0.0.0/14".parse().unwrap()), None);
        assert_eq!(Plan::new("10.0.0.0/31".parse().unwrap()).unwrap().slots(), 1);
    }

    #[test]
    fn a_device_is_known_by_its_name() {
        assert_eq!(number_of("wt0"), Some(0));
        assert_eq!(number_of("wt128"), Some(128));
        for other in ["wt", "wt01", "wt-1", "wt65536", "wtx", "eth0", "xwt1", "wt1 "] {
            assert_eq!(number_of(other), None, "{other}");
        }
    }
}
