//! From the control socket's answers to samples. What an answer lacks is left out.

use crate::cli::client::Reply;
use crate::sandbox::lifecycle::State;
use crate::sentinel::collect::Gatherer;
use crate::sentinel::model::{Kind, sanitized_name};
use crate::wire::Fields;

use Kind::{Counter, Gauge};

/// (key, name, kind, what the number is multiplied with)
type Row = (&'static str, &'static str, Kind, f64);

const NODE: &[Row] = &[
    ("cpus", "warren_node_cpus", Gauge, 1.0),
    ("allocated_vcpus", "warren_node_allocated_vcpus", Gauge, 1.0),
    ("memory_mib", "warren_node_memory_bytes", Gauge, MIB),
    ("memory_available_mib", "warren_node_memory_available_bytes", Gauge, MIB),
    ("allocated_memory_mib", "warren_node_allocated_memory_bytes", Gauge, MIB),
    ("disk_mib", "warren_node_disk_bytes", Gauge, MIB),
    ("disk_available_mib", "warren_node_disk_available_bytes", Gauge, MIB),
    ("clients", "warren_node_clients", Gauge, 1.0),
    ("started_ms", "warren_node_start_time_seconds", Gauge, 0.001),
];

const SANDBOX: &[Row] = &[
    ("cpu_ms", "warren_sandbox_cpu_seconds_total", Counter, 0.001),
    ("memory_mib", "warren_sandbox_memory_bytes", Gauge, MIB),
    ("memory_target_mib", "warren_sandbox_memory_target_bytes", Gauge, MIB),
    ("memory_resident_kib", "warren_sandbox_memory_resident_bytes", Gauge, KIB),
    ("memory_charged_kib", "warren_sandbox_memory_charged_bytes", Gauge, KIB),
    ("memory_used_kib", "warren_sandbox_guest_memory_used_bytes", Gauge, KIB),
    ("memory_cache_kib", "warren_sandbox_guest_memory_cache_bytes", Gauge, KIB),
    ("memory_available_kib", "warren_sandbox_guest_memory_available_bytes", Gauge, KIB),
    ("memory_balloon_kib", "warren_sandbox_memory_balloon_bytes", Gauge, KIB),
    ("memory_reported_kib", "warren_sandbox_memory_reported_bytes_total", Counter, KIB),
    ("major_faults", "warren_sandbox_guest_major_faults_total", Counter, 1.0),
    ("oom_kills", "warren_sandbox_guest_oom_kills_total", Counter, 1.0),
    ("disk_used_kib", "warren_sandbox_disk_used_bytes", Gauge, KIB),
    ("vsock_rx_bytes", "warren_sandbox_vsock_receive_bytes_total", Counter, 1.0),
    ("vsock_tx_bytes", "warren_sandbox_vsock_transmit_bytes_total", Counter, 1.0),
    ("vsock_connections", "warren_sandbox_vsock_connections", Gauge, 1.0),
    ("serial_dropped_bytes", "warren_sandbox_serial_dropped_bytes_total", Counter, 1.0),
    ("net_rx_bytes", "warren_sandbox_network_receive_bytes_total", Counter, 1.0),
    ("net_tx_bytes", "warren_sandbox_network_transmit_bytes_total", Counter, 1.0),
    ("net_rx_packets", "warren_sandbox_network_receive_packets_total", Counter, 1.0),
    ("net_tx_packets", "warren_sandbox_network_transmit_packets_total", Counter, 1.0),
    ("net_rx_dropped", "warren_sandbox_network_receive_drop_total", Counter, 1.0),
];

const DISK: &[Row] = &[
    ("reads", "warren_sandbox_disk_reads_total", Counter, 1.0),
    ("writes", "warren_sandbox_disk_writes_total", Counter, 1.0),
    ("flushes", "warren_sandbox_disk_flushes_total", Counter, 1.0),
    ("discards", "warren_sandbox_disk_discards_total", Counter, 1.0),
    ("read_bytes", "warren_sandbox_disk_read_bytes_total", Counter, 1.0),
    ("written_bytes", "warren_sandbox_disk_written_bytes_total", Counter, 1.0),
    ("discarded_bytes", "warren_sandbox_disk_discarded_bytes_total", Counter, 1.0),
    ("errors", "warren_sandbox_disk_errors_total", Counter, 1.0),
    ("throttled", "warren_sandbox_disk_throttled_total", Counter, 1.0),
    ("queue", "warren_sandbox_disk_queue", Gauge, 1.0),
];

const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * 1024.0;
/// Most buckets of a histogram.
const MAX_BUCKETS: usize = 64;

type Labels = Vec<(String, String)>;

