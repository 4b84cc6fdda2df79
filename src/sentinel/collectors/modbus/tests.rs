use std::net::TcpListener;

use super::frame::{Framing, Table, crc};
use super::plan::{Form, Order};
use super::*;
use crate::sentinel::collect::once;
use crate::sentinel::model::{Sample, SeriesTable};
use crate::sentinel::task::Outcome;
use serde_json::json;

fn task(device: serde_json::Value, config: serde_json::Value) -> Task {
    let object = |value: serde_json::Value| value.as_object().unwrap().clone();
    Task {
        id: "t".into(),
        plugin: "modbus".into(),
        device: object(device).into(),
        config: object(config).into(),
        labels: Default::default(),
        interval: Duration::from_secs(600),
        timeout: Duration::from_secs(20),
        priority: 0,
        retries: 0,
    }
}

/// How a simulated device misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Fine,
    /// Registers from 200 to 209 do not exist.
    Hole,
    /// Says twice that it is busy.
    Busy,
    /// Sends a late answer before the right one.
    Late,
    /// The first connection answers nonsense.
    Nonsense,
}

/// Function, address and count of a request.
type Asked = (u8, u16, u16);

/// Register n holds n, coil n is set where n is divisible by three.
fn device(framing: Framing, mood: Mood) -> (u16, std::thread::JoinHandle<Vec<Asked>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = std::thread::spawn(move || {
        let (mut asked, mut busy, connections) = (Vec::new(), 0, if mood == Mood::Nonsense { 2 } else { 1 });
        for connection in 0..connections {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = vec![0; if framing == Framing::Tcp { 12 } else { 8 }];
            while stream.read_exact(&mut head).is_ok() {
                let at = if framing == Framing::Tcp { 6 } else { 0 };
                let (unit, function) = (head[at], head[at + 1]);
                let number = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
                let (address, count) = (number(at + 2), number(at + 4));
                asked.push((function, address, count));
                let hole = mood == Mood::Hole && address < 210 && address + count > 200;
                let pdu = if hole {
                    vec![function | 0x80, 2]
                } else if mood == Mood::Busy && busy < 2 {
                    busy += 1;
                    vec![function | 0x80, 6]
                } else if function <= 2 {
                    let mut bits = vec![0u8; usize::from(count).div_ceil(8)];
                    (0..count)
                        .filter(|n| (address + n).is_multiple_of(3))
                        .for_each(|n| bits[usize::from(n) / 8] |= 1 << (n % 8));
                    [vec![function, bits.len() as u8], bits].concat()
                } else {
                    let values = (address..address + count).flat_map(u16::to_be_bytes);
                    [function, (count * 2) as u8].into_iter().chain(values).collect()
                };
                let mut frame = vec![unit];
                frame.extend(&pdu);
                if framing == Framing::Tcp {
                    let mut tcp = head[..2].to_vec();
                    tcp.extend([0, 0]);
                    tcp.extend((frame.len() as u16).to_be_bytes());
                    frame.splice(0..0, tcp);
                } else {
                    let sum = crc(&frame);
                    frame.extend(sum.to_le_bytes());
                }
                if mood == Mood::Late {
                    let mut late = frame.clone();
                    late[0] ^= 0x55;
                    stream.write_all(&late).unwrap();
                }
                if mood == Mood::Nonsense && connection == 0 {
                    stream.write_all(&[0xff; 64]).unwrap();
                    break;
                }
                // In two parts, with the connection's own pauses between them.
                let (first, second) = frame.split_at(4);
                stream.write_all(first).unwrap();
                stream.write_all(second).unwrap();
            }
        }
        asked
    });
    (port, serve)
}

fn run(port: u16, framing: &str, config: serde_json::Value) -> (Outcome, Vec<Sample>) {
    let task = task(json!({"host": "127.0.0.1", "port": port, "unit": 7, "framing": framing}), config);
    let (report, samples) = once(Default::default(), vec![task], Arc::new(SeriesTable::new(1000))).unwrap().remove(0);
    (report.outcome, samples)
}

fn value(samples: &[Sample], name: &str) -> Option<f64> {
    samples.iter().find(|sample| sample.series.name() == name).map(|sample| sample.value)
}

