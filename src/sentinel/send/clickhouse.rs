//! ClickHouse over HTTP: rows of `FORMAT JSONEachRow` for a table that exists already:
//!
//! ```sql
//! CREATE TABLE samples (
//!     timestamp_ms Int64, name String, kind String,
//!     label_names Array(String), label_values Array(String), value Float64
//! ) ENGINE = MergeTree ORDER BY (name, timestamp_ms)
//! ```

use std::fmt::Write as _;

use super::json;
use crate::sentinel::model::{Sample, is_stale_marker};

/// The rows. A staleness marker is no value and gets none.
pub fn encode(samples: &[Sample], out: &mut String) {
    for sample in samples.iter().filter(|sample| !is_stale_marker(sample.value)) {
        let _ = write!(out, "{{\"timestamp_ms\":{},\"name\":", sample.timestamp_ms);
        json::text(out, sample.series.name());
        let _ = write!(out, ",\"kind\":\"{}\",\"label_names\":[", sample.series.kind().name());
        list(out, sample.series.labels().map(|(name, _)| name));
        out.push_str("],\"label_values\":[");
        list(out, sample.series.labels().map(|(_, value)| value));
        out.push_str("],\"value\":");
        // Its JSON knows these three without quotes.
        let _ = match sample.value {
            value if value.is_nan() => write!(out, "nan"),
            f64::INFINITY => write!(out, "inf"),
            f64::NEG_INFINITY => write!(out, "-inf"),
            // Old versions read a number with an exponent inexactly.
            value if value == 0.0 || (1e-6..1e17).contains(&value.abs()) => write!(out, "{value}"),
            value => write!(out, "{value:e}"),
        };
        out.push_str("}\n");
    }
}

fn list<'a>(out: &mut String, texts: impl Iterator<Item = &'a str>) {
    for (n, text) in texts.enumerate() {
        if n > 0 {
            out.push(',');
        }
        json::text(out, text);
    }
}

/// `target` with the statement as a parameter. `table` is `[a-zA-Z0-9_.]+`.
pub fn target(target: &str, table: &str) -> String {
    let join = if target.contains('?') { '&' } else { '?' };
    format!("{target}{join}query=INSERT%20INTO%20{table}%20FORMAT%20JSONEachRow")
}
