//! Which bytes of the data file are free: a best-fit allocator over one address range.
//!
//! Pure bookkeeping, no I/O. Neighboring free ranges are always merged, so that whatever is handed back can be handed
//! out again whole. The smallest range that will do is taken, and of those the first: lengths that come and go are
//! served from ranges of their own kind, which is what keeps a store of few lengths whole. Everything is counted in
//! [`EXTENT_ALIGNMENT`].

use std::collections::{BTreeMap, BTreeSet};

/// Offsets and lengths of extents are multiples of this many bytes.
pub const EXTENT_ALIGNMENT: u64 = overspill_io::BLOCK_ALIGNMENT as u64;

/// A contiguous range of the data file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Extent {
    /// First byte; a multiple of [`EXTENT_ALIGNMENT`].
    pub offset: u64,
    /// Number of bytes; a multiple of [`EXTENT_ALIGNMENT`].
    pub length: u64,
}

impl Extent {
    /// The byte after the last one.
    pub fn end(self) -> u64 {
        self.offset + self.length
    }
}

/// No free range was long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room for {requested} bytes: {free} are free, the longest range has {longest}")]
pub struct Full {
    /// Bytes asked for, aligned.
    pub requested: u64,
    /// Bytes free in total.
    pub free: u64,
    /// Bytes in the longest free range.
    pub longest: u64,
}

/// The free ranges of an address space.
#[derive(Clone, Debug)]
pub struct Extents {
    capacity: u64,
    /// Free ranges, offset to length; never adjacent, never empty.
    free: BTreeMap<u64, u64>,
    /// The same, as (length, offset).
    by_length: BTreeSet<(u64, u64)>,
    free_bytes: u64,
}

impl Extents {
    /// An address space of `capacity` bytes (rounded down to the alignment), all free.
    pub fn new(capacity: u64) -> Self {
        let mut extents =
            Self { capacity: 0, free: BTreeMap::new(), by_length: BTreeSet::new(), free_bytes: 0 };
        extents.grow(capacity);
        extents
    }

    /// Makes the address space `capacity` bytes long (rounded down to the alignment), if it is not that long yet.
    pub fn grow(&mut self, capacity: u64) {
        let capacity = capacity - capacity % EXTENT_ALIGNMENT;
        if capacity > self.capacity {
            let added = Extent { offset: self.capacity, length: capacity - self.capacity };
            self.capacity = capacity;
            self.put(added);
        }
    }

    /// Takes the smallest free range of at least `bytes` (rounded up to the alignment; at least one unit).
    ///
    /// # Errors
    /// [`Full`] when no free range is long enough; nothing is taken then.
    pub fn allocate(&mut self, bytes: u64) -> Result<Extent, Full> {
        let longest = self.longest();
        let full = |requested| Full { requested, free: self.free_bytes, longest };
        let length = bytes.max(1).checked_next_multiple_of(EXTENT_ALIGNMENT).ok_or_else(|| full(bytes))?;
        let &(free, offset) = self.by_length.range((length, 0)..).next().ok_or_else(|| full(length))?;
        self.remove(offset, free);
        if free > length {
            self.insert(offset + length, free - length);
        }
        Ok(Extent { offset, length })
    }

    /// Takes this very range.
    ///
    /// # Errors
    /// `Err` when a part of it is taken already, or lies outside of the address space; nothing is taken then.
    #[expect(clippy::result_unit_err, reason = "there is one way to fail, and the caller knows the range")]
    pub fn claim(&mut self, extent: Extent) -> Result<(), ()> {
        let (&offset, &length) = self.free.range(..=extent.offset).next_back().ok_or(())?;
        let end = extent.offset.checked_add(extent.length).ok_or(())?;
        if extent.length == 0 || offset + length < end {
            return Err(());
        }
        self.remove(offset, length);
        if offset < extent.offset {
            self.insert(offset, extent.offset - offset);
        }
        if end < offset + length {
            self.insert(end, offset + length - end);
        }
        Ok(())
    }

    /// Hands a range back.
    ///
    /// # Panics
    /// When the range is not wholly allocated: a double free would give two tensors the same bytes.
    pub fn release(&mut self, extent: Extent) {
        let before = self.free.range(..=extent.offset).next_back().map(|(&o, &l)| (o, l));
        let after = self.free.range(extent.offset..).next().map(|(&o, &l)| (o, l));
        let clear_before = before.is_none_or(|(offset, length)| offset + length <= extent.offset);
        let clear_after = after.is_none_or(|(offset, _)| extent.end() <= offset);
        assert!(
            clear_before && clear_after && extent.end() <= self.capacity && extent.length > 0,
            "extent {extent:?} is not allocated"
        );
        self.put(extent);
    }

    /// Size of the address space, in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes not allocated.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Bytes in the longest free range.
    pub fn longest(&self) -> u64 {
        self.by_length.last().map_or(0, |&(length, _)| length)
    }

