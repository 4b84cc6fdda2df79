use super::tests::{Counting, disk, open_stack, read_only, scratch};
use super::*;
use std::cell::Cell;
use std::os::unix::fs::MetadataExt;

const BASE_BLOCKS: u64 = 8;

fn empty(blocks: u64) -> File {
    let file = scratch(0);
    create(&file, blocks * BLOCK, BASE_BLOCKS * BLOCK, [7; 32]).unwrap();
    file
}

/// The first octet of each block.
fn blocks_of(overlay: &Overlay) -> Vec<u8> {
    let first = |block| {
        let mut octets = vec![0; BLOCK as usize];
        overlay.read_at(block * BLOCK, &mut octets).unwrap();
        assert!(octets.iter().all(|&octet| octet == octets[0]), "block {block} is mixed");
        octets[0]
    };
    (0..overlay.disk_bytes() / BLOCK).map(first).collect()
}

fn fill(overlay: &mut Overlay, blocks: Range<u64>, octet: u8) {
    overlay.write_at(blocks.start * BLOCK, &vec![octet; ((blocks.end - blocks.start) * BLOCK) as usize]).unwrap();
}

fn content(file: &File) -> Vec<u8> {
    let mut octets = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut octets, 0).unwrap();
    octets
}

#[test]
fn the_newest_layer_that_has_a_block_is_read() {
    let (file, base, mut overlay) = disk(16);
    fill(&mut overlay, 0..4, 101);
    fill(&mut overlay, 10..12, 101);
    let (second, third) = (empty(16), empty(16));
    overlay.push(second.try_clone().unwrap()).unwrap();
    fill(&mut overlay, 2..6, 102);
    overlay.push(third.try_clone().unwrap()).unwrap();
    fill(&mut overlay, 3..4, 103);
    let expected = [101, 101, 102, 103, 102, 102, 7, 8, 0, 0, 101, 101, 0, 0, 0, 0];
    assert_eq!(blocks_of(&overlay), expected);
    overlay.flush().unwrap();
    assert_eq!(overlay.layers(), 2);
    let reopened = open_stack(&third, &[second, file], &base).unwrap();
    assert_eq!(blocks_of(&reopened), expected);
}

#[test]
fn a_frozen_layer_is_read_only_and_never_written() {
    let (file, base, mut overlay) = disk(16);
    fill(&mut overlay, 0..16, 1);
    overlay.push(empty(16)).unwrap();
    let before = content(&file);
    let top = empty(16);
    let layer = read_only(&file);
    let mut overlay = Overlay::open(top, vec![layer], read_only(&base)).unwrap();
    fill(&mut overlay, 3..9, 2);
    overlay.write_at(10, b"part of a block").unwrap();
    overlay.discard(0, 16 * BLOCK).unwrap();
    overlay.flush().unwrap();
    assert!(content(&file) == before);
    assert_eq!(blocks_of(&overlay), [0; 16]);
}

#[test]
fn a_partial_write_keeps_what_a_frozen_layer_has_of_its_block() {
    let (_, _, mut overlay) = disk(16);
    fill(&mut overlay, 9..11, 5);
    overlay.push(empty(16)).unwrap();
    overlay.write_at(10 * BLOCK - 2, b"abcd").unwrap();
    let mut octets = [0; 8];
    overlay.read_at(10 * BLOCK - 4, &mut octets).unwrap();
    assert_eq!(&octets, b"\x05\x05abcd\x05\x05");
}

#[test]
fn a_discard_hides_what_frozen_layers_have_beyond_the_base_too() {
    let (file, base, mut overlay) = disk(16);
    fill(&mut overlay, 12..14, 9);
    let top = empty(16);
    overlay.push(top.try_clone().unwrap()).unwrap();
    overlay.discard(0, 16 * BLOCK).unwrap();
    assert_eq!(blocks_of(&overlay), [0; 16]);
    overlay.flush().unwrap();
    let reopened = open_stack(&top, &[file], &base).unwrap();
    assert_eq!(blocks_of(&reopened), [0; 16]);
    // Only where there is something to hide.
    let in_top: Vec<u64> = (0..16).filter(|&block| reopened.bitmap.get(block)).collect();
    assert_eq!(in_top, (0..8).chain(12..14).collect::<Vec<_>>());
}

#[test]
fn a_pushed_disk_is_on_the_medium() {
    let (file, base, mut overlay) = disk(16);
    fill(&mut overlay, 1..3, 9);
    // Not flushed by hand.
    overlay.push(empty(16)).unwrap();
    drop(overlay);
    let reopened = open_stack(&empty(16), &[file], &base).unwrap();
    assert_eq!(blocks_of(&reopened)[..4], [1, 9, 9, 4]);
}

