//! Programs that stand still, and go on.

use std::time::Duration;

use warren::wire::{Code, Request};

use crate::client::{Agent, Client, shell};
use crate::until;

/// Counts in a file of the agent's directory for as long as it runs.
fn start_counter(client: &mut Client) -> u64 {
    client.start(shell("n=0; while :; do n=$((n+1)); echo $n > new; mv new count; done"))
}

/// What the counter has reached.
fn count(agent: &Agent) -> u64 {
    std::fs::read_to_string(agent.directory().join("count")).map_or(0, |text| text.trim().parse().unwrap())
}

fn freeze(client: &mut Client) {
    let frozen = client.done(Request::new("f", "system.freeze").set("wait_ms", 10_000));
    assert_eq!(frozen.get("frozen"), Some("true"));
}

/// Whether what it counts stays the same for a while.
fn assert_stands_still(agent: &Agent) {
    let before = count(agent);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(count(agent), before, "a frozen program went on");
}

fn assert_goes_on(agent: &Agent) {
    let before = count(agent);
    until("a thawed program goes on", || count(agent) > before);
}

#[test]
fn frozen_programs_stand_still_until_they_are_thawed() {
    let agent = Agent::start();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    other.done(Request::new("s", "system.stats"));
    if agent.cgroup().is_none() {
        let error = other.refused(Request::new("f", "system.freeze"));
        assert!(error.is(Code::BadState), "{error}");
        return;
    }
    start_counter(&mut client);
    assert_goes_on(&agent);
    for _ in 0..3 {
        freeze(&mut other);
        assert_stands_still(&agent);
        // The same again is no error.
        freeze(&mut other);
        other.done(Request::new("t", "system.thaw"));
        assert_goes_on(&agent);
    }
    other.done(Request::new("t", "system.thaw"));
}

#[test]
fn a_program_that_is_started_meanwhile_waits_and_one_that_is_killed_ends() {
    let agent = Agent::start();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    let id = start_counter(&mut client);
    if agent.cgroup().is_none() {
        return;
    }
    freeze(&mut other);
    let mut late = shell("echo late > late");
    late.tag = "late".to_string();
    let mut third = agent.connect();
    third.request(late);
    let rows = third.rows(Request::new("l", "exec.list"));
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert!(rows.iter().all(|row| row.get("state") == Some("running")));
    // The end of one that stands still.
    other.done(Request::new("k", "exec.signal").set("exec", id).set("signal", "KILL"));
    assert_eq!(client.finish("x").result.number("signal"), Some(9));
    assert!(!agent.directory().join("late").exists(), "it ran before it was thawed");
    other.done(Request::new("t", "system.thaw"));
    assert_eq!(third.finish("late").result.number("exit"), Some(0));
    assert!(agent.directory().join("late").exists());
}

#[test]
fn the_agent_says_who_it_is_and_whether_its_programs_stand_still() {
    let agent = Agent::start();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    let hello = |client: &mut Client| client.done(Request::new("h", "hello"));
    let (first, second) = (hello(&mut client), hello(&mut other));
    assert_eq!(first.get("boot").map(str::len), Some(16));
    assert_eq!((first.get("boot"), first.get("frozen"), first.get("resumed")), (second.get("boot"), None, None));
    assert_ne!(first.get("boot"), hello(&mut Agent::start().connect()).get("boot"), "another agent");
    client.done(Request::new("s", "system.stats"));
    if agent.cgroup().is_none() {
        return;
    }
    freeze(&mut client);
    assert_eq!(hello(&mut other).get("frozen"), Some("true"));
    client.done(Request::new("t", "system.thaw"));
    assert_eq!(hello(&mut other).get("frozen"), None);
}

#[test]
fn what_cannot_be_taken_leaves_the_programs_as_they_are() {
    let agent = Agent::start();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    start_counter(&mut client);
    for (request, code) in [
        (Request::new("f", "system.freeze").set("wait_ms", 10_001), Code::OutOfRange),
        (Request::new("f", "system.freeze").set("id", "a b"), Code::BadArgument),
        (Request::new("f", "system.freeze").set("soon", true), Code::UnknownArgument),
    ] {
        let error = other.refused(request);
        assert!(error.is(code), "{error}");
    }
    assert_goes_on(&agent);
    if agent.cgroup().is_none() {
        return;
    }
    freeze(&mut other);
    for (key, value) in [("machine_id", "x"), ("seed", "short"), ("mac", "1"), ("hostname", "-".repeat(64).as_str())] {
        other.refused(Request::new("t", "system.thaw").set(key, value));
    }
    assert_stands_still(&agent);
    // This machine is no sandbox: its names and clocks are not the agent's.
    let name = nix::unistd::gethostname().unwrap();
    let thaw = Request::new("t", "system.thaw").set("hostname", "never").set("clock_ns", 1).set("generation", 7);
    assert_eq!(other.done(thaw).number("generation"), Some(0));
    assert_eq!(nix::unistd::gethostname().unwrap(), name);
    assert_goes_on(&agent);
}

#[test]
fn an_agent_that_ends_takes_frozen_programs_along() {
    let agent = Agent::start();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    client.start(shell("echo $$; while :; do :; done"));
    let pid = client.wait_for("\n");
    if agent.cgroup().is_none() {
        return;
    }
    freeze(&mut other);
    drop(agent);
    assert!(crate::is_gone(&pid), "the frozen {pid} lives");
}
