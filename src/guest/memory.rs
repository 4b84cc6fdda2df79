//! What the agent takes from the sandbox's memory, and gives back.

/// Big buffers go back to the kernel as soon as they are freed, and threads have no heaps of their own.
pub(super) fn keep_small() {
    // SAFETY: mallopt only sets numbers of the allocator's.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 * 1024);
    }
}

/// Gives back what an idle agent does not need: free heap, and the mappings of its program. The kernel maps
/// sixteen pages around each one that is touched, so most of them were never used.
pub(super) fn give_back() {
    // SAFETY: malloc_trim takes a number; the callback does not outlive the call and takes no data.
    unsafe {
        libc::malloc_trim(0);
        libc::dl_iterate_phdr(Some(unmap_program), std::ptr::null_mut());
    }
}

/// Drops the page tables' entries of a program's read-only segments; they come back from the page cache at the next touch.
///
/// # Safety
/// `info` is what `dl_iterate_phdr` gives.
unsafe extern "C" fn unmap_program(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    const PAGE: usize = 4096;
    // SAFETY: the caller gives a valid structure, whose headers stay for as long as the program does.
    let (base, headers) = unsafe {
        let info = &*info;
        if info.dlpi_phdr.is_null() {
            return 0;
        }
        (info.dlpi_addr as usize, std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)))
    };
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0) {
        let start = base.wrapping_add(header.p_vaddr as usize).next_multiple_of(PAGE);
        let end = base.wrapping_add(header.p_vaddr as usize).wrapping_add(header.p_memsz as usize) & !(PAGE - 1);
        if start < end {
            // SAFETY: these pages are a file's, mapped privately and never written: dropping them changes no content.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    // Only the program itself, which comes first.
    1
}
