//! Staleness: a series that a task had in its last run and has no more gets one marker, so that a receiver's queries do
//! not show its last value for minutes.

use std::collections::HashSet;
use std::sync::Arc;

use crate::sentinel::model::{Sample, Series, SeriesId, stale_marker};

/// The series of a task's last run.
#[derive(Debug, Default)]
pub struct LastSeries {
    series: Vec<Arc<Series>>,
    /// The time of its samples.
    at_ms: i64,
}

impl LastSeries {
    /// Takes the series of a run that just ended, and adds markers for those that were here before and are gone.
    pub fn update(&mut self, samples: &mut Vec<Sample>, timestamp_ms: i64) {
        self.at_ms = timestamp_ms;
        // A target that says the same as last time says it in the same order: nothing to keep anew, nothing to search for.
        let same = samples.len() == self.series.len();
        if same && self.series.iter().zip(&*samples).all(|(before, now)| Arc::ptr_eq(before, &now.series)) {
            return;
        }
        let before = std::mem::take(&mut self.series);
        self.series = samples.iter().map(|sample| Arc::clone(&sample.series)).collect();
        let same = before.len() <= self.series.len() && before.iter().zip(&self.series).all(|(a, b)| Arc::ptr_eq(a, b));
        if !same {
            let now: HashSet<SeriesId> = self.series.iter().map(|series| series.id()).collect();
            samples.extend(markers(before.into_iter().filter(|series| !now.contains(&series.id())), timestamp_ms));
        }
    }

    /// Markers for all of them: the task is gone or the sentinel stops. They come after the last samples, even within
    /// their millisecond: a series has one value at a time.
    pub fn end(self, timestamp_ms: i64) -> Vec<Sample> {
        markers(self.series.into_iter(), timestamp_ms.max(self.at_ms + 1)).collect()
    }
}

fn markers(series: impl Iterator<Item = Arc<Series>>, timestamp_ms: i64) -> impl Iterator<Item = Sample> {
    let mut marked = HashSet::new();
    series.filter(move |series| marked.insert(series.id())).map(move |series| Sample {
        series,
        timestamp_ms,
        value: stale_marker(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::model::{Identity, Kind, SeriesTable, is_stale_marker};

    fn samples(table: &SeriesTable, names: &[&str]) -> Vec<Sample> {
        let of = |name: &&str| Identity::new(name, Kind::Gauge, std::iter::empty::<(&str, &str)>()).unwrap();
        let sample = |name| Sample { series: table.intern(of(name)).unwrap(), timestamp_ms: 1, value: 1.0 };
        names.iter().map(sample).collect()
    }

    fn marked(samples: &[Sample]) -> Vec<&str> {
        samples.iter().filter(|s| is_stale_marker(s.value)).map(|s| s.series.name()).collect()
    }

    #[test]
    fn a_series_that_is_gone_gets_one_marker_and_others_none() {
        let table = SeriesTable::new(100);
        let mut last = LastSeries::default();
        for (names, expected) in [
            (&["a", "b", "c"][..], &[][..]),
            (&["a", "b", "c"], &[]),
            (&["c", "a"], &["b"]),
            (&["c", "a", "b"], &[]),
            (&[], &["c", "a", "b"]),
            (&[], &[]),
        ] {
            let mut now = samples(&table, names);
            last.update(&mut now, 2);
            assert_eq!(marked(&now), expected);
            assert_eq!(now.len(), names.len() + expected.len());
        }
        last.update(&mut samples(&table, &["a", "a"]), 3);
        let markers = last.end(3);
        assert_eq!(marked(&markers), ["a"]);
        assert_eq!(markers[0].timestamp_ms, 4);
    }
}
