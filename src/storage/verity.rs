//! fs-verity (Documentation/filesystems/fsverity.rst): a file that cannot change any more, and whose damage is an error
//! of reading rather than wrong octets.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use self::uapi::{DigestArg, EnableArg, enable_verity, measure_verity};
use super::space::is_unsupported;

/// A file's digest: the root of its tree of SHA-256 hashes over 4096 octets each, with its length.
pub type Digest = [u8; 32];

/// A digest as text.
pub fn to_hex(digest: &Digest) -> String {
    digest.iter().map(|octet| format!("{octet:02x}")).collect()
}

/// Reads what `to_hex` gives.
pub fn of_hex(text: &str) -> Option<Digest> {
    let mut digest = [0; 32];
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (octet, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *octet = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

const SHA256: u32 = 1;
const TREE_BLOCK: u32 = 4096;

/// What the kernel takes.
mod uapi {
    use super::Digest;

    /// <linux/fsverity.h>
    #[repr(C)]
    pub struct EnableArg {
        pub version: u32,
        pub hash_algorithm: u32,
        pub block_size: u32,
        pub salt_size: u32,
        pub salt_ptr: u64,
        pub sig_size: u32,
        pub reserved1: u32,
        pub sig_ptr: u64,
        pub reserved2: [u64; 11],
    }

    /// <linux/fsverity.h>; the kernel's ends in an array of any length, and its request number counts the first two fields.
    #[repr(C)]
    pub struct DigestArg {
        pub algorithm: u16,
        pub size: u16,
        pub digest: Digest,
    }

    nix::ioctl_write_ptr!(enable_verity, b'f', 133, EnableArg);
    nix::ioctl_readwrite_bad!(measure_verity, nix::request_code_readwrite!(b'f', 134, 4), DigestArg);
}

/// Why a file was not sealed or is not what was sealed.
#[derive(Debug)]
pub enum SealError {
    /// The file system or the kernel has no fs-verity.
    Unsupported,
    /// The file is open for writing somewhere.
    InUse,
    /// It is not the file that was sealed, or is not sealed.
    Exchanged,
    /// The host could not do it.
    Io(io::Error),
}

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported => f.write_str("the file system has no fs-verity"),
            Self::InUse => f.write_str("the file cannot be sealed while it is open for writing"),
            Self::Exchanged => f.write_str("the file is not the one that was sealed"),
            Self::Io(cause) => write!(f, "sealing the file: {cause}"),
        }
    }
}

impl std::error::Error for SealError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(cause) => Some(cause),
            _ => None,
        }
    }
}

fn failed(error: Errno) -> SealError {
    match error {
        Errno::ETXTBSY => SealError::InUse,
        other => {
            let error = io::Error::from(other);
            if is_unsupported(&error) { SealError::Unsupported } else { SealError::Io(error) }
        }
    }
}

/// Seals a regular file for good and gives its digest. `file` is opened for reading only, and no descriptor for writing
/// may be left; a file that is sealed already is fine. Reads the whole file: not for the supervisor's loop.
pub fn seal(file: &File) -> Result<Digest, SealError> {
    let arg = EnableArg {
        version: 1,
        hash_algorithm: SHA256,
        block_size: TREE_BLOCK,
        salt_size: 0,
        salt_ptr: 0,
        sig_size: 0,
        reserved1: 0,
        sig_ptr: 0,
        reserved2: [0; 11],
    };
    loop {
        // SAFETY: the descriptor is open for the length of the call, and the kernel reads a live struct of its own layout.
        match unsafe { enable_verity(file.as_raw_fd(), &raw const arg) } {
            Ok(_) | Err(Errno::EEXIST) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    measure(file)?.ok_or(SealError::Exchanged)
}

/// The digest of a sealed file; `None` where it is not sealed, or cannot be here.
pub fn measure(file: &File) -> Result<Option<Digest>, SealError> {
    let mut arg = DigestArg { algorithm: 0, size: size_of::<Digest>() as u16, digest: [0; 32] };
    // SAFETY: the descriptor is open for the length of the call, and the kernel writes at most `size` octets of digest into
    // a live struct that has room for them.
    match unsafe { measure_verity(file.as_raw_fd(), &raw mut arg) } {
        Ok(_) if u32::from(arg.algorithm) == SHA256 && usize::from(arg.size) == size_of::<Digest>() => {
            Ok(Some(arg.digest))
        }
        // Sealed by somebody else.
        Ok(_) | Err(Errno::EOVERFLOW) => Err(SealError::Exchanged),
        Err(Errno::ENODATA) => Ok(None),
        Err(error) => match failed(error) {
            SealError::Unsupported => Ok(None),
            other => Err(other),
        },
    }
}

/// Whether a file is the one that was sealed with that digest.
pub fn check(file: &File, digest: &Digest) -> Result<(), SealError> {
    if measure(file)?.as_ref() == Some(digest) { Ok(()) } else { Err(SealError::Exchanged) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_their_sizes() {
        assert_eq!(size_of::<EnableArg>(), 128);
        assert_eq!(std::mem::offset_of!(DigestArg, digest), 4);
        // _IOW('f', 133, struct fsverity_enable_arg), _IOWR('f', 134, struct fsverity_digest)
        assert_eq!(nix::request_code_write!(b'f', 133, size_of::<EnableArg>()), 0x4080_6685);
        assert_eq!(nix::request_code_readwrite!(b'f', 134, 4), 0xc004_6686);
    }

    #[test]
    fn a_digest_is_text_and_back() {
        let digest: Digest = std::array::from_fn(|at| at as u8 * 7);
        assert_eq!(of_hex(&to_hex(&digest)), Some(digest));
        for text in ["", "00", &"0g".repeat(32), &"é".repeat(32), &"0".repeat(65)] {
            assert_eq!(of_hex(text), None);
        }
    }

    /// Where the file system can: on others, that it says so.
    #[test]
    fn a_sealed_file_is_told_from_any_other() {
        let dir = std::env::temp_dir().join(format!("warren-verity-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = |name: &str| dir.join(name);
        for (name, octets) in [("a", [1; 10_000]), ("b", [2; 10_000])] {
            std::fs::write(path(name), octets).unwrap();
        }
        let (a, b) = (File::open(path("a")).unwrap(), File::open(path("b")).unwrap());
        assert!(measure(&a).unwrap().is_none());
        assert!(matches!(check(&a, &[0; 32]), Err(SealError::Exchanged)));
        match seal(&a) {
            Err(SealError::Unsupported) => {}
            sealed => {
                let digest = sealed.unwrap();
                assert_eq!(seal(&a).unwrap(), digest);
                check(&a, &digest).unwrap();
                assert!(matches!(check(&b, &digest), Err(SealError::Exchanged)));
                assert!(File::options().write(true).open(path("a")).is_err());
                let _writer = File::options().write(true).open(path("b")).unwrap();
                assert!(matches!(seal(&b), Err(SealError::InUse)));
            }
        }
        std::fs::remove_dir_all(dir).unwrap();
    }
}
