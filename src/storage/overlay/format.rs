//! The file of one layer: header, sizes, and what can be wrong with them.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use super::MAX_LAYERS;
use super::bitmap::Bitmap;

/// Unit of copying between the files of a disk, in octets.
pub const BLOCK: u64 = 4096;
/// Largest disk, in octets.
pub const MAX_DISK: u64 = 16 << 40;

const MAGIC: &[u8; 8] = b"WARRENOV";
const VERSION: u32 = 1;
const HEADER: usize = 80;
pub(super) const BITMAP_OFFSET: u64 = 4096;

/// Why an overlay could not be made or opened.
#[derive(Debug)]
pub enum OverlayError {
    /// The host could not do it.
    Io {
        /// What was being done.
        doing: &'static str,
        /// The host's reason.
        cause: io::Error,
    },
    /// The file does not start as an overlay does.
    NotAnOverlay,
    /// A field of the header has a value that it cannot have.
    Field {
        /// Its name.
        field: &'static str,
        /// As found.
        value: u64,
        /// What may stand there.
        expected: String,
    },
    /// A file is shorter than its header, or the overlay's, says.
    TooShort {
        /// Which file.
        file: &'static str,
        /// As found, in octets.
        len: u64,
        /// Least length, in octets.
        expected: u64,
    },
    /// The bitmap has bits beyond the last block.
    BitsBeyondEnd,
    /// It was made over another base than the layers of its disk.
    OtherBase,
    /// It is to be the empty layer of a disk, and has blocks.
    NotEmpty,
    /// A disk of more frozen layers than it may have.
    TooManyLayers,
    /// One of the frozen layers.
    Layer {
        /// Which: 0 is the newest.
        index: usize,
        /// What is wrong with it.
        cause: Box<OverlayError>,
    },
}

impl OverlayError {
    /// Whether the file's contents are at fault rather than the host.
    pub fn is_corrupt(&self) -> bool {
        match self {
            Self::Io { .. } | Self::TooManyLayers => false,
            Self::Layer { cause, .. } => cause.is_corrupt(),
            _ => true,
        }
    }
}

impl fmt::Display for OverlayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { doing, cause } => write!(f, "{doing}: {cause}"),
            Self::NotAnOverlay => f.write_str("the file is not an overlay"),
            Self::Field { field, value, expected } => {
                write!(f, "overlay header: {field} is {value}, must be {expected}")
            }
            Self::TooShort { file, len, expected } => write!(f, "{file} has {len} octets, needs {expected}"),
            Self::BitsBeyondEnd => f.write_str("the overlay's bitmap has bits beyond the disk's end"),
            Self::OtherBase => f.write_str("the overlay was made over another base"),
            Self::NotEmpty => f.write_str("the overlay that is to be a new layer is not empty"),
            Self::TooManyLayers => write!(f, "the disk would have more than {MAX_LAYERS} frozen layers"),
            Self::Layer { index, cause } => write!(f, "frozen layer {index}: {cause}"),
        }
    }
}

impl std::error::Error for OverlayError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { cause, .. } => Some(cause),
            Self::Layer { cause, .. } => Some(cause),
            _ => None,
        }
    }
}

pub(super) fn while_doing(doing: &'static str) -> impl FnOnce(io::Error) -> OverlayError {
    move |cause| OverlayError::Io { doing, cause }
}

/// The header's numbers. All layers of a disk have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub disk_bytes: u64,
    pub base_bytes: u64,
    pub base_sha256: [u8; 32],
}

impl Geometry {
    pub fn check(&self) -> Result<(), OverlayError> {
        let (disk, base) = (self.disk_bytes, self.base_bytes);
        if disk == 0 || disk % BLOCK != 0 || disk > MAX_DISK {
            let expected = format!("a multiple of {BLOCK} up to {MAX_DISK}");
            return Err(OverlayError::Field { field: "disk size", value: disk, expected });
        }
        if base % BLOCK != 0 || base > disk {
            let expected = format!("a multiple of {BLOCK} up to the disk size of {disk}");
            return Err(OverlayError::Field { field: "base size", value: base, expected });
        }
        Ok(())
    }

    pub fn blocks(&self) -> u64 {
        self.disk_bytes / BLOCK
    }

    pub fn data_offset(&self) -> u64 {
        (BITMAP_OFFSET + self.blocks().div_ceil(8)).next_multiple_of(BLOCK)
    }

    pub fn file_bytes(&self) -> u64 {
        self.data_offset() + self.disk_bytes
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(BLOCK as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.disk_bytes.to_le_bytes());
        header[24..32].copy_from_slice(&self.base_bytes.to_le_bytes());
        header[32..40].copy_from_slice(&BITMAP_OFFSET.to_le_bytes());
        header[40..48].copy_from_slice(&self.data_offset().to_le_bytes());
        header[48..].copy_from_slice(&self.base_sha256);
        header
    }

