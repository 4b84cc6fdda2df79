//! The end: everything is ended, the data partition is made clean, the machine goes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, sync};

use super::client::StopMode;
use super::reaper::{Reaped, reap};

/// For processes to end when asked.
const ASKED: Duration = Duration::from_secs(3);
/// For processes to end when killed; one that hangs in the kernel never does.
const KILLED: Duration = Duration::from_secs(2);
/// For the disk to take what is to be written; one that hangs never does.
const WRITTEN: Duration = Duration::from_secs(20);

/// Stops the machine. `data` is where the data partition is mounted.
pub fn shut_down(mode: StopMode, data: Option<&PathBuf>) -> ExitCode {
    log::info!("the node stops now ({})", mode.as_str());
    for (signal, time) in [(Signal::SIGTERM, ASKED), (Signal::SIGKILL, KILLED)] {
        if end_all(signal, time) {
            break;
        }
        log::warn!("processes are left {} ms after {signal}", time.as_millis());
    }
    write_out(data.cloned());
    let how = match mode {
        StopMode::PowerOff => RebootMode::RB_POWER_OFF,
        StopMode::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(how);
    log::error!("cannot {}: {error}", mode.as_str());
    // When PID 1 ends, the kernel panics, and that starts the machine again.
    ExitCode::FAILURE
}

/// Sends a signal to every process but init. Whether all ended in time.
fn end_all(signal: Signal, time: Duration) -> bool {
    // ESRCH: nobody is there.
    let _ = kill(Pid::from_raw(-1), signal);
    let _ = kill(Pid::from_raw(-1), Signal::SIGCONT); // who is stopped cannot end
    let deadline = Instant::now() + time;
    loop {
        match reap() {
            Reaped::Exit(_) => {}
            Reaped::NoChildren => return true,
            Reaped::NoneNow if Instant::now() >= deadline => return false,
            Reaped::NoneNow => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Writes everything to disk and unmounts, on a thread, so that a disk that hangs does not keep the machine.
fn write_out(data: Option<PathBuf>) {
    let (done, wait) = mpsc::channel();
    let worker = std::thread::Builder::new().spawn(move || {
        sync();
        if let Some(data) = data {
            unmount(&data);
        }
        let _ = done.send(());
    });
    if worker.is_err() || wait.recv_timeout(WRITTEN).is_err() {
        log::error!("the disks did not take everything in {} s", WRITTEN.as_secs());
    }
}

/// Read-only where it is still in use: that makes it clean as well.
fn unmount(data: &Path) {
    let Err(error) = umount(data) else { return };
    log::warn!("cannot unmount {}: {error}; it is made read-only", data.display());
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(error) = mount(None::<&str>, data, None::<&str>, flags, None::<&str>) {
        log::error!("cannot make {} read-only: {error}", data.display());
    }
}
