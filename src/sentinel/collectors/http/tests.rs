use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::*;
use crate::sentinel::collect::{Collector, once};
use crate::sentinel::model::{Batch, Sample, SeriesTable};
use crate::sentinel::task::{Outcome, Refusal, Report, Reports, Sink, TaskSet, TaskSource};
use serde_json::json;

/// A server that answers each connection with the next of these octets, in small parts.
fn server(answers: Vec<String>) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut octet = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read_exact(&mut octet).is_ok() {
                request.push(octet[0]);
            }
            // What was sent and not read would break the connection at its end.
            let head = String::from_utf8_lossy(&request).into_owned();
            let length = head.split("Content-Length: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse().ok());
            stream.read_exact(&mut vec![0; length.unwrap_or(0)]).unwrap();
            // Who has heard enough hangs up.
            let _ = answer.as_bytes().chunks(7).try_for_each(|part| stream.write_all(part));
            requests.push(String::from_utf8(request).unwrap());
        }
        requests
    });
    (address, serve)
}

fn task(url: &str, config: serde_json::Value) -> Task {
    let object = |value: serde_json::Value| value.as_object().unwrap().clone();
    Task {
        id: "t".into(),
        plugin: "http".into(),
        device: object(json!({"url": url})).into(),
        config: object(config).into(),
        labels: Default::default(),
        interval: Duration::from_secs(600),
        timeout: Duration::from_secs(20),
        priority: 0,
        retries: 0,
    }
}

fn run(url: &str, config: serde_json::Value) -> (Report, Vec<Sample>) {
    once(Default::default(), vec![task(url, config)], Arc::new(SeriesTable::new(1000))).unwrap().remove(0)
}

fn value(samples: &[Sample], name: &str) -> Option<f64> {
    samples.iter().find(|sample| sample.series.name() == name).map(|sample| sample.value)
}

fn with_length(status: &str, kind: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn a_probe_says_how_a_server_answers() {
    for (answer, config, status, error) in [
        (with_length("200 OK", "text/plain", "hello"), json!({"match": "^hel+o$"}), Some(200.0), None),
        (
            with_length("200 OK", "text/plain", "hello"),
            json!({"no_match": "ell"}),
            Some(200.0),
            Some("the body is not as it must be"),
        ),
        (with_length("503 Busy", "text/plain", ""), json!({}), Some(503.0), Some("the server answers with status 503")),
        (with_length("404 No", "text/plain", "x"), json!({"status": ["2xx", "404"]}), Some(404.0), None),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".into(),
            json!({"match": "hello"}),
            Some(200.0),
            None,
        ),
        ("HTTP/1.0 200 OK\r\n\r\nhello".into(), json!({"match": "hello"}), Some(200.0), None),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello".into(),
            json!({}),
            None,
            Some("the server closed the connection in the middle of its answer"),
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\nhello".into(),
            json!({"body_limit_kib": 1}),
            None,
            Some("the answer is longer than 1024 octets"),
        ),
        (String::new(), json!({}), None, Some("the server closed the connection before it answered")),
    ] {
        let (address, serve) = server(vec![answer.clone()]);
        let (report, samples) = run(&format!("http://{address}/a?b=c"), config);
        let expected = error.map_or(Outcome::Success, |error| Outcome::Failed(error.into()));
        assert_eq!(report.outcome, expected, "{answer}");
        assert_eq!(value(&samples, "http_status_code"), status, "{answer}");
        assert_eq!(value(&samples, "up"), Some(f64::from(u8::from(error.is_none()))));
        let request = serve.join().unwrap().remove(0);
        assert!(request.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nConnection: close\r\n"), "{request}");
    }
}

#[test]
fn a_scrape_gives_samples_and_its_own_measures() {
    let text = "# TYPE a counter\na{b=\"c\"} 5\nd 6\n";
    let (address, serve) = server(vec![with_length("200 OK", "text/plain", text)]);
    let config = json!({"mode": "scrape", "authorization": "Bearer s3cret", "headers": {"X-Own": "1"}});
    let (report, samples) = run(&format!("http://{address}/metrics"), config);
    assert_eq!(report.outcome, Outcome::Success);
    let names = ["a", "d", "up", "scrape_samples_scraped", "scrape_series_added", "scrape_response_size_bytes"];
    assert_eq!(names.map(|name| value(&samples, name).unwrap()), [5.0, 6.0, 1.0, 2.0, 2.0, text.len() as f64]);
    assert_eq!(samples[0].series.to_string(), format!("a{{b=\"c\",instance=\"{address}\",job=\"t\"}}"));
    let request = serve.join().unwrap().remove(0);
    assert!(
        request.contains("\r\nAuthorization: Bearer s3cret\r\n") && request.contains("\r\nX-Own: 1\r\n"),
        "{request}"
    );
}

