//! One anonymous mapping that holds every block.
//!
//! Reads are two to three times faster into huge pages, writes a third, and a ring registers them in a tenth of the
//! time; but separate small mappings silently get small ones. So there is a single mapping, it starts at a huge-page
//! boundary, asks for huge pages before the first touch, and is touched once here, at start-up, instead of in
//! somebody's training step. What the kernel refuses (locking, huge pages) does not stop the work: it is measured and
//! told in [`MemoryReport`].

#![expect(unsafe_code, reason = "maps, advises and unmaps the memory that all blocks live in")]

use std::ffi::c_void;
use std::path::Path;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};

use super::BLOCK_ALIGNMENT;
use super::cuda::{CudaError, CudaReport, Registration};
use super::locking::{Locking, limit_advice};
use super::pool::PoolError;
use crate::sync::{Mutex, lock};

/// Where a mapping must start so that its first bytes can lie on a huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;

const _: () = assert!(HUGE_PAGE_BYTES.is_multiple_of(BLOCK_ALIGNMENT));

/// What the pool's memory really is; its pages are measured once, after they were touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Size of the one mapping: the sum of all blocks, rounded up to a page.
    pub total_bytes: usize,
    /// How much of it the kernel backed with huge pages.
    pub huge_page_bytes: usize,
    /// Whether the memory can be paged out.
    pub locked: Locking,
    /// What CUDA knows of it; nothing, until somebody registers it.
    pub cuda: Option<CudaReport>,
}

/// The mapping; unmapped on drop, which the blocks' leases put off until the last of them is gone.
pub(crate) struct Arena {
    start: NonNull<u8>,
    bytes: usize,
    huge_page_bytes: usize,
    locked: Locking,
    cuda: Mutex<Option<Registration>>,
}

// SAFETY: the arena hands out addresses only; who may use which bytes is the pool's decision, kept under its lock. Its
// other fields are `Send` by themselves.
unsafe impl Send for Arena {}
// SAFETY: as above: a shared arena is never written through by itself. Its other fields are `Sync` by themselves.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps, advises, touches and tries to lock at least `bytes` zeroed bytes.
    pub(crate) fn map(bytes: usize) -> Result<Arena, PoolError> {
        let refused = |errno: Errno| PoolError::Arena { bytes, errno: errno.raw_os_error() };
        let page = rustix::param::page_size();
        let total = bytes.max(1).checked_next_multiple_of(page).ok_or_else(|| refused(Errno::NOMEM))?;
        let start = map_aligned(total).map_err(refused)?;
        // From here on `arena` unmaps on every way out.
        let mut arena = Arena {
            start,
            bytes: total,
            huge_page_bytes: 0,
            locked: Locking::Locked,
            cuda: Mutex::new(None),
        };
        arena.advise();
        arena.touch(page);
        arena.locked = arena.lock();
        arena.huge_page_bytes = arena.count_huge_page_bytes();
        Ok(arena)
    }

    pub(crate) fn report(&self) -> MemoryReport {
        MemoryReport {
            total_bytes: self.bytes,
            huge_page_bytes: self.huge_page_bytes,
            locked: self.locked.clone(),
            cuda: lock(&self.cuda).as_ref().map(|registration| registration.report().clone()),
        }
    }

    /// Registers all of it with the CUDA driver in `library`, unless it is registered already.
    pub(super) fn register_with_cuda(&self, library: &Path) -> Result<CudaReport, CudaError> {
        // Held all the while: whoever comes second finds what the first one made.
        let mut cuda = lock(&self.cuda);
        let registration = match cuda.take() {
            Some(registration) => registration,
            None => Registration::make(library, self.start, self.bytes)?,
        };
        Ok(cuda.insert(registration).report().clone())
    }

    /// The first byte and the number of bytes.
    pub(crate) fn span(&self) -> (NonNull<u8>, usize) {
        (self.start, self.bytes)
    }

    /// The address of byte `offset`, from which `bytes` bytes lie inside the arena.
    pub(crate) fn address(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "{bytes} bytes at {offset} lie outside of the arena"
        );
        // SAFETY: `offset <= self.bytes`, just asserted, so the address is inside the mapping or its end.
        unsafe { self.start.add(offset) }
    }

    /// Asks for huge pages. A kernel without them refuses; the report's `huge_page_bytes` then says so.
    fn advise(&self) {
        // SAFETY: the range is the mapping that `self` owns, and the advice does not change its contents.
        let _refusal = unsafe { madvise(self.start.as_ptr().cast(), self.bytes, Advice::LinuxHugepage) };
    }

    /// Faults every page in, now.
    fn touch(&mut self, page: usize) {
        for offset in (0..self.bytes).step_by(page) {
            let address = self.address(offset, 1).as_ptr();
            // SAFETY: the byte is inside the mapping, and nobody else knows of it yet. Volatile, since writing a
            // zero over a zero is otherwise nothing to the compiler.
            unsafe { ptr::write_volatile(address, 0) };
        }
    }

    fn lock(&self) -> Locking {
        // SAFETY: the range is the mapping that `self` owns; locking does not change its contents.
        match unsafe { mlock(self.start.as_ptr().cast(), self.bytes) } {
            Ok(()) => Locking::Locked,
            Err(errno) => Locking::Unlocked {
                reason: format!(
                    "mlock of {} KiB: {}; {}",
                    self.bytes.div_ceil(1 << 10),
                    std::io::Error::from(errno),
                    limit_advice(self.bytes)
                ),
            },
        }
    }

    fn count_huge_page_bytes(&self) -> usize {
        let start = self.start.as_ptr().addr();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        // Neighboring mappings may have been merged with ours, so their pages could count too.
        huge_page_bytes_of(&smaps, start..start + self.bytes).min(self.bytes)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let cuda = lock(&self.cuda).take();
        if cuda.is_some_and(|registration| registration.end().is_err()) {
            // The driver takes these addresses for pinned ones: whatever were mapped here next, it would copy to and
            // from the old pages. So nothing ever is.
            return;
        }
        // SAFETY: `self` owns the mapping, and every lease holds the pool that holds `self`: none is left.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "the arena's own range cannot be refused");
    }
}

