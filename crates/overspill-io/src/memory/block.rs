//! The holder's handle on leased memory.
//!
//! A [`Block`] is an exclusive range of one lease. [`Block::split_off`] divides the range in two and
//! [`Block::join`] makes neighbors one again, so two blocks never overlap, whatever their holders do. All parts
//! share the lease; the memory returns to the pool when the last of them is dropped.
//!
//! Memory of somebody else's, such as an array of another language, becomes a block by [`Block::over`]: its owner takes
//! the lease's place.

#![expect(unsafe_code, reason = "turns an exclusive range of memory into slices")]

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use super::BLOCK_ALIGNMENT;
use super::pool::Lease;

/// A leased range of pool memory: exclusive, aligned to [`BLOCK_ALIGNMENT`], returned to the pool on drop.
///
/// It dereferences to its bytes. A fresh lease holds whatever its last holder left there.
pub struct Block {
    start: NonNull<u8>,
    len: usize,
    /// What keeps the memory: the lease, or the owner of memory that is not the pool's.
    owner: Arc<dyn Send + Sync>,
}

// SAFETY: a block is the only way to its bytes, and the owner behind it counts its holders atomically and
// may be dropped by any thread.
unsafe impl Send for Block {}
// SAFETY: a shared block gives shared access to its bytes only.
unsafe impl Sync for Block {}

impl Block {
    /// The first `len` bytes of a fresh lease, which only this call may see: it consumes the lease.
    pub(super) fn whole(lease: Lease, len: usize) -> Block {
        Block { start: lease.memory(len), len, owner: Arc::new(lease) }
    }

    /// A block over memory that no pool has; `owner` is dropped with its last part.
    ///
    /// It is as aligned as `start` is. An engine moves it as it is through the page cache; for direct I/O its address
    /// must be a multiple of [`File::alignment`](crate::File::alignment), or the kernel refuses the transfer. It is not
    /// registered with a ring.
    ///
    /// # Safety
    ///
    /// For as long as `owner` lives, the `len` bytes at `start` are mapped, readable, writable and initialized, and nothing
    /// of Rust's makes a reference to one of them but through this block and its parts. Code of other languages may use
    /// them, as the kernel does: what a transfer moves meanwhile are the bytes that it finds.
    pub unsafe fn over(start: NonNull<u8>, len: usize, owner: Arc<dyn Send + Sync>) -> Block {
        Block { start, len, owner }
    }

    /// Splits the block at byte `at`: `self` keeps `[0, at)`, the answer is `[at, len)`.
    ///
    /// # Panics
    ///
    /// If `at` is larger than the length, or not a multiple of [`BLOCK_ALIGNMENT`].
    #[must_use = "dropping the second half gives up its bytes"]
    pub fn split_off(&mut self, at: usize) -> Block {
        assert!(at <= self.len, "cannot split a block of {} bytes at byte {at}", self.len);
        assert!(
            at.is_multiple_of(BLOCK_ALIGNMENT),
            "cannot split at {at}, not a multiple of {BLOCK_ALIGNMENT}"
        );
        // SAFETY: `at <= self.len`, so the address is inside the owner's memory or its end.
        let start = unsafe { self.start.add(at) };
        let len = self.len - at;
        self.len = at;
        Block { start, len, owner: Arc::clone(&self.owner) }
    }

