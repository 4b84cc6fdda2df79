use std::collections::BTreeMap;
use std::sync::Arc;

use crate::sentinel::collect::Gatherer;
use crate::sentinel::collectors::node::{diskstats, loadavg, meminfo, mounts, net_dev, pressure, stat, vmstat};
use crate::sentinel::model::SeriesTable;

/// Whatever /proc says, there is no panic, and what comes out is a series that the model takes.
pub fn node(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (table, labels) = (Arc::new(SeriesTable::new(1_000_000)), BTreeMap::new());
    let mut out = Gatherer::new(&table, &labels, 1);
    stat(&text, &mut out);
    loadavg(&text, &mut out);
    meminfo(&text, &mut out);
    vmstat(&text, &mut out);
    diskstats(&text, &|_| true, &mut out);
    net_dev(&text, &|_| true, &mut out);
    pressure("io", &text, &mut out);
    let points = mounts(&text);
    assert!(points.len() <= text.lines().count());
    let gathered = out.done();
    assert!(gathered.samples.iter().all(|sample| !sample.value.is_nan() || text.to_lowercase().contains("nan")));
}
