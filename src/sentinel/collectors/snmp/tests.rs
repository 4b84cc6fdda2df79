use std::sync::atomic::Ordering;
use std::time::Duration;

use super::agent::{Agent, Manners};
use super::ber::Value;
use super::crypto::Privacy;
use super::oid::Oid;
use super::*;
use crate::sentinel::collect::once;
use crate::sentinel::model::Sample;
use crate::sentinel::task::{Outcome, Report};
use serde_json::{Map, json};

fn map(value: serde_json::Value) -> Map<String, serde_json::Value> {
    value.as_object().unwrap().clone()
}

pub fn task(id: &str, device: serde_json::Value, config: serde_json::Value) -> Task {
    Task {
        id: id.into(),
        plugin: "snmp".into(),
        device: map(device).into(),
        config: map(config).into(),
        labels: Default::default(),
        interval: Duration::from_secs(3600),
        timeout: Duration::from_secs(30),
        priority: 0,
        retries: 0,
    }
}

fn run(task: Task) -> (Report, Vec<Sample>) {
    once(Default::default(), vec![task], Arc::new(SeriesTable::new(1_000_000))).unwrap().remove(0)
}

fn shown(samples: &[Sample]) -> Vec<String> {
    let mut shown: Vec<String> = samples.iter().map(|s| format!("{} {}", **s.series, s.value)).collect();
    shown.sort();
    shown
}

/// Three interfaces; the second has no description, the third no counter.
fn interfaces() -> Manners {
    let text = |text: &str| Value::Octets(text.as_bytes().to_vec());
    Manners::of(&[
        ("1.3.6.1.2.1.1.1.0", text("A switch")),
        ("1.3.6.1.2.1.1.3.0", Value::Ticks(12_345)),
        ("1.3.6.1.2.1.1.5.0", text("sw1")),
        ("1.3.6.1.2.1.2.2.1.2.1", text("lo")),
        ("1.3.6.1.2.1.2.2.1.2.3", text("eth1")),
        ("1.3.6.1.2.1.2.2.1.8.1", Value::Integer(1)),
        ("1.3.6.1.2.1.2.2.1.8.2", Value::Integer(2)),
        ("1.3.6.1.2.1.2.2.1.8.3", Value::Integer(9)),
        ("1.3.6.1.2.1.31.1.1.1.6.1", Value::Counter(1)),
        ("1.3.6.1.2.1.31.1.1.1.6.2", Value::Counter(1 << 40)),
    ])
}

fn wanted() -> serde_json::Value {
    json!({
        "fields": [
            {"oid": "1.3.6.1.2.1.1.3.0", "name": "uptime_seconds", "convert": "ticks"},
            {"oid": "1.3.6.1.2.1.1.5.0", "name": "sysname", "type": "label"},
            {"oid": "1.3.6.1.2.1.1.1.0", "name": "description", "type": "info"},
            {"oid": "1.3.6.1.2.1.1.9.0", "name": "absent"}],
        "tables": [{"index": "ifindex", "columns": [
            {"oid": "1.3.6.1.2.1.2.2.1.2", "name": "ifname", "type": "label"},
            {"oid": "1.3.6.1.2.1.2.2.1.8", "name": "oper", "type": "state", "states": {"1": "up", "2": "down"}},
            {"oid": ".1.3.6.1.2.1.31.1.1.1.6", "name": "in_bits_total", "type": "counter", "scale": 8}]}],
    })
}

fn expected(port: u16) -> Vec<String> {
    let device = format!("instance=\"127.0.0.1:{port}\"");
    let mut expected = vec![
        format!("description{{{device},sysname=\"sw1\",value=\"A switch\"}} 1"),
        format!("in_bits_total{{ifindex=\"1\",ifname=\"lo\",{device},sysname=\"sw1\"}} 8"),
        format!("in_bits_total{{ifindex=\"2\",{device},sysname=\"sw1\"}} {}", 8u64 << 40),
        format!("oper{{ifindex=\"1\",ifname=\"lo\",{device},state=\"up\",sysname=\"sw1\"}} 1"),
        format!("oper{{ifindex=\"2\",{device},state=\"down\",sysname=\"sw1\"}} 1"),
        format!("oper{{ifindex=\"3\",ifname=\"eth1\",{device},state=\"9\",sysname=\"sw1\"}} 1"),
        format!("up{{{device}}} 1"),
        format!("uptime_seconds{{{device},sysname=\"sw1\"}} 123.45"),
    ];
    expected.sort();
    expected
}

