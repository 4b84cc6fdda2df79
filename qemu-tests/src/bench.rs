//! Rows of the benchmark: `node-bench` measures them on the node, `bench` collects and shows them.

/// One measured value.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: String,
    /// Under what conditions.
    pub condition: String,
}

impl Row {
    /// A row.
    pub fn new(name: &str, value: f64, unit: &str, condition: &str) -> Self {
        Self { name: name.to_string(), value, unit: unit.to_string(), condition: condition.to_string() }
    }

    /// The row as a line of a tab-separated file.
    pub fn to_tsv(&self) -> String {
        format!("{}\t{}\t{}\t{}", self.name, shown(self.value), self.unit, self.condition)
    }

    /// The row of such a line, where it is one.
    pub fn from_tsv(line: &str) -> Option<Self> {
        let mut columns = line.split('\t');
        let (name, value, unit) = (columns.next()?, columns.next()?.parse().ok()?, columns.next()?);
        Some(Self::new(name, value, unit, columns.next().unwrap_or_default()))
    }
}

/// Three significant digits are what repeats; whole numbers stay whole.
fn shown(value: f64) -> String {
    match value {
        v if v.fract() == 0.0 || v.abs() >= 1000.0 => format!("{v:.0}"),
        v if v.abs() >= 100.0 => format!("{v:.1}"),
        v if v.abs() >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}

/// The middle of several measurements.
///
/// # Panics
/// When there are none.
pub fn median(values: &mut [f64]) -> f64 {
    assert!(!values.is_empty(), "a median needs values");
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let values: Vec<String> = rows.iter().map(|row| shown(row.value)).collect();
    let name = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let value = values.iter().map(String::len).max().unwrap_or(0);
    let unit = rows.iter().map(|row| row.unit.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (row, shown) in rows.iter().zip(&values) {
        text.push_str(&format!("{:name$}  {shown:>value$} {:unit$}  {}\n", row.name, row.unit, row.condition));
    }
    text
}

/// What the project wants a row to be.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// No more than this.
    AtMost(f64),
    /// No more than this part of another row, where that one was measured.
    AtMostOf(f64, &'static str),
    /// No less than this part of another row, where that one was measured.
    AtLeastOf(f64, &'static str),
}

/// The targets, by row.
pub const TARGETS: &[(&str, Target)] = &[
    ("cold_boot_ms", Target::AtMost(60.0)),
    ("cold_boot_ms", Target::AtMostOf(0.9, "peer_cold_boot_ms")),
    ("exec_true_ms", Target::AtMost(5.0)),
    ("code_run_python_ms", Target::AtMost(3.0)),
    ("jail_cost_ms", Target::AtMost(3.0)),
    ("restore_ms", Target::AtMost(8.0)),
    ("restore_exec_ms", Target::AtMost(15.0)),
    ("fork_10_ms", Target::AtMost(60.0)),
    ("supervisor_rss_kib", Target::AtMost(16.0 * 1024.0)),
    // 0.1 % of a processor for 100 of them.
    ("supervisor_idle_us", Target::AtMost(600.0)),
    ("worker_overhead_kib", Target::AtMost(3072.0)),
    ("binary_bytes", Target::AtMost(8.0 * 1024.0 * 1024.0)),
    ("snapshot_bytes", Target::AtMost(24.0 * 1024.0 * 1024.0)),
    ("pause_stop_ms", Target::AtMost(10.0)),
    ("clone_private_kib", Target::AtMost(1024.0)),
    ("clone_worker_kib", Target::AtMost(600.0)),
    ("worker_restore_ms", Target::AtMost(4.0)),
    ("ready_worker_restore_ms", Target::AtMost(4.0)),
    ("restore_ms", Target::AtMostOf(0.5, "peer_restore_ms")),
    ("host_boot_ms", Target::AtMost(2500.0)),
    ("block_write_mib_per_s", Target::AtLeastOf(1.0, "peer_block_write_mib_per_s")),
    ("block_read_mib_per_s", Target::AtLeastOf(1.0, "peer_block_read_mib_per_s")),
    ("block_4k_iops", Target::AtLeastOf(1.0, "peer_block_4k_iops")),
    ("block_4k_write_iops", Target::AtLeastOf(1.0, "peer_block_4k_write_iops")),
    ("file_write_mib_per_s", Target::AtLeastOf(0.5, "vsock_mib_per_s")),
    ("file_read_mib_per_s", Target::AtLeastOf(0.5, "vsock_mib_per_s")),
    ("net_mib_per_s", Target::AtLeastOf(1.0, "peer_net_mib_per_s")),
    ("net_small_packets_per_s", Target::AtLeastOf(1.0, "peer_net_small_packets_per_s")),
];

/// One line for each target that can be judged.
pub fn verdicts(rows: &[Row]) -> Vec<String> {
    let value = |name: &str| rows.iter().find(|row| row.name == name).map(|row| row.value);
    TARGETS
        .iter()
        .filter_map(|(name, target)| {
            let measured = value(name)?;
            let (met, sign, limit, of) = match target {
                Target::AtMost(limit) => (measured <= *limit, '≤', *limit, String::new()),
                Target::AtMostOf(part, other) | Target::AtLeastOf(part, other) => {
                    let limit = part * value(other)?;
                    let of = format!(" ({part} × {other})");
                    match target {
                        Target::AtLeastOf(..) => (measured >= limit, '≥', limit, of),
                        _ => (measured <= limit, '≤', limit, of),
                    }
                }
            };
            let word = if met { "met" } else { "MISSED" };
            Some(format!("{word:6}  {name} {} {sign} {}{of}", shown(measured), shown(limit)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_survives_its_file() {
        let row = Row::new("cold_boot_ms", 43.25, "ms", "QEMU 7.2");
        assert_eq!(Row::from_tsv(&row.to_tsv()), Some(row));
    }

    #[test]
    fn a_target_relative_to_a_peer_is_judged_only_where_the_peer_was_measured() {
        let own = Row::new("cold_boot_ms", 50.0, "ms", "");
        assert_eq!(verdicts(std::slice::from_ref(&own)).len(), 1);
        let both = verdicts(&[own, Row::new("peer_cold_boot_ms", 52.0, "ms", "")]);
        assert_eq!(both.len(), 2);
        assert!(both[1].starts_with("MISSED"));
    }

    #[test]
    fn more_than_a_peer_is_met_where_more_is_better() {
        let rows = |own| [Row::new("block_4k_iops", own, "1/s", ""), Row::new("peer_block_4k_iops", 10.0, "1/s", "")];
        assert!(verdicts(&rows(11.0))[0].starts_with("met"));
        assert!(verdicts(&rows(9.0))[0].starts_with("MISSED"));
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 9.0]), 3.0);
    }
}
