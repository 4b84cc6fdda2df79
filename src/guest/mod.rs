//! The agent `burrow`: PID 1 of every sandbox, in the guest's initramfs, so that any root disk is a template.
//!
//! It mounts the root disk and serves the agent link (docs/protocol.md) over vsock: programs, files, the
//! sandbox as a whole. It is one thread and one loop; what a program or a client does can fail a
//! request, never the agent: nothing here panics on what it is told.
//!
//! As PID 1 of its pid namespace it cannot be killed from within: the kernel drops signals that PID 1 has no
//! handler for, SIGKILL included, and the out-of-memory killer passes it over. So it neither ignores
//! signals nor sets `oom_score_adj`, which its children would inherit.

mod agent;
mod boot;
mod children;
mod code;
mod connection;
mod exec;
mod files;
mod freeze;
mod identity;
mod loopback;
mod memory;
mod network;
mod port;
mod remove;
mod serve;
mod settings;
mod socket;
mod system;
mod tasks;
mod uplink;
mod verbs;
mod watch;
mod web;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use code::Lines as RunnerLines;
pub(crate) use exec::{FILE_MAX, read_file, resolve as resolve_user};

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use nix::sys::signal::{SigHandler, Signal};

use agent::{Agent, Door};
use connection::{greeting, hello};
use port::Port;

use crate::wire::{Code, Error, Message};

/// Runs the agent: as PID 1 in a sandbox, or with `--serve PATH` on a character device or Unix socket.
pub fn main() -> ExitCode {
    memory::keep_small();
    if std::process::id() == 1 {
        return serve_sandbox();
    }
    let mut args = std::env::args_os().skip(1);
    match (args.next(), args.next(), args.next()) {
        (Some(option), Some(path), None) if option == "--serve" => match serve_path(Path::new(&path)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                report(&format!("{}: {e}", path.to_string_lossy()));
                ExitCode::FAILURE
            }
        },
        _ => {
            report("usage: burrow --serve PATH (a character device, or a Unix socket to make)");
            ExitCode::from(2)
        }
    }
}

/// The end of PID 1 is a kernel panic: the node sees it as the sandbox's end, and the serial log has the reason.
fn serve_sandbox() -> ExitCode {
    let booted = match boot::enter_root(&greeting(hello()).to_bytes()) {
        Ok(booted) => booted,
        Err((sentence, booted)) => {
            report(&sentence);
            boot::give_up(booted, &Message::err("hello", Error::new(Code::Corrupt, sentence)).to_bytes());
        }
    };
    let served = Agent::new(Door::Vsock(booted.listener), true).and_then(|mut agent| {
        if let Some(uplink) = booted.uplink {
            agent.adopt_uplink(uplink, booted.greeted);
        }
        agent.run()
    });
    if let Err(e) = served {
        report(&format!("the agent has ended: {e}"));
    }
    ExitCode::FAILURE
}

fn serve_path(path: &Path) -> std::io::Result<()> {
    // Who starts it in the background may ignore these (POSIX, "Asynchronous AND Lists"), and programs would inherit that.
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: the default is no handler of ours.
        unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl)? };
    }
    // As PID 1 would, so that what programs leave behind is reaped here.
    nix::sys::prctl::set_child_subreaper(true)?;
    let is_device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device());
    let door = if is_device {
        Door::Port(Port::open(path)?)
    } else {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Door::Unix(OwnedFd::from(listener), path.to_path_buf())
    };
    Agent::new(door, false)?.run()
}

/// Says what went wrong: into the kernel's log in a sandbox, else on stderr. Serial consoles are slow, so
/// nothing else is said.
fn report(sentence: &str) {
    let line = format!("burrow: {sentence}\n");
    if std::process::id() == 1
        && let Ok(mut log) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg")
        && log.write_all(line.as_bytes()).is_ok()
    {
        return;
    }
    let _ = std::io::stderr().write_all(line.as_bytes());
}
