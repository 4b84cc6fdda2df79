//! What a task wants of a device, and the fewest requests that give it.

use super::frame::{Ask, Framing, Table};
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Values};

/// A task's plan.
#[derive(Debug)]
pub struct ModbusPlan {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Which device behind the address.
    pub unit: u8,
    /// How frames look.
    pub framing: Framing,
    /// What is wanted.
    pub points: Vec<Point>,
    /// Values between two wanted ones that are read along.
    pub max_gap: u16,
    /// Times that a busy device is asked again.
    pub busy_retries: u32,
    /// Between two requests.
    pub pause_ms: u64,
}

/// One wanted value.
#[derive(Debug, Clone)]
pub struct Point {
    /// Of the series.
    pub name: String,
    /// Where it is.
    pub table: Table,
    /// Its first register or bit.
    pub address: u16,
    /// How it is read.
    pub form: Form,
    /// What its values mean.
    pub kind: Kind,
    /// `value × scale + offset`
    pub scale: f64,
    /// See `scale`.
    pub offset: f64,
    /// Labels of its own.
    pub labels: Vec<(String, String)>,
}

/// How registers are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Form {
    /// A coil or discrete input, or this bit of a register.
    Bit(u8),
    Int(u8, Order),
    Uint(u8, Order),
    Float(u8, Order),
}

/// Order of octets, where the value's highest is A.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Order {
    Abcd,
    Dcba,
    Badc,
    Cdab,
}

impl Form {
    /// Registers (or bits) that it takes.
    pub fn registers(self) -> u16 {
        match self {
            Self::Bit(_) => 1,
            Self::Int(octets, _) | Self::Uint(octets, _) | Self::Float(octets, _) => u16::from(octets) / 2,
        }
    }

    /// The value of its registers' octets.
    pub fn value(self, registers: &[u8]) -> Option<f64> {
        let (octets, order) = match self {
            Self::Bit(bit) => {
                let register = u16::from_be_bytes(registers.first_chunk::<2>().copied()?);
                return Some(f64::from(register >> bit & 1));
            }
            Self::Int(octets, order) | Self::Uint(octets, order) | Self::Float(octets, order) => (octets, order),
        };
        let mut value = registers.get(..usize::from(octets))?.to_vec();
        if matches!(order, Order::Dcba | Order::Cdab) {
            value.reverse();
        }
        if matches!(order, Order::Badc | Order::Cdab) {
            value.chunks_exact_mut(2).for_each(|register| register.swap(0, 1));
        }
        let bits = value.iter().fold(0u64, |bits, octet| bits << 8 | u64::from(*octet));
        Some(match (self, octets) {
            (Self::Int(..), 2) => f64::from(bits as u16 as i16),
            (Self::Int(..), 4) => f64::from(bits as u32 as i32),
            (Self::Int(..), _) => bits as i64 as f64,
            (Self::Float(..), 4) => f64::from(f32::from_bits(bits as u32)),
            (Self::Float(..), _) => f64::from_bits(bits),
            _ => bits as f64,
        })
    }
}

/// A request and the points that it gives, by their place in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// What is asked for.
    pub ask: Ask,
    /// Which points it gives.
    pub points: Vec<usize>,
}

impl ModbusPlan {
    /// From checked values.
    pub fn new(device: &Values, config: &Values) -> Result<Self, FieldError> {
        let registers = config.tables("registers");
        let points = registers.iter().enumerate().map(|(n, point)| point_of(point, &format!("config.registers[{n}]")));
        Ok(Self {
            host: device.text("host").to_string(),
            port: device.whole("port"),
            unit: device.whole("unit"),
            framing: if device.text("framing") == "rtu" { Framing::Rtu } else { Framing::Tcp },
            points: points.collect::<Result<_, _>>()?,
            max_gap: config.whole("max_gap"),
            busy_retries: config.whole("busy_retries"),
            pause_ms: config.whole("pause_ms"),
        })
    }

