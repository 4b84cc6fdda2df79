//! The sandboxes' network: TAP devices on links of their own, addresses, packet policy. docs/network.md has the plan and
//! the rules.

pub mod check;
pub mod cidr;
pub mod conntrack;
pub mod link;
pub mod netlink;
pub mod nft;
pub mod plan;
pub mod policy;
pub mod rules;
mod service;
mod tap;

pub use service::{Adopted, Checked, Lease, MTU, Network, NetworkError, Report, Settings};
