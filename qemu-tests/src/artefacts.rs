//! Where the build put what the tests boot.

use std::path::{Path, PathBuf};

/// Something that the build makes and the tests need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Artefact {
    /// The host kernel of the QEMU profile.
    HostKernel,
    /// The host's initramfs: the node.
    HostInitramfs,
    /// The empty file system of a data partition.
    DataImage,
    /// The disk that templates are imported from.
    TemplateDisk,
    /// The disk that the template `code` is imported from.
    CodeDisk,
    /// The whole disk image, with the QEMU profile's kernel.
    DiskImage,
    /// The binary `warren`.
    Warren,
    /// The agent.
    Burrow,
    /// The guest kernel.
    GuestKernel,
    /// The guest's initramfs.
    GuestInitramfs,
    /// The base template's root file system.
    BaseTemplate,
    /// A file beside the images that other programs have made.
    Images,
}

impl Artefact {
    /// File below the build directory, environment variable that names another, make target that builds it.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::HostKernel => ("bzImage", "WARREN_HOST_KERNEL", "kernels"),
            Self::HostInitramfs => ("host-initramfs.img", "WARREN_HOST_INITRAMFS", "build"),
            Self::DataImage => ("data.img", "WARREN_DATA_IMAGE", "build"),
            Self::TemplateDisk => ("templates.img", "WARREN_TEMPLATE_DISK", "build"),
            Self::CodeDisk => ("code.img", "WARREN_CODE_DISK", "build/code.img"),
            Self::DiskImage => ("qemu.img", "WARREN_DISK_IMAGE", "build/qemu.img"),
            Self::Warren => ("warren", "WARREN_BINARY", "binaries"),
            Self::Burrow => ("burrow", "WARREN_BURROW", "binaries"),
            Self::GuestKernel => ("vmlinux", "WARREN_GUEST_KERNEL", "kernels"),
            Self::GuestInitramfs => ("initramfs.img", "WARREN_GUEST_INITRAMFS", "build"),
            Self::Images => ("images/done", "WARREN_TEST_IMAGES", "build/images"),
            Self::BaseTemplate => ("templates/base/rootfs.img", "WARREN_BASE_TEMPLATE", "templates"),
        }
    }

    /// Its path.
    ///
    /// # Panics
    /// When it has not been built; the message says how to build it.
    pub fn path(self) -> PathBuf {
        let (file, variable, target) = self.names();
        let path = named(variable).unwrap_or_else(|| build_directory().join(file));
        assert!(
            path.exists(),
            "{} is missing: run `make {target}`, or name another file by {variable}",
            path.display()
        );
        path
    }
}

/// `build/` of the repository, or `WARREN_BUILD`.
pub fn build_directory() -> PathBuf {
    named("WARREN_BUILD").unwrap_or_else(|| repository().join("build"))
}

/// The path that a variable names; a relative one counts from the top of the repository, because tests run in their
/// package's directory.
fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(|path| repository().join(path))
}

fn repository() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// A program of this package that runs on the node: built by cargo beside the program that asks.
///
/// # Panics
/// When it is not there.
pub fn node_tool(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    // Tests lie in deps/, one level below the programs.
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not beside {}: build the whole package qemu-tests", own.display()))
}

/// A static busybox, taken out of the base template: with it the tests look around on the node.
///
/// # Panics
/// When the template is missing or debugfs (package e2fsprogs) cannot read it.
pub fn busybox(into: &Path) -> PathBuf {
    let template = Artefact::BaseTemplate.path();
    let path = into.join("busybox");
    let dump = format!("dump /usr/bin/busybox {}", path.display());
    let output = std::process::Command::new("/sbin/debugfs")
        .args(["-R", &dump])
        .arg(&template)
        .output()
        .unwrap_or_else(|e| panic!("debugfs (package e2fsprogs) does not start: {e}"));
    let size = path.metadata().map_or(0, |meta| meta.len());
    assert!(size > 0, "no busybox in {}: {}", template.display(), String::from_utf8_lossy(&output.stderr));
    path
}
