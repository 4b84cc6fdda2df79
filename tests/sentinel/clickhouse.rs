//! A real ClickHouse as receiver: every row is queried back.

use serde_json::Value;

use crate::peers::Peer;
use crate::process::target;
use crate::prometheus::{Sample, sent, sorted};

const TABLE: &str = "CREATE TABLE samples (timestamp_ms Int64, name String, kind String, label_names Array(String), \
                     label_values Array(String), value Float64) ENGINE = MergeTree ORDER BY (name, timestamp_ms)";

#[test]
fn what_a_real_clickhouse_has_is_what_the_buffer_has() {
    let Some(clickhouse) = Peer::clickhouse() else { return };
    let query = |query: &str| {
        let headers = [("X-ClickHouse-User", "default"), ("X-ClickHouse-Key", "swordfish")];
        let answer = clickhouse.ask("POST", "/", &headers, query.as_bytes());
        String::from_utf8(answer.unwrap_or_else(|| panic!("{query} was not answered"))).unwrap()
    };
    // The documented table is the tested one.
    let documented = include_str!("../../docs/sentinel.md").split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(documented.replace("( ", "(").replace(" )", ")").contains(TABLE));
    let old = query("SELECT version()");
    // Versions before 20 name the engine in another way.
    let table =
        if old.starts_with("1") { TABLE.replace("MergeTree ORDER BY", "MergeTree() ORDER BY") } else { TABLE.into() };
    query(&table);
    let to = target("real", "clickhouse", &format!("{}/", clickhouse.url()));
    let sent = sent(&format!("{to}table = \"default.samples\"\nusername = \"default\"\npassword = \"swordfish\"\n"));
    let there: Vec<Sample> = query("SELECT * FROM samples FORMAT JSONEachRow")
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let texts = |key: &str| row[key].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_string());
            let mut labels: Vec<(String, String)> = texts("label_names").zip(texts("label_values")).collect();
            labels.push(("__name__".into(), row["name"].as_str().unwrap().into()));
            labels.sort();
            // 64-bit whole numbers come as text, floats to the bit.
            let time = row["timestamp_ms"].as_str().unwrap().parse().unwrap();
            let value = line.rsplit_once("\"value\":").unwrap().1.trim_end_matches('}').parse().unwrap();
            (labels, time, value)
        })
        .collect();
    let there = sorted(there);
    assert_eq!(there.len(), sent.len());
    for (there, sent) in there.iter().zip(&sent) {
        assert_eq!((&there.0, there.1), (&sent.0, sent.1));
        // Old versions read a fraction as the nearest number or the one beside it.
        let whole = sent.2.fract() == 0.0;
        assert!(
            there.2 == sent.2 || (!whole && (there.2 - sent.2).abs() <= sent.2.abs() * 4e-16),
            "{there:?} and {sent:?}"
        );
    }
}
