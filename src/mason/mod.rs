//! The program `mason`: fills the disk of a template that is being built. It runs inside the builder, a microVM that is
//! thrown away, because what it reads is hostile: no layer of an image is looked into anywhere else.
//!
//! ```text
//! mason layer [--whiteouts] [--sha256 HEX] < ARCHIVE   unpacks an archive over the root
//! mason copy TARGET [--directory] [--owner USER[:GROUP]] < ARCHIVE   puts files where COPY says
//! mason directory PATH [--owner USER[:GROUP]]          a directory with those above it
//! mason user [USER[:GROUP]]                            prints the numbers: `UID GID`
//! mason finish                                         takes away what the builder left, and trims the disk
//! ```
//!
//! Archives are tar, plain or compressed with gzip or zstd. It works in a view of the root file system without what is mounted
//! over it, and confined to that (chroot), so that neither /proc nor /dev is in its way and every link ends within. Exit
//! code 0, or 1 with `CODE: sentence` as the last line of standard error.

mod inflate;
mod names;
mod place;
mod tidy;
mod unpack;
mod xxh64;
mod zstd;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::statvfs;

use crate::archive::{Archive, ArchiveError};
use crate::recipe::key::Summed;
use inflate::Plain;
use names::NameServers;
use unpack::{Placement, Unpacker};

/// Where the view of the root is: on a file system in memory, which goes with the builder.
const VIEW: &str = "/run/warren/view";

/// Why something was not done: a code as the protocol has them, and a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        let code = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => "NO_CAPACITY",
            // What is read, not what is written.
            None => "BAD_ARCHIVE",
            _ => "BUILD_FAILED",
        };
        let hint = if code == "NO_CAPACITY" { ": the template's disk is full (--disk gives it more)" } else { "" };
        Self::new(code, format!("{what}: {error}{hint}"))
    }
}

impl From<ArchiveError> for Refusal {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Io(e) => Self::io("the archive", &e),
            error => Self::new("BAD_ARCHIVE", error.to_string()),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Refusal { code, message }) => {
            let _ = writeln!(io::stderr(), "{code}: {message}");
            ExitCode::FAILURE
        }
    }
}

/// What follows an option.
fn value<'a>(args: &'a [OsString], option: &str) -> Option<&'a str> {
    let at = args.iter().position(|arg| arg == option)?;
    args.get(at + 1)?.to_str()
}

fn run(args: &[OsString]) -> Result<(), Refusal> {
    let has = |option: &str| args.iter().any(|arg| arg == option);
    let misuse = || Refusal::new("BAD_ARGUMENT", "usage: mason layer|copy|directory|user|finish");
    let owner = |args: &[OsString]| value(args, "--owner").map(numbers).transpose();
    match args.first().and_then(|arg| arg.to_str()) {
        Some("layer") => {
            let names = NameServers::of_builder()?;
            enter_view()?;
            layer(has("--whiteouts"), value(args, "--sha256"))?;
            names.put_back()
        }
        Some("copy") => {
            let target = args.get(1).ok_or_else(misuse)?;
            let owner = owner(args)?.unwrap_or((0, 0));
            enter_view()?;
            let placement = Placement::new(target.as_bytes(), has("--directory"), owner)?;
            let mut unpacker = Unpacker::new(Some(placement), false);
            take(io::stdin().lock(), u64::MAX, &mut unpacker)?;
            unpacker.finish()
        }
        Some("directory") => {
            let path = args.get(1).ok_or_else(misuse)?;
            let owner = owner(args)?;
            enter_view()?;
            place::directories(&place::within(path.as_bytes(), true)?, owner)
        }
        Some("user") => {
            let user = args.get(1).and_then(|arg| arg.to_str()).unwrap_or("0");
            let (uid, gid) = numbers(user)?;
            println!("{uid} {gid}");
            Ok(())
        }
        Some("finish") => tidy::finish(),
        _ => Err(misuse()),
    }
}

/// A user by the disk's own /etc/passwd and /etc/group.
fn numbers(user: &str) -> Result<(u32, u32), Refusal> {
    let found = crate::guest::resolve_user(user).map_err(|error| Refusal::new("BAD_ARGUMENT", error.message))?;
    Ok((found.uid, found.gid))
}

/// Makes the root file system, and nothing that is mounted over it, this process's root.
fn enter_view() -> Result<(), Refusal> {
    let entered = || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        std::fs::create_dir_all(VIEW)?;
        // Without MS_REC: only the disk.
        mount(Some("/"), VIEW, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        nix::unistd::chroot(VIEW)?;
        nix::unistd::chdir("/")?;
        Ok(())
    };
    // Modes are set as archives have them.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    entered().map_err(|e| Refusal::io("the root of the disk cannot be entered", &e))
}

fn layer(whiteouts: bool, sha256: Option<&str>) -> Result<(), Refusal> {
    let room = statvfs("/").map_err(|e| Refusal::io("/", &e.into()))?;
    // More than the disk can hold is a bomb, or needs a larger disk.
    let most = room.blocks().saturating_mul(room.fragment_size());
    let mut unpacker = Unpacker::new(None, whiteouts);
    let digest = take(io::stdin().lock(), most, &mut unpacker)?;
    if let Some(expected) = sha256
        && digest != expected
    {
        let message = format!("the unpacked layer has sha256 {digest}, its image says {expected}");
        return Err(Refusal::new("CORRUPT", message));
    }
    unpacker.finish()
}

/// What `layer`, and with a target `copy`, does: over the root of whoever calls it. For the fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn apply(
    archive: &[u8],
    most: u64,
    whiteouts: bool,
    target: Option<&[u8]>,
) -> Result<(), (&'static str, String)> {
    let placement = target.map(|target| Placement::new(target, whiteouts, (7, 7))).transpose();
    let done = placement.and_then(|placement| {
        let whiteouts = whiteouts && placement.is_none();
        let mut unpacker = Unpacker::new(placement, whiteouts);
        take(archive, most, &mut unpacker)?;
        unpacker.finish()
    });
    done.map_err(|refusal| (refusal.code, refusal.message))
}

/// Reads an archive and makes nothing of it. For the fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_all(archive: &[u8], most: u64) -> Option<()> {
    let mut archive = Archive::new(Plain::of(archive, most).ok()?);
    while let Some(entry) = archive.next().ok()? {
        let _ = place::within(&entry.path, false);
    }
    Some(())
}

/// Unpacks an archive of `most` octets at most; the digest of all of it, unpacked.
fn take(from: impl Read, most: u64, unpacker: &mut Unpacker) -> Result<String, Refusal> {
    let plain = Plain::of(from, most).map_err(|e| Refusal::io("the archive", &e))?;
    let mut archive = Archive::new(Summed::new(plain));
    while let Some(entry) = archive.next()? {
        unpacker.place(&entry, &mut archive)?;
    }
    let mut rest = archive.into_inner();
    // What stands behind the end is part of the digest.
    io::copy(&mut rest, &mut io::sink()).map_err(|e| Refusal::io("the archive", &e))?;
    Ok(rest.digest())
}
