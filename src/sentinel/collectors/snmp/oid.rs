//! Object identifiers: names in the tree that an agent offers.

use std::fmt;

/// Most numbers of one (RFC 2578 §3.5).
pub const MAX_IDS: usize = 128;

/// An object identifier. Ordered as agents order them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Oid(pub Vec<u32>);

impl Oid {
    /// From `1.3.6.1`, with or without a dot in front.
    pub fn parse(text: &str) -> Option<Self> {
        let ids: Option<Vec<u32>> =
            text.strip_prefix('.').unwrap_or(text).split('.').map(|id| id.parse().ok()).collect();
        let ids = ids.filter(|ids| (2..=MAX_IDS).contains(&ids.len()))?;
        // The first two share one number in the encoding.
        let fits = ids[0] <= 2 && (ids[0] == 2 || ids[1] < 40) && ids[1] <= u32::MAX - 80;
        fits.then_some(Self(ids))
    }

    /// What follows `root`, where this lies under it.
    pub fn under(&self, root: &Self) -> Option<&[u32]> {
        self.0.strip_prefix(root.0.as_slice()).filter(|rest| !rest.is_empty())
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&dotted(&self.0))
    }
}

impl fmt::Debug for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Numbers with dots between them.
pub fn dotted(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(".")
}
