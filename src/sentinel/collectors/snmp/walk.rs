//! One round of questions to one device, as a state machine: which request comes next, what its answer means. It knows
//! nothing of sockets, time or versions beyond whether there is GetBulk.
//!
//! The columns of a table are walked side by side, eight in a request, each with a cursor of its own (tables have
//! holes). An agent that answers with names that do not increase would be walked for ever: that is an error.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ber::Value;
use super::convert::{number, text};
use super::message::{NO_SUCH_NAME, Pdu, PduKind, TOO_BIG, status_name};
use super::oid::{Oid, dotted};
use super::plan::{Column, Role, SnmpPlan};
use crate::sentinel::collect::Gatherer;
use crate::sentinel::model::Kind;

/// Single values in one request, at most.
const FIELDS: usize = 30;
/// Columns in one request, at most.
const COLUMNS: usize = 8;
/// Variables that one answer should have at most: more do not fit into a datagram that is not cut.
const VARIABLES: i32 = 100;

type Row = Vec<Option<Value>>;

/// A round.
pub struct Walk {
    plan: Arc<SnmpPlan>,
    bulk: bool,
    step: Step,
    fields: Row,
    rows: Vec<BTreeMap<Vec<u32>, Row>>,
    /// Single values per request; halved when an answer is too big.
    width: usize,
    repetitions: i32,
}

enum Step {
    /// These fields are asked for.
    Fields(Vec<usize>),
    /// Columns of a table, each with its cursor; those that have ended are gone.
    Columns {
        table: usize,
        first: usize,
        cursors: Vec<(usize, Oid)>,
    },
    Done,
}

impl Walk {
    /// At the start.
    pub fn new(plan: Arc<SnmpPlan>, bulk: bool) -> Self {
        let (fields, tables) = (plan.fields.len(), plan.tables.len());
        let repetitions = plan.max_repetitions;
        let mut walk = Self {
            plan,
            bulk,
            step: Step::Done,
            fields: vec![None; fields],
            rows: vec![BTreeMap::new(); tables],
            width: FIELDS,
            repetitions,
        };
        walk.fields_from(0);
        walk
    }

    fn fields_from(&mut self, first: usize) {
        if first >= self.fields.len() {
            return self.columns_from(0, 0);
        }
        self.step = Step::Fields((first..self.fields.len().min(first + self.width)).collect());
    }

    fn columns_from(&mut self, table: usize, first: usize) {
        let Some(columns) = self.plan.tables.get(table).map(|table| &table.columns) else {
            self.step = Step::Done;
            return;
        };
        if first >= columns.len() {
            return self.columns_from(table + 1, 0);
        }
        let last = columns.len().min(first + COLUMNS);
        let cursors = (first..last).map(|column| (column, columns[column].oid.clone())).collect();
        self.step = Step::Columns { table, first, cursors };
    }

    /// The next request, without its number; `None` when all is known. The same again until it is answered.
    pub fn request(&self) -> Option<Pdu> {
        match &self.step {
            Step::Fields(asked) => {
                let names = asked.iter().map(|field| self.plan.fields[*field].oid.clone());
                Some(Pdu::request(PduKind::Get, names))
            }
            Step::Columns { cursors, .. } => {
                let names = cursors.iter().map(|(_, cursor)| cursor.clone());
                if !self.bulk {
                    return Some(Pdu::request(PduKind::GetNext, names));
                }
                let repetitions = self.repetitions.min(VARIABLES / cursors.len().max(1) as i32).max(1);
                Some(Pdu { index: repetitions, ..Pdu::request(PduKind::GetBulk, names) })
            }
            Step::Done => None,
        }
    }

    /// A request was not answered in time: the next asks for less, for agents that need long for each row.
    pub fn unanswered(&mut self) {
        self.repetitions = (self.repetitions / 2).max(1);
    }

    /// Takes the answer to the request.
    pub fn answer(&mut self, pdu: Pdu) -> Result<(), String> {
        match pdu.status {
            0 => {}
            TOO_BIG => return self.too_big(),
            NO_SUCH_NAME => return self.no_such_name(pdu.index),
            status => {
                let at = usize::try_from(pdu.index).ok().and_then(|index| index.checked_sub(1));
                let name = at.and_then(|at| self.request()?.variables.into_iter().nth(at)).map(|(name, _)| name);
                let name = name.map_or_else(String::new, |name| format!(" for {name}"));
                return Err(format!("the agent answers {} ({status}){name}", status_name(status)));
            }
        }
        if pdu.variables.is_empty() {
            return Err("the agent's answer has no variables".into());
        }
        match &self.step {
            Step::Fields(asked) => {
                let asked = asked.clone();
                let next = asked.last().map_or(self.fields.len(), |last| last + 1);
                for (name, value) in pdu.variables {
                    // Agents need not keep the order.
                    let found = asked.iter().find(|field| self.plan.fields[**field].oid == name);
                    if let (Some(field), false) = (found, matches!(value, Value::Missing | Value::End | Value::Null)) {
                        self.fields[*field] = Some(value);
                    }
                }
                self.fields_from(next);
                Ok(())
            }
            Step::Columns { .. } => self.rows_of(pdu.variables),
            Step::Done => Ok(()),
        }
    }

