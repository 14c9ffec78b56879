//! The ordinary heap, which competes with the arena for the same memory.
#![cfg_attr(
    target_env = "gnu",
    expect(unsafe_code, reason = "the C library's own call, which rustix does not wrap")
)]

/// Gives pages of the heap that hold nothing back to the system.
///
/// glibc's allocator keeps what large matrices leave behind in pieces that later ones do not quite fit, a few more
/// with every pass, and so outgrows any budget in the long run. Other C libraries give pages back by themselves.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes the allocator's own locks and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
