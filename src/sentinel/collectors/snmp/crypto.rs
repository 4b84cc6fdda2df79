//! Keys and ciphers of the user-based security model (RFC 3414, RFC 3826, RFC 7860; AES-192 and AES-256 after
//! draft-blumenthal-aes-usm-04, and in the form that Cisco and others made of draft-reeder-snmpv3-usm-3desede).
//!
//! Hashes and block ciphers are crates; HMAC, CBC and CFB are the few lines around them.

use aes::cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use sha2::Digest;
use std::sync::Arc;
use zeroize::Zeroizing;

/// A password's key; overwritten when it is not needed any more.
pub type Key = Arc<Zeroizing<Vec<u8>>>;

/// How messages are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Auth {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Auth {
    /// By the name that a task gives.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            "md5" => Self::Md5,
            "sha" | "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            _ => return None,
        })
    }

    /// Octets of the signature in a message.
    pub fn signature_len(self) -> usize {
        match self {
            Self::Md5 | Self::Sha1 => 12,
            Self::Sha224 => 16,
            Self::Sha256 => 24,
            Self::Sha384 => 32,
            Self::Sha512 => 48,
        }
    }

    fn hash(self, parts: &[&[u8]]) -> Vec<u8> {
        fn of<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut digest = D::new();
            parts.iter().for_each(|part| digest.update(part));
            digest.finalize().to_vec()
        }
        match self {
            Self::Md5 => of::<md5::Md5>(parts),
            Self::Sha1 => of::<sha1::Sha1>(parts),
            Self::Sha224 => of::<sha2::Sha224>(parts),
            Self::Sha256 => of::<sha2::Sha256>(parts),
            Self::Sha384 => of::<sha2::Sha384>(parts),
            Self::Sha512 => of::<sha2::Sha512>(parts),
        }
    }

    /// The key of a password: its repetition to a mebi-octet, hashed (RFC 3414 §A.2). Takes some milliseconds.
    pub fn password_key(self, password: &[u8]) -> Vec<u8> {
        const TOTAL: usize = 1 << 20;
        if password.is_empty() {
            return self.hash(&[]);
        }
        let repeated: Zeroizing<Vec<u8>> = Zeroizing::new(password.iter().copied().cycle().take(TOTAL).collect());
        self.hash(&[&repeated])
    }

    /// The key at one engine.
    pub fn localized(self, key: &[u8], engine: &[u8]) -> Vec<u8> {
        self.hash(&[key, engine, key])
    }

    /// The signature of a message (RFC 2104, cut to its length).
    pub fn sign(self, key: &[u8], message: &[&[u8]]) -> Vec<u8> {
        let block = match self {
            Self::Sha384 | Self::Sha512 => 128,
            _ => 64,
        };
        // Localised keys are hashes, never longer than a block.
        let mut padded = key.to_vec();
        padded.resize(block, 0);
        let inner: Zeroizing<Vec<u8>> = Zeroizing::new(padded.iter().map(|octet| octet ^ 0x36).collect());
        let outer: Zeroizing<Vec<u8>> = Zeroizing::new(padded.iter().map(|octet| octet ^ 0x5c).collect());
        let mut parts: Vec<&[u8]> = vec![&inner];
        parts.extend_from_slice(message);
        let mut signature = self.hash(&[&outer, &self.hash(&parts)]);
        signature.truncate(self.signature_len());
        signature
    }
}

/// Whether two signatures are equal, in a time that does not tell where they differ.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

/// How messages are hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Privacy {
    Des,
    Aes128,
    Aes192,
    Aes256,
    /// With the key extended as Cisco does.
    Aes192C,
    Aes256C,
}

