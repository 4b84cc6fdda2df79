//! A real node_exporter beside our `node`: the same names, labels and values.

use std::collections::BTreeMap;

use crate::peers::Peer;
use crate::process::Sentinel;

/// Families that the exporter's version of Debian 12 lacks, or whose members depend on the moment.
const OURS: &[&str] = &["node_pressure_irq_", "node_disk_filesystem_info", "node_uname_info", "node_time_seconds"];

/// Series with their labels in order, and their values.
fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| line.starts_with("node_"));
    lines
        .map(|line| {
            let (series, value) =
                line.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end().rsplit_once(' ').map_or_else(
                    || line.rsplit_once(' ').unwrap(),
                    |(series, value)| {
                        if value.parse::<f64>().is_ok() { (series, value) } else { line.rsplit_once(' ').unwrap() }
                    },
                );
            (series.to_string(), value.parse().unwrap_or(f64::NAN))
        })
        .collect()
}

/// Both are asked at nearly the same time; what others do on this machine in between (a mount, a link) is no finding, so
/// that a difference has to show three times.
#[test]
fn what_node_measures_has_a_real_node_exporters_names_labels_and_values() {
    let Some(exporter) = Peer::node_exporter() else { return };
    let differs = (0..3).map_while(|_| compare(&exporter).err()).collect::<Vec<_>>();
    assert!(differs.len() < 3, "{}", differs[2]);
}

fn compare(exporter: &Peer) -> Result<(), String> {
    let sentinel = Sentinel::new(
        "[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n\
                                  [[task]]\nid = \"node\"\nplugin = \"node\"\ninterval_ms = 60000\n",
    );
    let ours = sentinel.command("test");
    let theirs = series(&String::from_utf8(exporter.get("/metrics").unwrap()).unwrap());
    let ours = String::from_utf8(ours.stdout).unwrap();
    // `test` gives the time behind the value.
    let ours: BTreeMap<String, f64> = ours
        .lines()
        .filter(|line| line.starts_with("node_"))
        .map(|line| {
            let (rest, _) = line.rsplit_once(' ').unwrap();
            let (series, value) = rest.rsplit_once(' ').unwrap();
            (series.to_string(), value.parse().unwrap())
        })
        .collect();
    assert!(ours.len() > 100, "{}", ours.len());
    let unknown: Vec<&String> = ours
        .keys()
        .filter(|name| !theirs.contains_key(*name) && !OURS.iter().any(|ours| name.starts_with(ours)))
        .collect();
    if !unknown.is_empty() {
        return Err(format!("the exporter does not know {unknown:#?}"));
    }
    // What stands still has the same value.
    for (name, value) in &ours {
        let still =
            ["MemTotal", "SwapTotal", "boot_time", "size_bytes", "filefd_maximum", "mtu_bytes", "memory_HugePages_"];
        if still.iter().any(|still| name.contains(still)) && theirs.get(name) != Some(value) {
            return Err(format!("{name}: {value}, the exporter has {:?}", theirs.get(name)));
        }
    }
    // And of what the exporter has in the parts that we measure, nothing is missing.
    let parts = ["node_memory_", "node_load", "node_cpu_seconds", "node_filesystem_", "node_vmstat_", "node_pressure_"];
    let missing: Vec<&String> = theirs
        .keys()
        .filter(|name| parts.iter().any(|part| name.starts_with(part)) && !ours.contains_key(*name))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("missing: {missing:#?}")) }
}