    fn too_big(&mut self) -> Result<(), String> {
        match &mut self.step {
            Step::Fields(asked) if asked.len() > 1 => {
                self.width = (asked.len() / 2).max(1);
                asked.truncate(self.width);
                Ok(())
            }
            Step::Columns { .. } if self.bulk && self.repetitions > 1 => {
                self.repetitions /= 2;
                Ok(())
            }
            // v1 has no answer but this for a wide row: fewer columns at a time would need another plan.
            _ => Err("the agent says that even its smallest answer is too big".into()),
        }
    }

    /// v1: one of the names is not there, or has nothing after it; the others are asked for again.
    fn no_such_name(&mut self, index: i32) -> Result<(), String> {
        let at = usize::try_from(index).ok().and_then(|index| index.checked_sub(1));
        match &mut self.step {
            Step::Fields(asked) => {
                let at =
                    at.filter(|at| *at < asked.len()).ok_or("the agent does not say which name it does not have")?;
                let next = asked.last().map_or(0, |last| last + 1);
                asked.remove(at);
                if asked.is_empty() {
                    self.fields_from(next);
                }
                Ok(())
            }
            Step::Columns { table, first, cursors } => {
                let at =
                    at.filter(|at| *at < cursors.len()).ok_or("the agent does not say which name it does not have")?;
                cursors.remove(at);
                if cursors.is_empty() {
                    let (table, next) = (*table, *first + COLUMNS);
                    self.columns_from(table, next);
                }
                Ok(())
            }
            Step::Done => Ok(()),
        }
    }

    fn rows_of(&mut self, variables: Vec<(Oid, Value)>) -> Result<(), String> {
        let Step::Columns { table, first, cursors } = &mut self.step else { return Ok(()) };
        let columns = &self.plan.tables[*table].columns;
        let max_rows = self.plan.tables[*table].max_rows;
        let rows = &mut self.rows[*table];
        let asked = cursors.len();
        let mut ended = vec![false; asked];
        for (n, (name, value)) in variables.into_iter().enumerate() {
            let at = n % asked;
            let (column, cursor) = &mut cursors[at];
            let root = &columns[*column].oid;
            if ended[at] {
                continue;
            }
            let index = name.under(root).map(<[u32]>::to_vec);
            let (Some(index), false) = (index, matches!(value, Value::End)) else {
                ended[at] = true;
                continue;
            };
            if name <= *cursor {
                return Err(format!("the agent's names do not increase: {name} after {cursor}"));
            }
            if !rows.contains_key(&index) && rows.len() >= max_rows {
                return Err(format!("the table {root} has more than {max_rows} rows"));
            }
            rows.entry(index).or_insert_with(|| vec![None; columns.len()])[*column] = Some(value);
            *cursor = name;
        }
        let mut ended = ended.into_iter();
        cursors.retain(|_| !ended.next().unwrap_or(false));
        if cursors.is_empty() {
            let (table, next) = (*table, *first + COLUMNS);
            self.columns_from(table, next);
        }
        Ok(())
    }

    /// What is known so far, as samples. `instance` names the device.
    pub fn gather(&self, instance: &str, out: &mut Gatherer<'_>) {
        let mut device = vec![("instance".to_string(), instance.to_string())];
        labels(&self.plan.fields, &self.fields, &mut device);
        samples(&self.plan.fields, &self.fields, &device, out);
        for (table, rows) in self.plan.tables.iter().zip(&self.rows) {
            for (index, row) in rows {
                let mut row_labels = device.clone();
                row_labels.push((table.index.clone(), dotted(index)));
                labels(&table.columns, row, &mut row_labels);
                samples(&table.columns, row, &row_labels, out);
            }
        }
    }
}

fn labels(columns: &[Column], row: &Row, labels: &mut Vec<(String, String)>) {
    for (column, value) in columns.iter().zip(row) {
        if let (Role::Label(how), Some(value)) = (&column.role, value) {
            // The column wins over an index of the same name.
            labels.retain(|(name, _)| *name != column.name);
            labels.push((column.name.clone(), text(value, *how)));
        }
    }
}

fn samples(columns: &[Column], row: &Row, labels: &[(String, String)], out: &mut Gatherer<'_>) {
    for (column, value) in columns.iter().zip(row) {
        let Some(value) = value else { continue };
        let mut with = |label: &str, value: String| {
            let mut labels = labels.to_vec();
            labels.retain(|(name, _)| name != label);
            labels.push((label.to_string(), value));
            out.add(&column.name, Kind::Gauge, &labels, 1.0);
        };
        match &column.role {
            Role::Label(_) => {}
            Role::Info(how) => with("value", text(value, *how)),
            Role::State(states) => {
                let Some(state) = number(value, super::convert::Number::Plain) else { continue };
                let name = states.iter().find(|(known, _)| *known as f64 == state).map(|(_, name)| name.clone());
                with("state", name.unwrap_or_else(|| state.to_string()));
            }
            Role::Sample(kind, how, scale) => {
                if let Some(value) = number(value, *how) {
                    out.add(&column.name, *kind, labels, value * scale);
                }
            }
        }
    }
}