/// Maps `total` bytes at a multiple of the huge page: maps a huge page more than that, and trims both ends.
fn map_aligned(total: usize) -> Result<NonNull<u8>, Errno> {
    let mapped = total.checked_add(HUGE_PAGE_BYTES).ok_or(Errno::NOMEM)?;
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
    let raw = unsafe { mmap_anonymous(ptr::null_mut(), mapped, protection, flags) }?;
    let head = raw.addr().next_multiple_of(HUGE_PAGE_BYTES) - raw.addr();
    let start = raw.wrapping_byte_add(head);
    trim(raw, head)?;
    trim(start.wrapping_byte_add(total), HUGE_PAGE_BYTES - head)?;
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

/// Gives back `bytes` bytes of a mapping that was just made and that nobody uses.
fn trim(start: *mut c_void, bytes: usize) -> Result<(), Errno> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller cut the range out of its own fresh mapping, and nothing points into it.
    unsafe { munmap(start, bytes) }
}

/// Sums `AnonHugePages` over the mappings of `smaps` (the text of `/proc/self/smaps`) that overlap `span`.
fn huge_page_bytes_of(smaps: &str, span: std::ops::Range<usize>) -> usize {
    let mut overlaps = false;
    let mut kib = 0_usize;
    for line in smaps.lines() {
        if let Some(range) = mapping_range(line) {
            overlaps = range.start < span.end && span.start < range.end;
        } else if overlaps && let Some(value) = line.strip_prefix("AnonHugePages:") {
            let digits = value.trim().trim_end_matches("kB").trim_end();
            kib = kib.saturating_add(digits.parse().unwrap_or(0));
        }
    }
    kib.saturating_mul(1024)
}

/// The addresses in the first line of a mapping's entry, such as `7f00-7f80 rw-p …`.
fn mapping_range(line: &str) -> Option<std::ops::Range<usize>> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arena_starts_at_a_huge_page_and_is_as_large_as_asked() {
        for bytes in [1, 4096, 5 * 4096, (2 << 20) - 4096, (2 << 20) + 4096, 9 << 20] {
            let arena = Arena::map(bytes).unwrap();
            let (start, total) = arena.span();
            assert!(start.as_ptr().addr().is_multiple_of(HUGE_PAGE_BYTES));
            assert_eq!(total, bytes.next_multiple_of(rustix::param::page_size()));
            assert_eq!(arena.report().total_bytes, total);
            assert!(arena.report().huge_page_bytes <= total);
        }
    }

    #[test]
    fn an_arena_that_cannot_be_mapped_is_a_typed_error() {
        for bytes in [usize::MAX, usize::MAX / 2] {
            let refusal = Arena::map(bytes).err().unwrap();
            assert_eq!(refusal, PoolError::Arena { bytes, errno: Errno::NOMEM.raw_os_error() });
        }
    }

    #[test]
    fn huge_pages_are_counted_in_the_overlapping_mappings_only() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nAnonHugePages:      2048 kB\n\
                     2000-4000 rw-p 00000000 00:00 0 \nAnonHugePages:      4096 kB\nVmFlags: rd\n\
                     4000-5000 r--p 00000000 00:00 0 /lib/a-b\nAnonHugePages:      8192 kB\n";
        assert_eq!(huge_page_bytes_of(smaps, 0x2000..0x4000), 4096 << 10);
        assert_eq!(huge_page_bytes_of(smaps, 0x1fff..0x2001), 6144 << 10);
        assert_eq!(huge_page_bytes_of("", 0..1), 0);
    }
}
