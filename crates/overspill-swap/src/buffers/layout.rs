//! Which tensor is where in a buffer: plain numbers, no memory.
//!
//! Regions follow each other without gaps, each a multiple of [`BLOCK_ALIGNMENT`] long, so a block can be cut between
//! any two of them. An empty tensor has an empty region, at the place where the next one begins.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use overspill_io::BLOCK_ALIGNMENT;

use super::alignment::Alignment;
use super::dtype::Dtype;
use super::error::SwapError;

/// The tensors of one buffer.
#[derive(Debug)]
pub(super) struct Layout {
    dtype: Dtype,
    alignment: Alignment,
    /// Bytes that regions may take: a multiple of [`BLOCK_ALIGNMENT`].
    room: usize,
    /// By rising offset.
    entries: Vec<Entry>,
    /// The paths of all entries.
    paths: HashSet<Arc<Path>>,
}

/// One tensor of a buffer.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) path: Arc<Path>,
    /// Where its region begins in the buffer, in bytes.
    pub(super) offset: usize,
    pub(super) numel: usize,
    pub(super) lengths: Lengths,
}

/// What a tensor takes, in bytes, each at least as long as the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    /// Its elements.
    pub(super) compute: usize,
    /// The aligned number of elements.
    pub(super) swap: usize,
    /// What is cut off, written and read.
    pub(super) region: usize,
}

impl Lengths {
    /// `None`: more than there are addresses.
    fn of(numel: usize, dtype: Dtype, alignment: Alignment) -> Option<Lengths> {
        let compute = numel.checked_mul(dtype.bytes())?;
        let swap = alignment.aligned_numel(numel, dtype)?.checked_mul(dtype.bytes())?;
        Some(Lengths { compute, swap, region: swap.checked_next_multiple_of(BLOCK_ALIGNMENT)? })
    }
}

impl Entry {
    /// Where its region ends in the buffer.
    pub(super) fn end(&self) -> usize {
        self.offset + self.lengths.region
    }
}