#[test]
fn values_and_tables_with_holes_come_out_by_v1_and_v2c() {
    for version in ["1", "2c"] {
        for most in [1000, 4] {
            let agent = Agent::start(Manners { most, ..interfaces() });
            let port = agent.address.port();
            let device = json!({"host": "127.0.0.1", "port": port, "version": version});
            let (report, samples) = run(task("t", device, wanted()));
            assert_eq!(report.outcome, Outcome::Success, "v{version}, at most {most} variables");
            assert_eq!(shown(&samples), expected(port), "v{version}, at most {most} variables");
        }
    }
}

#[test]
fn a_lost_request_is_sent_again_and_a_silent_device_is_said_to_be() {
    let agent = Agent::start(Manners { lost: 2, ..interfaces() });
    let config =
        json!({"fields": [{"oid": "1.3.6.1.2.1.1.3.0", "name": "a"}], "request_timeout_ms": 100, "retries": 2});
    let device = |agent: &Agent| json!({"host": "127.0.0.1", "port": agent.address.port()});
    let (report, _) = run(task("t", device(&agent), config.clone()));
    assert_eq!(report.outcome, Outcome::Success);
    assert_eq!(agent.requests.load(Ordering::Relaxed), 3);
    let agent = Agent::start(Manners { silent: |_| true, ..interfaces() });
    let (report, samples) = run(task("t", device(&agent), config));
    let error = format!("no answer from 127.0.0.1:{} to 3 requests", agent.address.port());
    assert_eq!(report.outcome, Outcome::Failed(error));
    assert_eq!(shown(&samples), [format!("up{{instance=\"127.0.0.1:{}\"}} 0", agent.address.port())]);
}

#[test]
fn an_agent_whose_names_do_not_increase_is_not_walked_for_ever() {
    let mut manners = interfaces();
    manners.variables.retain(|name, _| name.0.starts_with(&[1, 3, 6, 1, 2, 1, 2, 2, 1, 8]));
    for version in ["1", "2c"] {
        let agent = Agent::start(Manners { endless: true, variables: manners.variables.clone(), ..interfaces() });
        let device = json!({"host": "127.0.0.1", "port": agent.address.port(), "version": version});
        let config = json!({"tables": [{"columns": [{"oid": "1.3.6.1.2.1.2.2.1.8", "name": "oper"}]}]});
        let (report, samples) = run(task("t", device, config));
        let Outcome::Failed(error) = report.outcome else { panic!("v{version}") };
        assert!(error.starts_with("the agent's names do not increase: 1.3.6.1.2.1.2.2.1.8.1"), "{error}");
        assert!(samples.iter().any(|sample| sample.series.name() == "oper"), "what came before is kept");
    }
}

#[test]
fn too_many_rows_are_an_error() {
    let rows: Vec<(String, Value)> = (1..=50).map(|n| (format!("1.3.1.1.{n}"), Value::Gauge(n))).collect();
    let rows: Vec<(&str, Value)> = rows.iter().map(|(oid, value)| (oid.as_str(), value.clone())).collect();
    let agent = Agent::start(Manners::of(&rows));
    let device = json!({"host": "127.0.0.1", "port": agent.address.port()});
    let config = |most| json!({"tables": [{"max_rows": most, "columns": [{"oid": "1.3.1.1", "name": "a"}]}]});
    let (report, samples) = run(task("t", device.clone(), config(50)));
    assert_eq!((report.outcome, samples.len()), (Outcome::Success, 51));
    let (report, _) = run(task("t", device, config(49)));
    assert_eq!(report.outcome, Outcome::Failed("the table 1.3.1.1 has more than 49 rows".into()));
}

