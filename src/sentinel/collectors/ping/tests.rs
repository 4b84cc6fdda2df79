use super::*;
use crate::sentinel::collect::once;
use crate::sentinel::model::SeriesTable;
use crate::sentinel::task::Outcome;

fn task(host: &str) -> Task {
    let object = |value: serde_json::Value| value.as_object().unwrap().clone();
    Task {
        id: host.into(),
        plugin: "ping".into(),
        device: object(serde_json::json!({"host": host})).into(),
        config: object(serde_json::json!({"count": 3, "spacing_ms": 20, "wait_ms": 5000})).into(),
        labels: Default::default(),
        interval: Duration::from_secs(600),
        timeout: Duration::from_secs(30),
        priority: 0,
        retries: 0,
    }
}

#[test]
fn targets_share_a_socket_and_each_has_its_own_answers() {
    // Two of them on the same address; what is not there cannot be asked for on a loopback, so a name stands for it.
    let hosts = ["127.0.0.1", "127.0.0.2", "::1", "no-such-host.invalid"];
    let table = Arc::new(SeriesTable::new(1000));
    let ends = once(Default::default(), hosts.iter().map(|host| task(host)).collect(), table).unwrap();
    assert_eq!(ends.len(), hosts.len());
    for (report, samples) in ends {
        let value = |name: &str| samples.iter().find(|sample| sample.series.name() == name).map(|sample| sample.value);
        if let Outcome::Failed(error) = &report.outcome {
            assert_eq!(value("up"), Some(0.0));
            // A host without IPv6 or the right to open raw sockets says so.
            let expected =
                error.contains("looked up") || error.contains("has no address") || error.contains("raw socket");
            assert!(expected && (report.task.contains("invalid") || error.contains("raw socket")), "{error}");
            continue;
        }
        if value("up") == Some(0.0) && report.task == "::1" {
            continue;
        }
        assert_eq!((value("up"), value("ping_received"), value("ping_loss_ratio")), (Some(1.0), Some(3.0), Some(0.0)));
        let [min, avg, max] = ["min", "avg", "max"].map(|what| value(&format!("ping_rtt_{what}_seconds")).unwrap());
        assert!(0.0 < min && min <= avg && avg <= max && max < 5.0, "{min} {avg} {max}");
    }
}
