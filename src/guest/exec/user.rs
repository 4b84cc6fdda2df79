//! Whom a program runs as, by the sandbox's own /etc/passwd and /etc/group.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use crate::wire::{Code, Error};

/// What is read of files in /etc at most.
pub(crate) const FILE_MAX: u64 = 1024 * 1024;
/// Supplementary groups at most; the kernel takes 65,536.
const GROUPS_MAX: usize = 256;

/// A user as the kernel knows it, and what its environment is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory and name, where /etc/passwd has the user.
    pub account: Option<(Vec<u8>, Vec<u8>)>,
}

/// Resolves `uid`, `name`, `uid:gid`, `name:group` and so on. A uid need not be in /etc/passwd: its
/// group is then of the same number.
pub(crate) fn resolve(user: &str) -> Result<Identity, Error> {
    resolve_in(user, &read_file("/etc/passwd"), &read_file("/etc/group"))
}

/// Whether that names root and not just somebody whom the sandbox's /etc/passwd, which its programs may write, says to be uid 0.
pub(crate) fn names_root(user: &str) -> bool {
    matches!(user.split(':').next(), Some("0" | "root"))
}

fn resolve_in(user: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, Error> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let entry = find_account(user, passwd);
    let uid = match (&entry, parse_id(user)) {
        (Some(entry), _) => entry.uid,
        (None, Some(uid)) => uid,
        (None, None) => return Err(unknown("user", user, "/etc/passwd")),
    };
    let gid = match wanted_group {
        Some(wanted) => match find_group(wanted, group).or_else(|| parse_id(wanted)) {
            Some(gid) => gid,
            None => return Err(unknown("group", wanted, "/etc/group")),
        },
        None => entry.as_ref().map_or(uid, |entry| entry.gid),
    };
    // As docker does: whoever names a group gets that group only.
    let groups = match (&entry, wanted_group) {
        (Some(entry), None) => groups_of(&entry.name, gid, group),
        _ => vec![gid],
    };
    Ok(Identity { uid, gid, groups, account: entry.map(|entry| (entry.name, entry.home)) })
}

fn unknown(what: &str, name: &str, file: &str) -> Error {
    Error::new(Code::BadArgument, format!("{what} {name} is not in the sandbox's {file}")).with("argument", "user")
}

/// The user's number, where the user is written as one. The number -1 means "no change" to the kernel.
fn parse_id(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|&id| id != u32::MAX)
}

struct Entry {
    name: Vec<u8>,
    uid: u32,
    gid: u32,
    home: Vec<u8>,
}

fn find_account(user: &str, passwd: &[u8]) -> Option<Entry> {
    let wanted = parse_id(user);
    passwd.split(|&b| b == b'\n').find_map(|line| {
        // name:password:uid:gid:comment:home:shell
        let mut fields = line.split(|&b| b == b':');
        let name = fields.next()?;
        let uid = number(fields.nth(1)?)?;
        if wanted.map_or(name != user.as_bytes(), |wanted| wanted != uid) {
            return None;
        }
        let gid = number(fields.next()?)?;
        let home = fields.nth(1).unwrap_or_default().to_vec();
        Some(Entry { name: name.to_vec(), uid, gid, home })
    })
}

fn find_group(wanted: &str, group: &[u8]) -> Option<u32> {
    group.split(|&b| b == b'\n').find_map(|line| {
        // name:password:gid:member,member
        let mut fields = line.split(|&b| b == b':');
        (fields.next()? == wanted.as_bytes()).then(|| number(fields.nth(1)?))?
    })
}

fn groups_of(name: &[u8], gid: u32, group: &[u8]) -> Vec<u32> {
    let mut groups = vec![gid];
    for line in group.split(|&b| b == b'\n') {
        let mut fields = line.split(|&b| b == b':');
        let found = fields.nth(2).and_then(number);
        let members = fields.next().unwrap_or_default();
        if let Some(found) = found
            && members.split(|&b| b == b',').any(|member| member == name)
            && !groups.contains(&found)
            && groups.len() < GROUPS_MAX
        {
            groups.push(found);
        }
    }
    groups
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok().and_then(parse_id)
}

/// A file of the sandbox's: it may be missing, huge, or a FIFO that nobody writes to. What it begins with.
pub(crate) fn read_file(path: &str) -> Vec<u8> {
    let mut content = Vec::new();
    if let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
        && file.metadata().is_ok_and(|meta| meta.is_file())
    {
        let _ = file.take(FILE_MAX).read_to_end(&mut content);
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbroken\nann:x:1000:1000::/home/ann:/bin/sh\n7:x:1007:1007::/home/seven:\n";
    const GROUP: &[u8] = b"root:x:0:\nann:x:1000:\ndialout:x:20:bob,ann\nbad:x:-1:ann\nwheel:x:10:ann";

    #[test]
    fn a_name_gives_the_ids_and_the_supplementary_groups() {
        let ann = resolve_in("ann", PASSWD, GROUP).unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 1000, vec![1000, 20, 10]));
        assert_eq!(ann.account, Some((b"ann".to_vec(), b"/home/ann".to_vec())));
    }

    #[test]
    fn a_number_means_the_uid_also_where_it_could_be_a_name() {
        assert_eq!(resolve_in("1000", PASSWD, GROUP).unwrap().groups, vec![1000, 20, 10]);
        assert_eq!(resolve_in("7", PASSWD, GROUP).unwrap().uid, 7);
    }

    #[test]
    fn a_uid_that_is_not_in_passwd_has_the_group_of_the_same_number() {
        let stranger = resolve_in("4242", PASSWD, GROUP).unwrap();
        assert_eq!((stranger.uid, stranger.gid, stranger.groups), (4242, 4242, vec![4242]));
    }

    #[test]
    fn a_named_group_is_the_only_one() {
        let ann = resolve_in("ann:dialout", PASSWD, GROUP).unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups), (1000, 20, vec![20]));
        assert_eq!(resolve_in("0:99", PASSWD, GROUP).unwrap().gid, 99);
    }

    #[test]
    fn unknown_and_hostile_names_are_typed_errors() {
        for user in ["", "bob", "ann:nobody", ":", "-1", "4294967295", "99999999999", "ann:"] {
            let error = resolve_in(user, PASSWD, GROUP).unwrap_err();
            assert!(error.is(Code::BadArgument), "{user}: {error}");
        }
    }
}