    /// Makes two neighboring parts of one lease a single block again.
    ///
    /// # Errors
    ///
    /// Both blocks come back unchanged if `next` does not begin where `self` ends, or is of another lease.
    pub fn join(self, next: Block) -> Result<Block, (Block, Block)> {
        let end = self.start.as_ptr().wrapping_add(self.len);
        if !Arc::ptr_eq(&self.owner, &next.owner) || end != next.start.as_ptr() {
            return Err((self, next));
        }
        Ok(Block { start: self.start, len: self.len + next.len, owner: self.owner })
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the owner's memory, which is mapped and initialized for as long as the owner
        // lives, and no other block covers any byte of it.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; `&mut self` makes this the only slice.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Block {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("start", &self.start).field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{BlockClass, Pool};

    fn pool() -> Pool {
        Pool::new(&[BlockClass { name: "test", block_bytes: 8 * BLOCK_ALIGNMENT, count: 2 }]).unwrap()
    }

    #[test]
    fn a_block_is_aligned_and_as_long_as_asked() {
        let pool = pool();
        for bytes in [0, 1, 4095, 4096, 4097, 8 * BLOCK_ALIGNMENT] {
            let block = pool.lease(bytes).unwrap();
            assert_eq!(block.len(), bytes);
            assert!(block.as_ptr().addr().is_multiple_of(BLOCK_ALIGNMENT));
        }
    }

    #[test]
    fn the_memory_returns_when_the_last_part_is_dropped() {
        let pool = pool();
        let mut first = pool.lease(3 * BLOCK_ALIGNMENT).unwrap();
        let second = first.split_off(BLOCK_ALIGNMENT);
        drop(first);
        assert_eq!(pool.leased_blocks(), 1);
        drop(second);
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn only_neighbors_of_one_lease_join() {
        let pool = pool();
        let mut a = pool.lease(2 * BLOCK_ALIGNMENT).unwrap();
        let b = a.split_off(BLOCK_ALIGNMENT);
        let other = pool.lease(BLOCK_ALIGNMENT).unwrap();
        let (b, a) = b.join(a).unwrap_err();
        let (a, other) = a.join(other).unwrap_err();
        assert_eq!(a.join(b).unwrap().len(), 2 * BLOCK_ALIGNMENT);
        drop(other);
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn memory_of_somebody_elses_is_kept_until_its_last_part_is_dropped() {
        let memory = Arc::new(vec![7_u8; 3 * BLOCK_ALIGNMENT]);
        let start = NonNull::new(memory.as_ptr().cast_mut()).unwrap();
        let owner: Arc<dyn Send + Sync> = memory.clone();
        // SAFETY: the vector is not touched until the block and its parts are gone.
        let mut first = unsafe { Block::over(start, 3 * BLOCK_ALIGNMENT, owner) };
        let second = first.split_off(BLOCK_ALIGNMENT);
        assert!(first.iter().chain(second.iter()).all(|&byte| byte == 7));
        drop(first);
        assert_eq!(Arc::strong_count(&memory), 2);
        drop(second);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    #[should_panic(expected = "not a multiple")]
    fn a_split_inside_an_aligned_unit_is_refused() {
        let mut block = pool().lease(BLOCK_ALIGNMENT).unwrap();
        let _rest = block.split_off(100);
    }

    #[test]
    #[should_panic(expected = "cannot split a block of 4096 bytes")]
    fn a_split_behind_the_end_is_refused() {
        let mut block = pool().lease(BLOCK_ALIGNMENT).unwrap();
        let _rest = block.split_off(2 * BLOCK_ALIGNMENT);
    }

    proptest! {
        #[test]
        fn parts_are_disjoint_and_join_to_the_same_bytes(cuts in prop::collection::vec(0_usize..=8, 0..6)) {
            let pool = pool();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut * BLOCK_ALIGNMENT).collect();
            cuts.sort_unstable_by(|a, b| b.cmp(a));
            let mut head = pool.lease(8 * BLOCK_ALIGNMENT).unwrap();
            let address = head.as_ptr();
            let mut parts: Vec<Block> = cuts.iter().map(|&cut| head.split_off(cut)).collect();
            parts.push(head);
            parts.reverse();
            for (tag, part) in (1..).zip(&mut parts) {
                part.fill(tag);
            }
            for (tag, part) in (1_u8..).zip(&parts) {
                prop_assert!(part.iter().all(|&byte| byte == tag));
            }
            let whole = parts.into_iter().reduce(|whole, part| whole.join(part).unwrap()).unwrap();
            prop_assert_eq!(whole.len(), 8 * BLOCK_ALIGNMENT);
            prop_assert_eq!(whole.as_ptr(), address);
            drop(whole);
            prop_assert_eq!(pool.leased_blocks(), 0);
        }
    }
}
