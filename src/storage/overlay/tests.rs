use super::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::OwnedFd;

fn scratch() -> File {
    let fd: OwnedFd = memfd_create(c"overlay-test", MFdFlags::MFD_CLOEXEC).unwrap();
    File::from(fd)
}