impl Layout {
    /// An empty layout of a buffer of `bytes` bytes.
    pub(super) fn new(bytes: usize, dtype: Dtype, alignment: Alignment) -> Layout {
        let room = bytes - bytes % BLOCK_ALIGNMENT;
        Layout { dtype, alignment, room, entries: Vec::new(), paths: HashSet::new() }
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(super) fn alignment(&self) -> Alignment {
        self.alignment
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Bytes taken by regions: where the next one begins.
    pub(super) fn used(&self) -> usize {
        self.entries.last().map_or(0, Entry::end)
    }

    /// Bytes that no region has.
    pub(super) fn free(&self) -> usize {
        self.room - self.used()
    }

    /// The longest tensor that fits when nothing else does.
    pub(super) fn numel_max(&self) -> usize {
        self.room / self.dtype.bytes()
    }

    pub(super) fn holds(&self, path: &Path) -> bool {
        self.paths.contains(path)
    }

    /// Whether a tensor of `numel` elements would be placed.
    pub(super) fn has_space(&self, numel: usize) -> bool {
        self.lengths(numel).is_some_and(|lengths| lengths.region <= self.free())
    }

    /// Places one more tensor, behind all others. Nothing changes if it is refused.
    pub(super) fn place(&mut self, numel: usize, path: &Path) -> Result<Entry, SwapError> {
        let (dtype, numel_max) = (self.dtype, self.numel_max());
        let too_large = || SwapError::TooLarge { path: path.to_owned(), numel, dtype, numel_max };
        let lengths = self.lengths(numel).ok_or_else(too_large)?;
        if lengths.region > self.room {
            return Err(too_large());
        }
        if lengths.region > self.free() {
            return Err(SwapError::NoRoom { path: path.to_owned(), numel, dtype, bytes_free: self.free() });
        }
        if self.holds(path) {
            return Err(SwapError::Held { path: path.to_owned() });
        }
        let path: Arc<Path> = Arc::from(path);
        self.paths.insert(Arc::clone(&path));
        let entry = Entry { path, offset: self.used(), numel, lengths };
        self.entries.push(entry.clone());
        Ok(entry)
    }

    /// The tensor whose region begins at `offset`; of an empty one and its successor, the successor.
    pub(super) fn at(&self, offset: usize) -> Option<&Entry> {
        let behind = self.entries.partition_point(|entry| entry.offset <= offset);
        let last = self.entries.get(behind.checked_sub(1)?)?;
        (last.offset == offset).then_some(last)
    }

    /// Sum of the tensors' elements.
    pub(super) fn numel(&self) -> usize {
        self.entries.iter().map(|entry| entry.numel).sum()
    }

    /// Forgets every tensor.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.paths.clear();
    }

    fn lengths(&self, numel: usize) -> Option<Lengths> {
        Lengths::of(numel, self.dtype, self.alignment)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tensor_that_has_more_bytes_than_there_are_addresses_is_too_large() {
        let mut layout = Layout::new(1 << 20, Dtype::F64, Alignment::MAX);
        for numel in [usize::MAX, usize::MAX / 8, (1 << 17) + 1] {
            assert!(!layout.has_space(numel));
            let refused = layout.place(numel, Path::new("a")).unwrap_err();
            assert!(matches!(refused, SwapError::TooLarge { numel_max, .. } if numel_max == 1 << 17));
        }
        assert_eq!(layout.used(), 0);
    }

    #[test]
    fn an_empty_tensor_takes_no_room() {
        let mut layout = Layout::new(4096, Dtype::F32, Alignment::MAX);
        layout.place(0, Path::new("empty")).unwrap();
        layout.place(1024, Path::new("full")).unwrap();
        layout.place(0, Path::new("also empty")).unwrap();
        assert_eq!(layout.at(0).map(|entry| entry.numel), Some(1024));
        assert_eq!(layout.at(4096).map(|entry| entry.numel), Some(0));
        assert!(layout.at(1).is_none());
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_are_placed_exactly_when_there_is_space(
            bytes in 0_usize..60_000,
            power in 0_u32..=12,
            dtype in 0..9_usize,
            numels in prop::collection::vec(0_usize..3_000, 0..30),
        ) {
            let (alignment, dtype) = (Alignment::new(1 << power).unwrap(), Dtype::ALL[dtype]);
            let mut layout = Layout::new(bytes, dtype, alignment);
            let mut sum = 0;
            for (index, &numel) in numels.iter().enumerate() {
                let (fits, count) = (layout.has_space(numel), layout.entries().len());
                let placed = layout.place(numel, Path::new(&index.to_string()));
                prop_assert_eq!(fits, placed.is_ok());
                prop_assert_eq!(layout.entries().len(), count + usize::from(fits));
                sum += if fits { numel } else { 0 };
            }
            prop_assert_eq!(layout.numel(), sum);
            prop_assert!(layout.used() <= bytes && layout.used() + layout.free() <= bytes);
            let mut end = 0;
            for entry in layout.entries() {
                let Lengths { compute, swap, region } = entry.lengths;
                prop_assert_eq!(entry.offset, end);
                prop_assert!(entry.offset.is_multiple_of(BLOCK_ALIGNMENT));
                prop_assert_eq!(compute, entry.numel * dtype.bytes());
                prop_assert!(swap.is_multiple_of(alignment.bytes()) && region.is_multiple_of(BLOCK_ALIGNMENT));
                prop_assert!(compute <= swap && swap <= region && region < swap + BLOCK_ALIGNMENT);
                if region > 0 {
                    prop_assert_eq!(layout.at(entry.offset).map(|found| &found.path), Some(&entry.path));
                }
                end = entry.end();
            }
            layout.clear();
            prop_assert_eq!((layout.used(), layout.numel()), (0, 0));
        }
    }
}