    /// Names the device in labels.
    pub fn instance(&self) -> String {
        let port = if self.port == 502 { String::new() } else { format!(":{}", self.port) };
        let unit = if self.unit == 1 { String::new() } else { format!("/{}", self.unit) };
        format!("{}{port}{unit}", self.host)
    }

    /// The requests for all points; with `gap` 0 nothing is read that was not asked for.
    pub fn blocks(&self, points: impl IntoIterator<Item = usize>, gap: u16) -> Vec<Block> {
        let mut order: Vec<usize> = points.into_iter().collect();
        order.sort_by_key(|at| (self.points[*at].table, self.points[*at].address, *at));
        let mut blocks: Vec<Block> = Vec::new();
        for at in order {
            let point = &self.points[at];
            let end = u32::from(point.address) + u32::from(point.form.registers());
            if let Some(block) = blocks.last_mut()
                && block.ask.table == point.table
            {
                let block_end = u32::from(block.ask.address) + u32::from(block.ask.count);
                let count = end.max(block_end) - u32::from(block.ask.address);
                if u32::from(point.address) <= block_end + u32::from(gap) && count <= u32::from(point.table.most()) {
                    block.ask.count = count as u16;
                    block.points.push(at);
                    continue;
                }
            }
            let ask = Ask { table: point.table, address: point.address, count: point.form.registers() };
            blocks.push(Block { ask, points: vec![at] });
        }
        blocks
    }

    /// The value of a point in a block's octets.
    pub fn value(&self, point: usize, ask: &Ask, data: &[u8]) -> Option<f64> {
        let point = self.points.get(point)?;
        let at = usize::from(point.address.checked_sub(ask.address)?);
        let raw = if point.table.is_bits() {
            f64::from(data.get(at / 8)? >> (at % 8) & 1)
        } else {
            point.form.value(data.get(at * 2..)?)?
        };
        Some(raw * point.scale + point.offset)
    }
}

fn point_of(values: &Values, place: &str) -> Result<Point, FieldError> {
    let refuse = |field: &str, reason: &str| Err(FieldError::new(format!("{place}.{field}"), reason));
    let table = match values.text("table") {
        "coil" => Table::Coil,
        "discrete" => Table::Discrete,
        "input" => Table::Input,
        _ => Table::Holding,
    };
    let order = match values.text("order") {
        "dcba" => Order::Dcba,
        "badc" => Order::Badc,
        "cdab" => Order::Cdab,
        _ => Order::Abcd,
    };
    let form = match values.text("type") {
        _ if table.is_bits() => Form::Bit(0),
        "bit" if !values.has("bit") => return refuse("bit", "is required for a bit of a register"),
        "bit" => Form::Bit(values.whole("bit")),
        "int16" => Form::Int(2, order),
        "int32" => Form::Int(4, order),
        "int64" => Form::Int(8, order),
        "uint32" => Form::Uint(4, order),
        "uint64" => Form::Uint(8, order),
        "float32" => Form::Float(4, order),
        "float64" => Form::Float(8, order),
        _ => Form::Uint(2, order),
    };
    let address: u16 = values.whole("address");
    if u32::from(address) + u32::from(form.registers()) > 65_536 {
        return refuse("address", "reaches beyond the last register");
    }
    let mut labels = Vec::new();
    for (label, value) in values.entries("labels") {
        if !crate::sentinel::model::is_label_name(label) {
            return refuse("labels", "a key is not the name of a label");
        }
        labels.push((label.to_string(), value));
    }
    Ok(Point {
        name: values.text("name").to_string(),
        table,
        address,
        form,
        kind: if values.text("kind") == "counter" { Kind::Counter } else { Kind::Gauge },
        scale: values.number("scale").unwrap_or(1.0),
        offset: values.number("offset").unwrap_or(0.0),
        labels,
    })
}
