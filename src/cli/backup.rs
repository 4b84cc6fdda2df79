//! `node backup` and `node restore`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::Failure;
use super::client::{Client, LOCAL_IO, local};
use super::output::print;
use crate::wire::{Error, Request};

fn broken(file: &Path, e: &io::Error) -> Error {
    local(LOCAL_IO, format!("{}: {e}", file.display()))
}

/// `warren node backup`.
pub fn backup(client: &mut Client, file: &Path) -> Result<u8, Failure> {
    fetch(client, Request::new("", "node.backup"), file)
}

/// Writes what a request gives to a file that is not there yet, or to standard output for `-`.
pub fn fetch(client: &mut Client, request: Request, file: &Path) -> Result<u8, Failure> {
    if file == Path::new("-") {
        client.transfer(request, None, &mut |_, payload| print(payload))?;
        return Ok(0);
    }
    // It holds what sandboxes were given as environment, or their memory: nobody else's to read.
    let mut options = OpenOptions::new();
    let mut to = options.write(true).create_new(true).mode(0o600).open(file).map_err(|e| broken(file, &e))?;
    let done = client
        .transfer(request, None, &mut |_, payload| to.write_all(payload))
        .and_then(|_| to.sync_all().map_err(|e| broken(file, &e)));
    if done.is_err() {
        // Half a copy is none.
        let _ = fs::remove_file(file);
    }
    done?;
    Ok(0)
}

/// What is to be sent: a file, or standard input for `-`.
pub fn source(file: &Path) -> Result<Box<dyn Read>, Failure> {
    Ok(match file == Path::new("-") {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(file).map_err(|e| broken(file, &e))?),
    })
}

/// `warren node restore`.
pub fn restore(client: &mut Client, file: &Path, force: bool) -> Result<u8, Failure> {
    let mut from = source(file)?;
    let request = Request::new("", "node.restore");
    let request = if force { request.set("force", true) } else { request };
    let reply = client.transfer(request, Some(("content", &mut *from)), &mut |_, _| Ok(()))?;
    let known = reply.fields.number("sandboxes").unwrap_or(0);
    print(format!("restored; it knows {known} sandboxes\n"))?;
    Ok(0)
}
