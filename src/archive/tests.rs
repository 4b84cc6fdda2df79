use super::*;

fn entry(path: &[u8]) -> Entry {
    Entry { path: path.to_vec(), mode: 0o644, ..Entry::default() }
}

fn read(octets: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, ArchiveError> {
    let (mut archive, mut all) = (Archive::new(octets), Vec::new());
    while let Some(entry) = archive.next()? {
        let mut content = Vec::new();
        archive.read_to_end(&mut content)?;
        all.push((entry, content));
    }
    Ok(all)
}

#[test]
fn what_is_written_is_read() {
    let long = vec![b'n'; 300];
    let huge = Entry { uid: 3_000_000, gid: u32::MAX - 1, ..entry(&long) };
    let attributes = vec![(b"user.a".to_vec(), b"a\0=\n".to_vec()), (b"security.capability".to_vec(), vec![1; 20])];
    let huge = Entry { attributes, ..huge };
    let link = Entry { kind: Kind::SymbolicLink, link: long.clone(), ..entry(b"link") };
    let directory = Entry { kind: Kind::Directory, mode: 0o1777, mtime: 99, ..entry(b"d/") };
    let all: Vec<(Entry, &[u8])> =
        vec![(entry(b"a"), b"content"), (huge, &[7; 1000]), (link, b""), (directory, b""), (entry(b"empty"), b"")];
    let found = read(&pack(&all)).unwrap();
    assert_eq!(found.len(), all.len());
    for ((entry, content), (expected, octets)) in found.into_iter().zip(all) {
        assert_eq!((entry, content), (Entry { size: octets.len() as u64, ..expected }, octets.to_vec()));
    }
}

#[test]
fn what_is_not_read_of_a_content_is_skipped() {
    let octets = pack(&[(entry(b"a"), &[1; 5000]), (entry(b"b"), b"x")]);
    let mut archive = Archive::new(octets.as_slice());
    archive.next().unwrap();
    archive.read_exact(&mut [0; 10]).unwrap();
    assert_eq!(archive.next().unwrap().unwrap().path, b"b");
    assert!(archive.next().unwrap().is_none());
}

#[test]
fn an_archive_that_is_cut_is_an_error_wherever_that_is() {
    let octets = pack(&[(entry(b"a"), &[1; 700]), (entry(&[b'x'; 200]), b"x")]);
    let end = octets.len() - 2 * BLOCK;
    // Where nothing is missing of a content: it may be that its last block is not filled up.
    let is_whole = |cut: usize| (BLOCK + 700..=3 * BLOCK).contains(&cut) || cut > end - BLOCK;
    for cut in 1..end {
        match read(&octets[..cut]) {
            Ok(_) => assert!(is_whole(cut), "{cut}"),
            Err(ArchiveError::Truncated { .. } | ArchiveError::Io(_)) => {}
            Err(error) => panic!("{cut}: {error}"),
        }
    }
}

#[test]
fn an_extended_header_beyond_the_limit_names_it() {
    let mut header = write_entry(&Entry { size: 2 << 20, ..entry(b"x") });
    header[156] = b'L';
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|&octet| u64::from(octet)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let error = read(&header).unwrap_err().to_string();
    assert_eq!(error, "an extended header of 2097152 octets at octet 0 is over the limit of 1048576");
}

/// A header whose field has these octets.
fn with(entry: &Entry, kind: Option<u8>, field: std::ops::Range<usize>, octets: &[u8]) -> Vec<u8> {
    let mut header = write_entry(entry);
    let at = header.len() - BLOCK;
    header[at + field.start..at + field.end][..octets.len()].copy_from_slice(octets);
    header[at + 156] = kind.unwrap_or(header[at + 156]);
    header[at + 148..at + 156].fill(b' ');
    let sum: u64 = header[at..].iter().map(|&octet| u64::from(octet)).sum();
    header[at + 148..at + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

fn pax(records: &[u8]) -> Vec<u8> {
    let mut octets = with(&Entry { size: records.len() as u64, ..entry(b"x") }, Some(b'x'), 0..0, b"");
    octets.extend_from_slice(records);
    octets.resize(octets.len().next_multiple_of(BLOCK), 0);
    octets
}

fn error(octets: &[u8]) -> String {
    let mut archive = Archive::new(octets);
    loop {
        match archive.next() {
            Ok(Some(_)) => {}
            Ok(None) => return String::new(),
            Err(error) => return error.to_string(),
        }
    }
}

#[test]
fn a_size_beyond_all_files_is_refused_and_nothing_overflows() {
    let mut most = [0xff; 12];
    most[..4].copy_from_slice(&[0x80, 0, 0, 0]);
    let huge = with(&entry(b"a"), None, 124..136, &most);
    assert_eq!(error(&[huge, vec![0; 4096]].concat()), "no tar header at octet 0: its size is no number");
    for size in ["18446744073709551615", "9223372036854775808", "-1", "x"] {
        let record = format!("{} size={size}\n", size.len() + 9);
        let octets = [pax(record.as_bytes()), pack(&[(entry(b"a"), b"content")])].concat();
        assert_eq!(error(&octets), "no tar header at octet 0: its records are not of the form of pax", "{size}");
    }
}

#[test]
fn an_empty_value_takes_back_what_an_extended_header_said() {
    let octets = [pax(b"10 path=b\n"), pax(b"8 path=\n"), pack(&[(entry(b"a"), b"content")])].concat();
    assert_eq!(read(&octets).unwrap()[0].0.path, b"a");
}

#[test]
fn extended_headers_of_one_entry_are_bounded_together() {
    let attribute = [b"600028 SCHILY.xattr.user.a=".as_slice(), &vec![b'v'; 600_000], b"\n"].concat();
    assert_eq!(attribute.len(), 600_028);
    let one = [pax(&attribute), pack(&[(entry(b"a"), b"")])].concat();
    assert_eq!(read(&one).unwrap()[0].0.attributes[0].1.len(), 600_000);
    let message = error(&[pax(&attribute), one].concat());
    assert_eq!(message, "extended headers of one entry of 1200056 octets at octet 600576 is over the limit of 1048576");
}

#[test]
fn owners_that_the_kernel_has_none_of_are_refused() {
    let last = entry(b"a");
    assert_eq!(read(&pack(&[(Entry { uid: u32::MAX - 1, ..last.clone() }, b"")])).unwrap()[0].0.uid, u32::MAX - 1);
    let message = error(&pack(&[(Entry { uid: u32::MAX, ..last }, b"")]));
    assert!(message.ends_with("its owner is no number of 32 bits"), "{message}");
}
