//! The file verbs.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};

use crate::client::{Agent, Client};
use crate::{pattern, until};
use warren::wire::{Code, Error, FRAME, Fields, INITIAL_CREDIT, Message, Request};

fn verb(verb: &str, path: &str) -> Request {
    Request::new("f", verb).set("path", path)
}

/// Writes content with credit; gives the answer.
fn write(client: &mut Client, request: Request, content: &[u8]) -> Result<Fields, Error> {
    client.request(request);
    let mut chunks = content.chunks(FRAME).peekable();
    let (mut allowed, mut ended) = (INITIAL_CREDIT, false);
    loop {
        while let Some(chunk) = chunks.next_if(|chunk| chunk.len() as u64 <= allowed) {
            allowed -= chunk.len() as u64;
            client.send(&Message::data("f", "content", chunk));
        }
        if chunks.peek().is_none() && !ended {
            client.send(&Message::end("f", "content"));
            ended = true;
        }
        match client.next() {
            Message::Credit { octets, .. } => allowed += octets,
            Message::Ok { fields, .. } => return Ok(fields),
            Message::Err { error, .. } => return Err(error),
            other => panic!("unexpected: {other:?}"),
        }
    }
}

fn read(client: &mut Client, request: Request) -> Vec<u8> {
    client.request(request);
    let mut content = Vec::new();
    loop {
        match client.next() {
            Message::Data { payload, .. } => {
                client.send(&Message::credit("f", "content", payload.len() as u64));
                content.extend(payload);
            }
            Message::End { .. } => {}
            Message::Ok { fields, .. } => {
                assert_eq!(fields.number("size"), Some(content.len() as u64));
                return content;
            }
            other => panic!("unexpected: {other:?}"),
        }
    }
}

#[test]
fn content_comes_back_as_it_was_written() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let content = pattern(9 << 20);
    let answer = write(&mut client, verb("file.write", "big"), &content).unwrap();
    assert_eq!(answer.number("size"), Some(content.len() as u64));
    assert!(fs::read(agent.directory().join("big")).unwrap() == content);
    assert!(read(&mut client, verb("file.read", "big")) == content);
    let part = read(&mut client, verb("file.read", "big").set("offset", 1_000_003).set("length", 70_001));
    assert!(part == content[1_000_003..1_070_004]);
    assert!(read(&mut client, verb("file.read", "big").set("offset", 1u64 << 40)).is_empty());
    assert!(read(&mut client, verb("file.read", "big").set("length", 0)).is_empty());
}

#[test]
fn what_the_kernel_makes_up_can_be_read() {
    let agent = Agent::start();
    assert!(read(&mut agent.connect(), verb("file.read", "/proc/self/status")).starts_with(b"Name:\tburrow"));
}

#[test]
fn a_file_is_replaced_whole_and_keeps_its_mode() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let path = agent.directory().join("f");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o751)).unwrap();
    let old = fs::File::open(&path).unwrap();
    client.request(verb("file.write", "f"));
    client.send(&Message::data("f", "content", "ne"));
    client.send(&Message::Request(Request::new("h", "hello")));
    client.next();
    assert_eq!(fs::read(&path).unwrap(), b"old", "the old content is there until the new one is whole");
    client.send(&Message::data("f", "content", "w"));
    client.send(&Message::end("f", "content"));
    assert!(matches!(client.next(), Message::Ok { .. }));
    assert_eq!(fs::read(&path).unwrap(), b"new");
    let (meta, old) = (fs::metadata(&path).unwrap(), old.metadata().unwrap());
    assert_eq!((meta.mode() & 0o7777, meta.ino() != old.ino(), old.len()), (0o751, true, 3));
    write(&mut client, verb("file.write", "f").set("mode", "0600"), b"").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(agent.directory()).unwrap().count(), 2, "the socket and the file, no temporary one");
}

#[test]
fn a_cancelled_write_leaves_the_old_content_and_nothing_else() {
    let agent = Agent::start();
    let mut client = agent.connect();
    fs::write(agent.directory().join("f"), "old").unwrap();
    client.request(verb("file.write", "f"));
    client.send(&Message::data("f", "content", "new"));
    client.send(&Message::Cancel { tag: "f".to_string() });
    assert!(matches!(client.next(), Message::Err { error, .. } if error.is(Code::Cancelled)));
    assert_eq!(fs::read(agent.directory().join("f")).unwrap(), b"old");
    until("the temporary file is gone", || fs::read_dir(agent.directory()).unwrap().count() == 2);
}