    fn decode(header: &[u8; BITMAP_OFFSET as usize]) -> Result<Self, OverlayError> {
        let u32_at = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])));
        let u64_at = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[at + i]));
        let exact = |field, value, expected: u64| {
            if value == expected {
                Ok(())
            } else {
                Err(OverlayError::Field { field, value, expected: expected.to_string() })
            }
        };
        if &header[..8] != MAGIC {
            return Err(OverlayError::NotAnOverlay);
        }
        exact("version", u32_at(8), u64::from(VERSION))?;
        exact("block size", u32_at(12), BLOCK)?;
        let mut base_sha256 = [0; 32];
        base_sha256.copy_from_slice(&header[48..HEADER]);
        let geometry = Self { disk_bytes: u64_at(16), base_bytes: u64_at(24), base_sha256 };
        geometry.check()?;
        exact("bitmap offset", u64_at(32), BITMAP_OFFSET)?;
        exact("data offset", u64_at(40), geometry.data_offset())?;
        if let Some(&octet) = header[HEADER..].iter().find(|&&octet| octet != 0) {
            exact("reserved octet", u64::from(octet), 0)?;
        }
        Ok(geometry)
    }

    /// Whether a layer of geometry `other` can be one of the same disk.
    pub fn agrees(&self, other: &Self) -> Result<(), OverlayError> {
        for (field, value, expected) in
            [("disk size", other.disk_bytes, self.disk_bytes), ("base size", other.base_bytes, self.base_bytes)]
        {
            if value != expected {
                let expected = format!("{expected}, as in the other layers");
                return Err(OverlayError::Field { field, value, expected });
            }
        }
        if other.base_sha256 == self.base_sha256 { Ok(()) } else { Err(OverlayError::OtherBase) }
    }
}

/// Reads header and bitmap of a layer. Its contents are checked in full; nothing in it is trusted.
pub(super) fn read(file: &File) -> Result<(Geometry, Bitmap), OverlayError> {
    let len = length(file).map_err(while_doing("measuring the overlay"))?;
    let too_short = |expected| Err(OverlayError::TooShort { file: "the overlay", len, expected });
    if len < BITMAP_OFFSET {
        return too_short(BITMAP_OFFSET);
    }
    let geometry = read_header(file)?;
    if len < geometry.file_bytes() {
        return too_short(geometry.file_bytes());
    }
    let bitmap = Bitmap::read(file, geometry.blocks())?;
    Ok((geometry, bitmap))
}

/// Whether a file is a layer without blocks, of this geometry. It does with reading alone, which is what a disk's thread
/// may do in its jail.
pub(super) fn check_blank(file: &File, geometry: &Geometry) -> Result<(), OverlayError> {
    geometry.agrees(&read_header(file)?)?;
    file.read_exact_at(&mut [0], geometry.file_bytes() - 1).map_err(while_doing("reading the new layer's end"))?;
    let mut octets = vec![0; (geometry.data_offset() - BITMAP_OFFSET).min(64 << 10) as usize];
    let mut position = BITMAP_OFFSET;
    while position < geometry.data_offset() {
        let step = octets.len().min((geometry.data_offset() - position) as usize);
        let part = &mut octets[..step];
        file.read_exact_at(part, position).map_err(while_doing("reading the new layer's bitmap"))?;
        if part.iter().any(|&octet| octet != 0) {
            return Err(OverlayError::NotEmpty);
        }
        position += step as u64;
    }
    Ok(())
}

fn read_header(file: &File) -> Result<Geometry, OverlayError> {
    let mut header = [0; BITMAP_OFFSET as usize];
    file.read_exact_at(&mut header, 0).map_err(while_doing("reading the overlay's header"))?;
    Geometry::decode(&header)
}

/// Of a regular file or a block device, in octets.
pub(super) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Writes an empty overlay into `file`, whatever it held. Sizes in octets, multiples of `BLOCK`;
/// `base_bytes` at most `disk_bytes`. Nothing is synced: the first flush does that, and a file that was cut
/// by a lost host before is refused by `open`.
pub fn create(file: &File, disk_bytes: u64, base_bytes: u64, base_sha256: [u8; 32]) -> Result<(), OverlayError> {
    let geometry = Geometry { disk_bytes, base_bytes, base_sha256 };
    geometry.check()?;
    file.set_len(0).map_err(while_doing("emptying the overlay"))?;
    file.set_len(geometry.file_bytes()).map_err(while_doing("sizing the overlay"))?;
    file.write_all_at(&geometry.encode(), 0).map_err(while_doing("writing the overlay's header"))
}