#[test]
fn a_target_that_is_not_as_it_must_be_is_down() {
    for (answer, error) in [
        (with_length("500 No", "text/plain", "a 1\n"), "the target answers with status 500"),
        (
            with_length("200 OK", "text/plain", "a 1\nnonsense\n"),
            "the body's meaningful line 2 is a series that has no name or no end",
        ),
        (
            with_length("200 OK", "application/openmetrics-text; version=1.0.0", "a 1\n"),
            "the body is cut: OpenMetrics ends with # EOF",
        ),
        (with_length("200 OK", "text/plain", "a 1\nb 2\nc 3\n"), "more than 2 samples"),
        (
            with_length("200 OK", "text/plain", "a{b=\"c\",d=\"e\"} 1\n"),
            "\"a{b=\\\"c\\\",d=\\\"e\\\"}\" has so many labels: 4, the limit is 3",
        ),
        (
            with_length("200 OK", "text/plain", "a{bcdefghijk=\"\"} 1\n"),
            "\"a{bcdefghijk=\\\"\\\"}\" has a label's name of octets: 10, the limit is 9",
        ),
        (
            with_length("200 OK", "text/plain", "a{b=\"0123456789012345678901234567890\"} 1\n"),
            "\"a{b=\\\"0123456789012345678901234567890\\\"}\" has a label's value of octets: 31, the limit is 30",
        ),
    ] {
        let (address, serve) = server(vec![answer]);
        let (report, samples) = run(
            &format!("http://{address}/"),
            json!({"mode": "scrape", "sample_limit": 2, "label_limit": 3, "label_name_limit": 9, "label_value_limit": 30}),
        );
        assert_eq!(report.outcome, Outcome::Failed(error.into()));
        assert_eq!((value(&samples, "up"), value(&samples, "a")), (Some(0.0), None));
        serve.join().unwrap();
    }
}

#[test]
fn a_head_has_no_body_whatever_length_it_says() {
    let (address, serve) = server(vec!["HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n".into()]);
    let (report, samples) = run(&format!("http://{address}/"), json!({"method": "HEAD"}));
    assert_eq!(report.outcome, Outcome::Success);
    assert_eq!((value(&samples, "http_status_code"), value(&samples, "http_response_bytes")), (Some(200.0), Some(0.0)));
    assert!(serve.join().unwrap()[0].starts_with("HEAD / HTTP/1.1\r\n"));
}

fn sent_on(status: u16, to: &str) -> String {
    format!("HTTP/1.1 {status} -\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n")
}

#[test]
fn a_probe_goes_where_it_is_sent_and_tells_only_the_first_server_who_it_is() {
    let end = with_length("200 OK", "text/plain", "hello");
    let config = json!({"method": "POST", "body": "ask", "authorization": "Bearer s3cret", "match": "hello"});
    let (other, at_other) = server(vec![end.clone()]);
    let (first, at_first) = server(vec![sent_on(307, "b"), sent_on(303, &format!("http://{other}/c"))]);
    let (report, samples) = run(&format!("http://{first}/a"), config);
    assert_eq!(report.outcome, Outcome::Success);
    assert_eq!((value(&samples, "http_redirects"), value(&samples, "up")), (Some(2.0), Some(1.0)));
    let (first, other) = (at_first.join().unwrap(), at_other.join().unwrap());
    assert!(first[0].starts_with("POST /a ") && first[1].starts_with("POST /b "), "{first:?}");
    assert!(first.iter().all(|request| request.contains("Bearer s3cret") && request.contains("Content-Length: 3")));
    assert!(other[0].starts_with("GET /c "), "{other:?}");
    assert!(!other[0].contains("s3cret") && !other[0].contains("Content-Length"), "{other:?}");

    // A good status is an answer, and so is every one where nobody follows.
    for config in [json!({"status": ["3xx"]}), json!({"redirects": 0, "status": ["301"]})] {
        let (address, serve) = server(vec![sent_on(301, "/b")]);
        let (report, samples) = run(&format!("http://{address}/"), config);
        assert_eq!((report.outcome, value(&samples, "http_redirects")), (Outcome::Success, Some(0.0)));
        serve.join().unwrap();
    }
    for (answers, config, error) in [
        (vec![sent_on(301, "/b")], json!({"redirects": 0}), "the server answers with status 301"),
        (vec![sent_on(302, "/b"); 3], json!({"redirects": 2}), "the server sends us on more than 2 times"),
        (vec![sent_on(302, "gopher://x")], json!({}), "an address begins with http:// or https://"),
        (vec!["HTTP/1.1 302 -\r\nContent-Length: 0\r\n\r\n".into()], json!({}), "the server answers with status 302"),
    ] {
        let (address, serve) = server(answers);
        let (report, samples) = run(&format!("http://{address}/"), config);
        assert_eq!(report.outcome, Outcome::Failed(error.into()));
        assert_eq!(value(&samples, "up"), Some(0.0));
        serve.join().unwrap();
    }
}

