//! From a body of Prometheus or OpenMetrics text to samples.
//!
//! A target says the same series again and again: what a line's series is, is remembered by its text, so that a scrape
//! of known series takes nothing apart and allocates nothing for them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::sentinel::collect::Gathered;
use crate::sentinel::formats::exposition::{Kinds, Line, lines, series};
use crate::sentinel::model::{Identity, Sample, Series, SeriesTable};

/// The series of one target, by their text.
#[derive(Default)]
pub struct Known {
    by_text: HashMap<Box<str>, (Arc<Series>, u64)>,
    round: u64,
}

/// What a body gave.
#[derive(Debug, Default)]
pub struct Scraped {
    /// Its samples.
    pub gathered: Gathered,
    /// Samples of it.
    pub samples: u64,
    /// Series that were not there the time before.
    pub added: u64,
}

/// How a body is read.
pub struct Reading<'a> {
    /// Every series there is.
    pub table: &'a SeriesTable,
    /// The task's labels: they win over the target's, which are kept as `exported_…`.
    pub labels: &'a BTreeMap<String, String>,
    /// `instance` and `job`, where the task does not give them.
    pub target: &'a [(&'a str, &'a str)],
    /// The run's start, in milliseconds since 1970-01-01 UTC.
    pub started_ms: i64,
    /// More samples are an error; 0: no limit.
    pub limit: u64,
    /// Whether the body is OpenMetrics.
    pub openmetrics: bool,
}

impl Known {
    /// Reads a body. One line that is none fails it, as in Prometheus: what else was misread nobody knows.
    pub fn read(&mut self, body: &str, reading: &Reading<'_>) -> Result<Scraped, String> {
        self.round += 1;
        let mut scraped = Scraped::default();
        let mut kinds = Kinds::default();
        let mut ended = false;
        for (n, line) in lines(body, reading.openmetrics).enumerate() {
            match line.map_err(|e| format!("the body's meaningful line {} is {e}", n + 1))? {
                Line::Type { name, kind } => kinds.declare(name, kind),
                Line::Eof => {
                    ended = true;
                    break;
                }
                Line::Sample { series: text, value, timestamp_ms } => {
                    scraped.samples += 1;
                    if reading.limit > 0 && scraped.samples > reading.limit {
                        return Err(format!("more than {} samples", reading.limit));
                    }
                    let series = match self.by_text.get_mut(text) {
                        Some((series, round)) => {
                            *round = self.round;
                            Arc::clone(series)
                        }
                        None => match self.learn(text, &kinds, reading)? {
                            Ok(series) => {
                                scraped.added += 1;
                                series
                            }
                            Err(why) => {
                                scraped.gathered.refuse(why);
                                continue;
                            }
                        },
                    };
                    let to = if timestamp_ms.is_some() {
                        &mut scraped.gathered.timed
                    } else {
                        &mut scraped.gathered.samples
                    };
                    to.push(Sample { series, timestamp_ms: timestamp_ms.unwrap_or(reading.started_ms), value });
                }
            }
        }
        if reading.openmetrics && !ended {
            return Err("the body is cut: OpenMetrics ends with # EOF".into());
        }
        if scraped.samples != self.by_text.len() as u64 {
            let round = self.round;
            self.by_text.retain(|_, (_, seen)| *seen == round);
        }
        Ok(scraped)
    }

    #[allow(clippy::type_complexity)] // a body that is none, or a series that the model refuses
    fn learn(
        &mut self,
        text: &str,
        kinds: &Kinds<'_>,
        reading: &Reading<'_>,
    ) -> Result<Result<Arc<Series>, crate::sentinel::model::ModelError>, String> {
        let (name, own) =
            series(text).ok_or_else(|| format!("{:?} is no series", text.chars().take(80).collect::<String>()))?;
        let target = || reading.target.iter().filter(|(label, _)| !reading.labels.contains_key(*label));
        let taken = |label: &str| reading.labels.contains_key(label) || target().any(|(name, _)| *name == label);
        let mut labels: Vec<(String, String)> = Vec::with_capacity(own.len() + 4);
        for (label, value) in own {
            let label = if taken(label) { format!("exported_{label}") } else { label.to_string() };
            labels.push((label, value.into_owned()));
        }
        labels.extend(target().map(|(label, value)| (label.to_string(), value.to_string())));
        labels.extend(reading.labels.iter().map(|(label, value)| (label.clone(), value.clone())));
        let identity = Identity::new(name, kinds.of(name), labels).and_then(|identity| reading.table.intern(identity));
        if let Ok(series) = &identity {
            self.by_text.insert(text.into(), (Arc::clone(series), self.round));
        }
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::model::Kind;

    #[test]
    fn a_body_becomes_samples_and_known_series_stay_the_same() {
        let table = SeriesTable::new(100);
        let labels = BTreeMap::from([("env".to_string(), "test".to_string())]);
        let target = [("instance", "h:1"), ("job", "j")];
        let reading = |limit, openmetrics| Reading {
            table: &table,
            labels: &labels,
            target: &target,
            started_ms: 5,
            limit,
            openmetrics,
        };
        let mut known = Known::default();
        let body = "# TYPE a counter\na{job=\"own\",env=\"x\"} 1\nb 2 77\n";
        let first = known.read(body, &reading(0, false)).unwrap();
        assert_eq!((first.samples, first.added), (2, 2));
        let a = &first.gathered.samples[0];
        let shown = "a{env=\"test\",exported_env=\"x\",exported_job=\"own\",instance=\"h:1\",job=\"j\"}";
        assert_eq!((a.series.to_string(), a.timestamp_ms, a.series.kind()), (shown.to_string(), 5, Kind::Counter));
        assert_eq!(first.gathered.timed[0].timestamp_ms, 77);
        let again = known.read(body, &reading(0, false)).unwrap();
        assert_eq!(again.added, 0);
        assert!(Arc::ptr_eq(&again.gathered.samples[0].series, &a.series));
        // What is gone is forgotten, and new again when it comes back.
        known.read("b 2\n", &reading(0, false)).unwrap();
        assert_eq!(known.read(body, &reading(0, false)).unwrap().added, 1);
        assert_eq!(known.read(body, &reading(1, false)).unwrap_err(), "more than 1 samples");
        assert!(known.read(body, &reading(0, true)).unwrap_err().contains("# EOF"));
        assert!(known.read("a 1\na{b 2\n", &reading(0, false)).is_err());
    }
}
