//! TLS and client certificates, through a real nginx with an authority of the test's own.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use warren::sentinel::core_sim;
use warren::sentinel::secret::Secret;

use crate::peers::Peer;
use crate::process::{NODE, QUICK, Scratch, Sentinel, until};
use crate::receiver::Receiver;

fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority `ca.pem`, one that nobody knows, and certificates of it for a server and a client.
fn certificates(directory: &Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    for authority in ["ca", "other"] {
        openssl(
            directory,
            &format!("req -x509 {key} -keyout {authority}.key -out {authority}.pem -subj /CN={authority}"),
        );
    }
    for (name, subject) in [("server", "subjectAltName=DNS:localhost"), ("client", "extendedKeyUsage=clientAuth")] {
        std::fs::write(directory.join("extensions"), subject).unwrap();
        openssl(directory, &format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        let sign = "x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions";
        openssl(directory, &format!("{sign} -in {name}.csr -out {name}.pem"));
    }
}

/// A front with a certificate for `localhost` that wants one of its clients and passes on to `to`.
fn front(certificates: &Path, to: &str) -> Option<Peer> {
    Peer::nginx(|_, address| {
        let directory = certificates.display();
        format!(
            "server {{ listen {address} ssl; ssl_certificate {directory}/server.pem; \
             ssl_certificate_key {directory}/server.key; ssl_client_certificate {directory}/ca.pem; \
             ssl_verify_client on; client_max_body_size 16m; location / {{ proxy_pass {to}; }} }}"
        )
    })
}

fn target(url: &str, more: &str) -> String {
    format!("[[target]]\nname = \"real\"\nkind = \"prometheus\"\nurl = \"{url}\"\n{more}")
}

#[test]
fn samples_go_through_a_front_that_wants_certificates_and_to_none_that_is_not_believed() {
    let scratch = Scratch::new();
    let directory = scratch.0.clone();
    certificates(&directory);
    let receiver = Receiver::new();
    let Some(nginx) = front(&directory, receiver.url().trim_end_matches("/write")) else { return };
    let port = nginx.address.rsplit_once(':').unwrap().1;
    let (named, numbered) = (format!("https://localhost:{port}/write"), format!("https://127.0.0.1:{port}/write"));
    let file = |name: &str| directory.join(name).display().to_string();
    let identity = format!("cert = \"{}\"\nkey = \"{}\"\n", file("client.pem"), file("client.key"));
    let ca = |name: &str| format!("ca = \"{}\"\n", file(name));
    let mut sentinel = Sentinel::new("");
    let configure = |sentinel: &Sentinel, url: &str, more: &str| {
        sentinel.configure(&format!("{QUICK}{}{NODE}", target(url, more)));
    };

    // An authority that is not ours, then a name that is not the certificate's: not one sample is shown to them, all are kept.
    configure(&sentinel, &named, &format!("{}{identity}", ca("other.pem")));
    sentinel.start();
    for (url, authority) in [(&named, "other.pem"), (&numbered, "ca.pem")] {
        configure(&sentinel, url, &format!("{}{identity}", ca(authority)));
        assert!(sentinel.command("reload").status.success(), "{}", sentinel.log());
        until("a refusal", || {
            let error = sentinel.target("real")["error"].as_str()?.to_lowercase();
            (error.contains("certificate") && error.contains(url.as_str())).then_some(())
        });
    }
    assert_eq!(receiver.got.lock().unwrap().unique(), 0);

    // Without a certificate of ours nginx says 400: that is about us, and no batch is thrown away for it.
    configure(&sentinel, &named, &ca("ca.pem"));
    assert!(sentinel.command("reload").status.success(), "{}", sentinel.log());
    until("a pause", || (sentinel.target("real")["paused"] == true).then_some(()));
    assert!(sentinel.target("real")["error"].as_str().unwrap().contains("status 400"));
    assert_eq!(sentinel.target("real")["dropped"], 0);

    // The right ones: everything from the first sample on arrives.
    configure(&sentinel, &named, &format!("{}{identity}", ca("ca.pem")));
    assert!(sentinel.command("reload").status.success(), "{}", sentinel.log());
    until("samples", || (sentinel.target("real")["sent"].as_u64() > Some(1000)).then_some(()));
    let accepted = sentinel.accepted();
    until("the rest", || (receiver.got.lock().unwrap().unique() >= accepted).then_some(()));
    assert_eq!(sentinel.target("real")["dropped"], 0);

    // Without a check, because it was asked for, also a name that does not fit is spoken to.
    let before = receiver.got.lock().unwrap().unique();
    configure(&sentinel, &numbered, &format!("verify = false\n{identity}"));
    assert!(sentinel.command("reload").status.success(), "{}", sentinel.log());
    until("more samples", || (receiver.got.lock().unwrap().unique() > before + 1000).then_some(()));

    // A key that is none is a mistake in the configuration, and changes nothing.
    configure(&sentinel, &named, &format!("cert = \"{}\"\nkey = \"{}\"\n", file("client.pem"), file("ca.pem")));
    assert!(!sentinel.command("reload").status.success());
    assert_eq!(sentinel.stop(), 0);
}

#[test]
fn a_core_behind_a_front_that_wants_certificates_gets_everything() {
    let scratch = Scratch::new();
    let directory = scratch.0.clone();
    certificates(&directory);
    let out = scratch.path("samples");
    let core = core_sim::start(([127, 0, 0, 1], 0).into(), Secret::new("swordfish".into()), Some(&out)).unwrap();
    let Some(nginx) = front(&directory, &format!("http://{}", core.address())) else { return };
    let port = nginx.address.rsplit_once(':').unwrap().1;
    let file = |name: &str| directory.join(name).display().to_string();
    let mut sentinel = Sentinel::new(&format!(
        "{QUICK}sender.mode = \"core\"\nheartbeat.interval_s = 1\n[core]\nurl = \"https://localhost:{port}\"\n\
         token = \"swordfish\"\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n{NODE}",
        file("ca.pem"),
        file("client.pem"),
        file("client.key")
    ));
    sentinel.start();
    until("heartbeats and samples", || {
        let status = sentinel.status()?;
        let sent = status["targets"][0]["sent"].as_u64();
        (status["core"]["heartbeats"].as_u64() > Some(1) && sent > Some(1000)).then_some(())
    });
    assert_eq!(sentinel.stop(), 0);
    let text = std::fs::read_to_string(out).unwrap();
    assert!(text.lines().count() > 1000);
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
}
