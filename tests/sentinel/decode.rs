//! Remote write's messages, read independently of what writes them. Both the unit tests of `src/sentinel/send` and the
//! tests of the process include this file.

use std::io::Write;
use std::process::{Command, Stdio};

/// Labels with the name, in the order in which they came.
pub type Labels = Vec<(String, String)>;

/// A sample as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Got {
    pub labels: Labels,
    pub timestamp: i64,
    /// Of the value.
    pub bits: u64,
}

struct Field<'a> {
    number: u64,
    integer: u64,
    octets: &'a [u8],
}

fn varint(raw: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let octet = raw[0];
        *raw = &raw[1..];
        value |= u64::from(octet & 0x7f) << shift;
        if octet < 0x80 {
            break;
        }
    }
    value
}

/// The fields of a message.
fn fields(mut raw: &[u8]) -> Vec<Field<'_>> {
    let mut fields = Vec::new();
    while !raw.is_empty() {
        let key = varint(&mut raw);
        let mut field = Field { number: key >> 3, integer: 0, octets: &[] };
        match key & 7 {
            0 => field.integer = varint(&mut raw),
            1 => {
                field.integer = u64::from_le_bytes(raw[..8].try_into().unwrap());
                raw = &raw[8..];
            }
            2 => {
                let len = varint(&mut raw) as usize;
                (field.octets, raw) = raw.split_at(len);
            }
            other => panic!("wire type {other}"),
        }
        fields.push(field);
    }
    fields
}

fn text(octets: &[u8]) -> String {
    String::from_utf8(octets.to_vec()).unwrap()
}

fn sample(labels: &Labels, raw: &[u8]) -> Got {
    let fields = fields(raw);
    let of = |number| fields.iter().find(|field| field.number == number).map_or(0, |field| field.integer);
    Got { labels: labels.clone(), timestamp: of(2) as i64, bits: of(1) }
}

fn decode_1(raw: &[u8]) -> Vec<Got> {
    let mut got = Vec::new();
    for series in fields(raw) {
        assert_eq!(series.number, 1);
        let parts = fields(series.octets);
        let label = |field: &Field| {
            let parts = fields(field.octets);
            (text(parts[0].octets), text(parts[1].octets))
        };
        let labels: Labels = parts.iter().filter(|field| field.number == 1).map(label).collect();
        got.extend(parts.iter().filter(|field| field.number == 2).map(|field| sample(&labels, field.octets)));
    }
    got
}

fn decode_2(raw: &[u8]) -> Vec<Got> {
    let all = fields(raw);
    let symbols: Vec<String> = all.iter().filter(|field| field.number == 4).map(|field| text(field.octets)).collect();
    assert_eq!(symbols[0], "");
    let mut distinct = symbols.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), symbols.len());
    let mut got = Vec::new();
    for series in all.iter().filter(|field| field.number == 5) {
        let parts = fields(series.octets);
        let mut raw = parts[0].octets;
        let mut references = Vec::new();
        while !raw.is_empty() {
            references.push(symbols[varint(&mut raw) as usize].clone());
        }
        let labels: Labels = references.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        got.extend(parts.iter().filter(|field| field.number == 2).map(|field| sample(&labels, field.octets)));
    }
    got
}

/// Octets of one zstd frame or of several in a row, as Debian's program reads them.
pub fn unzstd(packed: &[u8]) -> Vec<u8> {
    let mut child =
        Command::new("zstd").args(["-dcq"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("zstd");
    let (mut stdin, packed) = (child.stdin.take().unwrap(), packed.to_vec());
    let writer = std::thread::spawn(move || stdin.write_all(&packed));
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    writer.join().unwrap().unwrap();
    output.stdout
}

fn unsnappy(packed: &[u8]) -> Vec<u8> {
    snap::raw::Decoder::new().decompress_vec(packed).unwrap()
}

/// The samples of a request with these headers. Panics when it is none.
pub fn remote_write<'a>(header: impl Fn(&str) -> Option<&'a str>, body: &[u8]) -> Vec<Got> {
    let version = ["x-prometheus-remote-write-version", "x-victoriametrics-remote-write-version"].map(&header);
    match (header("content-encoding"), version) {
        (Some("snappy"), [Some("0.1.0"), None]) => decode_1(&unsnappy(body)),
        (Some("snappy"), [Some("2.0.0"), None]) => decode_2(&unsnappy(body)),
        (Some("zstd"), [None, Some("1")]) => decode_1(&unzstd(body)),
        other => panic!("{other:?}"),
    }
}
