//! Declared fields and the check of what a task gives for them.

use std::fmt;

use regex_lite::Regex;
use serde_json::{Map, Value};

use crate::sentinel::secret::Given;

/// Longest string that a field takes, in octets.
const MAX_TEXT: usize = 64 * 1024;
/// Most items of a list.
const MAX_ITEMS: usize = 4096;

/// What a field holds.
#[derive(Debug, Clone)]
pub enum FieldType {
    /// Text.
    String,
    /// A whole number.
    Int,
    /// Any finite number.
    Number,
    /// `true` or `false`.
    Bool,
    /// Text that is never shown.
    Password,
    /// Texts, or, where `Schema` has fields, tables of them.
    List(Schema),
    /// Any keys, with text, numbers or truth values (labels, names of states).
    Table,
}

impl FieldType {
    /// As a manifest names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Int => "int",
            Self::Number => "number",
            Self::Bool => "bool",
            Self::Password => "password",
            Self::List(_) => "list",
            Self::Table => "table",
        }
    }
}

/// One declared field.
#[derive(Debug, Clone)]
pub struct Field {
    /// Its key.
    pub name: String,
    /// What it holds.
    pub kind: FieldType,
    /// Whether a task must give it.
    pub required: bool,
    /// Its value where a task gives none.
    pub default: Option<Value>,
    /// For people.
    pub description: String,
    /// Text, password or each text of a list must match this whole.
    pub pattern: Option<Regex>,
    /// The values that are allowed; empty: all.
    pub choices: Vec<String>,
    /// Least number, or fewest items.
    pub min: Option<f64>,
    /// Greatest number, or most items.
    pub max: Option<f64>,
}

/// Why a task's field is refused. Holds no password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Where, such as `device.host` or `config.fields[2].oid`.
    pub field: String,
    /// Why, with the limit.
    pub reason: String,
}