#[test]
fn writing_goes_through_a_link_and_appending_adds() {
    let agent = Agent::start();
    let mut client = agent.connect();
    fs::write(agent.directory().join("target"), "old").unwrap();
    symlink("target", agent.directory().join("link")).unwrap();
    write(&mut client, verb("file.write", "link"), b"new").unwrap();
    assert_eq!(fs::read(agent.directory().join("target")).unwrap(), b"new");
    assert!(agent.directory().join("link").is_symlink());
    write(&mut client, verb("file.write", "link").set("append", true), b"er").unwrap();
    write(&mut client, verb("file.write", "fresh").set("append", true), b"1").unwrap();
    assert_eq!(fs::read(agent.directory().join("target")).unwrap(), b"newer");
    assert_eq!(fs::metadata(agent.directory().join("fresh")).unwrap().mode() & 0o7777, 0o644);
}

#[test]
fn new_files_belong_to_the_user_they_are_for() {
    let agent = Agent::start();
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let mut client = agent.connect();
    write(&mut client, verb("file.write", "f").set("user", "1234:77"), b"x").unwrap();
    client.done(verb("file.mkdir", "a/b").set("parents", true).set("mode", "1770").set("user", "1234:77"));
    for (name, mode) in [("f", 0o644), ("a", 0o755), ("a/b", 0o1770)] {
        let meta = fs::metadata(agent.directory().join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (1234, 77, mode), "{name}");
    }
}

#[test]
fn a_directory_is_listed_with_what_it_has() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.done(verb("file.mkdir", "d"));
    fs::write(agent.directory().join("d/two words\n"), "12345").unwrap();
    symlink("/no/where", agent.directory().join("d/link")).unwrap();
    fs::create_dir(agent.directory().join("d/sub")).unwrap();
    nix::unistd::mkfifo(&agent.directory().join("d/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut rows = client.rows(verb("file.list", "d"));
    rows.sort_by_key(|row| row.get("name").map(str::to_string));
    let seen: Vec<_> = rows.iter().map(|row| (row.get("name").unwrap(), row.get("kind").unwrap())).collect();
    assert_eq!(seen, [("fifo", "other"), ("link", "link"), ("sub", "dir"), ("two words\n", "file")]);
    assert_eq!((rows[1].get("target"), rows[3].number("size")), (Some("/no/where"), Some(5)));
    let stat = client.done(verb("file.stat", "d/two words\n"));
    assert_eq!((stat.get("kind"), stat.number("size"), stat.get("mode")), (Some("file"), Some(5), Some("0644")));
    assert!(stat.number("mtime_ms").unwrap() > 1_600_000_000_000);
}

#[test]
fn a_long_list_comes_whole_while_other_requests_are_answered() {
    let agent = Agent::start();
    let mut client = agent.connect();
    fs::create_dir(agent.directory().join("d")).unwrap();
    for n in 0..5000 {
        fs::write(agent.directory().join(format!("d/{n:0>200}")), "").unwrap();
    }
    assert_eq!(client.rows(verb("file.list", "d")).len(), 5000);
}

#[test]
fn files_are_moved_and_removed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let at = |name: &str| agent.directory().join(name);
    fs::write(at("a"), "x").unwrap();
    client.done(Request::new("f", "file.move").set("from", "a").set("to", "b"));
    assert!(!at("a").exists() && at("b").exists());
    client.done(verb("file.remove", "b"));
    fs::create_dir_all(at("d/e")).unwrap();
    fs::write(at("d/e/f"), "x").unwrap();
    symlink(agent.directory(), at("d/out")).unwrap();
    let error = client.refused(verb("file.remove", "d"));
    assert_eq!(error.fields.get("errno"), Some("ENOTEMPTY"));
    client.done(verb("file.remove", "d").set("recursive", true));
    assert!(!at("d").exists() && at("sock").exists(), "a link out of the tree is not followed");
}

#[test]
fn a_tree_deeper_than_any_path_is_removed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (mut at, flags) = (std::fs::File::open(agent.directory()).unwrap().into(), OFlag::O_DIRECTORY);
    for _ in 0..2000 {
        mkdirat(&at, "deep", Mode::S_IRWXU).unwrap();
        drop(openat(&at, "file", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRWXU).unwrap());
        at = openat(&at, "deep", flags, Mode::empty()).unwrap();
    }
    client.done(verb("file.remove", "deep").set("recursive", true));
    assert!(!agent.directory().join("deep").exists());
}

