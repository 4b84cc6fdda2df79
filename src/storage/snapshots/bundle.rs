//! One file that holds all of a snapshot, to carry it to another node: written and read as a stream.
//!
//! Little endian:
//!
//! | octets | what |
//! |---|---|
//! | 8 | magic `WARRENSN` |
//! | u32 | version, 1 |
//! | u32 | 0 |
//!
//! Then parts, in this order: manifest, state, memory, each frozen layer (newest first), end. A part is
//!
//! | octets | what |
//! |---|---|
//! | u32 | 1 manifest, 2 state, 3 memory, 4 layer, 5 end |
//! | u32 | of a layer its number from 0, of the end the number of parts before it, else 0 |
//! | u64 | length of the file |
//! | … | extents: u64 offset, u64 length (not 0), that many octets; rising, apart, within the length; the rest is holes |
//! | 16 | the last extent: 2^64 - 1, 0 |
//! | 32 | SHA-256 of all of the part before it; of the end, of the digests of the parts before it |
//!
//! The manifest is a JSON object of at most 64 KiB in one extent (none where it is empty); members that are not known are
//! ignored. Nothing is believed of such a file: sizes are checked before they are used, and a reader that has not come to
//! the end with every digest right has nothing.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::storage::memory_file;
use crate::storage::overlay::{self, MAX_DISK, MAX_LAYERS, OverlayError};
use crate::storage::space::data_extents;

const MAGIC: &[u8; 8] = b"WARRENSN";
/// Version that is written; older ones are read.
pub const VERSION: u32 = 1;
/// Longest manifest, in octets.
const MAX_MANIFEST: u64 = 64 << 10;
/// Longest state file, in octets.
const MAX_STATE: u64 = 64 << 20;
/// Octets that are copied at once.
const CHUNK: usize = 256 << 10;

/// What a snapshot is, beside its files. Member names are the format's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    /// Version of Warren that wrote it.
    pub warren: String,
    /// Its name on the node that it comes from.
    pub name: Option<String>,
    /// Name of the template.
    pub template: String,
    /// Hash of the template's image, in hex: the base under the layers, which has to be on the node that it comes to.
    pub template_sha256: String,
    /// Unix time in milliseconds.
    pub created_ms: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory of the guest, in octets.
    pub memory_bytes: u64,
    /// Size of the root disk, in octets.
    pub disk_bytes: u64,
    /// Frozen layers.
    pub layers: u32,
    /// The processor that it was taken on, as the node writes it.
    pub processor: String,
    /// Further settings of its sandbox, as the node writes them.
    pub settings: String,
}

/// A file of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The manifest.
    Manifest,
    /// The state file.
    State,
    /// The memory file.
    Memory,
    /// A frozen layer, 0 the newest.
    Layer(u32),
    /// What ends the file.
    End,
}

impl Part {
    fn code(self) -> u32 {
        match self {
            Self::Manifest => 1,
            Self::State => 2,
            Self::Memory => 3,
            Self::Layer(_) => 4,
            Self::End => 5,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest => f.write_str("manifest"),
            Self::State => f.write_str("state"),
            Self::Memory => f.write_str("memory"),
            Self::Layer(number) => write!(f, "layer {number}"),
            Self::End => f.write_str("end"),
        }
    }
}

/// Why a snapshot was not written or read.
#[derive(Debug)]
pub enum BundleError {
    /// It does not begin as a snapshot does.
    NotASnapshot,
    /// A newer Warren wrote it.
    Newer {
        /// Its version.
        found: u32,
    },
    /// It ends before it should.
    Truncated {
        /// In which part.
        part: Part,
    },
    /// Its octets are not those that were written.
    Damaged {
        /// In which part.
        part: Part,
    },
    /// A number that cannot be, or is more than is allowed here.
    Value {
        /// In which part.
        part: Part,
        /// What it is.
        field: &'static str,
        /// As found.
        value: u64,
        /// The most, or the one that it has to be.
        limit: u64,
    },
    /// The manifest is not one.
    Manifest(String),
    /// A layer is not one, or does not fit to the others.
    Layer(OverlayError),
    /// Reading or writing failed.
    Io {
        /// At which part.
        part: Part,
        /// The host's reason.
        cause: io::Error,
    },
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotASnapshot => f.write_str("the file is no exported snapshot"),
            Self::Newer { found } => {
                write!(f, "the exported snapshot has version {found}, this program knows versions up to {VERSION}")
            }
            Self::Truncated { part } => write!(f, "the exported snapshot ends in its part: {part}"),
            Self::Damaged { part } => write!(f, "the exported snapshot is damaged in its part: {part}"),
            Self::Value { part, field, value, limit } => {
                write!(f, "the exported snapshot's part {part} has {field} {value} where the limit is {limit}")
            }
            Self::Manifest(why) => write!(f, "the exported snapshot's manifest: {why}"),
            Self::Layer(cause) => write!(f, "the exported snapshot: {cause}"),
            Self::Io { part, cause } => write!(f, "the exported snapshot's part {part}: {cause}"),
        }
    }
}

