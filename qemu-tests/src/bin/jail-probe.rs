//! A worker that a guest has taken over: `jail-probe STAGE CALL`, started by `vm-rig jail` just as a worker is. It closes
//! its jail as a worker does, up to that stage, and then makes one system call that no worker makes.
//!
//! `jail-probe close` only closes it, and `jail-probe nothing` not even that: what `make bench` compares.
//!
//! It ends with code 0 and one line, `done` or `errno N`, unless it is killed before.

use std::io::Write;
use std::process::ExitCode;

use qemu_tests::attacks::ATTACKS;
use warren::vmm::jail::{self, Breach, lists::Kind};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (stage, call) = match arguments.as_slice() {
        [stage, call] => (stage, call),
        [stage] if stage == "nothing" => return ExitCode::SUCCESS,
        [stage] if stage == "close" => {
            jail::close(Breach::Kill).expect("the jail can be closed");
            return ExitCode::SUCCESS;
        }
        _ => return ExitCode::from(2),
    };
    let Some(attack) = ATTACKS.iter().find(|attack| attack.name == call) else { return ExitCode::from(2) };
    let kind = match stage.as_str() {
        // Only what the spawner took away before this program began.
        "spawned" => None,
        // And what the worker gives up itself, but for the list of system calls.
        "confined" => {
            jail::confine().expect("the jail can be closed");
            None
        }
        "start" => Some(Kind::Start),
        "device" => Some(Kind::Device),
        "processor" => Some(Kind::Processor),
        "disk" => Some(Kind::Disk),
        "log" => Some(Kind::Log),
        _ => return ExitCode::from(2),
    };
    let act = || {
        let result = (attack.call)();
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let line = if result < 0 { format!("errno {errno}\n") } else { "done\n".to_string() };
        let _ = std::io::stderr().write_all(line.as_bytes());
    };
    match kind {
        None => act(),
        Some(kind) => {
            jail::close(Breach::Kill).expect("the jail can be closed");
            match kind {
                Kind::Start => act(),
                Kind::Device => {
                    jail::enter(kind).expect("the list can be put in force");
                    act();
                }
                _ => {
                    let thread = jail::spawn(kind, "probe".into(), 256 << 10, act);
                    let _ = thread.expect("a thread can be started").join();
                }
            }
        }
    }
    ExitCode::SUCCESS
}