impl FieldError {
    /// An error of one field.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// The same error of a field inside of `parent`.
    pub fn within(self, parent: &str) -> Self {
        Self { field: format!("{parent}.{}", self.field), ..self }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

impl std::error::Error for FieldError {}

/// Fields in the order of their declaration.
#[derive(Debug, Clone, Default)]
pub struct Schema(pub Vec<Field>);

impl Schema {
    /// Checks what was given and fills in the defaults. `at` names the whole: `device` or `config`.
    pub fn check(&self, at: &str, given: &Map<String, Value>) -> Result<Values, FieldError> {
        if let Some(unknown) = given.keys().find(|key| !self.0.iter().any(|field| field.name == **key)) {
            let known: Vec<&str> = self.0.iter().map(|field| field.name.as_str()).collect();
            let shown: String = unknown.chars().take(80).collect();
            let reason = format!("is not a field here; there are: {}", known.join(", "));
            return Err(FieldError::new(format!("{at}.{shown}"), reason));
        }
        let mut values = Map::new();
        for field in &self.0 {
            let place = format!("{at}.{}", field.name);
            let value = match given.get(&field.name) {
                Some(Value::Null) | None => match &field.default {
                    Some(default) => default,
                    None if field.required => return Err(FieldError::new(place, "is required")),
                    None => continue,
                },
                Some(value) => value,
            };
            let value = field.check(&place, value)?;
            values.insert(field.name.clone(), value);
        }
        Ok(Values(values.into()))
    }
}

impl Field {
    fn check(&self, place: &str, value: &Value) -> Result<Value, FieldError> {
        let refuse = |reason: String| Err(FieldError::new(place, reason));
        match (&self.kind, value) {
            (FieldType::String | FieldType::Password, Value::String(text)) => {
                self.check_text(place, text)?;
                Ok(value.clone())
            }
            (FieldType::Int, Value::Number(number)) => {
                let Some(whole) = number.as_i64() else { return refuse(format!("{number} is not a whole number")) };
                self.check_bounds(place, whole as f64, "")?;
                Ok(value.clone())
            }
            (FieldType::Number, Value::Number(number)) => {
                let Some(float) = number.as_f64().filter(|n| n.is_finite()) else {
                    return refuse("is not a finite number".into());
                };
                self.check_bounds(place, float, "")?;
                Ok(value.clone())
            }
            (FieldType::Bool, Value::Bool(_)) => Ok(value.clone()),
            (FieldType::List(items), Value::Array(given)) => {
                if given.len() > MAX_ITEMS {
                    return refuse(format!("{} items are over the limit of {MAX_ITEMS}", given.len()));
                }
                self.check_bounds(place, given.len() as f64, " items")?;
                let mut list = Vec::with_capacity(given.len());
                for (n, item) in given.iter().enumerate() {
                    let place = format!("{place}[{n}]");
                    list.push(self.check_item(&place, items, item)?);
                }
                Ok(Value::Array(list))
            }
            (FieldType::Table, Value::Object(given)) => {
                if given.len() > MAX_ITEMS {
                    return refuse(format!("{} keys are over the limit of {MAX_ITEMS}", given.len()));
                }
                for (key, value) in given {
                    if matches!(value, Value::Array(_) | Value::Object(_) | Value::Null) {
                        let shown: String = key.chars().take(80).collect();
                        let reason = format!("is {}, expected text, a number or a truth value", name_of(value));
                        return Err(FieldError::new(format!("{place}.{shown}"), reason));
                    }
                }
                Ok(value.clone())
            }
            (kind, other) => refuse(format!("is {}, expected {}", name_of(other), kind.name())),
        }
    }

    fn check_item(&self, place: &str, items: &Schema, item: &Value) -> Result<Value, FieldError> {
        match item {
            Value::String(text) if items.0.is_empty() => {
                self.check_text(place, text)?;
                Ok(item.clone())
            }
            Value::Object(table) if !items.0.is_empty() => {
                Ok(Value::Object(std::mem::take(&mut *items.check(place, table)?.0)))
            }
            other => {
                let expected = if items.0.is_empty() { "text" } else { "a table" };
                Err(FieldError::new(place, format!("is {}, expected {expected}", name_of(other))))
            }
        }
    }

    fn check_text(&self, place: &str, text: &str) -> Result<(), FieldError> {
        let refuse = |reason: String| Err(FieldError::new(place, reason));
        // The value is named only where it may be.
        let shown = match self.kind {
            FieldType::Password => "its value".to_string(),
            _ => format!("{:?}", text.chars().take(80).collect::<String>()),
        };
        if text.len() > MAX_TEXT {
            return refuse(format!("{} octets are over the limit of {MAX_TEXT}", text.len()));
        }
        if self.required && text.is_empty() {
            return refuse("is required and empty".into());
        }
        if !self.choices.is_empty() && !self.choices.iter().any(|choice| choice == text) {
            return refuse(format!("{shown} is none of {}", self.choices.join(", ")));
        }
        match &self.pattern {
            Some(pattern) if !pattern.is_match(text) => refuse(format!("{shown} does not match {}", pattern.as_str())),
            _ => Ok(()),
        }
    }

    fn check_bounds(&self, place: &str, number: f64, unit: &str) -> Result<(), FieldError> {
        if let Some(min) = self.min.filter(|min| number < *min) {
            return Err(FieldError::new(place, format!("{number}{unit} is under the least of {min}")));
        }
        if let Some(max) = self.max.filter(|max| number > *max) {
            return Err(FieldError::new(place, format!("{number}{unit} is over the limit of {max}")));
        }
        Ok(())
    }
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}

/// Checked values, defaults included. The getters give what the schema promised; for a key that it does not have they
/// give the empty value.
#[derive(Clone, Default)]
pub struct Values(Given);

impl fmt::Debug for Values {
    /// The keys only: a value may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

impl Values {
    /// Text, or `""`.
    pub fn text(&self, key: &str) -> &str {
        self.0.get(key).and_then(Value::as_str).unwrap_or("")
    }

    /// A whole number, or 0.
    pub fn int(&self, key: &str) -> i64 {
        self.0.get(key).and_then(Value::as_i64).unwrap_or(0)
    }

    /// A whole number within what the type holds; the schema's bounds make sure of it.
    pub fn whole<T: TryFrom<i64> + Default>(&self, key: &str) -> T {
        T::try_from(self.int(key)).unwrap_or_default()
    }

    /// A number, where there is one.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.0.get(key).and_then(Value::as_f64)
    }

    /// A truth value, or `false`.
    pub fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Whether there is a value.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// The texts of a list.
    pub fn texts(&self, key: &str) -> Vec<&str> {
        self.list(key).filter_map(Value::as_str).collect()
    }

    /// The tables of a list.
    pub fn tables(&self, key: &str) -> Vec<Values> {
        self.list(key).filter_map(|item| item.as_object().cloned().map(|table| Values(table.into()))).collect()
    }

    /// The entries of a table, each value as text.
    pub fn entries(&self, key: &str) -> Vec<(&str, String)> {
        let table = self.0.get(key).and_then(Value::as_object);
        let shown = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
        table.into_iter().flatten().map(|(key, value)| (key.as_str(), shown(value))).collect()
    }

    /// All of it, for a plugin outside of this process.
    pub fn as_map(&self) -> &Map<String, Value> {
        &self.0
    }

    fn list(&self, key: &str) -> impl Iterator<Item = &Value> {
        self.0.get(key).and_then(Value::as_array).into_iter().flatten()
    }
}