impl std::error::Error for BundleError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { cause, .. } => Some(cause),
            Self::Layer(cause) => Some(cause),
            _ => None,
        }
    }
}

fn at(part: Part) -> impl Fn(io::Error) -> BundleError {
    move |cause| match cause.kind() {
        ErrorKind::UnexpectedEof => BundleError::Truncated { part },
        _ => BundleError::Io { part, cause },
    }
}

// ---- Writing ----

/// Files of a snapshot that is exported, all readable.
#[derive(Debug)]
pub struct Files<'a> {
    /// The state file.
    pub state: &'a File,
    /// The memory file, which has to be flat.
    pub memory: &'a File,
    /// Frozen layers, newest first.
    pub layers: &'a [File],
}

/// Writes a snapshot. `manifest.layers` is set from `files`. The files must not change meanwhile. Blocks.
pub fn export(manifest: &Manifest, files: &Files<'_>, out: &mut impl Write) -> Result<(), BundleError> {
    let layers = u32::try_from(files.layers.len()).unwrap_or(u32::MAX);
    let manifest = Manifest { layers, ..manifest.clone() };
    let text = serde_json::to_vec(&manifest).map_err(|e| BundleError::Manifest(e.to_string()))?;
    let mut head = Vec::from(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend([0; 4]);
    out.write_all(&head).map_err(at(Part::Manifest))?;
    let mut writer = Writer { out, digests: Sha256::new(), parts: 0 };
    writer.part(Part::Manifest, text.len() as u64, |writer, digest| {
        writer.extent(digest, 0, text.len() as u64)?;
        writer.put(digest, &text)
    })?;
    writer.file(Part::State, files.state)?;
    writer.file(Part::Memory, files.memory)?;
    for (number, layer) in (0..).zip(files.layers) {
        writer.file(Part::Layer(number), layer)?;
    }
    writer.end()
}

struct Writer<'a, W> {
    out: &'a mut W,
    /// Of the digests of the parts so far.
    digests: Sha256,
    parts: u32,
}

impl<W: Write> Writer<'_, W> {
    fn put(&mut self, digest: &mut Sha256, octets: &[u8]) -> io::Result<()> {
        digest.update(octets);
        self.out.write_all(octets)
    }

    fn extent(&mut self, digest: &mut Sha256, offset: u64, len: u64) -> io::Result<()> {
        self.put(digest, &offset.to_le_bytes())?;
        self.put(digest, &len.to_le_bytes())
    }

    fn part(
        &mut self,
        part: Part,
        len: u64,
        content: impl FnOnce(&mut Self, &mut Sha256) -> io::Result<()>,
    ) -> Result<(), BundleError> {
        let mut digest = Sha256::new();
        let write = || {
            let number = if let Part::Layer(number) = part { number } else { 0 };
            self.put(&mut digest, &part.code().to_le_bytes())?;
            self.put(&mut digest, &number.to_le_bytes())?;
            self.put(&mut digest, &len.to_le_bytes())?;
            content(self, &mut digest)?;
            self.extent(&mut digest, u64::MAX, 0)?;
            let digest: [u8; 32] = digest.finalize().into();
            self.digests.update(digest);
            self.parts += 1;
            self.out.write_all(&digest)
        };
        write().map_err(|cause| BundleError::Io { part, cause })
    }

    fn file(&mut self, part: Part, file: &File) -> Result<(), BundleError> {
        let len = file.metadata().map_err(|cause| BundleError::Io { part, cause })?.len();
        self.part(part, len, |writer, digest| {
            let mut buffer = vec![0; CHUNK];
            for extent in data_extents(file, 0..len) {
                let extent = extent?;
                writer.extent(digest, extent.start, extent.end - extent.start)?;
                let mut position = extent.start;
                while position < extent.end {
                    let step = (extent.end - position).min(CHUNK as u64);
                    let chunk = &mut buffer[..step as usize];
                    file.read_exact_at(chunk, position)?;
                    writer.put(digest, chunk)?;
                    position += step;
                }
            }
            Ok(())
        })
    }

    fn end(self) -> Result<(), BundleError> {
        let mut octets = Vec::from(Part::End.code().to_le_bytes());
        octets.extend(self.parts.to_le_bytes());
        octets.extend(0u64.to_le_bytes());
        octets.extend(u64::MAX.to_le_bytes());
        octets.extend(0u64.to_le_bytes());
        octets.extend(self.digests.finalize());
        self.out.write_all(&octets).and_then(|()| self.out.flush()).map_err(at(Part::End))
    }
}

