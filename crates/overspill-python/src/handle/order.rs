//! Which operations of a handle wait for which of its own (pure).
//!
//! Two operations that touch the same bytes of a file or of memory, one of them changing these, are carried out in the
//! order of their calls; all others at the same time. What is read by way of other memory reaches its own only when it
//! lands: whatever else touches that memory begins after that, but for reads that land there, too, one after another.

use std::ops::Range;

use overspill_io::Direction;

/// Which file it is, whatever the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileKey {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// Everything that an operation touches, in bytes.
#[derive(Clone, Debug)]
pub(super) struct Footprint {
    pub(super) direction: Direction,
    pub(super) file: FileKey,
    pub(super) file_range: Range<u64>,
    /// Whether it is a write that begins or ends within a sector, which other handles have to know of.
    pub(super) is_odd: bool,
    /// Addresses.
    pub(super) memory: Range<usize>,
    /// Whether it changes the memory only when it lands.
    pub(super) lands: bool,
}

impl Footprint {
    /// Whether this one has to wait for `earlier`.
    pub(super) fn conflicts_with(&self, earlier: &Footprint) -> bool {
        let reads_only = |direction| self.direction == direction && earlier.direction == direction;
        let same_file = self.file == earlier.file && overlap(&self.file_range, &earlier.file_range);
        // A write changes the file, a read the memory.
        (same_file && !reads_only(Direction::Read)) || (self.meets(earlier) && !(self.lands && earlier.lands))
    }

    /// Whether one of the two changes memory of the other.
    pub(super) fn meets(&self, other: &Footprint) -> bool {
        self.changes(&other.memory) || other.changes(&self.memory)
    }

    /// Whether it changes any of this memory.
    pub(super) fn changes(&self, memory: &Range<usize>) -> bool {
        self.direction == Direction::Read && overlap(&self.memory, memory)
    }
}

fn overlap<T: Ord + Copy>(a: &Range<T>, b: &Range<T>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}