#[test]
fn nobody_is_led_out_of_tls() {
    let asking = Asking::new(
        &manifest("http").config.check("config", &Default::default()).unwrap(),
        false,
        TlsOptions::default(),
    )
    .unwrap();
    let hop = asking.to(Url::parse("https://a/").unwrap());
    let error = hop.next(302, Some("http://a/")).unwrap().err().unwrap();
    assert_eq!(error, "the server sends us on to http://a/, which is without TLS");
}

#[test]
fn mistakes_are_named_and_secrets_are_not_shown() {
    let said = |url: &str, config: serde_json::Value| match run(url, config).0.outcome {
        Outcome::Failed(error) => error,
        other => panic!("{other:?}"),
    };
    assert!(said("ftp://a", json!({})).starts_with("device.url: \"ftp://a\" does not match"));
    assert!(said("http://a", json!({"match": "("})).starts_with("config.match: "));
    assert!(said("http://a", json!({"status": ["ok"]})).starts_with("config.status[0]: \"ok\" does not match"));
    let secret = said("http://a", json!({"authorization": "s3cret\r\nX: y"}));
    assert_eq!(secret, "config.authorization: holds what may not stand in a header");
    assert!(said("https://a", json!({"verify": false, "certificate": "/x"})).starts_with("config.certificate: "));
}

/// Runs a task again and again until its sink has seen `count` values of `up`; gives them.
fn ups(task: Task, count: usize) -> Vec<f64> {
    #[derive(Default)]
    struct Kept(Mutex<Vec<f64>>, Condvar);
    impl Sink for Kept {
        fn offer(&self, batch: &Batch) -> Result<(), Refusal> {
            self.0.lock().unwrap().extend(value(&batch.samples, "up"));
            self.1.notify_all();
            Ok(())
        }
    }
    impl Reports for Kept {
        fn report(&self, _report: Report) {}
    }
    struct One(Arc<TaskSet>);
    impl TaskSource for One {
        fn current(&self) -> Arc<TaskSet> {
            Arc::clone(&self.0)
        }
    }
    let source = Arc::new(One(Arc::new(TaskSet { version: 1, tasks: vec![task] })));
    let kept = Arc::new(Kept::default());
    let (sink, reports) = (Arc::clone(&kept), Arc::clone(&kept));
    let table = Arc::new(SeriesTable::new(1000));
    let collector = Collector::start(Default::default(), source, sink, reports, table).unwrap();
    let seen = kept.1.wait_while(kept.0.lock().unwrap(), |seen| seen.len() < count).unwrap()[..count].to_vec();
    drop(collector);
    seen
}

#[test]
fn scrapes_share_a_connection_and_one_that_the_server_gave_up_is_replaced() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    // For each connection: how many requests are answered, whether one more is heard and not answered, what is announced.
    let script = [(3, false, ""), (2, true, ""), (1, false, "Connection: close\r\n"), (2, false, ""), (1, false, "")];
    let answered: usize = script.iter().map(|(answered, ..)| answered).sum();
    let serve = std::thread::spawn(move || {
        for (answered, heard, announced) in script {
            let (mut stream, _) = listener.accept().unwrap();
            let request = |stream: &mut TcpStream| {
                let (mut request, mut octet) = (Vec::new(), [0]);
                while !request.ends_with(b"\r\n\r\n") {
                    stream.read_exact(&mut octet).unwrap();
                    request.push(octet[0]);
                }
                assert!(!String::from_utf8_lossy(&request).contains("Connection"));
            };
            for _ in 0..answered {
                request(&mut stream);
                let answer = format!("HTTP/1.1 200 OK\r\n{announced}Content-Length: 4\r\n\r\na 1\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
            if heard {
                request(&mut stream);
            }
        }
        listener
    });
    let config = json!({"mode": "scrape"});
    let task = Task { interval: Duration::from_millis(50), timeout: Duration::from_secs(20), ..task(&url, config) };
    assert_eq!(ups(task, answered), vec![1.0; answered]);
    serve.join().unwrap();
}
