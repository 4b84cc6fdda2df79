//! What was accepted arrives: over outages, kills, full disks.

use std::process::Command;
use std::time::Duration;

use crate::process::{NODE, QUICK, Sentinel, target, until};
use crate::receiver::Receiver;

fn config(receiver: &Receiver, more: &str) -> String {
    format!("{QUICK}{more}{}{NODE}", target("one", "prometheus", &receiver.url()))
}

/// Waits until everything that was accepted is acknowledged; gives how much was accepted in this life by then. A run that
/// was under way at the reload and the markers of what ended with it may be accepted later: both numbers are of one moment.
fn settle(sentinel: &mut Sentinel, receiver: &Receiver, more: &str) -> u64 {
    // Without tasks nothing is added.
    let without = format!("{QUICK}{more}{}", target("one", "prometheus", &receiver.url()));
    sentinel.configure(&without);
    until("the reload", || sentinel.command("reload").status.success().then_some(()));
    until("an empty buffer", || {
        let status = sentinel.status()?;
        (status["targets"][0]["pending"] == 0).then(|| status["buffer"]["accepted"].as_u64().unwrap())
    })
}

#[test]
fn nothing_accepted_is_lost_when_it_is_killed_while_the_receiver_is_away() {
    for fsync in ["always", "interval"] {
        let more = format!("buffer.fsync = \"{fsync}\"\n");
        let mut receiver = Receiver::new();
        let mut sentinel = Sentinel::new(&config(&receiver, &more));
        sentinel.start();
        until("samples", || (receiver.got.lock().unwrap().unique() > 500).then_some(()));
        receiver.go_away();
        let before = sentinel.accepted();
        until("an outage with samples", || (sentinel.accepted() > before + 2000).then_some(()));
        // Everything up to here was accepted; the process dies without warning.
        let accepted = sentinel.accepted();
        sentinel.kill();
        sentinel.start();
        until("more samples", || (sentinel.accepted() > 1000).then_some(()));
        receiver.come_back();
        let accepted = accepted + settle(&mut sentinel, &receiver, &more);
        let got = receiver.got.lock().unwrap();
        assert!(got.unique() >= accepted, "{} of {accepted} arrived (fsync {fsync})", got.unique());
        assert_eq!(got.contradictions, 0);
        assert_eq!(sentinel.target("one")["dropped"], 0);
    }
}

#[test]
fn over_a_clean_restart_nothing_is_lost_and_nothing_comes_twice() {
    let mut receiver = Receiver::new();
    let mut sentinel = Sentinel::new(&config(&receiver, ""));
    sentinel.start();
    until("samples", || (receiver.got.lock().unwrap().unique() > 500).then_some(()));
    receiver.go_away();
    let before = sentinel.accepted();
    until("an outage with samples", || (sentinel.accepted() > before + 1000).then_some(()));
    assert_eq!(sentinel.stop(), 0, "{}", sentinel.log());
    receiver.come_back();
    sentinel.start();
    until("more samples", || (sentinel.accepted() > 500).then_some(()));
    let accepted = settle(&mut sentinel, &receiver, "");
    let got = receiver.got.lock().unwrap();
    assert_eq!((got.repeated(), got.contradictions), (0, 0));
    // Each series has every slot of the outage, with no hole longer than a slow machine explains; what was accepted in
    // the second life is all there.
    assert!(got.unique() >= before + 1000 + accepted);
}

#[test]
fn killed_again_and_again_it_comes_back_with_everything() {
    let receiver = Receiver::new();
    let mut sentinel = Sentinel::new(&config(&receiver, "buffer.fsync = \"always\"\n"));
    let mut accepted = 0;
    for round in 0..6u64 {
        sentinel.start();
        until("samples", || (sentinel.accepted() > 100 * (round % 3 + 1)).then_some(()));
        accepted += sentinel.accepted();
        sentinel.kill();
    }
    sentinel.start();
    accepted += settle(&mut sentinel, &receiver, "buffer.fsync = \"always\"\n");
    let got = receiver.got.lock().unwrap();
    assert!(got.unique() >= accepted, "{} of {accepted}", got.unique());
    assert_eq!(got.contradictions, 0);
}

#[test]
fn a_receiver_that_stands_still_stops_neither_collection_nor_the_end() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut sentinel = Sentinel::new(&format!("{QUICK}{}{NODE}", target("one", "prometheus", &url)));
    sentinel.start();
    until("samples", || (sentinel.accepted() > 1000).then_some(()));
    assert_eq!(sentinel.target("one")["sent"], 0);
    assert_eq!(sentinel.stop(), 0);
}

#[test]
fn a_full_disk_is_outlived_and_what_it_costs_is_counted() {
    let receiver = Receiver::new();
    let mut sentinel = Sentinel::new("");
    let data = sentinel.data();
    std::fs::create_dir_all(&data).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m", "none"]).arg(&data).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    }
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
        }
    }
    let _mounted = Mounted(data.clone());
    let mut away = receiver;
    away.go_away();
    let more = "buffer.max_kib = 1048576\n";
    sentinel.configure(&format!("{QUICK}{more}{}{NODE}", target("one", "prometheus", &away.url())));
    // Somebody else has nearly all of it.
    std::fs::write(data.join("ballast"), vec![1; (3 << 20) - (200 << 10)]).unwrap();
    sentinel.start();
    until("refused samples", || (sentinel.target("one")["dropped"].as_u64() > Some(0)).then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    assert!(sentinel.status().is_some());
    std::fs::remove_file(data.join("ballast")).unwrap();
    away.come_back();
    until("samples again", || (away.got.lock().unwrap().unique() > 500).then_some(()));
    let accepted = settle(&mut sentinel, &away, more);
    let dropped = sentinel.target("one")["dropped"].as_u64().unwrap();
    let got = away.got.lock().unwrap().unique();
    // Accepted ones either arrived or made room for newer ones and were counted; the count has the refused ones too.
    assert!(got + dropped >= accepted, "{got} + {dropped} < {accepted}");
    sentinel.kill();
}
