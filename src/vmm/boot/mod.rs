//! Puts a guest kernel and what it needs to start into fresh guest memory.
//!
//! Kernel (ELF with PVH entry), initramfs, command line, ACPI tables and start_info. No registers: `kvm` sets
//! those to what PVH asks for.

pub mod acpi;
mod aml;
pub mod command_line;
pub mod elf;
pub mod layout;
mod pvh;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::generation;
use super::memory::{self, GuestMemory, MemoryError, PAGE};
use crate::wire::Code;
use acpi::MmioDevice;
use elf::{ElfError, KernelFile};

/// Why a guest could not be put into memory.
#[derive(Debug)]
pub enum BootError {
    /// The kernel file is damaged or not of the expected form.
    Kernel(ElfError),
    /// The initramfs cannot be read.
    Initramfs(io::Error),
    /// Kernel and initramfs do not fit into the memory.
    TooLarge {
        /// End of the kernel in guest memory.
        kernel_end: u64,
        /// Length of the initramfs in octets.
        initramfs: u64,
        /// End of the memory that both must fit into.
        memory_end: u64,
    },
    /// The command line is too long or holds a NUL.
    CommandLine(command_line::CommandLineError),
    /// A fixed structure does not fit: the memory is far too small.
    Memory(MemoryError),
    /// The machine gets no generation identifier.
    Generation(io::Error),
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(e) => e.fmt(f),
            Self::Initramfs(e) => write!(f, "initramfs cannot be read: {e}"),
            Self::TooLarge { kernel_end, initramfs, memory_end } => write!(
                f,
                "kernel up to {kernel_end:#x} and an initramfs of {initramfs:#x} octets do not fit below {memory_end:#x}"
            ),
            Self::CommandLine(e) => e.fmt(f),
            Self::Memory(e) => e.fmt(f),
            Self::Generation(e) => write!(f, "no random numbers for a generation identifier: {e}"),
        }
    }
}

impl std::error::Error for BootError {}

impl BootError {
    /// The code that the supervisor is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Kernel(ElfError::Read(_)) | Self::Initramfs(_) | Self::Memory(_) | Self::Generation(_) => {
                Code::VmFailed
            }
            Self::TooLarge { .. } => Code::OutOfRange,
            // The smallest guest has room for any kernel that is one.
            Self::Kernel(_) => Code::Corrupt,
            Self::CommandLine(_) => Code::BadArgument,
        }
    }
}

impl From<MemoryError> for BootError {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
    }
}

/// What is to be booted.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// Uncompressed ELF kernel.
    pub kernel: &'a File,
    /// Initramfs, as the kernel unpacks it.
    pub initramfs: &'a File,
    /// What comes after Warren's own kernel parameters.
    pub command_line: &'a str,
    /// Processors, 1 to 16.
    pub vcpus: u8,
    /// The virtio-mmio devices, in order.
    pub devices: &'a [MmioDevice],
}

/// A kernel file whose segments are read straight into guest memory.
struct OnDisk<'a> {
    file: &'a File,
    memory: &'a GuestMemory,
}

impl KernelFile for OnDisk<'_> {
    fn octets(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    fn load(&self, offset: u64, addr: u64, len: u64) -> io::Result<()> {
        load_file(self.file, self.memory, offset, addr, len)
    }
}

/// Reads `len` octets of a file from `offset` into guest memory at `addr`.
fn load_file(file: &File, memory: &GuestMemory, offset: u64, addr: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let slice = memory.slice(addr + done, (len - done) as usize).map_err(io::Error::other)?;
        match memory::read_at(file.as_fd(), &[slice], offset + done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Puts everything into `memory`, which must be fresh (all zero), and gives the address of the kernel's entry.
pub fn load(memory: &GuestMemory, source: &BootSource<'_>) -> Result<u64, BootError> {
    let ram: Vec<(u64, u64)> = memory.regions().iter().map(|r| (r.guest_addr, r.size)).collect();
    let memory_end = memory.regions().first().map_or(0, |r| r.size);

    let kernel = elf::load(&OnDisk { file: source.kernel, memory }, memory_end).map_err(BootError::Kernel)?;
    let initramfs = place_initramfs(memory, source.initramfs, kernel.end, memory_end)?;

    let line = command_line::build(source.command_line).map_err(BootError::CommandLine)?;
    memory.write(layout::COMMAND_LINE, &line)?;
    let tables = acpi::build(source.vcpus, source.devices);
    memory.write(layout::ACPI_START, &tables.octets)?;
    generation::draw(memory).map_err(BootError::Generation)?;
    for (addr, octets) in pvh::build(&ram, initramfs, tables.rsdp).parts {
        memory.write(addr, &octets)?;
    }
    Ok(kernel.entry)
}

/// Loads the initramfs page-aligned at the top of low RAM, away from what the kernel grows into. An empty file is
/// none.
fn place_initramfs(
    memory: &GuestMemory,
    file: &File,
    kernel_end: u64,
    memory_end: u64,
) -> Result<Option<(u64, u64)>, BootError> {
    let len = file.metadata().map_err(BootError::Initramfs)?.len();
    if len == 0 {
        return Ok(None);
    }
    let addr = memory_end
        .checked_sub(len)
        .map(|a| a / PAGE * PAGE)
        .filter(|a| *a >= kernel_end)
        .ok_or(BootError::TooLarge { kernel_end, initramfs: len, memory_end })?;
    load_file(file, memory, 0, addr, len).map_err(BootError::Initramfs)?;
    Ok(Some((addr, len)))
}