// ---- Reading ----

/// What a node takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most memory of a guest, in octets.
    pub memory_bytes: u64,
    /// Largest disk, in octets; `MAX_DISK` at most.
    pub disk_bytes: u64,
    /// Most octets of all parts together: what there is room for.
    pub bytes: u64,
}

/// A snapshot that was read: all digests are right, its layers are layers of one disk of `manifest.disk_bytes`.
#[derive(Debug)]
pub struct Imported {
    /// What it is.
    pub manifest: Manifest,
    /// The state file. What is in it is for `vmm::snapshot` to judge.
    pub state: File,
    /// The flat memory file, `manifest.memory_bytes` long.
    pub memory: File,
    /// Frozen layers, newest first.
    pub layers: Vec<File>,
    /// Digest of the base that the layers were made over; `None` without layers.
    pub base_sha256: Option<[u8; 32]>,
}

/// Reads a snapshot. `make` gives an empty file (readable and writable) for each part but manifest and end; whoever gave them
/// takes them away again where this fails. All files are on the medium on return. Blocks.
///
/// That the processor fits, that the template is there and that its hash is `base_sha256`, is for the caller to see.
pub fn import(
    from: &mut impl Read,
    limits: &Limits,
    make: impl FnMut(Part) -> io::Result<File>,
) -> Result<Imported, BundleError> {
    read(from, limits, make, true)
}

/// `checked`: whether digests have to be right. Only a fuzz target does without.
pub(crate) fn read(
    from: &mut impl Read,
    limits: &Limits,
    mut make: impl FnMut(Part) -> io::Result<File>,
    checked: bool,
) -> Result<Imported, BundleError> {
    let mut head = [0; 16];
    from.read_exact(&mut head).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => BundleError::NotASnapshot,
        _ => BundleError::Io { part: Part::Manifest, cause: e },
    })?;
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| head[at + i]));
    if &head[..8] != MAGIC {
        return Err(BundleError::NotASnapshot);
    }
    match word(8) {
        VERSION => {}
        found if found > VERSION => return Err(BundleError::Newer { found }),
        found => {
            return Err(value(Part::Manifest, "version", u64::from(found), u64::from(VERSION)));
        }
    }
    exact(Part::Manifest, "reserved", u64::from(word(12)), 0)?;
    let mut reader = Reader { from, digests: Sha256::new(), parts: 0, room: limits.bytes, checked };

    let mut text = Vec::new();
    reader.part(
        Part::Manifest,
        |len| most(Part::Manifest, "length", len, MAX_MANIFEST),
        |offset, octets| {
            text.resize(offset as usize + octets.len(), 0);
            text[offset as usize..].copy_from_slice(octets);
            Ok(())
        },
    )?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| BundleError::Manifest(e.to_string()))?;
    most(Part::Manifest, "memory_bytes", manifest.memory_bytes, limits.memory_bytes)?;
    most(Part::Manifest, "disk_bytes", manifest.disk_bytes, limits.disk_bytes.min(MAX_DISK))?;
    most(Part::Manifest, "layers", u64::from(manifest.layers), MAX_LAYERS as u64)?;

    let mut file = |part, check: &dyn Fn(u64) -> Result<(), BundleError>| -> Result<File, BundleError> {
        let file = make(part).map_err(|cause| BundleError::Io { part, cause })?;
        reader.file(part, &file, check)?;
        Ok(file)
    };
    let state = file(Part::State, &|len| most(Part::State, "length", len, MAX_STATE))?;
    let memory = file(Part::Memory, &|len| exact(Part::Memory, "length", len, manifest.memory_bytes))?;
    memory_file::check(&memory, manifest.memory_bytes, None)
        .map_err(|_| value(Part::Manifest, "memory_bytes", manifest.memory_bytes, limits.memory_bytes))?;
    let mut layers = Vec::new();
    for number in 0..manifest.layers {
        let part = Part::Layer(number);
        let longest = overlay::file_bytes(manifest.disk_bytes).map_err(BundleError::Layer)?;
        layers.push(file(part, &|len| exact(part, "length", len, longest))?);
    }
    reader.end()?;
    let mut base_sha256 = None;
    if !layers.is_empty() {
        let checked = overlay::check_layers(&layers.iter().collect::<Vec<_>>());
        let (disk_bytes, base) = checked.map_err(BundleError::Layer)?;
        exact(Part::Layer(0), "disk size", disk_bytes, manifest.disk_bytes)?;
        base_sha256 = Some(base);
    }
    let files = [(Part::State, &state), (Part::Memory, &memory)].into_iter();
    let numbered = (0..).zip(&layers).map(|(number, file)| (Part::Layer(number), file));
    for (part, file) in files.chain(numbered) {
        file.sync_all().map_err(|cause| BundleError::Io { part, cause })?;
    }
    Ok(Imported { manifest, state, memory, layers, base_sha256 })
}

