//! Tests of the state database, most of them by fault: killed writers, damaged files, no room.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::storage::audit::AuditEnd;

/// A folder of its own that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("warren-state-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("data/state.db")
    }

    fn open(&self) -> (State, Snapshot) {
        State::open(&self.file(), || {}).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn sandbox(id: &str) -> SandboxRow {
    SandboxRow {
        id: id.to_string(),
        owner: "ann".to_string(),
        name: Some(format!("name-{id}")),
        template: "base".to_string(),
        template_sha256: "ab".repeat(32),
        state: "running".to_string(),
        reason: "quotes \" ' and \n lines".to_string(),
        vcpus: 2,
        cpu_quota: Some(150),
        memory_mib: 512,
        disks: vec!["data:new:64".to_string()],
        disk_iops: Some(100),
        disk_mbps: None,
        network: Some("on".into()),
        net_allow: vec!["1.1.1.0/24".into()],
        net_deny: vec!["1.1.1.1/32".into()],
        net_mbps: Some(7),
        net_address: Some("10.201.0.1".into()),
        restart: "on-failure:3".into(),
        restarts: 5,
        restarts_in_row: 2,
        time_limits: "ttl=600:pause".into(),
        ttl_until_ms: Some(1_700_000_600_000),
        disk_mib: 1 << 40,
        env: vec!["A=1".to_string(), "B=ü \"x\"".to_string()],
        labels: BTreeMap::from([("team".to_string(), "a'; DROP TABLE sandboxes".to_string())]),
        created_ms: 1_700_000_000_000,
        started_ms: Some(1_700_000_000_500),
        ended_ms: None,
        pid: Some(4_194_303),
        layer: Some("layer".into()),
        snapshot: Some("snapshot".into()),
        overlay: Some("overlay-2".into()),
        trace: "[]".into(),
        read_only: true,
    }
}

fn snapshot(id: &str) -> SnapshotRow {
    SnapshotRow {
        id: id.to_string(),
        name: Some(format!("name-{id}")),
        owner: "ann".to_string(),
        sandbox: Some("a".to_string()),
        template: "base".to_string(),
        template_sha256: "ab".repeat(32),
        created_ms: 1_700_000_000_000,
        vcpus: 2,
        memory_bytes: 128 << 20,
        disk_bytes: 1 << 40,
        kind: SnapshotKind::Template,
        state: SnapshotState::Ready,
        memory_below: Some("other".to_string()),
        memory_seal: Some("cd".repeat(32)),
        layer: Some("l1".to_string()),
        next_overlay: Some("overlay-3".to_string()),
        bytes: 4096,
        settings: "{\"quotes\": \"' and \n lines\"}".to_string(),
    }
}

fn put(row: SandboxRow) -> Change {
    Change::PutSandbox(Box::new(row))
}

fn execution(sandbox_id: &str, exec_id: u64) -> ExecutionRow {
    ExecutionRow {
        sandbox_id: sandbox_id.to_string(),
        exec_id,
        argv: vec!["sh".to_string(), "-c".to_string(), "exit 3".to_string()],
        state: "exited".to_string(),
        started_ms: 5,
        ended_ms: Some(6),
        exit: Some(3),
        signal: None,
        timeout: true,
        cpu_ms: Some(7),
        peak_kib: None,
        language: Some("python".to_string()),
        context: Some(2),
    }
}

fn results(state: State) -> Vec<Result<(), StateError>> {
    state.close().into_iter().map(|(_, result)| result).collect()
}

#[test]
fn what_was_written_is_there_after_the_next_open() {
    let folder = Folder::new("roundtrip");
    let (mut state, first) = folder.open();
    assert_eq!((first.sandboxes.len(), first.templates.len(), first.executions.len()), (0, 0, 0));
    assert_eq!((first.node_id.len(), first.moved_aside), (32, None));
    let template = TemplateRow {
        name: "python".to_string(),
        sha256: "cd".repeat(32),
        size_bytes: 8192,
        description: "d".to_string(),
        imported_ms: 9,
        path: "/data/templates/python".to_string(),
    };
    state.submit(put(sandbox("a")));
    state.submit(put(SandboxRow { name: None, pid: None, ended_ms: Some(1), ..sandbox("b") }));
    state.submit(Change::PutTemplate(template.clone()));
    state.submit_durable(Change::PutExecution(Box::new(execution("a", 1))));
    state.submit(Change::PutExecution(Box::new(execution("b", 1))));
    assert_eq!(results(state), vec![Ok(()); 5]);

    let (mut state, second) = folder.open();
    assert_eq!((second.node_id, second.created_ms), (first.node_id, first.created_ms));
    assert_eq!(second.sandboxes[0], sandbox("a"));
    assert_eq!(second.templates, [template]);
    assert_eq!(second.executions, [execution("a", 1), execution("b", 1)]);

    // A new state of a sandbox keeps its executions; its removal does not.
    state.submit(put(SandboxRow { state: "stopped".to_string(), ..sandbox("a") }));
    state.submit(Change::RemoveSandbox { id: "b".to_string() });
    state.submit(Change::RemoveSandbox { id: "never there".to_string() });
    state.submit(Change::RemoveTemplate { name: "python".to_string() });
    assert_eq!(results(state), vec![Ok(()); 4]);
    let (mut state, third) = folder.open();
    assert_eq!(third.sandboxes.iter().map(|s| s.state.as_str()).collect::<Vec<_>>(), ["stopped"]);
    assert_eq!((third.templates.len(), third.executions), (0, vec![execution("a", 1)]));
    state.submit(Change::RemoveExecution { sandbox_id: "a".to_string(), exec_id: 1 });
    drop(state);
    assert_eq!(folder.open().1.executions, []);
}

#[test]
fn completions_come_in_order_and_are_notified() {
    static NOTIFIED: AtomicUsize = AtomicUsize::new(0);
    let folder = Folder::new("notify");
    let (mut state, _) = State::open(&folder.file(), || {
        NOTIFIED.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    let tickets: Vec<Ticket> = (0..5000).map(|n| state.submit(put(sandbox(&format!("s{n:04}"))))).collect();
    let mut done = Vec::new();
    while done.len() < tickets.len() {
        done.extend(state.completed());
    }
    assert_eq!(done.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), tickets);
    assert!(done.iter().all(|(_, result)| result.is_ok()));
    assert_eq!(state.pending(), 0);
    drop(state);
    let notified = NOTIFIED.load(Ordering::SeqCst);
    assert!((1..=5000).contains(&notified), "{notified}");
    assert_eq!(folder.open().1.sandboxes.len(), 5000);
}

#[test]
fn a_conflicting_change_fails_alone() {
    let folder = Folder::new("conflict");
    let (mut state, _) = folder.open();
    let named = |id: &str, ended_ms| put(SandboxRow { name: Some("x".to_string()), ended_ms, ..sandbox(id) });
    state.submit(named("a", None));
    state.submit(named("b", None)); // the name is taken
    state.submit(Change::PutExecution(Box::new(execution("nobody", 1))));
    state.submit(put(sandbox("c")));
    state.submit(named("a", Some(5))); // it ended: the name is free
    state.submit(named("b", None));
    let results = results(state);
    let conflicts: Vec<bool> = results.iter().map(|r| matches!(r, Err(StateError::Conflict(_)))).collect();
    assert_eq!(conflicts, [false, true, true, false, false, false], "{results:?}");
    let (_, snapshot) = folder.open();
    assert_eq!(snapshot.sandboxes.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
}

#[test]
fn a_full_database_refuses_with_a_typed_error_and_goes_on() {
    let folder = Folder::new("full");
    let (mut connection, _) = open_file(&folder.file()).unwrap();
    let pages: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    connection.query_row(&format!("PRAGMA max_page_count = {}", pages + 20), [], |_| Ok(())).unwrap();
    let job = |n: u64, reason: String| Job {
        ticket: Ticket(n),
        change: put(SandboxRow { reason, ..sandbox(&format!("s{n}")) }),
        durable: false,
    };
    // One that is too big in the midst of small ones: each gets its own result.
    let batch = [job(1, String::new()), job(2, "x".repeat(1_000_000)), job(3, String::new())];
    let done = write_batch(&mut connection, &batch);
    assert_eq!((done[0].clone(), done[2].clone()), ((Ticket(1), Ok(())), (Ticket(3), Ok(()))));
    assert!(matches!(&done[1], (Ticket(2), Err(StateError::DiskFull(_)))), "{done:?}");
    drop(connection);
    let ids: Vec<_> = folder.open().1.sandboxes.into_iter().map(|s| s.id).collect();
    assert_eq!(ids, ["s1", "s3"]);
}

#[test]
fn a_second_process_cannot_open_it() {
    let folder = Folder::new("busy");
    let (_state, _) = folder.open();
    // Locks are of processes, so another one must try.
    let child = child("a_child_opens", &folder.file()).output().unwrap();
    assert!(String::from_utf8_lossy(&child.stdout).contains("BUSY"), "{child:?}");
}

#[test]
fn a_damaged_file_is_moved_aside_with_its_log_and_a_new_one_begun() {
    for (name, damage) in [
        ("garbage", (|octets: &mut Vec<u8>| *octets = vec![0x5a; 10_000]) as fn(&mut Vec<u8>)),
        ("middle", |octets| octets[4096..].fill(0xff)),
        ("cut", |octets| octets.truncate(6000)),
        ("header", |octets| octets[..16].fill(0)),
    ] {
        let folder = Folder::new(&format!("damaged-{name}"));
        let (mut state, first) = folder.open();
        state.submit(put(sandbox("a")));
        drop(state);
        let mut octets = std::fs::read(folder.file()).unwrap();
        damage(&mut octets);
        std::fs::write(folder.file(), octets).unwrap();

        let (mut state, second) = folder.open();
        let aside = second.moved_aside.unwrap();
        assert!(aside.ends_with("state.db.corrupt-1") && aside.exists(), "{name}");
        assert_ne!(second.node_id, first.node_id);
        assert_eq!(second.sandboxes, [], "{name}");
        state.submit(put(sandbox("b")));
        drop(state);
        let (_, third) = folder.open();
        assert_eq!((third.moved_aside, third.sandboxes.len()), (None, 1), "{name}");
    }
}

#[test]
fn a_row_of_another_shape_counts_as_damage() {
    let folder = Folder::new("shape");
    let (mut state, _) = folder.open();
    state.submit(put(sandbox("a")));
    drop(state);
    for (sql, aside) in [
        ("UPDATE sandboxes SET env = '{not json'", "state.db.corrupt-1"),
        ("INSERT INTO templates VALUES ('t', 'x', -1, '', 0, '')", "state.db.corrupt-2"),
    ] {
        let connection = Connection::open(folder.file()).unwrap();
        connection.execute_batch(sql).unwrap();
        drop(connection);
        let (_, snapshot) = folder.open();
        assert!(snapshot.moved_aside.is_some_and(|path| path.ends_with(aside)), "{sql}");
    }
}

#[test]
fn a_database_of_a_newer_program_is_left_alone() {
    let folder = Folder::new("newer");
    drop(folder.open());
    let connection = Connection::open(folder.file()).unwrap();
    schema::set_meta(&connection, "schema_version", "99").unwrap();
    drop(connection);
    let error = State::open(&folder.file(), || {}).unwrap_err();
    assert_eq!(error, StateError::Newer { found: 99, known: SCHEMA_VERSION });
    assert!(folder.file().exists());
}

#[test]
fn a_place_that_cannot_be_written_is_an_io_error() {
    let folder = Folder::new("place");
    std::fs::write(folder.0.join("data"), "a file, no folder").unwrap();
    assert!(matches!(State::open(&folder.file(), || {}).unwrap_err(), StateError::Io(_)));
    std::fs::remove_file(folder.0.join("data")).unwrap();
    std::fs::create_dir_all(folder.file()).unwrap(); // a folder, no file
    assert!(matches!(State::open(&folder.file(), || {}).unwrap_err(), StateError::Io(_)));
}

#[test]
fn a_writer_killed_at_any_instant_leaves_whole_batches_and_all_that_it_knew_durable() {
    let folder = Folder::new("kill");
    let mut least = 0;
    for round in 0..8 {
        let mut child = child("a_child_writes", &folder.file()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Each `done N` says that N was durable; kill it in the midst of more.
        let mut done = 0;
        while done < least + 5 * (round + 1) {
            let line = lines.next().unwrap().unwrap();
            done = line.strip_prefix("done ").map_or(done, |number| number.parse().unwrap());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What the child said before it died but was not read yet.
        for line in lines.map_while(Result::ok) {
            done = line.strip_prefix("done ").and_then(|number| number.parse().ok()).unwrap_or(done);
        }
        let (_, snapshot) = folder.open();
        assert_eq!(snapshot.moved_aside, None, "round {round}");
        let [counter] = snapshot.sandboxes.as_slice() else { panic!("{:?}", snapshot.sandboxes) };
        assert!(counter.created_ms >= done, "round {round}: {} of {done}", counter.created_ms);
        // Each step writes the counter and then as many executions: never out of order.
        let executions = snapshot.executions.len() as u64;
        assert!(executions == counter.created_ms || executions + 1 == counter.created_ms, "{executions}");
        least = counter.created_ms;
    }
}

#[test]
fn a_disk_that_fails_is_a_typed_error() {
    let folder = Folder::new("limit");
    let output = child("a_child_hits_its_file_size_limit", &folder.file()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("FIRST true") && said.contains("LAST Err(Io("), "{said}");
    let (_, snapshot) = folder.open();
    assert_eq!(snapshot.moved_aside, None);
    assert!(!snapshot.sandboxes.is_empty());
}

const CHILD: &str = "WARREN_TEST_STATE_FILE";

/// This test program again, as another process that runs only the test `name`.
fn child(name: &str, file: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("storage::state::tests::{name}"), "--nocapture"]).env(CHILD, file);
    command.stderr(Stdio::null());
    command
}

/// In a child: the file to work on. In the test program itself the children's tests do nothing.
fn in_child() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

#[test]
fn a_child_opens() {
    let Some(file) = in_child() else { return };
    if let Err(StateError::Busy(_)) = State::open(&file, || {}) {
        println!("BUSY");
    }
}

#[test]
fn a_child_writes() {
    let Some(file) = in_child() else { return };
    let (mut state, snapshot) = State::open(&file, || {}).unwrap();
    // `executions` may lack its last: begin where the rows agree.
    let mut step = snapshot.executions.len() as u64;
    loop {
        step += 1;
        state.submit_durable(put(SandboxRow { created_ms: step, ..sandbox("counter") }));
        state.submit_durable(Change::PutExecution(Box::new(execution("counter", step))));
        let mut results = Vec::new();
        while results.len() < 2 {
            results.extend(state.completed());
        }
        assert!(results.iter().all(|(_, result)| result.is_ok()), "{results:?}");
        println!("done {step}");
    }
}

#[test]
fn a_child_hits_its_file_size_limit() {
    let Some(file) = in_child() else { return };
    let (mut state, _) = State::open(&file, || {}).unwrap();
    // SAFETY: only changes what happens on this signal, which then is an error of write(2).
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, 200_000, 200_000).unwrap();
    let mut last = Ok(());
    for n in 0..100 {
        state.submit(put(SandboxRow { reason: "x".repeat(10_000), ..sandbox(&format!("s{n}")) }));
        let mut results = Vec::new();
        while results.is_empty() {
            results = state.completed();
        }
        last = results.remove(0).1;
        if n == 0 {
            println!("FIRST {}", last.is_ok());
        }
    }
    println!("LAST {last:?}");
}

fn audited(id: u64, owner: &str) -> AuditRow {
    AuditRow { id, began_ms: 5, owner: owner.to_string(), verb: "sandbox.stop".to_string(), ..AuditRow::default() }
}

fn wait_for_reading(state: &mut State) -> Vec<AuditRow> {
    loop {
        if let Some((_, Ok(Reading::Audit(rows)))) = state.readings().pop() {
            return rows;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_audit_log_has_ends_and_names_what_had_none() {
    let folder = Folder::new("audit");
    let (mut state, snapshot) = folder.open();
    assert_eq!(snapshot.next_audit, 1);
    for (id, owner) in [(1, "ann"), (2, "bob"), (3, "ann")] {
        state.submit(Change::BeginAudit(Box::new(audited(id, owner))));
    }
    let end = AuditEnd { id: 2, ended_ms: 9, result: "ok".to_string(), sandbox: Some("sb".to_string()) };
    state.submit(Change::EndAudit(end));
    // What was submitted before is in what is read.
    state.read(Query::Audit(AuditQuery { before: None, owner: None, limit: 2 }));
    let rows = wait_for_reading(&mut state);
    assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(
        (rows[1].result.as_deref(), rows[1].sandbox.as_deref(), rows[1].ended_ms),
        (Some("ok"), Some("sb"), Some(9))
    );
    state.read(Query::Audit(AuditQuery { before: Some(3), owner: Some("ann".to_string()), limit: 9 }));
    assert_eq!(wait_for_reading(&mut state), [audited(1, "ann")]);
    state.close();

    let (mut state, snapshot) = folder.open();
    assert_eq!(snapshot.next_audit, 4);
    state.read(Query::Audit(AuditQuery { before: None, owner: None, limit: 9 }));
    let results: Vec<_> = wait_for_reading(&mut state).into_iter().map(|row| row.result.unwrap()).collect();
    assert_eq!(results, [audit::INTERRUPTED, "ok", audit::INTERRUPTED]);
}

#[test]
fn the_audit_log_keeps_its_newest_rows() {
    let folder = Folder::new("audit-kept");
    let (mut state, _) = folder.open();
    let last = audit::KEPT.next_multiple_of(256) + 512;
    let gone = last - audit::KEPT;
    for id in [1, gone, gone + 1, last] {
        state.submit(Change::BeginAudit(Box::new(audited(id, "ann"))));
    }
    state.read(Query::Audit(AuditQuery { before: None, owner: None, limit: 9 }));
    assert_eq!(wait_for_reading(&mut state).iter().map(|row| row.id).collect::<Vec<_>>(), [last, gone + 1]);
}

#[test]
fn a_database_that_ends_writes_what_is_queued_and_names_what_it_could_not() {
    let folder = Folder::new("end");
    let (mut state, _) = folder.open();
    for n in 0..200 {
        state.submit(put(sandbox(&format!("s{n}"))));
    }
    // Of no sandbox.
    state.submit(Change::PutExecution(Box::new(execution("nobody", 1))));
    while !state.end() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(state.is_ending());
    assert_eq!(state.completed().len(), 201);
    let (rows, first) = state.refused();
    assert!(rows == 1 && matches!(first, Some(StateError::Conflict(_))), "{rows} {first:?}");
    // Whoever comes too late is told.
    state.submit(put(sandbox("late")));
    assert_eq!(state.completed().len(), 1);
    assert_eq!(state.refused().0, 2);
    drop(state);
    assert_eq!(folder.open().1.sandboxes.len(), 200);
}

#[test]
fn snapshots_and_layers_are_kept_as_they_were_put() {
    let folder = Folder::new("snapshots");
    let (mut state, _) = folder.open();
    let bare = SnapshotRow { id: "bare".into(), kind: SnapshotKind::Pause, ..SnapshotRow::default() };
    let layer = |id: &str, below: Option<&str>| LayerRow { id: id.into(), below: below.map(Into::into), bytes: 7 };
    for change in [
        Change::PutSnapshot(Box::new(SnapshotRow { bytes: 1, ..snapshot("s1") })),
        Change::PutSnapshot(Box::new(snapshot("s1"))),
        Change::PutSnapshot(Box::new(bare.clone())),
        Change::PutSnapshot(Box::new(SnapshotRow { name: None, ..snapshot("gone") })),
        Change::RemoveSnapshot { id: "gone".into() },
        Change::PutLayer(layer("l1", None)),
        Change::PutLayer(layer("l2", Some("l1"))),
        Change::PutLayer(layer("l3", Some("l2"))),
        Change::RemoveLayer { id: "l3".into() },
    ] {
        state.submit(change);
    }
    assert!(state.close().iter().all(|(_, result)| result.is_ok()));
    let (_state, found) = folder.open();
    assert_eq!(found.snapshots, [bare, snapshot("s1")]);
    assert_eq!(found.layers, [layer("l1", None), layer("l2", Some("l1"))]);
}

#[test]
fn a_name_is_its_owners_until_its_snapshot_is_being_removed() {
    let folder = Folder::new("names");
    let (mut state, _) = folder.open();
    let named = |id: &str, owner: &str, state| {
        let row = SnapshotRow { name: Some("x".into()), owner: owner.into(), state, ..snapshot(id) };
        Change::PutSnapshot(Box::new(row))
    };
    let expected = [
        (named("s1", "ann", SnapshotState::Making), true),
        (named("s2", "ann", SnapshotState::Ready), false),
        (named("s2", "bob", SnapshotState::Ready), true),
        (named("s1", "ann", SnapshotState::Removing), true),
        (named("s3", "ann", SnapshotState::Ready), true),
    ];
    for (change, _) in &expected {
        state.submit(change.clone());
    }
    let results: Vec<bool> = state.close().iter().map(|(_, result)| result.is_ok()).collect();
    assert_eq!(results, expected.map(|(_, fine)| fine));
}

#[test]
fn changes_that_belong_together_are_made_together_or_not_at_all() {
    let folder = Folder::new("together");
    let (mut state, _) = folder.open();
    state.submit(put(sandbox("a")));
    let rebase = |id: &str| Change::Rebase { id: id.into(), layer: Some("l9".into()), snapshot: None, overlay: None };
    let layer = |id: &str| Change::PutLayer(LayerRow { id: id.into(), ..LayerRow::default() });
    state.submit(Change::Together(vec![layer("l8"), rebase("nobody")]));
    state.submit(Change::Together(vec![layer("l9"), rebase("a"), Change::PutSnapshot(Box::new(snapshot("s1")))]));
    let results: Vec<bool> = state.close().iter().map(|(_, result)| result.is_ok()).collect();
    assert_eq!(results, [true, false, true]);
    let (_state, found) = folder.open();
    let row = SandboxRow { layer: Some("l9".into()), snapshot: None, overlay: None, ..sandbox("a") };
    assert_eq!(found.sandboxes, [row]);
    assert_eq!(found.layers.iter().map(|layer| layer.id.as_str()).collect::<Vec<_>>(), ["l9"]);
    assert_eq!(found.snapshots.len(), 1);
}
