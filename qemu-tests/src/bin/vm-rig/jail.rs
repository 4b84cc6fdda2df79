//! `jail`: everything of `attacks` in a worker's place, at each stage of the jail's closing and in each kind of thread.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use qemu_tests::attacks::{ATTACKS, Attack, Without};
use qemu_tests::files::TempDir;
use qemu_tests::rig::Worker;
use qemu_tests::timing;
use warren::sandbox::spawn::{Parent, Spawner};

/// Stages without a list of system calls, and kinds of threads with theirs.
const BARE: [&str; 2] = ["spawned", "confined"];
const LISTED: [&str; 5] = ["start", "device", "processor", "disk", "log"];

/// What came of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The kernel killed the process for it.
    Killed,
    /// The kernel refused it.
    Refused(i32),
    /// It worked.
    Done,
}

pub fn run(_: &[&str]) {
    let own = std::env::current_exe().expect("a running program has a path");
    let program = own.with_file_name("jail-probe");
    let open = || File::open(&program).expect("jail-probe lies beside this program");
    let spawner = Spawner::of(open(), &["jail-probe"], Parent::Caller).expect("a spawner");
    let spawner =
        |stage: &str, attack: &Attack| spawner.another(open(), &["jail-probe", stage, attack.name]).expect("a spawner");
    let home = TempDir::new().expect("a directory can be made");
    let mut wrong = Vec::new();
    let (mut killed, mut refused) = (0, 0);
    for attack in ATTACKS {
        for stage in BARE {
            let outcome = attempt(&spawner(stage, attack), home.path(), stage, attack);
            let as_stated = match (attack.without_list, &outcome) {
                (Without::Refused(errors), Outcome::Refused(errno)) => errors.contains(errno),
                (Without::UntilLandlock(_), Outcome::Done) => stage == "spawned",
                (Without::UntilLandlock(error), Outcome::Refused(errno)) => stage == "confined" && errno == &error,
                (Without::List, outcome) => *outcome != Outcome::Killed,
                _ => false,
            };
            refused += u32::from(matches!(outcome, Outcome::Refused(_)));
            if !as_stated {
                wrong.push(format!("{stage} {}: {outcome:?}, not {:?}", attack.name, attack.without_list));
            }
        }
        for stage in LISTED {
            let outcome = attempt(&spawner(stage, attack), home.path(), stage, attack);
            killed += u32::from(outcome == Outcome::Killed);
            if outcome != Outcome::Killed {
                wrong.push(format!("{stage} {}: {outcome:?}, not killed", attack.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} attempts ended otherwise than stated:\n{}", wrong.len(), wrong.join("\n"));
    println!("attempts={} killed={killed} refused={refused}", ATTACKS.len());
}

fn attempt(spawner: &Spawner, home: &Path, stage: &str, attack: &Attack) -> Outcome {
    let path = |name: &str| home.join(name);
    for name in ["socket", "log", "last-words"] {
        let _ = std::fs::remove_file(path(name));
    }
    let listener = UnixListener::bind(path("socket")).expect("a socket can be bound");
    let last_words = File::create(path("last-words")).expect("a file can be made");
    let mut worker = Worker::by(spawner, &listener, &last_words, &path("log"));
    let what = format!("{stage} {}", attack.name);
    let status = worker.wait(timing::hang()).unwrap_or_else(|| panic!("{what} does not end"));
    let said = std::fs::read_to_string(path("log")).unwrap_or_default();
    if status.signal() == Some(libc::SIGSYS) {
        assert_eq!(said, "", "{what}");
        return Outcome::Killed;
    }
    let words = std::fs::read_to_string(path("last-words")).unwrap_or_default();
    assert_eq!(status.code(), Some(0), "{what}: {status}, {said:?}, {words:?}");
    match said.trim().strip_prefix("errno ") {
        Some(errno) => Outcome::Refused(errno.parse().expect("a number")),
        None if said == "done\n" => Outcome::Done,
        // A forked child says so as well.
        None if said == "done\ndone\n" => Outcome::Done,
        None => panic!("{what} says {said:?}"),
    }
}
