//! The tables of /proc. Sources: Documentation/filesystems/proc.rst, Documentation/admin-guide/iostats.rst,
//! Documentation/accounting/psi.rst.

use crate::sentinel::collect::Gatherer;
use crate::sentinel::model::{Kind, sanitized_name};

/// USER_HZ: ticks per second in /proc, 100 on every architecture that Linux still supports.
const TICKS: f64 = 100.0;
/// /proc/diskstats counts in sectors of 512 octets, whatever the disk's own are.
const SECTOR: f64 = 512.0;
const MILLI: f64 = 0.001;

const NONE: &[(&str, &str)] = &[];

fn numbers(words: std::str::SplitWhitespace<'_>) -> Vec<f64> {
    // Counters beyond 2^53 lose their last digits as in every float; negative ones and words are none.
    words.take(64).map_while(|word| word.parse::<u64>().ok()).map(|number| number as f64).collect()
}

/// /proc/stat: CPU time by mode, interrupts, context switches, processes.
pub fn stat(text: &str, out: &mut Gatherer<'_>) {
    const MODES: [&str; 8] = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"];
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        let values = numbers(words);
        let Some(&first) = values.first() else { continue };
        if let Some(cpu) = key.strip_prefix("cpu").filter(|cpu| !cpu.is_empty()) {
            for (mode, value) in MODES.iter().zip(&values) {
                let labels = [("cpu", cpu), ("mode", mode)];
                out.add("node_cpu_seconds_total", Kind::Counter, &labels, value / TICKS);
            }
            for (mode, value) in ["user", "nice"].iter().zip(values.iter().skip(8)) {
                out.add("node_cpu_guest_seconds_total", Kind::Counter, &[("cpu", cpu), ("mode", mode)], value / TICKS);
            }
            continue;
        }
        let (name, kind) = match key {
            "intr" => ("node_intr_total", Kind::Counter),
            "ctxt" => ("node_context_switches_total", Kind::Counter),
            "processes" => ("node_forks_total", Kind::Counter),
            "btime" => ("node_boot_time_seconds", Kind::Gauge),
            "procs_running" => ("node_procs_running", Kind::Gauge),
            "procs_blocked" => ("node_procs_blocked", Kind::Gauge),
            _ => continue,
        };
        out.add(name, kind, NONE, first);
    }
}

/// /proc/loadavg.
pub fn loadavg(text: &str, out: &mut Gatherer<'_>) {
    for (name, word) in ["node_load1", "node_load5", "node_load15"].into_iter().zip(text.split_whitespace()) {
        if let Ok(load) = word.parse() {
            out.gauge(name, load);
        }
    }
}

/// /proc/meminfo: `Active(anon):  12 kB` is `node_memory_Active_anon_bytes`.
pub fn meminfo(text: &str, out: &mut Gatherer<'_>) {
    for line in text.lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        let mut words = rest.split_whitespace();
        let Some(value) = words.next().and_then(|word| word.parse::<u64>().ok()) else { continue };
        let name = sanitized_name(&key.replace('(', "_").replace(')', ""));
        match words.next() {
            Some("kB") => out.gauge(&format!("node_memory_{name}_bytes"), value as f64 * 1024.0),
            Some(_) => {}
            None => out.gauge(&format!("node_memory_{name}"), value as f64),
        }
    }
}

/// /proc/vmstat: paging, faults and kills for want of memory.
pub fn vmstat(text: &str, out: &mut Gatherer<'_>) {
    for line in text.lines() {
        let Some((key, value)) = line.split_once(' ') else { continue };
        let wanted = ["oom_kill", "pgpg", "pswp"].iter().any(|start| key.starts_with(start))
            || (key.starts_with("pg") && key.contains("fault"));
        if let (true, Ok(value)) = (wanted, value.trim().parse::<u64>()) {
            out.add(&format!("node_vmstat_{}", sanitized_name(key)), Kind::Unknown, NONE, value as f64);
        }
    }
}

/// /proc/diskstats, of the disks that are wanted.
pub fn diskstats(text: &str, wanted: &dyn Fn(&str) -> bool, out: &mut Gatherer<'_>) {
    const COLUMNS: [(&str, f64, Kind); 17] = [
        ("reads_completed_total", 1.0, Kind::Counter),
        ("reads_merged_total", 1.0, Kind::Counter),
        ("read_bytes_total", SECTOR, Kind::Counter),
        ("read_time_seconds_total", MILLI, Kind::Counter),
        ("writes_completed_total", 1.0, Kind::Counter),
        ("writes_merged_total", 1.0, Kind::Counter),
        ("written_bytes_total", SECTOR, Kind::Counter),
        ("write_time_seconds_total", MILLI, Kind::Counter),
        ("io_now", 1.0, Kind::Gauge),
        ("io_time_seconds_total", MILLI, Kind::Counter),
        ("io_time_weighted_seconds_total", MILLI, Kind::Counter),
        ("discards_completed_total", 1.0, Kind::Counter),
        ("discards_merged_total", 1.0, Kind::Counter),
        ("discarded_sectors_total", 1.0, Kind::Counter),
        ("discard_time_seconds_total", MILLI, Kind::Counter),
        ("flush_requests_total", 1.0, Kind::Counter),
        ("flush_requests_time_seconds_total", MILLI, Kind::Counter),
    ];
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(disk) = words.nth(2).filter(|disk| wanted(disk)) else { continue };
        for ((name, scale, kind), value) in COLUMNS.iter().zip(numbers(words)) {
            out.add(&format!("node_disk_{name}"), *kind, &[("device", disk)], value * scale);
        }
    }
}

/// /proc/net/dev, of the interfaces that are wanted. The column names are in its second line.
pub fn net_dev(text: &str, wanted: &dyn Fn(&str) -> bool, out: &mut Gatherer<'_>) {
    let mut lines = text.lines().skip(1);
    let mut header = lines.next().unwrap_or_default().split('|').skip(1).map(|part| part.split_whitespace().take(32));
    let (Some(receive), Some(transmit)) = (header.next(), header.next()) else { return };
    let columns: Vec<String> = receive
        .map(|column| format!("node_network_receive_{}_total", sanitized_name(column)))
        .chain(transmit.map(|column| format!("node_network_transmit_{}_total", sanitized_name(column))))
        .collect();
    for line in lines {
        // The name may hold colons (an alias); the last one ends it.
        let Some((device, values)) = line.rsplit_once(':') else { continue };
        let device = device.trim();
        if wanted(device) {
            for (name, value) in columns.iter().zip(numbers(values.split_whitespace())) {
                out.add(name, Kind::Counter, &[("device", device)], value);
            }
        }
    }
}

/// /proc/pressure/RESOURCE: `some` is waiting, `full` is stalled, in microseconds.
pub fn pressure(resource: &str, text: &str, out: &mut Gatherer<'_>) {
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let state = match words.next() {
            Some("some") => "waiting",
            // The kernel writes a line of zeroes for the CPU: nothing can be stalled on all of it.
            Some("full") if resource != "cpu" => "stalled",
            _ => continue,
        };
        let total = words.find_map(|word| word.strip_prefix("total=")).and_then(|total| total.parse::<u64>().ok());
        if let Some(total) = total {
            out.add(
                &format!("node_pressure_{resource}_{state}_seconds_total"),
                Kind::Counter,
                NONE,
                total as f64 / 1e6,
            );
        }
    }
}
