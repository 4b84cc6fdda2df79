//! Layers: whatever an archive has in it, it is applied within the root or refused with a sentence.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sched::{CloneFlags, unshare};

use super::Input;
use crate::archive::{Entry, Kind, pack};
use crate::mason;

/// Octets that an archive unpacks to at most.
const MOST: u64 = 1 << 20;
/// Names that paths are made of.
const NAMES: [&str; 14] =
    ["a", "b", "c", "d", ".wh.a", ".wh.b", ".wh..wh..opq", ".", "..", "", ".wh.", ".wh..", ".wh..wh.x", "LONG"];
const KINDS: [Kind; 7] =
    [Kind::File, Kind::HardLink, Kind::SymbolicLink, Kind::Character, Kind::Block, Kind::Directory, Kind::Pipe];

/// The first octet says what the rest is: an archive as it comes, or entries of layers and of what COPY sends.
pub fn unpack(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    match kind % 2 {
        0 => apply(&[(rest.to_vec(), kind & 2 != 0, None)]),
        _ => apply(&layers(rest)),
    }
}

type Layer = (Vec<u8>, bool, Option<Vec<u8>>);

fn path(input: &mut Input<'_>) -> Vec<u8> {
    let parts = (0..1 + input.u8() % 4).map(|_| match NAMES[usize::from(input.u8()) % NAMES.len()] {
        "LONG" => "n".repeat(250 + usize::from(input.u8() % 8)),
        name => name.to_string(),
    });
    parts.collect::<Vec<_>>().join("/").into_bytes()
}

fn layers(data: &[u8]) -> Vec<Layer> {
    let mut input = Input(data);
    let mut layers = Vec::new();
    let mut entries: Vec<(Entry, Vec<u8>)> = Vec::new();
    while !input.ended() && layers.len() < 8 {
        let what = input.u8();
        if what & 0x80 != 0 {
            let packed: Vec<(Entry, &[u8])> = entries.iter().map(|(entry, c)| (entry.clone(), c.as_slice())).collect();
            let target = (what & 0x40 != 0).then(|| [b"/", path(&mut input).as_slice()].concat());
            layers.push((pack(&packed), what & 0x20 == 0, target));
            entries.clear();
            continue;
        }
        let kind = KINDS[usize::from(what) % KINDS.len()];
        let mut entry = Entry { kind, path: path(&mut input), mode: u32::from(input.u16()), ..Entry::default() };
        if matches!(kind, Kind::HardLink | Kind::SymbolicLink) {
            entry.link = path(&mut input);
        }
        if what & 0x40 != 0 {
            (entry.uid, entry.gid, entry.mtime) = (input.u32(), input.u32(), i64::from(input.u32()));
            let prefix = ["user.", "security.", "trusted.", "none."][usize::from(input.u8() % 4)];
            entry.attributes.push((format!("{prefix}{}", input.u8()).into_bytes(), vec![1; input.u16().into()]));
        }
        let content = if kind == Kind::File { vec![what; usize::from(input.u8()) * 9] } else { Vec::new() };
        entries.push((entry, content));
    }
    layers
}

/// Applies layers over a root of their own, which only root can have; otherwise they are only read.
fn apply(layers: &[Layer]) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let root = std::env::temp_dir().join(format!("warren-fuzz-unpack-{}-{number}", std::process::id()));
    fs::create_dir_all(&root).unwrap();
    let outcome = std::thread::scope(|scope| scope.spawn(|| within(&root, layers)).join());
    fs::remove_dir_all(&root).unwrap();
    outcome.unwrap();
}

fn within(root: &PathBuf, layers: &[Layer]) {
    const MARK: &str = "mark-of-the-fuzzed-root";
    fs::write(root.join(MARK), b"").unwrap();
    // Root directory and mode mask are this thread's alone from here on.
    let confined = unshare(CloneFlags::CLONE_FS).and_then(|()| nix::unistd::chroot(root));
    if confined.is_err() {
        for (archive, ..) in layers {
            let _ = mason::read_all(archive, MOST);
        }
        return;
    }
    nix::unistd::chdir("/").unwrap();
    assert!(Path::new("/").join(MARK).exists(), "this is another root");
    for (archive, whiteouts, target) in layers {
        if let Err((code, message)) = mason::apply(archive, MOST, *whiteouts, target.as_deref()) {
            assert!(
                ["BAD_ARCHIVE", "OUT_OF_RANGE", "BUILD_FAILED", "NO_CAPACITY"].contains(&code),
                "{code}: {message}"
            );
            assert!(!message.is_empty());
        }
        assert_no_devices(Path::new("/"));
    }
}

fn assert_no_devices(directory: &Path) {
    use std::os::unix::fs::FileTypeExt;
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        assert!(!kind.is_char_device() && !kind.is_block_device(), "{}", entry.path().display());
        if kind.is_dir() {
            assert_no_devices(&entry.path());
        }
    }
}