#[test]
fn mistakes_in_a_task_are_named_and_passwords_are_not_shown() {
    let mut snmp = Snmp::new();
    let field = json!({"fields": [{"oid": "1.3", "name": "a"}]});
    let mut said = |device: serde_json::Value, config: &serde_json::Value| {
        snmp.prepare(&task("t", device, config.clone())).map(|_| ()).unwrap_err().to_string()
    };
    let v3 = |more: serde_json::Value| {
        let mut device = map(json!({"host": "h", "version": "3", "user": "u"}));
        device.extend(map(more));
        serde_json::Value::Object(device)
    };
    assert_eq!(said(json!({}), &field), "device.host: is required");
    assert_eq!(said(json!({"host": "h", "version": "2"}), &field), "device.version: \"2\" is none of 1, 2c, 3");
    assert_eq!(said(json!({"host": "h"}), &json!({})), "config: neither fields nor tables are asked for");
    assert_eq!(said(json!({"host": "h", "version": "3"}), &field), "device.user: v3 needs a user of 1 to 32 octets");
    let short = said(v3(json!({"auth_protocol": "md5", "auth_password": "hunter2"})), &field);
    assert_eq!(short, "device.auth_password: must have at least 8 octets");
    assert_eq!(said(v3(json!({"privacy_protocol": "aes"})), &field), "device.privacy_protocol: needs an auth_protocol");
    let ok = json!({"host": "h"});
    let fields = |field: serde_json::Value| json!({"fields": [{"oid": "1.3", "name": "a"}, field]});
    assert_eq!(
        said(ok.clone(), &fields(json!({"oid": "1.99.1", "name": "a"}))),
        "config.fields[1].oid: is no object identifier"
    );
    assert_eq!(
        said(ok.clone(), &fields(json!({"oid": "1.3", "name": "a", "convert": "mac"}))),
        "config.fields[1].convert: gives text, expected number, hex or ticks"
    );
    assert_eq!(
        said(ok.clone(), &fields(json!({"oid": "1.3", "name": "a", "type": "label", "convert": "hex"}))),
        "config.fields[1].convert: gives a number, expected text, mac, address or hexdigits"
    );
    assert_eq!(
        said(ok.clone(), &fields(json!({"oid": "1.3", "name": "a", "type": "state"}))),
        "config.fields[1].states: a state needs names by number"
    );
    assert_eq!(said(ok, &json!({"tables": [{}]})), "config.tables[0].columns: is required");
}

#[test]
fn a_message_of_v3_is_read_by_who_has_the_keys_and_by_nobody_else() {
    let now = Instant::now();
    let user = |auth: Auth, privacy: Privacy, password: &str| v3::User {
        name: "user".into(),
        auth: Some((auth, Arc::new(auth.password_key(password.as_bytes()).into()))),
        privacy: Some((privacy, Arc::new(auth.password_key(b"privacy password").into()))),
        context: "context".into(),
    };
    let pdu = Pdu { id: 77, ..Pdu::request(PduKind::Get, [Oid::parse("1.3.6.1").unwrap()]) };
    for (auth, privacy) in [(Auth::Md5, Privacy::Des), (Auth::Sha1, Privacy::Aes128), (Auth::Sha512, Privacy::Aes256C)]
    {
        let sender = user(auth, privacy, "maplesyrup");
        let engine = Engine::new(b"\x80engine", 3, 1000, &sender, now);
        let datagram = v3::request(5, &sender, &engine, 42, &pdu, now);
        let open = |datagram: &[u8], user: &v3::User| {
            let Ok(Message::V3(envelope)) = Message::decode(datagram) else { return Err("unreadable".to_string()) };
            envelope.open(user, Some(&Engine::new(b"\x80engine", 0, 0, user, now)))
        };
        assert_eq!(open(&datagram, &sender), Ok(pdu.clone()));
        assert_eq!(open(&datagram, &user(auth, privacy, "another one")), Err("the answer's signature is wrong".into()));
        for at in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[at] ^= 0x04;
            // The message's number is in front of what names the engine, but signed as well; what claims not to be
            // signed is refused as less protected.
            assert!(open(&changed, &sender).is_err(), "octet {at} of {auth:?}");
        }
    }
}

