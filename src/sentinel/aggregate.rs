//! Windows: of the samples of a series in some seconds, their least, greatest, mean, sum, count or last value, as series of
//! their own. After the rules, before the log.
//!
//! A window that is not over is in memory alone: what a crash costs is one window.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use regex_lite::Regex;
use serde::Deserialize;

use super::log::BySeries;
use super::model::{Batch, Identity, Kind, Sample, Series, SeriesTable, is_stale_marker};

/// Longest pattern, in octets.
const MAX_PATTERN: usize = 4096;
/// How long after its end a window is closed when nothing follows: what was measured in it may still come.
const GRACE_MS: i64 = 2000;
/// Values that wait for room in the log; later ones are lost, and counted.
const MOST_WAITING: usize = 100_000;

/// What is made of a window's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Function {
    Min,
    Max,
    Mean,
    Sum,
    Count,
    Last,
}

impl Function {
    /// What is added to the series' name.
    fn suffix(self) -> &'static str {
        match self {
            Self::Min => "_min",
            Self::Max => "_max",
            Self::Mean => "_mean",
            Self::Sum => "_sum",
            Self::Count => "_count",
            Self::Last => "_last",
        }
    }
}

/// One `[[aggregate]]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregate {
    /// Matches the whole name of a series.
    pub regex: String,
    /// Seconds of a window, 1–86,400. Windows begin at multiples of it since 1970-01-01 UTC.
    pub window_s: u64,
    /// What is made of the values.
    pub functions: Vec<Function>,
    /// Whether the samples themselves go on as well.
    #[serde(default)]
    pub keep: bool,
}

impl Aggregate {
    /// Why it cannot be used, if so.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=86_400).contains(&self.window_s) {
            return Err(format!("window_s = {} is out of range: 1 to 86400", self.window_s));
        }
        if self.functions.is_empty() {
            return Err("no function: min, max, mean, sum, count, last".into());
        }
        self.pattern().map(drop)
    }

    fn pattern(&self) -> Result<Regex, String> {
        if self.regex.len() > MAX_PATTERN {
            return Err(format!("a pattern of {} octets, the limit is {MAX_PATTERN}", self.regex.len()));
        }
        Regex::new(&format!("^(?s:{})$", self.regex)).map_err(|e| format!("the pattern {:?}: {e}", self.regex))
    }
}

struct Window {
    series: Arc<Series>,
    rule: usize,
    start_ms: i64,
    count: u64,
    min: f64,
    max: f64,
    sum: f64,
    last: f64,
}

#[derive(Default)]
struct Open {
    windows: BySeries<Window>,
    /// Closed and not in the log yet, in order.
    closed: Vec<Sample>,
    lost: u64,
}

/// The windows of the rules in force.
pub struct Aggregator {
    rules: Vec<(Regex, Aggregate)>,
    table: Arc<SeriesTable>,
    open: Mutex<Open>,
}

impl Aggregator {
    /// For these rules; of those that match a name the first counts.
    pub fn new(rules: &[Aggregate], table: Arc<SeriesTable>) -> Result<Self, String> {
        let rules = rules.iter().map(|rule| Ok((rule.pattern()?, rule.clone()))).collect::<Result<_, String>>()?;
        Ok(Self { rules, table, open: Mutex::default() })
    }

    fn rule(&self, series: &Series) -> Option<usize> {
        self.rules.iter().position(|(pattern, _)| pattern.is_match(series.name()))
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.rules.is_empty()
    }

    /// What goes on as it is.
    pub fn through(&self, batch: &Batch) -> Batch {
        let goes_on = |sample: &&Sample| self.rule(&sample.series).is_none_or(|rule| self.rules[rule].1.keep);
        Batch { samples: batch.samples.iter().filter(goes_on).cloned().collect() }
    }

    /// Counts a batch in; call once for each.
    pub fn add(&self, batch: &Batch) {
        let mut open = self.lock();
        for sample in &batch.samples {
            let Some(rule) = self.rule(&sample.series) else { continue };
            let id = sample.series.id();
            if is_stale_marker(sample.value) {
                if let Some(window) = open.windows.remove(&id) {
                    self.close(window, &mut open);
                }
                continue;
            }
            let length = self.rules[rule].1.window_s as i64 * 1000;
            let start_ms = sample.timestamp_ms.div_euclid(length).saturating_mul(length);
            if open.windows.get(&id).is_some_and(|window| window.start_ms != start_ms)
                && let Some(window) = open.windows.remove(&id)
            {
                self.close(window, &mut open);
            }
            let window = open.windows.entry(id).or_insert_with(|| Window {
                series: Arc::clone(&sample.series),
                rule,
                start_ms,
                count: 0,
                min: f64::INFINITY,
                max: f64::NEG_INFINITY,
                sum: 0.0,
                last: 0.0,
            });
            window.count += 1;
            window.min = window.min.min(sample.value);
            window.max = window.max.max(sample.value);
            window.sum += sample.value;
            window.last = sample.value;
        }
    }

    /// Closes the windows that ended some time before `now_ms`; all with `None`.
    pub fn close_due(&self, now_ms: Option<i64>) {
        let mut open = self.lock();
        let over = |window: &Window| {
            let length = self.rules[window.rule].1.window_s as i64 * 1000;
            now_ms.is_none_or(|now| now >= window.start_ms.saturating_add(length + GRACE_MS))
        };
        let mut due: Vec<Window> =
            open.windows.extract_if(|_, window| over(window)).map(|(_, window)| window).collect();
        due.sort_by_key(|window| window.series.id());
        due.into_iter().for_each(|window| self.close(window, &mut open));
    }

