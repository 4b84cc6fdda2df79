//! What a task wants of a device, checked.

use std::time::Duration;

use zeroize::Zeroizing;

use super::convert::{Number, Text};
use super::crypto::{Auth, Key, Privacy};
use super::message::{V1, V2C};
use super::oid::Oid;
use super::v3::User;
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Values};

/// The shortest password (RFC 3414 §11.2).
const MIN_PASSWORD: usize = 8;

/// A task's plan.
pub struct SnmpPlan {
    /// Name or address.
    pub host: String,
    /// UDP port.
    pub port: u16,
    /// How the device lets us in.
    pub access: Access,
    /// Single values.
    pub fields: Vec<Column>,
    /// Tables.
    pub tables: Vec<Table>,
    /// Rows per request.
    pub max_repetitions: i32,
    /// Until a request is sent again.
    pub request_timeout: Duration,
    /// How often.
    pub retries: u32,
}

/// How the device lets us in.
pub enum Access {
    /// v1 or v2c.
    Community(i32, Zeroizing<Vec<u8>>),
    /// v3.
    User(User),
}

/// A table.
pub struct Table {
    /// The label that holds the row's index.
    pub index: String,
    /// What makes up a row.
    pub columns: Vec<Column>,
    /// More rows are an error.
    pub max_rows: usize,
}

/// A single value, or a table's column.
pub struct Column {
    /// Of the value, or of the column without the index.
    pub oid: Oid,
    /// Of the series or label.
    pub name: String,
    /// What becomes of the value.
    pub role: Role,
}

/// What becomes of a value.
pub enum Role {
    /// A number.
    Sample(Kind, Number, f64),
    /// A label of the row, or of all the device's samples.
    Label(Text),
    /// 1, with the value as label `value`.
    Info(Text),
    /// 1, with the name of the value's state as label `state`.
    State(Vec<(i64, String)>),
}

impl SnmpPlan {
    /// From checked values. `key` gives the key of a password: it takes milliseconds, and many devices share one.
    pub fn new(device: &Values, config: &Values, key: &mut dyn FnMut(Auth, &str) -> Key) -> Result<Self, FieldError> {
        let access = match device.text("version") {
            "1" => Access::Community(V1, device.text("community").as_bytes().to_vec().into()),
            "2c" => Access::Community(V2C, device.text("community").as_bytes().to_vec().into()),
            _ => Access::User(user(device, key)?),
        };
        let fields = columns(config, "config.fields", "fields")?;
        let mut tables = Vec::new();
        for (n, table) in config.tables("tables").iter().enumerate() {
            tables.push(Table {
                index: table.text("index").to_string(),
                columns: columns(table, &format!("config.tables[{n}].columns"), "columns")?,
                max_rows: table.whole("max_rows"),
            });
        }
        if fields.is_empty() && tables.is_empty() {
            return Err(FieldError::new("config", "neither fields nor tables are asked for"));
        }
        Ok(Self {
            host: device.text("host").to_string(),
            port: device.whole("port"),
            access,
            fields,
            tables,
            max_repetitions: config.whole("max_repetitions"),
            request_timeout: Duration::from_millis(config.whole("request_timeout_ms")),
            retries: config.whole("retries"),
        })
    }

    /// Names the device in labels and errors.
    pub fn instance(&self) -> String {
        if self.port == 161 { self.host.clone() } else { format!("{}:{}", self.host, self.port) }
    }
}

fn user(device: &Values, key: &mut dyn FnMut(Auth, &str) -> Key) -> Result<User, FieldError> {
    let name = device.text("user").to_string();
    if name.is_empty() || name.len() > 32 {
        return Err(FieldError::new("device.user", "v3 needs a user of 1 to 32 octets"));
    }
    let password = |field: &str| {
        let password = device.text(field);
        if password.len() >= MIN_PASSWORD {
            return Ok(password);
        }
        Err(FieldError::new(format!("device.{field}"), format!("must have at least {MIN_PASSWORD} octets")))
    };
    let auth = match Auth::of(device.text("auth_protocol")) {
        Some(auth) => Some((auth, key(auth, password("auth_password")?))),
        None => None,
    };
    let privacy = match (Privacy::of(device.text("privacy_protocol")), &auth) {
        (Some(privacy), Some((auth, _))) => Some((privacy, key(*auth, password("privacy_password")?))),
        (Some(_), None) => return Err(FieldError::new("device.privacy_protocol", "needs an auth_protocol")),
        (None, _) => None,
    };
    Ok(User { name, auth, privacy, context: device.text("context").to_string() })
}

fn columns(values: &Values, place: &str, key: &str) -> Result<Vec<Column>, FieldError> {
    values.tables(key).iter().enumerate().map(|(n, column)| column_of(column, &format!("{place}[{n}]"))).collect()
}

fn column_of(values: &Values, place: &str) -> Result<Column, FieldError> {
    let wrong = |field: &str, reason: &str| FieldError::new(format!("{place}.{field}"), reason);
    let refuse = |field: &str, reason: &str| Err(wrong(field, reason));
    let Some(oid) = Oid::parse(values.text("oid")) else { return refuse("oid", "is no object identifier") };
    let convert = values.text("convert");
    let text = Text::of(if convert.is_empty() { "text" } else { convert });
    let text = text.ok_or_else(|| wrong("convert", "gives a number, expected text, mac, address or hexdigits"));
    let role = match values.text("type") {
        "label" => Role::Label(text?),
        "info" => Role::Info(text?),
        "state" => {
            let mut states = Vec::new();
            for (number, name) in values.entries("states") {
                let Ok(number) = number.parse() else { return refuse("states", "a key is not a whole number") };
                states.push((number, name));
            }
            if states.is_empty() {
                return refuse("states", "a state needs names by number");
            }
            Role::State(states)
        }
        kind => {
            let Some(number) = Number::of(if convert.is_empty() { "number" } else { convert }) else {
                return refuse("convert", "gives text, expected number, hex or ticks");
            };
            let kind = if kind == "counter" { Kind::Counter } else { Kind::Gauge };
            Role::Sample(kind, number, values.number("scale").unwrap_or(1.0))
        }
    };
    Ok(Column { oid, name: values.text("name").to_string(), role })
}