#[test]
fn silent_devices_delay_no_other() {
    use crate::sentinel::collect::{Collector, Settings};
    use crate::sentinel::model::Batch;
    use crate::sentinel::task::{Refusal, Reports, Sink, TaskSet, TaskSource};
    use std::sync::Mutex;

    struct Fixed(Arc<TaskSet>);
    impl TaskSource for Fixed {
        fn current(&self) -> Arc<TaskSet> {
            Arc::clone(&self.0)
        }
    }
    #[derive(Default)]
    struct Kept(Mutex<Vec<Report>>);
    impl Sink for Kept {
        fn offer(&self, _: &Batch) -> Result<(), Refusal> {
            Ok(())
        }
    }
    impl Reports for Kept {
        fn report(&self, report: Report) {
            self.0.lock().unwrap().push(report);
        }
    }
    // 2,000 devices on 20 sockets; a device is its community. Of each hundred, five never answer.
    let manners = || Manners {
        silent: |community| {
            let number: u32 = std::str::from_utf8(community).unwrap().parse().unwrap();
            number.is_multiple_of(20)
        },
        ..interfaces()
    };
    let agents: Vec<Agent> = (0..20).map(|_| Agent::start(manners())).collect();
    let config = json!({"fields": [{"oid": "1.3.6.1.2.1.1.3.0", "name": "uptime"}], "request_timeout_ms": 1000});
    let tasks = (0..2000).map(|n: usize| Task {
        interval: Duration::from_secs(4),
        timeout: Duration::from_secs(4),
        ..task(
            &format!("device-{n}"),
            json!({"host": "127.0.0.1", "port": agents[n % 20].address.port(), "community": (n / 20).to_string()}),
            config.clone(),
        )
    });
    let set = Arc::new(TaskSet { version: 1, tasks: tasks.collect() });
    let kept = Arc::new(Kept::default());
    let (sink, reports, table) = (Arc::clone(&kept), Arc::clone(&kept), Arc::new(SeriesTable::new(100_000)));
    let collector = Collector::start(Settings::default(), Arc::new(Fixed(set)), sink, reports, table).unwrap();
    let silent = |report: &Report| report.task.rsplit('-').next().unwrap().parse::<u32>().unwrap() / 20 % 20 == 0;
    // Until every device that answers was read three times; the guard is for a machine that hangs.
    let guard = Instant::now() + Duration::from_secs(120);
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let reports = kept.0.lock().unwrap();
        let good = reports.iter().filter(|report| report.outcome == Outcome::Success).count();
        assert!(Instant::now() < guard, "{good} good runs");
        if good >= 3 * 1900 && reports.iter().filter(|report| silent(report)).count() >= 100 {
            break;
        }
    }
    let view = collector.tasks();
    collector.stop(Duration::ZERO);
    let reports = kept.0.lock().unwrap();
    for report in reports.iter() {
        match (&report.outcome, silent(report)) {
            (Outcome::Success, false) => {}
            (Outcome::Failed(error), true) => {
                assert!(error.contains("no answer") || error.contains("stopping"), "{error}")
            }
            (Outcome::Failed(error), false) if error.contains("stopping") => {}
            (Outcome::Skipped(_), true) => {}
            (outcome, silent) => panic!("{}: {outcome:?}, silent: {silent}", report.task),
        }
    }
    assert_eq!(view.len(), 2000);
    // No device that answers has lost a slot to one that does not.
    for view in view.iter().filter(|view| view.counts.success > 0) {
        assert_eq!((view.counts.failed, view.counts.skipped.len()), (0, 0), "{}", view.id);
    }
}