fn value(part: Part, field: &'static str, value: u64, limit: u64) -> BundleError {
    BundleError::Value { part, field, value, limit }
}

fn most(part: Part, field: &'static str, found: u64, limit: u64) -> Result<(), BundleError> {
    if found <= limit { Ok(()) } else { Err(value(part, field, found, limit)) }
}

fn exact(part: Part, field: &'static str, found: u64, expected: u64) -> Result<(), BundleError> {
    if found == expected { Ok(()) } else { Err(value(part, field, found, expected)) }
}

struct Reader<'a, R> {
    from: &'a mut R,
    digests: Sha256,
    parts: u32,
    /// Octets that may still come.
    room: u64,
    checked: bool,
}

impl<R: Read> Reader<'_, R> {
    fn get<const N: usize>(&mut self, part: Part, digest: &mut Sha256) -> Result<[u8; N], BundleError> {
        let mut octets = [0; N];
        self.from.read_exact(&mut octets).map_err(at(part))?;
        digest.update(octets);
        Ok(octets)
    }

    fn u32(&mut self, part: Part, digest: &mut Sha256) -> Result<u32, BundleError> {
        self.get(part, digest).map(u32::from_le_bytes)
    }

    fn u64(&mut self, part: Part, digest: &mut Sha256) -> Result<u64, BundleError> {
        self.get(part, digest).map(u64::from_le_bytes)
    }

    /// The part that has to come next. `check` judges its length, `put` takes its octets with their offsets, rising.
    fn part(
        &mut self,
        part: Part,
        check: impl FnOnce(u64) -> Result<(), BundleError>,
        mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), BundleError> {
        let mut digest = Sha256::new();
        exact(part, "kind", u64::from(self.u32(part, &mut digest)?), u64::from(part.code()))?;
        let expected = if let Part::Layer(number) = part { number } else { 0 };
        exact(part, "number", u64::from(self.u32(part, &mut digest)?), u64::from(expected))?;
        let len = self.u64(part, &mut digest)?;
        check(len)?;
        let mut buffer = vec![0; CHUNK];
        let mut position = 0;
        loop {
            let (offset, octets) = (self.u64(part, &mut digest)?, self.u64(part, &mut digest)?);
            if (offset, octets) == (u64::MAX, 0) {
                break;
            }
            let end = offset.checked_add(octets).filter(|&end| end <= len && octets > 0 && offset >= position);
            let Some(end) = end else { return Err(value(part, "extent", offset, len)) };
            most(part, "octets", octets, self.room)?;
            self.room -= octets;
            position = offset;
            while position < end {
                let step = (end - position).min(CHUNK as u64);
                let chunk = &mut buffer[..step as usize];
                self.from.read_exact(chunk).map_err(at(part))?;
                digest.update(&*chunk);
                put(position, chunk).map_err(|cause| BundleError::Io { part, cause })?;
                position += step;
            }
        }
        let digest: [u8; 32] = digest.finalize().into();
        self.check(part, &digest)?;
        self.digests.update(digest);
        self.parts += 1;
        Ok(())
    }

    fn file(
        &mut self,
        part: Part,
        file: &File,
        check: impl FnOnce(u64) -> Result<(), BundleError>,
    ) -> Result<(), BundleError> {
        self.part(
            part,
            |len| {
                check(len)?;
                file.set_len(0).and_then(|()| file.set_len(len)).map_err(|cause| BundleError::Io { part, cause })
            },
            |offset, octets| file.write_all_at(octets, offset),
        )
    }

    fn check(&mut self, part: Part, digest: &[u8]) -> Result<(), BundleError> {
        let mut found = [0; 32];
        self.from.read_exact(&mut found).map_err(at(part))?;
        if found == digest || !self.checked { Ok(()) } else { Err(BundleError::Damaged { part }) }
    }

    fn end(mut self) -> Result<(), BundleError> {
        let part = Part::End;
        let mut unused = Sha256::new();
        exact(part, "kind", u64::from(self.u32(part, &mut unused)?), u64::from(part.code()))?;
        exact(part, "parts", u64::from(self.u32(part, &mut unused)?), u64::from(self.parts))?;
        exact(part, "length", self.u64(part, &mut unused)?, 0)?;
        exact(part, "extent", self.u64(part, &mut unused)?, u64::MAX)?;
        exact(part, "extent", self.u64(part, &mut unused)?, 0)?;
        let digest = std::mem::take(&mut self.digests).finalize();
        self.check(part, &digest)
    }
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;
