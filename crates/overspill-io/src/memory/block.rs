//! The holder's handle on leased memory.
//!
//! A [`Block`] is an exclusive range of one lease. [`Block::split_off`] divides the range in two and
//! [`Block::join`] makes neighbors one again, so two blocks never overlap, whatever their holders do. All parts
//! share the lease; the memory returns to the pool when the last of them is dropped.

#![expect(unsafe_code, reason = "turns an exclusive range of the arena into slices")]

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
    lease: Arc<Lease>,
}

// SAFETY: a block is the only way to its bytes, and the lease behind it counts its holders atomically.
unsafe impl Send for Block {}
// SAFETY: a shared block gives shared access to its bytes only.
unsafe impl Sync for Block {}

impl Block {
    /// The first `len` bytes of a fresh lease, which only this call may see: it consumes the lease.
    pub(super) fn whole(lease: Lease, len: usize) -> Block {
        Block { start: lease.memory(len), len, lease: Arc::new(lease) }
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
        // SAFETY: `at <= self.len`, so the address is inside the lease's memory or its end.
        let start = unsafe { self.start.add(at) };
        let len = self.len - at;
        self.len = at;
        Block { start, len, lease: Arc::clone(&self.lease) }
    }

    /// Makes two neighboring parts of one lease a single block again.
    ///
    /// # Errors
    ///
    /// Both blocks come back unchanged if `next` does not begin where `self` ends, or is of another lease.
    pub fn join(self, next: Block) -> Result<Block, (Block, Block)> {
        let end = self.start.as_ptr().wrapping_add(self.len);
        if !Arc::ptr_eq(&self.lease, &next.lease) || end != next.start.as_ptr() {
            return Err((self, next));
        }
        Ok(Block { start: self.start, len: self.len + next.len, lease: self.lease })
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the lease's memory, which is mapped and initialized for as long as the lease
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
