//! `plugin.toml`: what a plugin is, what it wants to know and what it measures.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use regex_lite::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::schema::{Field, FieldType, Schema};
use crate::sentinel::model::{Kind, is_series_name};

/// More than this is no manifest, in octets.
pub const MAX_MANIFEST: usize = 1024 * 1024;
/// Lists of tables inside of lists of tables: this deep.
const MAX_DEPTH: usize = 4;

/// A checked manifest.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// `[a-z][a-z0-9_-]*`, at most 64 octets.
    pub name: String,
    /// The plugin's own version.
    pub version: String,
    /// For people.
    pub description: String,
    /// For people.
    pub author: String,
    /// Kinds of devices that it knows.
    pub device_types: Vec<String>,
    /// What a task says of the device.
    pub device: Schema,
    /// What a task says of how to measure.
    pub config: Schema,
    /// Names, kinds and units of what comes out.
    pub metrics: Vec<Mapping>,
    /// How the plugin is run; `None` for one that is built in.
    pub program: Option<Program>,
}

/// What one metric is called and means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// As the plugin names it (Influx: `measurement_field`).
    pub source: String,
    /// As it is called from there on.
    pub name: String,
    /// What its values mean.
    pub kind: Kind,
    /// Such as `seconds`; for people.
    pub unit: String,
    /// For people.
    pub description: String,
}

/// How to run a plugin that is a program of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The program, relative to the manifest's directory unless absolute, and its arguments.
    pub command: Vec<String>,
    /// How it is spoken to.
    pub form: Form,
    /// What it answers in (execd form).
    pub format: Format,
    /// Added to an otherwise empty environment.
    pub environment: BTreeMap<String, String>,
    /// Address space, in octets.
    pub memory: u64,
    /// Processes and threads of its user.
    pub processes: Option<u64>,
    /// Descriptors.
    pub files: u64,
    /// Most octets that it may write in one run.
    pub output: usize,
    /// Time to start and greet.
    pub start_timeout: Duration,
}

/// How a plugin program is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Requests of the line protocol (docs/plugins.md).
    Native,
    /// An empty line asks for one round of measurements, as Telegraf's execd does with `signal = "STDIN"`.
    Execd,
}

/// What a program of the execd form answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Influx line protocol.
    Influx,
    /// OpenMetrics or Prometheus text; a round ends with `# EOF`.
    Openmetrics,
}

/// Why a manifest is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestError(pub String);

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ManifestError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    name: String,
    version: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    author: String,
    #[serde(default)]
    device_types: Vec<String>,
    #[serde(default)]
    device_fields: Vec<RawField>,
    #[serde(default)]
    config_fields: Vec<RawField>,
    #[serde(default)]
    metrics: Vec<RawMapping>,
    program: Option<RawProgram>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawField {
    name: String,
    r#type: String,
    #[serde(default)]
    required: bool,
    default: Option<Value>,
    #[serde(default)]
    description: String,
    pattern: Option<String>,
    #[serde(default)]
    choices: Vec<String>,
    min: Option<f64>,
    max: Option<f64>,
    #[serde(default)]
    items: Vec<RawField>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMapping {
    name: String,
    source: Option<String>,
    r#type: String,
    #[serde(default)]
    unit: String,
    #[serde(default)]
    description: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProgram {
    command: Vec<String>,
    form: Form,
    #[serde(default = "influx")]
    format: Format,
    #[serde(default)]
    environment: BTreeMap<String, String>,
    #[serde(default = "memory_mib")]
    memory_mib: u64,
    processes: Option<u64>,
    #[serde(default = "files")]
    files: u64,
    #[serde(default = "output_kib")]
    output_kib: u64,
    #[serde(default = "start_timeout_s")]
    start_timeout_s: u64,
}

fn influx() -> Format {
    Format::Influx
}

fn memory_mib() -> u64 {
    1024
}

fn files() -> u64 {
    256
}

fn output_kib() -> u64 {
    16 * 1024
}

fn start_timeout_s() -> u64 {
    10
}

impl Manifest {
    /// Reads and checks a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        if text.len() > MAX_MANIFEST {
            return Err(ManifestError(format!("{} octets are over the limit of {MAX_MANIFEST}", text.len())));
        }
        let raw: RawManifest = toml::from_str(text).map_err(|e| ManifestError(e.to_string().trim().to_string()))?;
        if !is_plugin_name(&raw.name) {
            return Err(ManifestError(format!("name: {:?} is not [a-z][a-z0-9_-]* of at most 64 octets", raw.name)));
        }
        if raw.version.is_empty() || raw.version.len() > 64 {
            return Err(ManifestError("version: must have 1 to 64 octets".into()));
        }
        Ok(Self {
            name: raw.name,
            version: raw.version,
            description: raw.description,
            author: raw.author,
            device_types: raw.device_types,
            device: schema("device_fields", raw.device_fields, 0)?,
            config: schema("config_fields", raw.config_fields, 0)?,
            metrics: raw.metrics.into_iter().map(mapping).collect::<Result<_, _>>()?,
            program: raw.program.map(program).transpose()?,
        })
    }

    /// The mapping of a metric as the plugin names it.
    pub fn mapping(&self, source: &str) -> Option<&Mapping> {
        self.metrics.iter().find(|metric| metric.source == source)
    }
}