#[test]
fn failures_have_their_errno() {
    let agent = Agent::start();
    let mut client = agent.connect();
    fs::write(agent.directory().join("f"), "x").unwrap();
    nix::unistd::mkfifo(&agent.directory().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (request, code, errno) in [
        (verb("file.read", "none"), Code::NotFound, "ENOENT"),
        (verb("file.read", "/"), Code::FileFailed, "EISDIR"),
        (verb("file.read", "fifo"), Code::FileFailed, "EINVAL"),
        (verb("file.write", "fifo"), Code::FileFailed, "EINVAL"),
        (verb("file.write", "/"), Code::FileFailed, "EISDIR"),
        (verb("file.write", "."), Code::FileFailed, "EISDIR"),
        (verb("file.write", "none/f"), Code::NotFound, "ENOENT"),
        (verb("file.write", "f/f"), Code::FileFailed, "ENOTDIR"),
        (verb("file.list", "f"), Code::FileFailed, "ENOTDIR"),
        (verb("file.stat", "none"), Code::NotFound, "ENOENT"),
        (verb("file.mkdir", "f"), Code::FileFailed, "EEXIST"),
        (verb("file.mkdir", "none/d"), Code::NotFound, "ENOENT"),
        (verb("file.remove", "none"), Code::NotFound, "ENOENT"),
        (verb("file.stat", &"x".repeat(300)), Code::FileFailed, "ENAMETOOLONG"),
        (Request::new("f", "file.move").set("from", "none").set("to", "b"), Code::NotFound, "ENOENT"),
    ] {
        let shown = format!("{request:?}");
        let error = client.refused(request);
        assert!(error.is(code), "{shown}: {error}");
        assert_eq!(error.fields.get("errno"), Some(errno), "{shown}: {error}");
    }
    assert!(client.refused(verb("file.read", "a\0b")).is(Code::BadArgument));
}

/// A file system whose server never answers: whoever touches it waits until it is taken down.
struct Hung {
    server: Option<File>,
    at: PathBuf,
}

impl Hung {
    /// `None` where this process may not mount.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let server = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV;
        nix::mount::mount(Some("hung"), at, Some("fuse"), flags, Some(options.as_str())).ok()?;
        Some(Self { server: Some(server), at: at.to_path_buf() })
    }
}

impl Hung {
    /// The server ends: every call ends with an error.
    fn give_up(&mut self) {
        self.server.take();
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        self.give_up();
        nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_hung_file_system_holds_up_nothing_but_its_own_requests() {
    let agent = Agent::start();
    let Some(mut hung) = Hung::mount(&agent.directory().join("hung")) else { return };
    let mut client = agent.connect();
    let stuck = [
        Request::new("s1", "file.stat").set("path", "hung/f"),
        Request::new("s2", "file.read").set("path", "hung/f"),
        Request::new("s3", "file.write").set("path", "hung/f"),
        Request::new("s4", "file.list").set("path", "hung"),
        Request::new("s5", "file.mkdir").set("path", "hung/d").set("parents", true),
        Request::new("s6", "file.move").set("from", "hung/f").set("to", "hung/g"),
        Request::new("s7", "file.remove").set("path", "hung/f"),
        Request::new("s8", "file.remove").set("path", "hung/d").set("recursive", true),
    ];
    for request in &stuck {
        client.request(request.clone());
    }
    client.send(&Message::data("s3", "content", "x"));
    // The same link, and another one, go on: programs, files, lists, themselves.
    for client in [&mut client, &mut agent.connect()] {
        write(client, verb("file.write", "f"), b"still here").unwrap();
        assert_eq!(read(client, verb("file.read", "f")), b"still here");
        let run = client.run(Request::new("r", "exec.start").arg("cat").arg("f"));
        assert_eq!(run.stdout, b"still here");
        client.done(Request::new("h", "hello"));
    }
    // What is cancelled is answered at once.
    client.send(&Message::Cancel { tag: "s1".to_string() });
    match client.next() {
        Message::Err { tag, error } => assert!(tag == "s1" && error.is(Code::Cancelled), "{error}"),
        other => panic!("unexpected: {other:?}"),
    }
    // A link that goes away does not wait either.
    let mut gone = agent.connect();
    gone.request(verb("file.stat", "hung/x"));
    drop(gone);
    client.done(Request::new("h", "hello"));
    hung.give_up();
    let mut ended: Vec<String> = (1..stuck.len())
        .map(|_| match client.next() {
            Message::Err { tag, error } => {
                assert!(error.fields.get("errno").is_some(), "{error}");
                tag
            }
            other => panic!("unexpected: {other:?}"),
        })
        .collect();
    ended.sort();
    assert_eq!(ended, ["s2", "s3", "s4", "s5", "s6", "s7", "s8"]);
    client.done(Request::new("h", "hello"));
}

#[test]
fn too_many_stuck_file_requests_are_refused_and_leave_room_again() {
    const MOST: usize = 64;
    let agent = Agent::start();
    let Some(mut hung) = Hung::mount(&agent.directory().join("hung")) else { return };
    let mut client = agent.connect();
    for n in 0..MOST {
        client.request(Request::new(format!("s{n}"), "file.stat").set("path", "hung/f"));
    }
    let error = client.refused(verb("file.stat", "."));
    assert!(error.is(Code::NoCapacity), "{error}");
    assert_eq!(error.fields.get("max"), Some("64"));
    assert_eq!(client.run(Request::new("r", "exec.start").arg("echo").arg("on")).stdout, b"on\n");
    hung.give_up();
    for _ in 0..MOST {
        assert!(matches!(client.next(), Message::Err { .. }));
    }
    client.done(verb("file.stat", "."));
}
