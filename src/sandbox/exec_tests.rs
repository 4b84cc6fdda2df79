use super::*;
use crate::sandbox::home::Places;
use crate::sandbox::id::SandboxId;

struct Reader {
    got: Vec<u8>,
    lost: u64,
    done: Option<Message>,
    queued: usize,
}

impl Sink for Reader {
    fn send(&mut self, message: &Message) {
        match message {
            Message::Data { payload, .. } => self.got.extend_from_slice(payload),
            Message::Item { fields, .. } => self.lost += fields.number("lost").unwrap_or(0),
            Message::Ok { .. } | Message::Err { .. } => self.done = Some(message.clone()),
            _ => {}
        }
    }
    fn queued(&self) -> usize {
        self.queued
    }
}

#[test]
fn a_beginning_is_news_once() {
    let pid = |pid: u64| Fields::new().with("exec", 99).with("pid", pid);
    let mut exec = Exec::new(1, vec![b"true".to_vec()], 0);
    assert_eq!(exec.begins(&Fields::new().with("stdout_offset", 0)), None);
    assert_eq!(exec.begins(&pid(7)), Some(Fields::new().with("exec", 1).with("pid", 7)));
    exec.rejoin("2".to_string());
    assert_eq!(exec.begins(&pid(7)), None);

    let state = |state: &str| Fields::new().with("state", state);
    let mut exec = Exec::new(2, Vec::new(), 0);
    exec.is_run(CodeRun { language: String::new(), context: None, running: false });
    let news = |exec: &mut Exec, word: &str| exec.begins(&state(word)).is_some();
    let heard = ["pending", "pending", "sleeping", "running", "pending", "running"].map(|w| news(&mut exec, w));
    assert_eq!(heard, [true, false, false, true, false, false]);
    exec.rejoin("2".to_string());
    assert_eq!(["pending", "running", "pending"].map(|word| news(&mut exec, word)), [true, true, false]);
    assert!(exec.code.is_some_and(|run| run.running));
}

fn home(name: &str) -> (std::path::PathBuf, Home) {
    let dir = std::env::temp_dir().join(format!("warren-exec-{name}-{}", std::process::id()));
    let id = SandboxId::random().expect("urandom");
    std::fs::create_dir_all(dir.join(id.as_str()).join("exec")).expect("temp dir");
    let places = Places { disks: dir.clone(), sockets: dir.clone(), cgroups: dir.join("cgroups") };
    (dir, places.of(&id))
}

#[test]
fn a_slow_viewer_holds_the_agent_and_loses_nothing() {
    let (dir, home) = home("slow");
    let mut exec = Exec::new(1, vec![b"yes".to_vec()], 0);
    exec.watch(7, "a", true);
    let mut reader = Reader { got: Vec::new(), lost: 0, done: None, queued: 0 };
    let mut sent = 0u64;
    let mut allowed = INITIAL_CREDIT;
    for round in 0..100u64 {
        while sent < allowed {
            let piece =
                vec![u8::try_from(round).expect("small"); 10_000.min(usize::try_from(allowed - sent).expect("fits"))];
            exec.take(&home, 1024 * 1024, 0, &piece).expect("within credit");
            sent += piece.len() as u64;
        }
        exec.pump(0, &mut reader);
        if let Some(more) = exec.grant(0) {
            allowed += more;
        }
        if round % 3 == 0 {
            exec.credit(7, "a", 0, 100_000);
        }
    }
    assert!(exec.take(&home, 1024 * 1024, 0, &vec![0; usize::try_from(allowed - sent).expect("fits") + 1]).is_err());
    exec.finish(Ok(Fields::new().with("exit", 0)));
    exec.credit(7, "a", 0, u64::MAX);
    assert!(exec.pump(0, &mut reader));
    assert_eq!(reader.got.len() as u64, sent);
    assert!(matches!(reader.done, Some(Message::Ok { .. })));
    std::fs::remove_dir_all(&dir).expect("clean up");
}

#[test]
fn without_viewers_the_program_runs_on_and_an_attach_is_told_what_it_lost() {
    let (dir, home) = home("lost");
    let capacity = 512 * 1024;
    let mut exec = Exec::new(1, vec![b"yes".to_vec()], 0);
    let mut total = 0u64;
    for _ in 0..100 {
        exec.take(&home, capacity, 0, &[b'y'; 16 * 1024]).expect("granted as it comes");
        total += 16 * 1024;
        exec.grant(0);
    }
    assert_eq!(exec.watch(7, "a", false), total - capacity);
    let mut reader = Reader { got: Vec::new(), lost: 0, done: None, queued: 0 };
    exec.credit(7, "a", 0, u64::MAX);
    assert!(!exec.pump(0, &mut reader));
    assert_eq!(reader.got.len() as u64, capacity);
    exec.forget(&home);
    std::fs::remove_dir_all(&dir).expect("clean up");
}

#[test]
fn a_slow_watcher_holds_nobody_up_and_is_told_what_it_lost_of_which_channel() {
    let (dir, home) = home("watcher");
    let capacity = 512 * 1024;
    let mut exec = Exec::new(1, vec![b"yes".to_vec()], 0);
    exec.watch(7, "slow", false);
    let mut reader = Reader { got: Vec::new(), lost: 0, done: None, queued: 0 };
    exec.take(&home, capacity, 0, &[b'x'; 1000]).expect("within credit");
    exec.credit(7, "slow", 0, 0);
    exec.pump(0, &mut reader);
    assert_eq!(reader.got.len(), 1000);
    let mut total = 1000;
    for _ in 0..100 {
        exec.take(&home, capacity, 0, &[b'y'; 16 * 1024]).expect("granted as it comes");
        total += 16 * 1024;
        exec.grant(0);
    }
    exec.finish(Ok(Fields::new().with("exit", 0)));
    assert!(!exec.collected);
    exec.credit(7, "slow", 0, u64::MAX);
    assert!(exec.pump(0, &mut reader) && exec.collected);
    assert_eq!(reader.lost, total - 1000 - capacity);
    assert_eq!(reader.got.len() as u64, 1000 + capacity);
    exec.forget(&home);
    std::fs::remove_dir_all(&dir).expect("clean up");
}

#[test]
fn argv_is_shown_as_a_shell_would_read_it() {
    let argv = [b"sh".to_vec(), b"-c".to_vec(), b"echo 'a b'".to_vec(), b"".to_vec()];
    assert_eq!(shell_line(&argv), b"sh -c 'echo '\\''a b'\\''' ''");
}