impl Privacy {
    /// By the name that a task gives.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            "des" => Self::Des,
            "aes" | "aes128" => Self::Aes128,
            "aes192" => Self::Aes192,
            "aes256" => Self::Aes256,
            "aes192c" => Self::Aes192C,
            "aes256c" => Self::Aes256C,
            _ => return None,
        })
    }

    fn key_len(self) -> usize {
        match self {
            Self::Des | Self::Aes128 => 16,
            Self::Aes192 | Self::Aes192C => 24,
            Self::Aes256 | Self::Aes256C => 32,
        }
    }

    /// The key at one engine, made longer where the hash is too short.
    pub fn localized(self, auth: Auth, password_key: &[u8], engine: &[u8]) -> Vec<u8> {
        let mut key = auth.localized(password_key, engine);
        while key.len() < self.key_len() {
            let more = match self {
                // Reeder: the key so far is the password of the next part.
                Self::Aes192C | Self::Aes256C => auth.localized(&auth.password_key(&key), engine),
                // Blumenthal: the hash of the key so far.
                _ => auth.hash(&[&key]),
            };
            key.extend(more);
        }
        key.truncate(self.key_len());
        key
    }

    /// Hides octets; `salt` must never repeat under one key.
    pub fn encrypt(self, key: &[u8], boots: u32, time: u32, salt: [u8; 8], data: &mut Vec<u8>) {
        if self == Self::Des {
            data.resize(data.len().next_multiple_of(8), 0);
        }
        self.run(key, boots, time, salt, data, true);
    }

    /// Shows octets again; `false` where they cannot have been hidden so.
    pub fn decrypt(self, key: &[u8], boots: u32, time: u32, salt: [u8; 8], data: &mut [u8]) -> bool {
        if self == Self::Des && (data.is_empty() || !data.len().is_multiple_of(8)) {
            return false;
        }
        self.run(key, boots, time, salt, data, false)
    }

    fn run(self, key: &[u8], boots: u32, time: u32, salt: [u8; 8], data: &mut [u8], encrypt: bool) -> bool {
        if key.len() != self.key_len() {
            return false;
        }
        if self == Self::Des {
            let mut start = [0; 8];
            start.iter_mut().zip(&key[8..]).zip(salt).for_each(|((start, key), salt)| *start = key ^ salt);
            return des::Des::new_from_slice(&key[..8]).is_ok_and(|cipher| cbc(&cipher, start, data, encrypt));
        }
        let mut start = [0; 16];
        start[..4].copy_from_slice(&boots.to_be_bytes());
        start[4..8].copy_from_slice(&time.to_be_bytes());
        start[8..].copy_from_slice(&salt);
        match self.key_len() {
            16 => aes::Aes128::new_from_slice(key).is_ok_and(|cipher| cfb(&cipher, start, data, encrypt)),
            24 => aes::Aes192::new_from_slice(key).is_ok_and(|cipher| cfb(&cipher, start, data, encrypt)),
            _ => aes::Aes256::new_from_slice(key).is_ok_and(|cipher| cfb(&cipher, start, data, encrypt)),
        }
    }
}

/// CBC over whole blocks of eight octets.
fn cbc<C>(cipher: &C, mut last: [u8; 8], data: &mut [u8], encrypt: bool) -> bool
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser,
{
    for chunk in data.chunks_exact_mut(8) {
        let mut block = Block::<C>::default();
        if encrypt {
            block.iter_mut().zip(chunk.iter()).zip(last).for_each(|((block, data), last)| *block = data ^ last);
            cipher.encrypt_block(&mut block);
            chunk.copy_from_slice(&block);
            last.copy_from_slice(&block);
        } else {
            block.copy_from_slice(chunk);
            cipher.decrypt_block(&mut block);
            block.iter_mut().zip(last).for_each(|(block, last)| *block ^= last);
            last.copy_from_slice(chunk);
            chunk.copy_from_slice(&block);
        }
    }
    true
}

