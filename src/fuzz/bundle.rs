use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::storage::snapshots::bundle::{Files, Imported, Limits, export, import, read};

const LIMITS: Limits = Limits { memory_bytes: 1 << 20, disk_bytes: 1 << 20, bytes: 1 << 20 };

fn scratch() -> File {
    File::from(memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).unwrap())
}

fn content(file: &File) -> Vec<u8> {
    let mut octets = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut octets, 0).unwrap();
    octets
}

/// An exported snapshot of any contents is refused, or comes out as it went in when it is exported again. Digests need not
/// be right: the fuzzer cannot guess them.
pub fn bundle(data: &[u8]) {
    let exact = import(&mut &data[..], &LIMITS, |_| Ok(scratch()));
    let found = read(&mut &data[..], &LIMITS, |_| Ok(scratch()), false);
    assert!(exact.is_err() || found.is_ok());
    let Ok(Imported { manifest, state, memory, layers, .. }) = found else { return };
    assert!(manifest.memory_bytes <= LIMITS.memory_bytes && memory.metadata().unwrap().len() == manifest.memory_bytes);
    let mut out = Vec::new();
    export(&manifest, &Files { state: &state, memory: &memory, layers: &layers }, &mut out).unwrap();
    let again = import(&mut &out[..], &LIMITS, |_| Ok(scratch())).unwrap();
    assert_eq!(again.manifest, manifest);
    assert!(content(&again.state) == content(&state) && content(&again.memory) == content(&memory));
    assert!(again.layers.iter().map(content).eq(layers.iter().map(content)));
}
