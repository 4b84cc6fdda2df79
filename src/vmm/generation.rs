//! Tells the guest's kernel that it is another machine from now on than the one whose memory it has (VMGenID, Microsoft's
//! "Virtual Machine Generation ID"; Linux drivers/virt/vmgenid.c): it then reseeds its random pool, before anybody in the
//! guest can ask it.
//!
//! The identifier is 16 octets in reserved memory that the ACPI tables name (`boot/acpi.rs`). After a restore it is
//! renewed while the processors stand still, and then the interrupt `layout::GENERATION_GSI` is raised, at which the
//! guest's kernel looks.

use std::io;

use super::boot::layout::GENERATION_ID;
use super::memory::{self, GuestMemory, MemoryError};

/// Octets of an identifier.
pub const LEN: usize = 16;

/// Writes a new identifier, which must be another than any before it. The interrupt is the caller's to raise.
///
/// # Errors
/// When the memory ends below the ACPI area, which no guest's does.
pub fn renew(memory: &GuestMemory, id: [u8; LEN]) -> Result<(), MemoryError> {
    memory.write(GENERATION_ID, &id)
}

/// The same with an identifier from the host's random numbers.
///
/// # Errors
/// As `renew`, and when the host has no random numbers.
pub fn draw(memory: &GuestMemory) -> io::Result<()> {
    let place = memory.slice(GENERATION_ID, LEN).map_err(io::Error::other)?;
    match memory::random(place)? {
        LEN => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(memory: &GuestMemory) -> [u8; LEN] {
        let mut id = [0; LEN];
        memory.read(GENERATION_ID, &mut id).unwrap();
        id
    }

    #[test]
    fn an_identifier_is_written_where_the_tables_say() {
        let memory = GuestMemory::new(2 << 20).unwrap();
        renew(&memory, *b"0123456789abcdef").unwrap();
        assert_eq!(&id(&memory), b"0123456789abcdef");
        draw(&memory).unwrap();
        let first = id(&memory);
        draw(&memory).unwrap();
        assert!(first != *b"0123456789abcdef" && first != id(&memory));
        let mut beyond = [0; 8];
        memory.read(GENERATION_ID + LEN as u64, &mut beyond).unwrap();
        assert_eq!(beyond, [0; 8]);
    }
}