/// Whether `name` may name a plugin.
pub fn is_plugin_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'_' | b'-'))
}

fn schema(at: &str, raw: Vec<RawField>, depth: usize) -> Result<Schema, ManifestError> {
    let mut fields: Vec<Field> = Vec::new();
    for raw in raw {
        let place = format!("{at}.{}", raw.name);
        if fields.iter().any(|field| field.name == raw.name) {
            return Err(ManifestError(format!("{place}: is declared twice")));
        }
        fields.push(field(&place, raw, depth)?);
    }
    Ok(Schema(fields))
}

fn field(place: &str, raw: RawField, depth: usize) -> Result<Field, ManifestError> {
    let refuse = |reason: String| Err(ManifestError(format!("{place}: {reason}")));
    if raw.name.is_empty() || !raw.name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_') {
        return refuse("a field's name is of [a-z0-9_]".into());
    }
    if depth > MAX_DEPTH {
        return refuse(format!("lists are nested deeper than {MAX_DEPTH}"));
    }
    if !raw.items.is_empty() && raw.r#type != "list" {
        return refuse("only a list has items".into());
    }
    let kind = match raw.r#type.as_str() {
        "string" => FieldType::String,
        "int" => FieldType::Int,
        "number" => FieldType::Number,
        "bool" => FieldType::Bool,
        "password" => FieldType::Password,
        "list" => FieldType::List(schema(place, raw.items, depth + 1)?),
        "table" => FieldType::Table,
        other => {
            return refuse(format!("type {other:?} is none of string, int, number, bool, password, list, table"));
        }
    };
    let pattern = match raw.pattern {
        // The whole value must match: a rule that is forgotten to be anchored must not let anything through.
        Some(pattern) => match Regex::new(&format!("^(?:{pattern})$")) {
            Ok(regex) => Some(regex),
            Err(e) => return refuse(format!("pattern: {e}")),
        },
        None => None,
    };
    if raw.required && raw.default.is_some() {
        return refuse("is required and has a default".into());
    }
    let field = Field {
        name: raw.name,
        kind,
        required: raw.required,
        default: None,
        description: raw.description,
        pattern,
        choices: raw.choices,
        min: raw.min,
        max: raw.max,
    };
    let Some(default) = raw.default else { return Ok(field) };
    // A default is held to the same rules as what a task gives.
    let alone = Schema(vec![field]);
    let given = [(alone.0[0].name.clone(), default.clone())].into_iter().collect();
    if let Err(e) = alone.check("default", &given) {
        return refuse(e.to_string());
    }
    Ok(Field { default: Some(default), ..alone.0.into_iter().next().unwrap_or_else(|| unreachable!("one was put in")) })
}

fn mapping(raw: RawMapping) -> Result<Mapping, ManifestError> {
    if !is_series_name(&raw.name) {
        return Err(ManifestError(format!("metrics: {:?} is not the name of a series", raw.name)));
    }
    let kind = match raw.r#type.as_str() {
        "gauge" => Kind::Gauge,
        "counter" => Kind::Counter,
        "histogram" => Kind::Histogram,
        "summary" => Kind::Summary,
        "unknown" => Kind::Unknown,
        other => {
            let names = "gauge, counter, histogram, summary, unknown";
            return Err(ManifestError(format!("metrics.{}: type {other:?} is none of {names}", raw.name)));
        }
    };
    let source = raw.source.unwrap_or_else(|| raw.name.clone());
    Ok(Mapping { source, name: raw.name, kind, unit: raw.unit, description: raw.description })
}

fn program(raw: RawProgram) -> Result<Program, ManifestError> {
    let within = |name: &str, value: u64, limits: std::ops::RangeInclusive<u64>| {
        if limits.contains(&value) {
            return Ok(value);
        }
        let (min, max) = (limits.start(), limits.end());
        Err(ManifestError(format!("program.{name}: {value} is out of range: {min} to {max}")))
    };
    if raw.command.first().is_none_or(String::is_empty) {
        return Err(ManifestError("program.command: names no program".into()));
    }
    if raw.command.iter().any(|word| word.contains('\0')) {
        return Err(ManifestError("program.command: holds a zero octet".into()));
    }
    if let Some(key) = raw.environment.iter().find(|(k, v)| k.is_empty() || k.contains(['=', '\0']) || v.contains('\0'))
    {
        return Err(ManifestError(format!("program.environment: {:?} is not the name of a variable", key.0)));
    }
    Ok(Program {
        command: raw.command,
        form: raw.form,
        format: raw.format,
        environment: raw.environment,
        memory: within("memory_mib", raw.memory_mib, 16..=65_536)? << 20,
        processes: raw.processes.map(|n| within("processes", n, 1..=65_536)).transpose()?,
        files: within("files", raw.files, 16..=65_536)?,
        output: usize::try_from(within("output_kib", raw.output_kib, 1..=262_144)? << 10).unwrap_or(usize::MAX),
        start_timeout: Duration::from_secs(within("start_timeout_s", raw.start_timeout_s, 1..=600)?),
    })
}

#[cfg(test)]
mod tests;
