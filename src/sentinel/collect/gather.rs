//! What a run gives: samples of interned series.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::sentinel::model::{Identity, Kind, ModelError, Sample, SeriesTable};

/// Samples of one run.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Samples with the run's time. A series that was here in the run before and is not now has ended, and gets a
    /// staleness marker.
    pub samples: Vec<Sample>,
    /// Samples that came with a time of their own: they get no markers.
    pub timed: Vec<Sample>,
    /// Samples that could not be taken, with the first reason.
    pub refused: Option<(u64, ModelError)>,
}

impl Gathered {
    /// How many samples.
    pub fn len(&self) -> usize {
        self.samples.len() + self.timed.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counts a sample that could not be taken.
    pub fn refuse(&mut self, why: ModelError) {
        self.refused.get_or_insert((0, why)).0 += 1;
    }
}

/// Collects a run's samples: interns their series, with the task's labels over the plugin's own.
#[derive(Debug)]
pub struct Gatherer<'a> {
    table: &'a SeriesTable,
    labels: &'a BTreeMap<String, String>,
    timestamp_ms: i64,
    gathered: Gathered,
}

impl<'a> Gatherer<'a> {
    /// For a run that started at `timestamp_ms`.
    pub fn new(table: &'a Arc<SeriesTable>, labels: &'a BTreeMap<String, String>, timestamp_ms: i64) -> Self {
        Self { table, labels, timestamp_ms, gathered: Gathered::default() }
    }

    /// Adds a sample.
    pub fn add<L: AsRef<str>, V: AsRef<str>>(&mut self, name: &str, kind: Kind, labels: &[(L, V)], value: f64) {
        let timestamp_ms = self.timestamp_ms;
        if let Some(sample) = self.sample(name, kind, labels, value, timestamp_ms) {
            self.gathered.samples.push(sample);
        }
    }

    /// Adds a gauge without labels of its own.
    pub fn gauge(&mut self, name: &str, value: f64) {
        self.add::<&str, &str>(name, Kind::Gauge, &[], value);
    }

    /// Adds a sample that has a time of its own, in milliseconds since 1970-01-01 UTC.
    pub fn add_timed<L: AsRef<str>, V: AsRef<str>>(
        &mut self,
        name: &str,
        kind: Kind,
        labels: &[(L, V)],
        value: f64,
        timestamp_ms: i64,
    ) {
        if let Some(sample) = self.sample(name, kind, labels, value, timestamp_ms) {
            self.gathered.timed.push(sample);
        }
    }

    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.gathered.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.gathered.is_empty()
    }

    /// All of them.
    pub fn done(self) -> Gathered {
        self.gathered
    }

    fn sample<L: AsRef<str>, V: AsRef<str>>(
        &mut self,
        name: &str,
        kind: Kind,
        labels: &[(L, V)],
        value: f64,
        timestamp_ms: i64,
    ) -> Option<Sample> {
        match series_identity(name, kind, labels, self.labels).and_then(|identity| self.table.intern(identity)) {
            Ok(series) => Some(Sample { series, timestamp_ms, value }),
            Err(e) => {
                self.gathered.refuse(e);
                None
            }
        }
    }
}

/// The identity of a series with a task's labels over its own.
pub fn series_identity<L: AsRef<str>, V: AsRef<str>>(
    name: &str,
    kind: Kind,
    labels: &[(L, V)],
    task: &BTreeMap<String, String>,
) -> Result<Identity, ModelError> {
    let own = labels.iter().map(|(label, value)| (label.as_ref(), value.as_ref()));
    let own = own.filter(|(label, _)| !task.contains_key(*label));
    Identity::new(name, kind, own.chain(task.iter().map(|(label, value)| (label.as_str(), value.as_str()))))
}
