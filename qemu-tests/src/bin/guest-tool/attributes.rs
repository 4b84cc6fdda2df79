//! Extended attributes, which busybox has nothing to show.

use std::ffi::CString;
use std::io;

use crate::{Keys, Outcome};

/// Prints each of a file's, in the order of their names: `NAME=HEX`. Links are not followed.
pub fn run(keys: &Keys) -> Outcome {
    let path: String = keys.get("path", None)?;
    let path = CString::new(path).map_err(|e| e.to_string())?;
    let mut names = vec![0u8; 64 * 1024];
    // SAFETY: the path ends with NUL, and the buffer is as long as is said.
    let got = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(got).map_err(|_| io::Error::last_os_error().to_string())?);
    let mut names: Vec<&[u8]> = names.split(|&octet| octet == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    for name in names {
        let key = CString::new(name).map_err(|e| e.to_string())?;
        let mut value = vec![0u8; 64 * 1024];
        // SAFETY: both strings end with NUL, and the buffer is as long as is said.
        let got = unsafe { libc::lgetxattr(path.as_ptr(), key.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        value.truncate(usize::try_from(got).map_err(|_| io::Error::last_os_error().to_string())?);
        let hex: String = value.iter().map(|octet| format!("{octet:02x}")).collect();
        println!("{}={hex}", String::from_utf8_lossy(name));
    }
    Ok(())
}