fn add(table: &[Row], fields: &Fields, labels: &Labels, out: &mut Gatherer<'_>) {
    for (key, name, kind, factor) in table {
        if let Some(number) = fields.number(key) {
            out.add(name, *kind, labels, number as f64 * factor);
        }
    }
}

/// The answer to `node.info`.
pub fn node(info: &Fields, out: &mut Gatherer<'_>) {
    add(NODE, info, &Vec::new(), out);
    let text = |key: &'static str| (key, info.get(key).unwrap_or_default().to_string());
    let status = info.get("status").unwrap_or_default();
    out.add("warren_node_healthy", Gauge, &Labels::new(), f64::from(u8::from(status == "healthy")));
    out.add("warren_node_info", Gauge, &[text("id"), text("name"), text("version"), text("kernel")], 1.0);
}

/// How many sandboxes are in each state; one that none is in is told as 0.
pub fn states(sandboxes: &[Fields], out: &mut Gatherer<'_>) {
    for state in State::ALL.iter().map(|state| state.as_str()) {
        let count = sandboxes.iter().filter(|row| row.get("state") == Some(state)).count();
        out.add("warren_sandboxes", Gauge, &[("state", state)], count as f64);
    }
}

/// The row of a sandbox and the answer to `sandbox.stats`. `chosen`: which of its labels become labels of its series.
pub fn sandbox(row: &Fields, chosen: &[String], stats: &Reply, out: &mut Gatherer<'_>) {
    let labels = labels(row, chosen);
    for (key, name, factor) in [
        ("vcpus", "warren_sandbox_vcpus", 1.0),
        ("execs", "warren_sandbox_executions", 1.0),
        ("started_ms", "warren_sandbox_start_time_seconds", 0.001),
    ] {
        if let Some(number) = row.number(key) {
            out.add(name, Gauge, &labels, number as f64 * factor);
        }
    }
    add(SANDBOX, &stats.fields, &labels, out);
    for (key, value) in &stats.fields.0 {
        // Exits of the vCPUs: those that reached the worker, and all that the kernel counts. Frames of the guest that were not
        // let through.
        let (name, reason) = if let Some(reason) = key.strip_prefix("kvm_exits") {
            ("warren_sandbox_kvm_exits_total", reason)
        } else if let Some(reason) = key.strip_prefix("exits") {
            ("warren_sandbox_exits_total", reason)
        } else if let Some(reason) = key.strip_prefix("net_tx_dropped") {
            ("warren_sandbox_network_transmit_drop_total", reason)
        } else {
            continue;
        };
        let Some(number) = std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok()) else { continue };
        let reason = reason.strip_prefix('_').unwrap_or("all").to_string();
        out.add(name, Counter, &with(&labels, "reason", reason), number as f64);
    }
    for disk in &stats.items {
        let labels = with(&labels, "disk", disk.get("disk").unwrap_or_default().to_string());
        add(DISK, disk, &labels, out);
        latency(disk.get("latency_us").unwrap_or_default(), &labels, out);
    }
}

fn labels(row: &Fields, chosen: &[String]) -> Labels {
    let mut labels = Labels::new();
    for (label, key) in [("sandbox", "id"), ("name", "name"), ("template", "template")] {
        if let Some(value) = row.get(key) {
            labels.push((label.into(), value.into()));
        }
    }
    for (_, pair) in row.0.iter().filter(|(key, _)| key == "label") {
        if let Some((key, value)) = std::str::from_utf8(pair).ok().and_then(|pair| pair.split_once('='))
            && chosen.iter().any(|chosen| chosen == key)
        {
            labels.push((format!("label_{}", sanitized_name(key)), value.into()));
        }
    }
    labels
}

fn with(labels: &Labels, key: &str, value: String) -> Labels {
    let mut labels = labels.clone();
    labels.push((key.into(), value));
    labels
}

/// Bucket n counts requests of less than 2^n microseconds that no bucket before it counts; the last one has the rest.
fn latency(histogram: &str, labels: &Labels, out: &mut Gatherer<'_>) {
    let counts: Vec<u64> = histogram.split(',').take(MAX_BUCKETS).map_while(|count| count.parse().ok()).collect();
    let mut so_far = 0u64;
    for (n, count) in counts.iter().enumerate() {
        so_far = so_far.saturating_add(*count);
        let limit = if n + 1 == counts.len() { "+Inf".to_string() } else { (2f64.powi(n as i32) / 1e6).to_string() };
        let labels = with(labels, "le", limit);
        out.add("warren_sandbox_disk_latency_seconds_bucket", Kind::Histogram, &labels, so_far as f64);
    }
    if !counts.is_empty() {
        out.add("warren_sandbox_disk_latency_seconds_count", Kind::Histogram, labels, so_far as f64);
    }
}
