//! From what a plugin says to samples.

use serde_json::Value;

use crate::sentinel::collect::Gatherer;
use crate::sentinel::formats::{exposition, influx};
use crate::sentinel::model::{Kind, sanitized_name};
use crate::sentinel::plugin::{Manifest, Values};
use crate::wire::Fields;

/// Adds one `item` of the native form: `name=… value=… type=… time=… l.LABEL=…`.
pub fn item(fields: &Fields, manifest: &Manifest, out: &mut Gatherer<'_>) -> Result<(), String> {
    let source = fields.get("name").ok_or("an item has no name")?;
    let value: f64 = fields.get("value").and_then(|value| value.parse().ok()).ok_or("an item's value is no number")?;
    let (name, mapped) = named(source, manifest);
    let kind = match fields.get("type") {
        None => mapped,
        Some("gauge") => Kind::Gauge,
        Some("counter") => Kind::Counter,
        Some("histogram") => Kind::Histogram,
        Some("summary") => Kind::Summary,
        Some(_) => return Err("an item's type is none of gauge, counter, histogram, summary".into()),
    };
    let mut labels = Vec::new();
    for (key, value) in &fields.0 {
        if let Some(label) = key.strip_prefix("l.") {
            labels.push((label, std::str::from_utf8(value).map_err(|_| "a label is not UTF-8")?));
        }
    }
    match fields.get("time") {
        None => out.add(&name, kind, &labels, value),
        Some(time) => {
            let time = time.parse().map_err(|_| "an item's time is not in milliseconds")?;
            out.add_timed(&name, kind, &labels, value, time);
        }
    }
    Ok(())
}

fn named(source: &str, manifest: &Manifest) -> (String, Kind) {
    match manifest.mapping(source) {
        Some(mapping) => (mapping.name.clone(), mapping.kind),
        None => (sanitized_name(source), Kind::Unknown),
    }
}

/// Adds a line of the Influx line protocol. Its time is left out: as in a scrape, the run's own time counts, so that a
/// series stays in order whatever a plugin's clock says.
pub fn influx_line(line: &str, manifest: &Manifest, out: &mut Gatherer<'_>) -> Result<(), String> {
    let Some(point) = influx::point(line) else { return Ok(()) };
    let point = point.map_err(|e| e.to_string())?;
    let labels: Vec<(String, &str)> = point.tags.iter().map(|(tag, value)| (sanitized_name(tag), &**value)).collect();
    for (field, value) in &point.fields {
        let source = match &**field {
            "value" | "gauge" | "counter" => point.measurement.to_string(),
            field => format!("{}_{field}", point.measurement),
        };
        let (name, mapped) = named(&source, manifest);
        let kind = match (mapped, &**field) {
            (Kind::Unknown, "counter") => Kind::Counter,
            (Kind::Unknown, "gauge") => Kind::Gauge,
            (kind, _) => kind,
        };
        out.add(&name, kind, &labels, *value);
    }
    Ok(())
}

/// Adds a body of OpenMetrics or Prometheus text.
pub fn exposition_body(body: &str, out: &mut Gatherer<'_>) -> Result<(), String> {
    let mut kinds = exposition::Kinds::default();
    let mut wrong = None;
    for line in exposition::lines(body, true) {
        match line {
            Ok(exposition::Line::Type { name, kind }) => kinds.declare(name, kind),
            Ok(exposition::Line::Eof) => break,
            Ok(exposition::Line::Sample { series, value, timestamp_ms }) => {
                let Some((name, labels)) = exposition::series(series) else {
                    wrong.get_or_insert_with(|| exposition::LineError::Series.to_string());
                    continue;
                };
                match timestamp_ms {
                    None => out.add(name, kinds.of(name), &labels, value),
                    Some(time) => out.add_timed(name, kinds.of(name), &labels, value, time),
                }
            }
            Err(e) => _ = wrong.get_or_insert_with(|| e.to_string()),
        }
    }
    wrong.map_or(Ok(()), Err)
}

/// A task's values as arguments of the native form: `device.host=…`; lists and tables as JSON.
pub fn arguments(device: &Values, config: &Values) -> Vec<(String, String)> {
    let mut arguments = Vec::new();
    for (place, values) in [("device", device), ("config", config)] {
        for (key, value) in values.as_map() {
            arguments.push((format!("{place}.{key}"), shown(value)));
        }
    }
    arguments
}

/// The same as environment of the execd form: `DEVICE_HOST`.
pub fn environment(device: &Values, config: &Values) -> Vec<(String, String)> {
    let upper = |key: String| key.replace('.', "_").to_ascii_uppercase();
    // A zero octet cannot be in an environment.
    arguments(device, config).into_iter().map(|(key, value)| (upper(key), value.replace('\0', ""))).collect()
}

fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
