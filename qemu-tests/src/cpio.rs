//! Writes archives of the kernel's initramfs format ("newc", Documentation/driver-api/early-userspace/
//! buffer-format.rst). The kernel unpacks any number of them one after the other, so what a test adds is
//! appended to the node's own.

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    octets: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory; its parents must be there.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[]);
    }

    /// Adds a file with permission bits `mode`. A later file replaces an earlier one of the same path.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, REGULAR | mode, content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK | 0o777, target.as_bytes());
    }

    /// The whole archive, its trailer included, ready to be appended at an offset that is a multiple of 4.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.octets
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        let path = path.trim_start_matches('/');
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("an initramfs holds files below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        let fields = [self.inode, mode, 0, 0, 1, 1, size, 0, 0, 0, 0, name_size, 0];
        self.octets.extend_from_slice(b"070701");
        for field in fields {
            self.octets.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.octets.extend_from_slice(path.as_bytes());
        self.octets.push(0);
        self.pad();
        self.octets.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.octets.resize(self.octets.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_contents_are_aligned_to_four_octets() {
        let mut archive = Archive::new();
        archive.directory("/test");
        archive.file("/test/greeting", 0o755, b"hello\n");
        archive.link("/test/link", "greeting");
        let octets = archive.finish();
        assert_eq!(octets.len() % 4, 0);
        assert!(octets.starts_with(b"070701"));
        assert_eq!(&octets[110..115], b"test\0");
        let content = octets.windows(6).position(|w| w == b"hello\n").expect("the content is in the archive");
        assert_eq!(content % 4, 0);
    }
}