#[test]
fn what_is_no_empty_layer_of_the_same_disk_is_not_pushed() {
    let (file, base, mut overlay) = disk(16);
    fill(&mut overlay, 0..1, 9);
    let other_base = scratch(0);
    create(&other_base, 16 * BLOCK, BASE_BLOCKS * BLOCK, [8; 32]).unwrap();
    assert!(matches!(overlay.push(other_base), Err(OverlayError::OtherBase)));
    assert!(matches!(overlay.push(empty(17)), Err(OverlayError::Field { field: "disk size", .. })));
    assert!(matches!(overlay.push(scratch(1 << 20)), Err(OverlayError::NotAnOverlay)));
    let full = empty(16);
    let mut other = open_stack(&full, &[], &base).unwrap();
    fill(&mut other, 5..6, 1);
    other.flush().unwrap();
    assert!(matches!(overlay.push(full), Err(OverlayError::NotEmpty)));
    // The disk goes on as it was.
    fill(&mut overlay, 1..2, 9);
    overlay.flush().unwrap();
    assert_eq!(overlay.layers(), 0);
    assert_eq!(blocks_of(&open_stack(&file, &[], &base).unwrap())[..3], [9, 9, 3]);
}

#[test]
fn a_layer_that_does_not_fit_is_named() {
    let (_, base, _) = disk(16);
    let odd = scratch(0);
    create(&odd, 16 * BLOCK, 7 * BLOCK, [7; 32]).unwrap();
    let cut = empty(16);
    cut.set_len(16 * BLOCK).unwrap();
    let other = scratch(0);
    create(&other, 16 * BLOCK, BASE_BLOCKS * BLOCK, [0; 32]).unwrap();
    for bad in [odd, cut, other, scratch(0), scratch(1 << 20)] {
        let error = open_stack(&empty(16), &[empty(16), bad, empty(16)], &base).unwrap_err();
        assert!(matches!(error, OverlayError::Layer { index: 1, .. }), "{error}");
        assert!(error.is_corrupt() && error.to_string().starts_with("frozen layer 1: "), "{error}");
    }
}

#[test]
fn there_are_so_many_layers_and_no_more() {
    let (_, base, mut overlay) = disk(16);
    let mut layers = Vec::new();
    for n in 0..MAX_LAYERS {
        let new = empty(16);
        layers.insert(0, new.try_clone().unwrap());
        overlay.push(new).unwrap();
        fill(&mut overlay, n as u64 % 16..n as u64 % 16 + 1, n as u8 + 100);
    }
    assert!(matches!(overlay.push(empty(16)), Err(OverlayError::TooManyLayers)));
    let expected: Vec<u8> = (0..16).map(|block| (MAX_LAYERS - 16 + block + 100) as u8).collect();
    assert_eq!(blocks_of(&overlay), expected);
    overlay.flush().unwrap();
    // Without the first of all, which stays frozen below and hides nothing.
    let reopened = open_stack(&layers[0], &layers[1..], &base).unwrap();
    assert_eq!(blocks_of(&reopened), expected);
    layers.insert(0, empty(16));
    layers.insert(0, empty(16));
    assert!(matches!(open_stack(&layers[0], &layers[1..], &base), Err(OverlayError::TooManyLayers)));
}

#[test]
fn a_run_of_one_layer_is_one_transfer_however_many_layers_there_are() {
    let (_, _, mut overlay) = disk(1024);
    fill(&mut overlay, 0..1024, 1);
    for n in 0..20 {
        overlay.push(empty(1024)).unwrap();
        fill(&mut overlay, 1000 + n..1001 + n, 2);
    }
    let calls = Cell::new(0);
    let mut buffer = vec![0; 1000 * BLOCK as usize];
    overlay.read(0, buffer.len(), Counting { octets: &mut buffer, calls: &calls }).unwrap();
    assert_eq!(calls.get(), 1);
}

#[test]
fn a_merged_layer_is_sparse_and_keeps_discards() {
    let (file, base, mut overlay) = disk(4096);
    fill(&mut overlay, 0..2000, 1);
    let second = empty(4096);
    overlay.push(second.try_clone().unwrap()).unwrap();
    overlay.discard(0, 1900 * BLOCK).unwrap();
    fill(&mut overlay, 1990..2010, 2);
    overlay.push(empty(4096)).unwrap();
    let expected = blocks_of(&overlay);
    let merged = scratch(3 << 20);
    merged.write_all_at(&[0xee; 1 << 20], 0).unwrap();
    merge(&[&second, &file], &merged).unwrap();
    assert_eq!(blocks_of(&open_stack(&empty(4096), &[merged.try_clone().unwrap()], &base).unwrap()), expected);
    let blocks = merged.metadata().unwrap().blocks() * 512 / BLOCK;
    assert!((110..140).contains(&blocks), "{blocks} blocks are taken");
    // The upper alone says what it said, and the lower's blocks are not in it.
    let alone = scratch(0);
    merge(&[&second], &alone).unwrap();
    assert_eq!(content(&alone), content(&second));
}

#[test]
fn layers_of_different_disks_are_not_merged() {
    let other = scratch(0);
    create(&other, 16 * BLOCK, BASE_BLOCKS * BLOCK, [8; 32]).unwrap();
    let error = merge(&[&other, &empty(16)], &scratch(0)).unwrap_err();
    assert!(matches!(error, OverlayError::Layer { index: 0, .. }), "{error}");
    let error = merge(&[&empty(16), &scratch(0)], &scratch(0)).unwrap_err();
    assert!(matches!(error, OverlayError::Layer { index: 1, .. }), "{error}");
    assert!(merge(&[], &scratch(0)).is_err());
}
