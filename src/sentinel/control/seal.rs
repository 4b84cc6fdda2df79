//! The cached tasks on disk: encrypted, for they hold passwords of devices (AES-256-GCM; RFC 5116).
//!
//! The key is derived from the core's token, so that what was copied off the disk is of no use without it; where there
//! is no token it is in a file of mode 0600 beside the cache.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::{digest, hmac};

use crate::sentinel::secret::Secret;

const MAGIC: &[u8; 8] = b"WSENTSL1";

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut octets = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut octets)?;
    Ok(octets)
}

/// The key for files in `directory`.
pub fn key(directory: &Path, token: &Secret) -> io::Result<Key> {
    let tag = if token.is_empty() {
        let path = directory.join("cache.key");
        let octets = match fs::read(&path) {
            Ok(octets) => octets,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let octets = random::<32>()?.to_vec();
                replace(&path, &octets)?;
                octets
            }
            Err(e) => return Err(e),
        };
        digest::digest(&digest::SHA256, &octets).as_ref().to_vec()
    } else {
        let key = hmac::Key::new(hmac::HMAC_SHA256, token.reveal().as_bytes());
        hmac::sign(&key, b"warren sentinel task cache").as_ref().to_vec()
    };
    let key = UnboundKey::new(&AES_256_GCM, &tag).map_err(|_| io::Error::other("a key of the wrong length"))?;
    Ok(Key(LessSafeKey::new(key)))
}

/// Opens and closes what is kept.
pub struct Key(LessSafeKey);

impl Key {
    /// Writes a file, whole or not at all.
    pub fn store(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        let nonce = random::<NONCE_LEN>()?;
        let mut sealed = text.to_vec();
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(MAGIC), &mut sealed)
            .map_err(|_| io::Error::other("it cannot be encrypted"))?;
        replace(path, &[&MAGIC[..], &nonce, &sealed].concat())
    }

    /// Reads it again. Nothing when there is none, or it was made with another key, or it is damaged.
    pub fn load(&self, path: &Path) -> Option<Vec<u8>> {
        let raw = fs::read(path).ok()?;
        let (nonce, sealed) = raw.strip_prefix(MAGIC)?.split_first_chunk::<NONCE_LEN>()?;
        let mut sealed = sealed.to_vec();
        let text = self.0.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(MAGIC), &mut sealed).ok()?;
        Some(text.to_vec())
    }
}

/// Replaces a file durably; mode 0600.
pub fn replace(path: &Path, octets: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(octets)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_unreadable_without_its_key() {
        let directory = std::env::temp_dir().join(format!("warren-seal-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("tasks");
        for token in ["", "hunter2"] {
            let token = Secret::new(token.to_string());
            key(&directory, &token).unwrap().store(&path, b"the password is swordfish").unwrap();
            let raw = fs::read(&path).unwrap();
            assert!(!raw.windows(9).any(|nine| nine == b"swordfish"));
            let again = key(&directory, &token).unwrap();
            assert_eq!(again.load(&path).unwrap(), b"the password is swordfish");
            assert_eq!(key(&directory, &Secret::new("other".into())).unwrap().load(&path), None);
            let mut damaged = raw.clone();
            *damaged.last_mut().unwrap() ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(again.load(&path), None);
        }
        fs::remove_dir_all(directory).unwrap();
    }
}
