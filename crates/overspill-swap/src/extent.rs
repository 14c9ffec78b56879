//! Which bytes of the data file belong to whom: a first-fit allocator over one address range.
//!
//! Pure bookkeeping, no I/O. Free space is kept as a map from offset to length in which neighbors are always merged,
//! so that whatever is handed back can be handed out again whole. Everything is counted in [`EXTENT_ALIGNMENT`].

use std::collections::BTreeMap;

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

/// The free ranges of an address space of fixed size.
#[derive(Clone, Debug)]
pub struct Extents {
    capacity: u64,
    /// Free ranges, offset to length; never adjacent, never empty.
    free: BTreeMap<u64, u64>,
}

impl Extents {
    /// An address space of `capacity` bytes (rounded down to the alignment), all free.
    pub fn new(capacity: u64) -> Self {
        let capacity = capacity - capacity % EXTENT_ALIGNMENT;
        let free = if capacity > 0 { BTreeMap::from([(0, capacity)]) } else { BTreeMap::new() };
        Self { capacity, free }
    }

    /// Takes the first free range of at least `bytes` (rounded up to the alignment; at least one unit).
    ///
    /// # Errors
    /// [`Full`] when no free range is long enough; nothing is taken then.
    pub fn allocate(&mut self, bytes: u64) -> Result<Extent, Full> {
        let full = |free: &BTreeMap<u64, u64>, requested| Full {
            requested,
            free: free.values().sum(),
            longest: free.values().copied().max().unwrap_or(0),
        };
        let Some(length) = bytes.max(1).checked_next_multiple_of(EXTENT_ALIGNMENT) else {
            return Err(full(&self.free, bytes));
        };
        let found =
            self.free.iter().find(|&(_, &free)| free >= length).map(|(&offset, &free)| (offset, free));
        let Some((offset, free)) = found else { return Err(full(&self.free, length)) };
        self.free.remove(&offset);
        if free > length {
            self.free.insert(offset + length, free - length);
        }
        Ok(Extent { offset, length })
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
        let mut merged = extent;
        if let Some((offset, length)) = before.filter(|&(offset, length)| offset + length == extent.offset) {
            self.free.remove(&offset);
            merged = Extent { offset, length: length + merged.length };
        }
        if let Some((offset, length)) = after.filter(|&(offset, _)| offset == extent.end()) {
            self.free.remove(&offset);
            merged.length += length;
        }
        self.free.insert(merged.offset, merged.length);
    }

    /// Size of the address space, in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes not allocated.
    pub fn free_bytes(&self) -> u64 {
        self.free.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNITS: u64 = 64;

    proptest! {
        /// The model is one owner per unit of the address space.
        #[test]
        fn extents_never_overlap_and_nothing_leaks(steps in prop::collection::vec((any::<bool>(), 0u64..12 * EXTENT_ALIGNMENT, any::<usize>()), 1..200)) {
            let mut extents = Extents::new(UNITS * EXTENT_ALIGNMENT + 17);
            let mut owners = [None::<usize>; UNITS as usize];
            let mut held: Vec<(usize, Extent)> = Vec::new();
            let units = |e: Extent| (e.offset / EXTENT_ALIGNMENT) as usize..(e.end() / EXTENT_ALIGNMENT) as usize;
            for (id, (take, bytes, pick)) in steps.into_iter().enumerate() {
                if take || held.is_empty() {
                    match extents.allocate(bytes) {
                        Ok(extent) => {
                            prop_assert!(extent.length >= bytes && extent.length < bytes.max(1) + EXTENT_ALIGNMENT);
                            for unit in units(extent) {
                                prop_assert_eq!(owners[unit].replace(id), None);
                            }
                            held.push((id, extent));
                        }
                        Err(full) => {
                            let longest = owners.split(Option::is_some).map(<[_]>::len).max().unwrap_or(0) as u64;
                            prop_assert_eq!(full.longest, longest * EXTENT_ALIGNMENT);
                            prop_assert!(full.requested > full.longest);
                        }
                    }
                } else {
                    let (id, extent) = held.swap_remove(pick % held.len());
                    for unit in units(extent) {
                        prop_assert_eq!(owners[unit].take(), Some(id));
                    }
                    extents.release(extent);
                }
                let free = owners.iter().filter(|o| o.is_none()).count() as u64;
                prop_assert_eq!(extents.free_bytes(), free * EXTENT_ALIGNMENT);
            }
            for (_, extent) in held {
                extents.release(extent);
            }
            prop_assert_eq!(extents.allocate(UNITS * EXTENT_ALIGNMENT).map(|e| e.offset), Ok(0));
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