    /// Hands over what is closed. What `put` has no room for (`false`) is kept for the next time.
    pub fn put_out(&self, put: impl FnOnce(&Batch) -> bool) {
        let mut open = self.lock();
        if open.closed.is_empty() {
            return;
        }
        let batch = Batch { samples: std::mem::take(&mut open.closed) };
        if !put(&batch) {
            open.closed = batch.samples;
        }
    }

    /// Values that found no room, or whose series was one too many.
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }

    fn close(&self, window: Window, open: &mut Open) {
        let rule = &self.rules[window.rule].1;
        let timestamp_ms = window.start_ms.saturating_add(rule.window_s as i64 * 1000);
        for function in &rule.functions {
            let value = match function {
                Function::Min => window.min,
                Function::Max => window.max,
                Function::Mean => window.sum / window.count as f64,
                Function::Sum => window.sum,
                Function::Count => window.count as f64,
                Function::Last => window.last,
            };
            let name = format!("{}{}", window.series.name(), function.suffix());
            let kind = if *function == Function::Last { window.series.kind() } else { Kind::Gauge };
            let series =
                Identity::new(&name, kind, window.series.labels()).and_then(|identity| self.table.intern(identity));
            match series {
                Ok(series) if open.closed.len() < MOST_WAITING => {
                    open.closed.push(Sample { series, timestamp_ms, value });
                }
                _ => open.lost += 1,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::model::STALE_NAN_BITS;

    fn aggregator(functions: &[Function], keep: bool) -> (Aggregator, Arc<SeriesTable>) {
        let table = Arc::new(SeriesTable::new(1000));
        let rule = Aggregate { regex: "load.*".into(), window_s: 10, functions: functions.to_vec(), keep };
        (Aggregator::new(&[rule], Arc::clone(&table)).unwrap(), table)
    }

    fn batch(table: &SeriesTable, samples: &[(&str, i64, f64)]) -> Batch {
        let sample = |(name, timestamp_ms, value): &(&str, i64, f64)| {
            let series = table.intern(Identity::new(name, Kind::Gauge, [("a", "b")]).unwrap()).unwrap();
            Sample { series, timestamp_ms: *timestamp_ms, value: *value }
        };
        Batch { samples: samples.iter().map(sample).collect() }
    }

    fn out(aggregator: &Aggregator) -> Vec<(String, i64, f64)> {
        let mut all = Vec::new();
        aggregator.put_out(|batch| {
            all.extend(batch.samples.iter().map(|s| (s.series.to_string(), s.timestamp_ms, s.value)));
            true
        });
        all
    }

    #[test]
    fn a_window_gives_each_function_once_at_its_end_with_the_labels_of_the_series() {
        use Function::*;
        let (aggregator, table) = aggregator(&[Min, Max, Mean, Sum, Count, Last], false);
        aggregator.add(&batch(&table, &[("load1", 1000, 4.0), ("load1", 9999, 2.0), ("other", 1000, 7.0)]));
        assert!(out(&aggregator).is_empty());
        aggregator.add(&batch(&table, &[("load1", 10_000, 9.0)]));
        let row = |suffix: &str, value: f64| (format!("load1_{suffix}{{a=\"b\"}}"), 10_000, value);
        let rows =
            [row("min", 2.0), row("max", 4.0), row("mean", 3.0), row("sum", 6.0), row("count", 2.0), row("last", 2.0)];
        assert_eq!(out(&aggregator), rows);
        assert!(out(&aggregator).is_empty());
    }

    #[test]
    fn a_window_that_nothing_follows_is_closed_by_the_clock_by_the_end_of_its_series_and_at_the_stop() {
        let (aggregator, table) = aggregator(&[Function::Sum], false);
        aggregator.add(&batch(&table, &[("load1", 5000, 1.0), ("load2", 5000, 2.0), ("load3", 25_000, 3.0)]));
        aggregator.add(&batch(&table, &[("load2", 6000, f64::from_bits(STALE_NAN_BITS))]));
        assert_eq!(out(&aggregator), [("load2_sum{a=\"b\"}".to_string(), 10_000, 2.0)]);
        aggregator.close_due(Some(11_999));
        assert!(out(&aggregator).is_empty());
        aggregator.close_due(Some(12_000));
        assert_eq!(out(&aggregator), [("load1_sum{a=\"b\"}".to_string(), 10_000, 1.0)]);
        aggregator.close_due(None);
        assert_eq!(out(&aggregator), [("load3_sum{a=\"b\"}".to_string(), 30_000, 3.0)]);
    }

    #[test]
    fn samples_go_on_where_no_rule_matches_or_it_keeps_them_and_what_finds_no_room_waits() {
        for keep in [false, true] {
            let (aggregator, table) = aggregator(&[Function::Last], keep);
            let all = batch(&table, &[("load1", 5000, 1.0), ("other", 5000, 2.0)]);
            assert_eq!(aggregator.through(&all).samples.len(), 1 + usize::from(keep));
            aggregator.add(&all);
            aggregator.close_due(None);
            aggregator.put_out(|_| false);
            assert_eq!(out(&aggregator).len(), 1);
        }
    }

    #[test]
    fn what_is_no_aggregate_is_refused() {
        let good = Aggregate { regex: "a".into(), window_s: 1, functions: vec![Function::Min], keep: false };
        assert_eq!(good.check(), Ok(()));
        assert!(Aggregate { window_s: 0, ..good.clone() }.check().is_err());
        assert!(Aggregate { functions: Vec::new(), ..good.clone() }.check().is_err());
        assert!(Aggregate { regex: "(".into(), ..good.clone() }.check().is_err());
        assert!(Aggregate { regex: "a".repeat(5000), ..good }.check().is_err());
    }
}
