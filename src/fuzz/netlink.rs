use crate::network::conntrack::Flow;
use crate::network::link::Link;
use crate::network::netlink::{HEADER, attributes, messages, verdict};
use crate::network::nft;

/// Depth to which attributes within attributes are looked at.
const DEPTH: usize = 6;

/// Anything in the kernel's place: every reader ends, and gives no more than there was.
pub fn netlink(data: &[u8]) {
    let mut octets = 0;
    for message in messages(data) {
        octets += HEADER + message.payload.len();
        walk(message.payload, DEPTH);
        if let Err(error) = verdict(&message) {
            assert!(!error.text.contains(char::is_control) && error.to_string().len() < 4096);
        }
        if let Some(link) = Link::parse(&message) {
            assert!(link.name.len() <= message.payload.len());
        }
        if let Some(name) = nft::name_of(&message, "warren", 3) {
            assert!(name.len() <= message.payload.len());
        }
        assert!(nft::keys_of(&message).iter().map(Vec::len).sum::<usize>() <= message.payload.len());
        if let Some(flow) = Flow::parse(&message) {
            assert!(message.payload.windows(4).any(|octets| octets == flow.source.octets()));
        }
    }
    assert!(octets <= data.len());
    walk(data, DEPTH);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(range) = text.parse::<crate::network::cidr::Cidr>()
    {
        assert!(range.contains(range.first()) && range.contains(range.last()));
        assert_eq!(range.to_string().parse(), Ok(range));
    }
}

fn walk(octets: &[u8], depth: usize) {
    let Some(depth) = depth.checked_sub(1) else { return };
    let mut total = 0;
    for (_, data) in attributes(octets) {
        total += 4 + data.len();
        walk(data, depth);
    }
    assert!(total <= octets.len());
}
