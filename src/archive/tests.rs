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
    let huge = Entry { uid: 3_000_000, gid: u32::MAX, ..entry(&long) };
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
    let whole = read(&octets).unwrap().len();
    for cut in 1..octets.len() - 2 * BLOCK {
        match read(&octets[..cut]) {
            Ok(found) => assert!(found.len() < whole && cut % BLOCK == 0, "{cut}"),
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
