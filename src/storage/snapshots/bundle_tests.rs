use super::*;
use crate::storage::memory_file::{PAGE, taken};
use crate::storage::overlay::BLOCK;
use nix::sys::memfd::{MFdFlags, memfd_create};

const LIMITS: Limits = Limits { memory_bytes: 1 << 20, disk_bytes: 1 << 30, bytes: 1 << 20 };

fn scratch() -> File {
    File::from(memfd_create(c"bundle-test", MFdFlags::MFD_CLOEXEC).unwrap())
}

fn content(file: &File) -> Vec<u8> {
    let mut octets = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut octets, 0).unwrap();
    octets
}

fn manifest() -> Manifest {
    Manifest {
        name: Some("a \"name\"".into()),
        memory_bytes: 64 * PAGE,
        disk_bytes: 16 * BLOCK,
        settings: "{}".into(),
        ..Manifest::default()
    }
}

fn layer(octet: u8) -> File {
    let file = scratch();
    overlay::create(&file, 16 * BLOCK, 0, [5; 32]).unwrap();
    let mut disk = overlay::Overlay::open(file.try_clone().unwrap(), Vec::new(), scratch()).unwrap();
    disk.write_at(u64::from(octet) * BLOCK, &[octet; BLOCK as usize]).unwrap();
    disk.flush().unwrap();
    file
}

/// State, memory and layers.
fn files() -> (File, File, Vec<File>) {
    let (state, memory) = (scratch(), scratch());
    state.write_all_at(b"the state", 0).unwrap();
    memory_file::create(&memory, 64 * PAGE).unwrap();
    memory.write_all_at(&[7; PAGE as usize], 3 * PAGE).unwrap();
    memory.write_all_at(&[8; 2 * PAGE as usize], 62 * PAGE).unwrap();
    (state, memory, vec![layer(3), layer(2)])
}

fn exported(manifest: &Manifest, layers: usize) -> Vec<u8> {
    let (state, memory, all) = files();
    let mut out = Vec::new();
    export(manifest, &Files { state: &state, memory: &memory, layers: &all[..layers] }, &mut out).unwrap();
    out
}

fn import_all(octets: &[u8], limits: &Limits) -> Result<Imported, BundleError> {
    import(&mut &octets[..], limits, |_| Ok(scratch()))
}

#[test]
fn what_is_imported_is_what_was_exported() {
    let (state, memory, layers) = files();
    let octets = exported(&manifest(), 2);
    let mut made = Vec::new();
    let found = import(&mut &octets[..], &LIMITS, |part| {
        made.push(part);
        Ok(scratch())
    });
    let found = found.unwrap();
    assert_eq!(made, [Part::State, Part::Memory, Part::Layer(0), Part::Layer(1)]);
    assert_eq!(found.manifest, Manifest { layers: 2, ..manifest() });
    assert_eq!(found.base_sha256, Some([5; 32]));
    assert_eq!(content(&found.state), content(&state));
    assert_eq!(content(&found.memory), content(&memory));
    assert_eq!(taken(&found.memory).unwrap(), 3 * PAGE, "zero pages are holes");
    for (found, layer) in found.layers.iter().zip(&layers) {
        assert_eq!(content(found), content(layer));
        assert_eq!(taken(found).unwrap(), taken(layer).unwrap());
    }
    assert!((octets.len() as u64) < 10 * PAGE, "{} octets", octets.len());
    let bare = import_all(&exported(&manifest(), 0), &LIMITS).unwrap();
    assert!(bare.layers.is_empty() && bare.base_sha256.is_none());
}

/// Places in a file: all near its ends, and some of the rest.
fn places(len: usize) -> impl Iterator<Item = usize> {
    (0..len).filter(move |&at| at < 600 || at + 200 > len || at.is_multiple_of(211))
}

#[test]
fn a_file_with_a_flipped_bit_is_refused() {
    let octets = exported(&manifest(), 1);
    for at in places(octets.len()) {
        let mut bad = octets.clone();
        bad[at] ^= 1 << (at % 8);
        let error = import_all(&bad, &LIMITS).expect_err(&format!("octet {at} is flipped"));
        assert!(!matches!(error, BundleError::Io { .. }), "octet {at}: {error}");
    }
}

#[test]
fn a_file_that_was_cut_is_refused() {
    let octets = exported(&manifest(), 1);
    for len in places(octets.len()) {
        let error = import_all(&octets[..len], &LIMITS).unwrap_err();
        let fine =
            matches!(error, BundleError::Truncated { .. }) || (len < 16 && matches!(error, BundleError::NotASnapshot));
        assert!(fine, "{len} octets: {error}");
    }
    // What follows the end is not read.
    import_all(&[&octets[..], b"more"].concat(), &LIMITS).unwrap();
}

#[test]
fn a_file_of_a_newer_version_is_told() {
    let mut octets = exported(&manifest(), 0);
    octets[8] = 2;
    assert!(matches!(import_all(&octets, &LIMITS), Err(BundleError::Newer { found: 2 })));
    octets[8] = 0;
    assert!(matches!(import_all(&octets, &LIMITS), Err(BundleError::Value { field: "version", .. })));
    octets[0] = b'w';
    assert!(matches!(import_all(&octets, &LIMITS), Err(BundleError::NotASnapshot)));
}

#[test]
fn sizes_that_are_too_large_are_refused_before_anything_is_made_of_them() {
    let field = |octets: &[u8], limits: &Limits| match import_all(octets, limits) {
        Err(BundleError::Value { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let octets = exported(&manifest(), 2);
    assert_eq!(field(&octets, &Limits { memory_bytes: 63 * PAGE, ..LIMITS }), "memory_bytes");
    assert_eq!(field(&octets, &Limits { disk_bytes: 15 * BLOCK, ..LIMITS }), "disk_bytes");
    assert_eq!(field(&octets, &Limits { bytes: 4 * PAGE, ..LIMITS }), "octets");
    let other = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        field(&exported(&manifest, 2), &LIMITS)
    };
    assert_eq!(other(&|manifest| manifest.memory_bytes = u64::MAX), "memory_bytes");
    assert_eq!(other(&|manifest| manifest.disk_bytes = u64::MAX), "disk_bytes");
    assert_eq!(other(&|manifest| manifest.memory_bytes -= PAGE), "length");
    assert_eq!(other(&|manifest| manifest.disk_bytes -= BLOCK), "length");
    // Of the manifest itself, whose part begins at 16: its length, then the extent's place and length.
    for at in [24, 32, 40] {
        let mut bad = octets.clone();
        bad[at..at + 8].copy_from_slice(&(u64::MAX - 1).to_le_bytes());
        assert!(["length", "extent"].contains(&field(&bad, &LIMITS)), "{at}");
    }
}

#[test]
fn layers_that_are_none_are_refused() {
    let (state, memory, _) = files();
    let other_base = scratch();
    overlay::create(&other_base, 16 * BLOCK, 0, [6; 32]).unwrap();
    let none = scratch();
    none.set_len(overlay::file_bytes(16 * BLOCK).unwrap()).unwrap();
    for layers in [vec![other_base, layer(1)], vec![layer(1), none]] {
        let mut out = Vec::new();
        export(&manifest(), &Files { state: &state, memory: &memory, layers: &layers }, &mut out).unwrap();
        let error = import_all(&out, &LIMITS).unwrap_err();
        assert!(matches!(&error, BundleError::Layer(cause) if cause.is_corrupt()), "{error}");
    }
}
