//! Which snapshots go because there are too many, or they are too old.

use std::collections::{BTreeMap, BTreeSet};

use super::rows::{SnapshotKind, SnapshotRow, SnapshotState};

/// How much is kept of each owner's snapshots. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// Longest time since it was taken, in milliseconds.
    pub age_ms: Option<u64>,
    /// Most snapshots.
    pub count: Option<u64>,
    /// Most octets of memory and state on the disk. The newest stays, whatever it takes.
    pub bytes: Option<u64>,
}

/// Ids of the snapshots that are to go, the oldest first. Only those that somebody asked for (`SnapshotKind::Snapshot`)
/// and that are ready count and go; those in `pinned` count and stay. `now_ms` is Unix time; a snapshot from the future
/// is new.
pub fn expired<'a>(
    rows: impl IntoIterator<Item = &'a SnapshotRow>,
    pinned: &BTreeSet<String>,
    retention: Retention,
    now_ms: u64,
) -> Vec<String> {
    let mut owners: BTreeMap<&str, Vec<&SnapshotRow>> = BTreeMap::new();
    for row in rows {
        if row.kind == SnapshotKind::Snapshot && row.state == SnapshotState::Ready {
            owners.entry(&row.owner).or_default().push(row);
        }
    }
    let mut gone: Vec<(u64, &str)> = Vec::new();
    for rows in owners.values_mut() {
        rows.sort_by_key(|row| (row.created_ms, row.id.as_str()));
        let mut count = rows.len() as u64;
        let mut bytes = rows.iter().fold(0u64, |sum, row| sum.saturating_add(row.bytes));
        let newest = rows.last().map(|row| row.id.clone());
        for row in rows.iter().filter(|row| !pinned.contains(&row.id)) {
            let over = |limit: Option<u64>, value: u64| limit.is_some_and(|limit| value > limit);
            let age = now_ms.saturating_sub(row.created_ms);
            let too_large = over(retention.bytes, bytes) && newest.as_ref() != Some(&row.id);
            if over(retention.age_ms, age) || over(retention.count, count) || too_large {
                count -= 1;
                bytes = bytes.saturating_sub(row.bytes);
                gone.push((row.created_ms, &row.id));
            }
        }
    }
    gone.sort_unstable();
    gone.into_iter().map(|(_, id)| id.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, owner: &str, created_ms: u64, bytes: u64) -> SnapshotRow {
        let (id, owner, state) = (id.to_string(), owner.to_string(), SnapshotState::Ready);
        SnapshotRow { id, owner, created_ms, bytes, state, ..SnapshotRow::default() }
    }

    fn gone(rows: &[SnapshotRow], pinned: &[&str], retention: Retention) -> String {
        let pinned = pinned.iter().map(ToString::to_string).collect();
        expired(rows, &pinned, retention, 1000).concat()
    }

    const NONE: Retention = Retention { age_ms: None, count: None, bytes: None };

    #[test]
    fn the_oldest_go_until_the_rest_is_within_its_limits() {
        let rows = [row("c", "x", 300, 10), row("a", "x", 100, 10), row("d", "x", 400, 30), row("b", "x", 200, 10)];
        assert_eq!(gone(&rows, &[], NONE), "");
        assert_eq!(gone(&rows, &[], Retention { count: Some(2), ..NONE }), "ab");
        assert_eq!(gone(&rows, &[], Retention { age_ms: Some(700), ..NONE }), "ab");
        assert_eq!(gone(&rows, &[], Retention { bytes: Some(40), ..NONE }), "ab");
        assert_eq!(gone(&rows, &[], Retention { bytes: Some(29), ..NONE }), "abc");
        assert_eq!(gone(&rows, &[], Retention { count: Some(3), age_ms: Some(799), bytes: None }), "ab");
        assert_eq!(gone(&rows, &[], Retention { count: Some(0), ..NONE }), "abcd");
    }

    #[test]
    fn pinned_ones_count_and_stay() {
        let rows = [row("a", "x", 100, 10), row("b", "x", 200, 10), row("c", "x", 300, 10)];
        assert_eq!(gone(&rows, &["a"], Retention { count: Some(2), ..NONE }), "b");
        assert_eq!(gone(&rows, &["a", "b", "c"], Retention { count: Some(0), ..NONE }), "");
    }

    #[test]
    fn owners_have_their_own_limits_and_only_asked_for_snapshots_go() {
        let mut rows = vec![row("a", "x", 100, 10), row("b", "y", 200, 10), row("c", "y", 300, 10)];
        assert_eq!(gone(&rows, &[], Retention { count: Some(1), ..NONE }), "b");
        for (n, kind) in SnapshotKind::ALL.iter().enumerate() {
            for (m, state) in SnapshotState::ALL.iter().enumerate() {
                if (*kind, *state) != (SnapshotKind::Snapshot, SnapshotState::Ready) {
                    rows.push(SnapshotRow { kind: *kind, state: *state, ..row(&format!("z{n}{m}"), "z", 1, 10) });
                }
            }
        }
        assert_eq!(gone(&rows, &[], Retention { count: Some(0), ..NONE }), "abc");
        assert_eq!(gone(&[row("f", "x", 5000, 1)], &[], Retention { age_ms: Some(0), ..NONE }), "");
    }
}
