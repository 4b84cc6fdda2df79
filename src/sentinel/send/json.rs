//! Samples as JSON: for the core and the dead-letter file.

use std::fmt::Write as _;

use crate::sentinel::model::{Sample, is_stale_marker};

/// Appends a text with its quotes.
pub fn text(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A number, or one of `"NaN"`, `"+Inf"`, `"-Inf"` and `"stale"`, for which JSON has none.
pub fn value(out: &mut String, value: f64) {
    let _ = match value {
        _ if is_stale_marker(value) => write!(out, "\"stale\""),
        _ if value.is_nan() => write!(out, "\"NaN\""),
        f64::INFINITY => write!(out, "\"+Inf\""),
        f64::NEG_INFINITY => write!(out, "\"-Inf\""),
        // The shortest digits that give the same double; exponents where that is shorter.
        _ if value != 0.0 && !(1e-5..1e16).contains(&value.abs()) => write!(out, "{value:e}"),
        _ => write!(out, "{value}"),
    };
}

/// One sample: `{"name":…,"type":…,"labels":{…},"timestamp":ms,"value":…}`.
pub fn sample(out: &mut String, sample: &Sample) {
    out.push_str("{\"name\":");
    text(out, sample.series.name());
    let _ = write!(out, ",\"type\":\"{}\",\"labels\":{{", sample.series.kind().name());
    for (n, (name, value)) in sample.series.labels().enumerate() {
        if n > 0 {
            out.push(',');
        }
        text(out, name);
        out.push(':');
        text(out, value);
    }
    let _ = write!(out, "}},\"timestamp\":{},\"value\":", sample.timestamp_ms);
    value(out, sample.value);
    out.push('}');
}

/// Several samples: an array.
pub fn samples(out: &mut String, samples: &[Sample]) {
    out.push('[');
    for (n, sample) in samples.iter().enumerate() {
        if n > 0 {
            out.push(',');
        }
        self::sample(out, sample);
    }
    out.push(']');
}
