//! Directories as a tar archive on standard input or output: `cp - SANDBOX:DIRECTORY`, `cp SANDBOX:DIRECTORY -`.

use std::io::{self, Read};

use super::super::Failure;
use super::super::output::print;
use super::{Copier, MAX_DEPTH, is_contents, is_name, join, last_name, mode_of};
use crate::archive::{Archive, BLOCK, Entry, Kind, write_entry};
use crate::wire::{Error, Fields};

/// What ends an archive: two blocks of zeroes.
const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// The path of an entry below `root`; `None` where it would lead out of it. Empty for the root itself.
fn place(root: &[u8], path: &[u8]) -> Option<Vec<u8>> {
    if path.starts_with(b"/") {
        return None;
    }
    let mut names = path.split(|&b| b == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.try_fold(root.to_vec(), |path, name| is_name(name).then(|| join(&path, name)))
}

/// Unpacks an archive into a directory of the sandbox. Links are made when all else is done, so that nothing in the archive
/// is written through one of its own.
pub(super) fn send(copier: &mut Copier, archive: &mut dyn Read, to: &[u8]) -> Result<(), Failure> {
    let mut archive = Archive::new(archive);
    let mut links = Vec::new();
    while let Some(entry) = archive.next().map_err(|e| super::broken("standard input", &io::Error::other(e)))? {
        let shown = String::from_utf8_lossy(&entry.path).into_owned();
        let Some(path) = place(to, &entry.path) else {
            copier.leave_out(shown, "it leads out of the directory");
            continue;
        };
        match entry.kind {
            // The agent is root there, and can fill one that its owner may not write.
            Kind::Directory => copier.make_directory(&path, entry.mode & 0o777)?,
            Kind::File => {
                if let Some(parent) = path.iter().rposition(|&b| b == b'/').filter(|&at| at > 0) {
                    copier.make_directory(&path[..parent], 0o755)?;
                }
                copier.progress.begin(&shown, Some(entry.size));
                copier.send_stream(&mut archive, &path, Some(entry.mode & 0o777))?;
            }
            Kind::SymbolicLink => links.push((path, entry.link)),
            Kind::HardLink => copier.leave_out(shown, "it is a further name of another file"),
            Kind::Character | Kind::Block | Kind::Pipe => copier.leave_out(shown, "neither a file nor a directory"),
        }
    }
    for (path, target) in links {
        copier.make_link(&path, &target)?;
    }

    Ok(())
}

/// Writes a directory of the sandbox, with its name in front of all paths, or `.` where only what is in it was asked for.
pub(super) fn receive(copier: &mut Copier, from: &[u8], directory: &Fields) -> Result<(), Failure> {
    let name = last_name(from).filter(|_| !is_contents(from)).unwrap_or(b".");
    let mut left = vec![(from.to_vec(), name.to_vec(), entry_of(directory, Kind::Directory), 0)];
    while let Some((from, name, mut entry, depth)) = left.pop() {
        entry.path = [&name, &b"/"[..]].concat();
        print(write_entry(&entry))?;
        let mut rows = copier.client.call(copier.request("file.list", &from))?.items;
        rows.sort_by(|a, b| a.bytes("name").cmp(&b.bytes("name")));
        for row in rows {
            let Some(own) = row.bytes("name").filter(|name| is_name(name)) else {
                copier.leave_out(String::from_utf8_lossy(&name), "an entry has an impossible name");
                continue;
            };
            let (path, name) = (join(&from, own), join(&name, own));
            match row.get("kind") {
                Some("dir") if depth < MAX_DEPTH => left.push((path, name, entry_of(&row, Kind::Directory), depth + 1)),
                Some("file") => receive_file(copier, &path, Entry { path: name, ..entry_of(&row, Kind::File) })?,
                Some("link") => {
                    let link = row.bytes("target").unwrap_or_default().to_vec();
                    print(write_entry(&Entry { path: name, link, ..entry_of(&row, Kind::SymbolicLink) }))?;
                }
                Some("dir") => copier.leave_out(String::from_utf8_lossy(&name), "too deep"),
                _ => copier.leave_out(String::from_utf8_lossy(&name), "neither a file nor a directory"),
            }
        }
    }
    print(END)?;
    Ok(())
}

/// An entry is as long as its header says: a file that shrinks meanwhile is filled up with zeroes, and counts as left out.
fn receive_file(copier: &mut Copier, path: &[u8], entry: Entry) -> Result<(), Failure> {
    print(write_entry(&entry))?;
    let mut left = entry.size;
    let mut output = Ok(());
    if left > 0 {
        let request = copier.request("file.read", path).set("length", entry.size);
        let done = copier.client.transfer(request, None, &mut |_, payload| {
            let part = &payload[..payload.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
            left -= part.len() as u64;
            output = print(part);
            output.as_ref().map_err(|e: &io::Error| e.kind().into()).copied()
        });
        output?;
        done?;
    }
    if left > 0 {
        copier.leave_out(String::from_utf8_lossy(&entry.path), "it became shorter meanwhile");
    }
    let zeroes = [0; 64 * 1024];
    let mut filling = left + entry.size.next_multiple_of(BLOCK as u64) - entry.size;
    while filling > 0 {
        let part = usize::try_from(filling).unwrap_or(usize::MAX).min(zeroes.len());
        print(&zeroes[..part])?;
        filling -= part as u64;
    }
    Ok(())
}

/// What a sandbox says of a file, as an entry without a path.
fn entry_of(row: &Fields, kind: Kind) -> Entry {
    let number = |key: &str| row.number(key).unwrap_or(0);
    let id = |key: &str| u32::try_from(number(key)).unwrap_or(u32::MAX);
    Entry {
        kind,
        mode: mode_of(row),
        uid: id("uid"),
        gid: id("gid"),
        size: if kind == Kind::File { number("size") } else { 0 },
        mtime: i64::try_from(number("mtime_ms") / 1000).unwrap_or(0),
        ..Entry::default()
    }
}

/// Whether a place is one where an archive belongs: a directory that is there, or one that is named as such.
pub(super) fn is_directory(copier: &mut Copier, path: &[u8]) -> Result<bool, Error> {
    if path.ends_with(b"/") {
        return Ok(true);
    }
    Ok(copier.stat(path)?.is_some_and(|found| found.get("kind") == Some("dir")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_stay_below_their_directory() {
        let under = |path: &[u8]| place(b"/workspace", path);
        assert_eq!(under(b"./a/b").as_deref(), Some(&b"/workspace/a/b"[..]));
        assert_eq!(under(b"./").as_deref(), Some(&b"/workspace"[..]));
        assert_eq!(under(b"a//b/").as_deref(), Some(&b"/workspace/a/b"[..]));
        for bad in [&b"/etc/passwd"[..], b"../x", b"a/../../x", b"a\0b"] {
            assert_eq!(under(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_entry_has_what_the_sandbox_says_and_no_special_bits() {
        let row = Fields::new().with("mode", "4755").with("size", 7).with("uid", 1000).with("mtime_ms", 5_999);
        let entry = entry_of(&row, Kind::File);
        assert_eq!((entry.mode, entry.size, entry.uid, entry.mtime), (0o755, 7, 1000, 5));
        assert_eq!(entry_of(&row, Kind::Directory).size, 0);
    }
}