#[test]
fn neighbours_are_read_together_and_values_come_out_by_both_framings() {
    let config = json!({"max_gap": 10, "registers": [
        {"name": "a", "address": 10, "scale": 0.1, "labels": {"phase": 1}},
        {"name": "b", "address": 15, "type": "uint32"},
        {"name": "far", "address": 200, "type": "int16", "offset": -1},
        {"name": "bit", "address": 11, "type": "bit", "bit": 1},
        {"name": "input", "table": "input", "address": 3},
        {"name": "coil3", "table": "coil", "address": 3},
        {"name": "coil4", "table": "coil", "address": 4}]});
    for (framing, name) in [(Framing::Tcp, "tcp"), (Framing::Rtu, "rtu")] {
        let (port, serve) = device(framing, Mood::Fine);
        let (outcome, samples) = run(port, name, config.clone());
        assert_eq!(outcome, Outcome::Success, "{name}");
        let mut asked = serve.join().unwrap();
        asked.sort();
        assert_eq!(asked, [(1, 3, 2), (3, 10, 7), (3, 200, 1), (4, 3, 1)]);
        let found =
            ["up", "a", "b", "far", "bit", "input", "coil3", "coil4"].map(|name| value(&samples, name).unwrap());
        assert_eq!(found, [1.0, 1.0, f64::from(15 << 16 | 16), 199.0, 1.0, 3.0, 1.0, 0.0]);
        let a = samples.iter().find(|sample| sample.series.name() == "a").unwrap();
        assert_eq!(a.series.to_string(), format!("a{{instance=\"127.0.0.1:{port}/7\",phase=\"1\"}}"));
    }
}

#[test]
fn a_block_with_a_hole_that_the_device_lacks_is_read_in_parts() {
    let (port, serve) = device(Framing::Tcp, Mood::Hole);
    let registers = [195, 205, 212].map(|address| json!({"name": format!("r{address}"), "address": address}));
    let (outcome, samples) = run(port, "tcp", json!({"registers": registers, "max_gap": 20}));
    assert_eq!(outcome, Outcome::Failed("Holding 205: illegal data address (code 2)".into()));
    assert_eq!(
        (value(&samples, "r195"), value(&samples, "r205"), value(&samples, "r212")),
        (Some(195.0), None, Some(212.0))
    );
    assert_eq!(serve.join().unwrap(), [(3, 195, 18), (3, 195, 1), (3, 205, 1), (3, 212, 1)]);
}

#[test]
fn a_busy_device_a_late_answer_and_a_broken_connection_are_lived_through() {
    for mood in [Mood::Busy, Mood::Late, Mood::Nonsense] {
        let (port, serve) = device(Framing::Tcp, mood);
        let (outcome, samples) = run(port, "tcp", json!({"registers": [{"name": "a", "address": 4}]}));
        assert_eq!((outcome, value(&samples, "a")), (Outcome::Success, Some(4.0)));
        serve.join().unwrap();
    }
}

#[test]
fn a_device_that_is_not_there_is_down() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (outcome, samples) = run(port, "tcp", json!({"registers": [{"name": "a", "address": 4}]}));
    assert!(matches!(outcome, Outcome::Failed(error) if error.starts_with("cannot connect: ")));
    assert_eq!(value(&samples, "up"), Some(0.0));
}

#[test]
fn requests_keep_within_what_the_protocol_allows() {
    let plan = |points: serde_json::Value| {
        let task = task(json!({"host": "h"}), json!({"registers": points, "max_gap": 0}));
        let (device, config) = checked(&manifest("modbus"), &task).unwrap();
        ModbusPlan::new(&device, &config).unwrap()
    };
    let many: Vec<_> = (0..300).map(|n| json!({"name": "a", "address": n})).collect();
    let blocks = plan(json!(many)).blocks(0..300, 0);
    assert_eq!(blocks.iter().map(|block| block.ask.count).collect::<Vec<_>>(), [125, 125, 50]);
    // A value is never cut in two.
    let wide: Vec<_> = (0..40).map(|n| json!({"name": "a", "address": n * 4, "type": "float64"})).collect();
    let blocks = plan(json!(wide)).blocks(0..40, 0);
    assert_eq!(blocks.iter().map(|block| block.ask.count).collect::<Vec<_>>(), [124, 36]);
    let coils: Vec<_> = (0..2000).map(|n| json!({"name": "a", "table": "coil", "address": n * 2})).collect();
    let blocks = plan(json!(coils)).blocks(0..2000, 1);
    assert!(blocks.iter().all(|block| block.ask.count <= 2000 && block.ask.table == Table::Coil), "{blocks:?}");
}

#[test]
fn every_order_of_octets_is_read() {
    let bits = 0x4148_f5c3u32; // 12.56
    let [a, b, c, d] = bits.to_be_bytes();
    for (order, octets) in [
        (Order::Abcd, [a, b, c, d]),
        (Order::Dcba, [d, c, b, a]),
        (Order::Badc, [b, a, d, c]),
        (Order::Cdab, [c, d, a, b]),
    ] {
        assert_eq!(Form::Float(4, order).value(&octets), Some(f64::from(f32::from_bits(bits))), "{order:?}");
        assert_eq!(Form::Uint(4, order).value(&octets), Some(f64::from(bits)));
    }
    assert_eq!(Form::Int(2, Order::Abcd).value(&[0xff, 0xfe]), Some(-2.0));
    assert_eq!(Form::Int(8, Order::Dcba).value(&[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), Some(-2.0));
    assert_eq!(Form::Int(4, Order::Abcd).value(&[0, 0, 0]), None);
}