    /// Number of free ranges.
    pub fn fragments(&self) -> usize {
        self.free.len()
    }

    /// Frees a range that is not free, and merges it with its neighbors.
    fn put(&mut self, extent: Extent) {
        let Extent { mut offset, mut length } = extent;
        if let Some((&before, &free)) = self.free.range(..offset).next_back()
            && before + free == offset
        {
            self.remove(before, free);
            (offset, length) = (before, free + length);
        }
        if let Some(&free) = self.free.get(&(offset + length)) {
            self.remove(offset + length, free);
            length += free;
        }
        self.insert(offset, length);
    }

    fn insert(&mut self, offset: u64, length: u64) {
        self.free.insert(offset, length);
        self.by_length.insert((length, offset));
        self.free_bytes += length;
    }

    fn remove(&mut self, offset: u64, length: u64) {
        self.free.remove(&offset);
        self.by_length.remove(&(length, offset));
        self.free_bytes -= length;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNITS: u64 = 64;

    /// What happens to an allocator.
    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u64),
        Claim(u64, u64),
        Release(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0u64..12 * EXTENT_ALIGNMENT).prop_map(Step::Allocate),
            1 => (0..UNITS + 4, 0u64..8).prop_map(|(first, units)| Step::Claim(first, units)),
            3 => any::<usize>().prop_map(Step::Release),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        /// The model is one owner per unit of the address space, which grows by half on the way.
        #[test]
        fn extents_never_overlap_and_nothing_leaks(steps in steps(), grown_at in 0usize..200) {
            let mut extents = Extents::new(UNITS * EXTENT_ALIGNMENT + 17);
            let mut owners = vec![None::<usize>; UNITS as usize];
            let mut held: Vec<(usize, Extent)> = Vec::new();
            let units = |e: Extent| (e.offset / EXTENT_ALIGNMENT) as usize..(e.end() / EXTENT_ALIGNMENT) as usize;
            let runs = |owners: &[Option<usize>]| -> Vec<u64> {
                owners.split(Option::is_some).map(|run| run.len() as u64).filter(|&run| run > 0).collect()
            };
            for (id, step) in steps.into_iter().enumerate() {
                if id == grown_at {
                    owners.resize(UNITS as usize * 3 / 2, None);
                    extents.grow(owners.len() as u64 * EXTENT_ALIGNMENT + 5);
                }
                match step {
                    Step::Allocate(bytes) => match extents.allocate(bytes) {
                        Ok(extent) => {
                            prop_assert!(extent.length >= bytes && extent.length < bytes.max(1) + EXTENT_ALIGNMENT);
                            for unit in units(extent) {
                                prop_assert_eq!(owners[unit].replace(id), None);
                            }
                            held.push((id, extent));
                        }
                        Err(full) => {
                            prop_assert_eq!(full.longest, runs(&owners).into_iter().max().unwrap_or(0) * EXTENT_ALIGNMENT);
                            prop_assert!(full.requested > full.longest);
                        }
                    },
                    Step::Claim(first, count) => {
                        let extent = Extent { offset: first * EXTENT_ALIGNMENT, length: count * EXTENT_ALIGNMENT };
                        let free = count > 0
                            && owners.get(units(extent)).is_some_and(|owners| owners.iter().all(Option::is_none));
                        prop_assert_eq!(extents.claim(extent).is_ok(), free);
                        if free {
                            owners[units(extent)].fill(Some(id));
                            held.push((id, extent));
                        }
                    }
                    Step::Release(_) if held.is_empty() => {}
                    Step::Release(pick) => {
                        let (id, extent) = held.swap_remove(pick % held.len());
                        for unit in units(extent) {
                            prop_assert_eq!(owners[unit].take(), Some(id));
                        }
                        extents.release(extent);
                    }
                }
                let runs = runs(&owners);
                prop_assert_eq!(extents.free_bytes(), runs.iter().sum::<u64>() * EXTENT_ALIGNMENT);
                prop_assert_eq!(extents.fragments(), runs.len());
                prop_assert_eq!(extents.longest(), runs.into_iter().max().unwrap_or(0) * EXTENT_ALIGNMENT);
            }
            for (_, extent) in held {
                extents.release(extent);
            }
            prop_assert_eq!(extents.allocate(extents.capacity()).map(|e| e.offset), Ok(0));
        }
    }

    #[test]
    #[should_panic(expected = "is not allocated")]
    fn a_double_free_is_caught() {
        let mut extents = Extents::new(8 * EXTENT_ALIGNMENT);
        let extent = extents.allocate(1).unwrap();
        extents.release(extent);
        extents.release(extent);
    }

    #[test]
    fn a_request_beyond_the_address_space_is_refused() {
        let mut extents = Extents::new(8 * EXTENT_ALIGNMENT);
        assert!(extents.allocate(u64::MAX).is_err());
        assert_eq!(extents.free_bytes(), extents.capacity());
    }
}
