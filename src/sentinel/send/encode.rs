//! A batch as the request of a protocol.

use std::fmt::Write as _;

use super::gather::Outgoing;
use super::gzip::gzip;
use super::snappy::Snappy;
use super::zstd::Zstd;
use super::{clickhouse, json, remote_write};

/// What a receiver speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// Prometheus remote write 1.0.
    RemoteWrite1,
    /// Prometheus remote write 2.0, and 1.0 where the receiver knows no other.
    RemoteWrite2,
    /// Remote write 1.0 in zstd's frame, as VictoriaMetrics' own agent sends it, and in snappy's where the receiver does
    /// not know that.
    VictoriaMetrics,
    /// ClickHouse's HTTP interface; the table, `[a-zA-Z0-9_.]+`.
    ClickHouse {
        /// Its name, with its database where it is not the default one.
        table: String,
    },
    /// The core: JSON.
    Core,
}

/// What is sent.
#[derive(Debug)]
pub struct Encoded {
    /// Path and query.
    pub target: String,
    /// Besides those that every request has.
    pub headers: Vec<(&'static str, String)>,
    /// As it goes over the wire.
    pub body: Vec<u8>,
}

/// Who we are, for those protocols that say it.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The sentinel's id.
    pub sentinel: String,
    /// The log's: sequence numbers count in it.
    pub log: u64,
}

/// Encodes; keeps its buffers for the next time.
pub struct Encoder {
    raw: Vec<u8>,
    /// As large as what was compressed may become: not made anew, and not cleared, for each batch.
    packed: Vec<u8>,
    text: String,
    quick: snap::raw::Encoder,
    snappy: Snappy,
    zstd: Zstd,
}

impl Default for Encoder {
    fn default() -> Self {
        Self {
            raw: Vec::new(),
            packed: Vec::new(),
            text: String::new(),
            quick: snap::raw::Encoder::new(),
            snappy: Snappy::default(),
            zstd: Zstd::default(),
        }
    }
}

impl Encoder {
    /// The request that hands over a batch.
    pub fn encode(&mut self, protocol: &Protocol, target: &str, origin: &Origin, batch: &Outgoing) -> Encoded {
        match protocol {
            Protocol::RemoteWrite1 => {
                self.raw.clear();
                remote_write::encode_1(&batch.samples, &mut self.raw);
                // The receivers of this form are near, and it costs most of the time there is: the quick encoder.
                let most = snap::raw::max_compress_len(self.raw.len());
                if self.packed.len() < most {
                    // Anew and not made longer: of fresh zeroes only what is written over takes memory.
                    self.packed = vec![0; most];
                }
                let len = self.quick.compress(&self.raw, &mut self.packed).unwrap_or_default();
                snappy(target, self.packed[..len].to_vec(), "application/x-protobuf", "0.1.0")
            }
            Protocol::RemoteWrite2 => {
                self.raw.clear();
                remote_write::encode_2(&batch.samples, &mut self.raw);
                let mut body = Vec::with_capacity(self.raw.len() / 4);
                self.snappy.compress(&self.raw, &mut body);
                snappy(target, body, "application/x-protobuf;proto=io.prometheus.write.v2.Request", "2.0.0")
            }
            Protocol::VictoriaMetrics => {
                self.raw.clear();
                remote_write::encode_1(&batch.samples, &mut self.raw);
                let mut body = Vec::with_capacity(self.raw.len() / 8);
                self.zstd.compress(&self.raw, &mut body);
                let headers = vec![
                    ("Content-Type", "application/x-protobuf".to_string()),
                    ("Content-Encoding", "zstd".to_string()),
                    ("X-VictoriaMetrics-Remote-Write-Version", "1".to_string()),
                ];
                Encoded { target: target.to_string(), headers, body }
            }
            Protocol::ClickHouse { table } => {
                self.text.clear();
                clickhouse::encode(&batch.samples, &mut self.text);
                let headers = vec![("Content-Encoding", "gzip".to_string())];
                Encoded { target: clickhouse::target(target, table), headers, body: gzip(self.text.as_bytes()) }
            }
            Protocol::Core => {
                self.text.clear();
                core(&mut self.text, origin, batch);
                let headers =
                    vec![("Content-Type", "application/json".to_string()), ("Content-Encoding", "gzip".to_string())];
                Encoded { target: target.to_string(), headers, body: gzip(self.text.as_bytes()) }
            }
        }
    }
}

/// A body in snappy's block format, not the framed one.
fn snappy(target: &str, body: Vec<u8>, content_type: &str, version: &str) -> Encoded {
    let headers = vec![
        ("Content-Type", content_type.to_string()),
        ("Content-Encoding", "snappy".to_string()),
        ("X-Prometheus-Remote-Write-Version", version.to_string()),
    ];
    Encoded { target: target.to_string(), headers, body }
}

/// `batch` and `sequence` let the core see that it has a sample already: the same sample has the same number in the
/// same log, whatever batch it comes in.
fn core(out: &mut String, origin: &Origin, batch: &Outgoing) {
    out.push_str("{\"sentinel\":");
    json::text(out, &origin.sentinel);
    let (log, first) = (origin.log, batch.first);
    let _ = write!(out, ",\"log\":\"{log:016x}\",\"batch\":\"{log:016x}-{first}\",\"sequence\":{first},\"samples\":");
    json::samples(out, &batch.samples);
    out.push('}');
}