/// CFB with the whole block fed back; the last block may be short.
fn cfb<C: BlockCipherEncrypt + BlockSizeUser>(cipher: &C, start: [u8; 16], data: &mut [u8], encrypt: bool) -> bool {
    let mut feedback = start;
    for chunk in data.chunks_mut(16) {
        let mut block = Block::<C>::default();
        block.copy_from_slice(&feedback);
        cipher.encrypt_block(&mut block);
        for ((data, key), back) in chunk.iter_mut().zip(block.iter()).zip(feedback.iter_mut()) {
            let hidden = if encrypt { *data ^ key } else { *data };
            *data ^= key;
            *back = hidden;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    const ENGINE: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

    #[test]
    fn keys_are_those_of_rfc_3414() {
        // §A.3.1 and §A.3.2
        let key = Auth::Md5.password_key(b"maplesyrup");
        assert_eq!(key, hex("9faf3283884e92834ebc9847d8edd963"));
        assert_eq!(Auth::Md5.localized(&key, &ENGINE), hex("526f5eed9fcce26f8964c2930787d82b"));
        let key = Auth::Sha1.password_key(b"maplesyrup");
        assert_eq!(key, hex("9fb5cc0381497b3793528939ff788d5d79145211"));
        assert_eq!(Auth::Sha1.localized(&key, &ENGINE), hex("6695febc9288e36282235fc7151f128497b38f3f"));
    }

    #[test]
    fn signatures_are_those_of_rfc_2202_and_rfc_4231() {
        // Test case 2 of each: key "Jefe".
        let message = [&b"what do ya want "[..], b"for nothing?"];
        for (auth, signature) in [
            (Auth::Md5, "750c783e6ab0b503eaa86e31"),
            (Auth::Sha1, "effcdf6ae5eb2fa2d27416d5"),
            (Auth::Sha224, "a30e01098bc6dbbf45690f3a7e9e6d0f"),
            (Auth::Sha256, "5bdcc146bf60754e6a042426089575c75a003f089d273983"),
            (Auth::Sha384, "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e"),
            (
                Auth::Sha512,
                "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fd",
            ),
        ] {
            assert_eq!(auth.sign(b"Jefe", &message), hex(signature), "{auth:?}");
        }
        assert!(same(b"ab", b"ab") && !same(b"ab", b"ac") && !same(b"a", b"ab"));
    }

    #[test]
    fn cfb_is_that_of_sp_800_38a() {
        // F.3.13: CFB128-AES128, the first two blocks, the second cut short.
        let key = hex("2b7e151628aed2a6abf7158809cf4f3c");
        let mut data = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c");
        let start: [u8; 16] = hex("000102030405060708090a0b0c0d0e0f").try_into().unwrap();
        let (boots, time) = (0x0001_0203, 0x0405_0607);
        let salt: [u8; 8] = start[8..].try_into().unwrap();
        Privacy::Aes128.encrypt(&key, boots, time, salt, &mut data);
        assert_eq!(data, hex("3b3fd92eb72dad20333449f8e83cfb4ac8a64537a0b3a93f"));
    }

    #[test]
    fn every_cipher_gives_back_what_it_took() {
        let password = Auth::Sha1.password_key(b"maplesyrup");
        for privacy in
            [Privacy::Des, Privacy::Aes128, Privacy::Aes192, Privacy::Aes256, Privacy::Aes192C, Privacy::Aes256C]
        {
            let key = privacy.localized(Auth::Sha1, &password, &ENGINE);
            assert_eq!(key.len(), privacy.key_len());
            for len in [8, 16, 17, 100] {
                let plain: Vec<u8> = (0..len).collect();
                let mut data = plain.clone();
                privacy.encrypt(&key, 1, 2, *b"saltsalt", &mut data);
                assert_ne!(data, plain);
                assert!(privacy.decrypt(&key, 1, 2, *b"saltsalt", &mut data));
                assert_eq!(data[..plain.len()], plain);
            }
        }
        assert!(!Privacy::Des.decrypt(&[0; 16], 0, 0, [0; 8], &mut [0; 9]));
        assert!(!Privacy::Aes128.decrypt(&[0; 15], 0, 0, [0; 8], &mut [0; 9]));
    }

    #[test]
    fn the_two_ways_to_longer_keys_differ_and_are_stable() {
        // The first 20 octets are the localised SHA-1 key of RFC 3414 §A.3.2; the rest is one hash of it.
        let password = Auth::Sha1.password_key(b"maplesyrup");
        let key = Privacy::Aes256.localized(Auth::Sha1, &password, &ENGINE);
        assert_eq!(key[..20], hex("6695febc9288e36282235fc7151f128497b38f3f"));
        assert_eq!(key[20..], Auth::Sha1.hash(&[&key[..20]])[..12]);
        // draft-reeder-snmpv3-usm-3desede-00 §B.2 has this chain for its 32 octets.
        let reeder = Privacy::Aes256C.localized(Auth::Sha1, &password, &ENGINE);
        assert_eq!(reeder, hex("6695febc9288e36282235fc7151f128497b38f3f9b8b6d78936ba6e7d19dfd9c"));
    }
}
