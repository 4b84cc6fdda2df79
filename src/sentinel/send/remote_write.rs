//! Prometheus remote write (prometheus.io/docs/specs/prw): messages 1.0 and 2.0.
//!
//! 1.0: `WriteRequest { 1: TimeSeries { 1: Label { 1: name, 2: value }, 2: Sample { 1: double, 2: ms } } }`.
//! 2.0: `Request { 4: symbols, 5: TimeSeries { 1: packed label references, 2: Sample { 1: double, 2: ms },
//! 5: Metadata { 1: type } } }`; the first symbol is the empty string.
//! Labels are sorted by name (`__name__` among them), samples of one series are in time order.

use std::collections::HashMap;

use super::protobuf::{double, header, integer, octets, octets_len, varint, varint_len};
use crate::sentinel::log::BySeries;
use crate::sentinel::model::{Kind, Sample, Series};

const NAME: &str = "__name__";
/// Ids so many times as far apart as there are samples still make a list.
const DENSE: usize = 8;
/// No sample: a batch has fewer.
const NONE: u32 = u32::MAX;

/// The samples of each series together; series in the order in which they first occur. Two lists of indices instead of
/// a list per series: most series have one sample in a batch.
struct Groups<'a> {
    samples: &'a [Sample],
    heads: Vec<u32>,
    /// After each sample the next one of its series; 0 where there is none (no sample follows one after it as number 0).
    next: Vec<u32>,
}

impl<'a> Groups<'a> {
    fn new(samples: &'a [Sample]) -> Self {
        let (mut heads, mut next) = (Vec::with_capacity(samples.len()), vec![0; samples.len()]);
        let mut follow = |before: Option<u32>, n: u32| match before {
            Some(before) => next[before as usize] = n,
            None => heads.push(n),
        };
        // Series that were first seen together have ids near each other: then a list by id does.
        let ids = || samples.iter().map(|sample| sample.series.id().0);
        let (least, most) = (ids().min().unwrap_or(0), ids().max().unwrap_or(0));
        let span = usize::try_from(most - least).ok().filter(|span| *span < DENSE * samples.len());
        if let Some(span) = span {
            let mut tails = vec![NONE; span + 1];
            for (n, id) in (0..).zip(ids()) {
                let before = std::mem::replace(&mut tails[(id - least) as usize], n);
                follow(Some(before).filter(|before| *before != NONE), n);
            }
        } else {
            let mut tails: BySeries<u32> = BySeries::default();
            tails.reserve(samples.len());
            for (n, sample) in (0..).zip(samples) {
                follow(tails.insert(sample.series.id(), n), n);
            }
        }
        Self { samples, heads, next }
    }

    /// The samples of the group that begins with number `head`.
    fn group(&self, head: u32) -> impl Iterator<Item = &'a Sample> {
        let following = move |&n: &u32| Some(self.next[n as usize]).filter(|&n| n != 0);
        std::iter::successors(Some(head), following).map(|n| &self.samples[n as usize])
    }

    fn iter(&self) -> impl Iterator<Item = (&'a Series, u32)> {
        self.heads.iter().map(|&head| (&*self.samples[head as usize].series, head))
    }
}

/// Name and labels in the order of their names.
fn labels(series: &Series) -> impl Iterator<Item = (&str, &str)> {
    let before = series.labels().take_while(|(name, _)| *name < NAME);
    let after = series.labels().skip_while(|(name, _)| *name < NAME);
    before.chain([(NAME, series.name())]).chain(after)
}

fn sample_len(sample: &Sample) -> usize {
    9 + 1 + varint_len(sample.timestamp_ms as u64)
}

fn put_sample(out: &mut Vec<u8>, sample: &Sample) {
    header(out, 2, sample_len(sample));
    // Fields may come in any order: what is the same in every sample stands together, for the compressor.
    integer(out, 2, sample.timestamp_ms as u64);
    double(out, 1, sample.value);
}

/// A `WriteRequest` of version 1.0.
pub fn encode_1(samples: &[Sample], out: &mut Vec<u8>) {
    let groups = Groups::new(samples);
    for (series, head) in groups.iter() {
        let labels = series.encoded();
        let of_samples: usize = groups.group(head).map(|sample| octets_len(sample_len(sample))).sum();
        header(out, 1, labels.len() + of_samples);
        out.extend_from_slice(labels);
        groups.group(head).for_each(|sample| put_sample(out, sample));
    }
}

/// A `Request` of version 2.0.
pub fn encode_2(samples: &[Sample], out: &mut Vec<u8>) {
    let groups = Groups::new(samples);
    let mut symbols: Vec<&str> = vec![""];
    let mut known: HashMap<&str, u64> = HashMap::from([("", 0)]);
    let mut body: Vec<u8> = Vec::new();
    let mut references: Vec<u8> = Vec::new();
    for (series, head) in groups.iter() {
        references.clear();
        for (name, value) in labels(series) {
            for text in [name, value] {
                let number = *known.entry(text).or_insert_with(|| {
                    symbols.push(text);
                    symbols.len() as u64 - 1
                });
                varint(&mut references, number);
            }
        }
        let metadata_type = match series.kind() {
            Kind::Unknown => 0,
            Kind::Counter => 1,
            Kind::Gauge => 2,
            Kind::Histogram => 3,
            Kind::Summary => 5,
        };
        let of_samples: usize = groups.group(head).map(|sample| octets_len(sample_len(sample))).sum();
        let of_metadata = if metadata_type == 0 { 0 } else { octets_len(2) };
        header(&mut body, 5, octets_len(references.len()) + of_samples + of_metadata);
        octets(&mut body, 1, &references);
        if metadata_type != 0 {
            header(&mut body, 5, 2);
            integer(&mut body, 1, metadata_type);
        }
        groups.group(head).for_each(|sample| put_sample(&mut body, sample));
    }
    symbols.iter().for_each(|symbol| octets(out, 4, symbol.as_bytes()));
    out.extend_from_slice(&body);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sentinel::model::{Identity, SeriesTable};

    #[test]
    fn samples_of_a_series_are_together_however_far_apart_the_ids_are() {
        let table = SeriesTable::new(1000);
        let of = |n: usize| {
            let labels = [("n", n.to_string())];
            table.intern(Identity::new("a", Kind::Gauge, labels).unwrap()).unwrap()
        };
        let series: Vec<Arc<Series>> = (0..1000).map(of).collect();
        for numbers in [[0, 1, 0, 2, 1, 0], [0, 999, 0, 500, 999, 0], [7, 7, 7, 7, 7, 7]] {
            let sample = |(time, &n): (usize, &usize)| Sample {
                series: Arc::clone(&series[n]),
                timestamp_ms: time as i64,
                value: 0.0,
            };
            let samples: Vec<Sample> = numbers.iter().enumerate().map(sample).collect();
            let groups = Groups::new(&samples);
            let mut seen = Vec::new();
            for (one, head) in groups.iter() {
                let times: Vec<i64> = groups.group(head).map(|sample| sample.timestamp_ms).collect();
                assert!(times.is_sorted_by(|a, b| a < b));
                assert!(times.iter().all(|&time| series[numbers[time as usize]].id() == one.id()));
                seen.extend(times);
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..6).collect::<Vec<_>>());
        }
        assert!(Groups::new(&[]).heads.is_empty());
    }
}
