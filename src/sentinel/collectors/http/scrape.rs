//! From a body of Prometheus or OpenMetrics text to samples.
//!
//! A target says the same series again and again: what a line's series is, is remembered by its text, so that a scrape
//! of known series takes nothing apart and allocates nothing for them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::sentinel::collect::Gathered;
use crate::sentinel::formats::exposition::{Expected, Kinds, Line, line, series};
use crate::sentinel::model::{Identity, Sample, Series, SeriesTable};

/// The series of one target in the order in which it says them, which is nearly always the same: the next line is
/// compared with the next of the list, and searched for only where it is another one.
///
/// There may be very many, and neighbours differ in little: of each text only what the one before it has not is kept.
#[derive(Default)]
pub struct Known {
    /// The ends of all texts, one after the other.
    rests: String,
    series: Vec<Place>,
}

#[derive(Clone)]
struct Place {
    /// Octets that its text shares with the one before.
    shared: u32,
    /// Where the rest of it ends.
    end: u32,
    series: Arc<Series>,
}

impl Known {
    fn rest(&self, n: usize) -> &str {
        let start = n.checked_sub(1).map_or(0, |before| self.series[before].end);
        self.rests.get(start as usize..self.series[n].end as usize).unwrap_or_default()
    }

    /// The text of place `n`, given that of the place before.
    fn expected<'a>(&'a self, n: usize, before: &'a str) -> Option<Expected<'a>> {
        let shared = before.get(..self.series.get(n)?.shared as usize)?;
        Some(Expected { shared, rest: self.rest(n) })
    }

    /// Adds a text; `before` is that of the last place.
    fn push(&mut self, text: &str, before: &str, series: Arc<Series>) {
        let same = text.bytes().zip(before.bytes()).take_while(|(a, b)| a == b).count();
        let shared = (0..=same).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        self.rests.push_str(&text[shared..]);
        self.series.push(Place { shared: shared as u32, end: self.rests.len() as u32, series });
    }

    /// The first `count` of them.
    fn first(&self, count: usize) -> Self {
        let end = count.checked_sub(1).map_or(0, |last| self.series[last].end);
        Self { rests: self.rests[..end as usize].to_string(), series: self.series[..count].to_vec() }
    }

    fn places(&self) -> HashMap<String, usize> {
        let mut text = String::new();
        let mut next = |n: usize| {
            text.truncate(self.series[n].shared as usize);
            text.push_str(self.rest(n));
            (text.clone(), n)
        };
        (0..self.series.len()).map(&mut next).collect()
    }
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

/// Beyond one of these a scrape fails, as in Prometheus. 0: no limit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Samples of one body.
    pub samples: u64,
    /// Labels of one sample, those of the task among them.
    pub labels: usize,
    /// Octets of a label's name.
    pub label_name: usize,
    /// Octets of a label's value.
    pub label_value: usize,
}

impl Limits {
    fn check(&self, text: &str, labels: &[(String, String)]) -> Result<(), String> {
        let over = |what: &str, found: usize, limit: usize| match limit {
            limit if limit > 0 && found > limit => {
                Err(format!("{:?} has {what} {found}, the limit is {limit}", text.chars().take(80).collect::<String>()))
            }
            _ => Ok(()),
        };
        over("so many labels:", labels.len(), self.labels)?;
        labels.iter().try_for_each(|(label, value)| {
            over("a label's name of octets:", label.len(), self.label_name)?;
            over("a label's value of octets:", value.len(), self.label_value)
        })
    }
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
    /// What a target may say at most.
    pub limits: Limits,
    /// Whether the body is OpenMetrics.
    pub openmetrics: bool,
}

impl Known {
    /// Reads a body. One line that is none fails it, as in Prometheus: what else was misread nobody knows.
    pub fn read(&mut self, body: &str, reading: &Reading<'_>) -> Result<Scraped, String> {
        let mut scraped = Scraped::default();
        let mut kinds = Kinds::default();
        let mut ended = false;
        // What is expected next, and the text before it in the list; where to find what is not; and the new list, once it
        // differs from the old one, with its last text.
        let (mut next, mut before) = (0, "");
        let (mut places, mut changed, mut last) = (None, None::<Self>, "");
        scraped.gathered.samples.reserve(self.series.len() + 8);
        let mut n = 0;
        for raw in body.split('\n') {
            let expected = self.expected(next, before);
            let Some(found) = line(raw, reading.openmetrics, expected) else { continue };
            n += 1;
            match found.map_err(|e| format!("the body's meaningful line {n} is {e}"))? {
                Line::Type { name, kind } => kinds.declare(name, kind),
                Line::Eof => {
                    ended = true;
                    break;
                }
                Line::Sample { series: text, value, timestamp_ms } => {
                    scraped.samples += 1;
                    let limit = reading.limits.samples;
                    if limit > 0 && scraped.samples > limit {
                        return Err(format!("more than {limit} samples"));
                    }
                    let place = match expected {
                        Some(expected) if expected.is(text) => Some(next),
                        _ => places.get_or_insert_with(|| self.places()).get(text).copied(),
                    };
                    let series = match place {
                        Some(place) => Arc::clone(&self.series[place].series),
                        None => match learn(text, &kinds, reading)? {
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
                    if place != Some(next) && changed.is_none() {
                        (changed, last) = (Some(self.first(next)), before);
                    }
                    if let Some(changed) = &mut changed {
                        changed.push(text, last, Arc::clone(&series));
                        last = text;
                    }
                    if let Some(place) = place {
                        (next, before) = (place + 1, text);
                    }
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
        drop(places);
        if changed.is_none() && next < self.series.len() {
            changed = Some(self.first(next));
        }
        if let Some(mut changed) = changed {
            changed.rests.shrink_to_fit();
            changed.series.shrink_to_fit();
            *self = changed;
        }
        Ok(scraped)
    }
}

#[allow(clippy::type_complexity)] // a body that is none, or a series that the model refuses
fn learn(
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
    reading.limits.check(text, &labels)?;
    Ok(Identity::new(name, kinds.of(name), labels).and_then(|identity| reading.table.intern(identity)))
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
            limits: Limits { samples: limit, ..Limits::default() },
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
