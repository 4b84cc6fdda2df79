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
        let mut tails: BySeries<u32> = BySeries::default();
        tails.reserve(samples.len());
        let (mut heads, mut next) = (Vec::with_capacity(samples.len()), vec![0; samples.len()]);
        for (n, sample) in (0..).zip(samples) {
            match tails.insert(sample.series.id(), n) {
                Some(before) => next[before as usize] = n,
                None => heads.push(n),
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
        let label_len = |(name, value): (&str, &str)| octets_len(name.len()) + octets_len(value.len());
        let of_labels: usize = labels(series).map(|label| octets_len(label_len(label))).sum();
        let of_samples: usize = groups.group(head).map(|sample| octets_len(sample_len(sample))).sum();
        header(out, 1, of_labels + of_samples);
        for (name, value) in labels(series) {
            header(out, 1, label_len((name, value)));
            octets(out, 1, name.as_bytes());
            octets(out, 2, value.as_bytes());
        }
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
