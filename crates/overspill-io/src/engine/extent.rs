//! How an operation is cut into chunks.
//!
//! Direct I/O takes whole sectors. What begins and ends with sectors goes straight, in chunks of the engine's size; what
//! does not goes through bounce blocks, in chunks that end where a window of the file does.

use super::chunk::Way;
use super::detour::BOUNCE_BYTES;
use super::queue::Priority;
use crate::memory::BLOCK_ALIGNMENT;

/// What an operation amounts to before it is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Where it begins in its file.
    pub(crate) offset: u64,
    /// Bytes to move, at least one.
    pub(crate) length: usize,
    /// What direct I/O needs of offsets and lengths; a chunk whose answer was short goes on at a multiple of it.
    pub(crate) alignment: usize,
    pub(crate) priority: Priority,
}

impl Extent {
    /// Whether all of it can go straight.
    pub(crate) fn is_aligned(&self) -> bool {
        self.straight() == self.length
    }

    /// How many of its first bytes go straight. The rest starts where a block can be split.
    fn straight(&self) -> usize {
        if !self.offset.is_multiple_of(self.alignment as u64) {
            0
        } else if self.length.is_multiple_of(self.alignment) {
            self.length
        } else {
            self.length - self.length % BLOCK_ALIGNMENT
        }
    }

    /// Length and way of the chunk that begins `start` bytes in. Chunks on a detour end where a window of the file
    /// does, so that no two of them touch one sector.
    pub(super) fn cut(&self, start: usize, chunk_bytes: usize) -> (usize, Way) {
        let straight = self.straight();
        if start < straight {
            return (chunk_bytes.min(straight - start), Way::Straight);
        }
        let window = chunk_bytes.min(BOUNCE_BYTES);
        let inside = ((self.offset + start as u64) % window as u64) as usize;
        ((window - inside).min(self.length - start), Way::Detour)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(offset: u64, length: usize, alignment: usize) -> Extent {
        Extent { offset, length, alignment, priority: Priority::Urgent }
    }

    fn cuts(extent: Extent, chunk_bytes: usize) -> Vec<(usize, usize, Way)> {
        let mut start = 0;
        let next = || {
            (start < extent.length).then(|| {
                let (length, way) = extent.cut(start, chunk_bytes);
                start += length;
                (start - length, length, way)
            })
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn only_the_odd_end_takes_a_detour() {
        let chunks = cuts(extent(4096, 20_000, 512), 8192);
        use Way::{Detour, Straight};
        assert_eq!(chunks, [(0, 8192, Straight), (8192, 8192, Straight), (16_384, 3616, Detour)]);
        assert_eq!(cuts(extent(512, 4608, 512), 8192), [(0, 4608, Straight)]);
        assert_eq!(cuts(extent(3, 5000, 1), 8192), [(0, 5000, Straight)], "through the page cache");
    }

    #[test]
    fn an_odd_offset_takes_a_detour_from_window_to_window() {
        let chunks = cuts(extent(8191, 8194, 512), 8192);
        assert_eq!(chunks, [(0, 1, Way::Detour), (1, 8192, Way::Detour), (8193, 1, Way::Detour)]);
    }

    proptest! {
        #[test]
        fn cuts_cover_the_extent_and_suit_direct_io(
            offset in 0_u64..1 << 22,
            length in 1_usize..1 << 20,
            sector in prop_oneof![Just(1_usize), Just(512), Just(4096)],
            chunk_bytes in (1_usize..300).prop_map(|blocks| blocks * BLOCK_ALIGNMENT),
        ) {
            let mut end = 0;
            let mut last_sector = None;
            for (start, length, way) in cuts(extent(offset, length, sector), chunk_bytes) {
                prop_assert_eq!(start, end);
                prop_assert!(length > 0 && length <= chunk_bytes);
                end = start + length;
                let (first, behind) = (offset + start as u64, offset + end as u64);
                let sectors = first / sector as u64..behind.div_ceil(sector as u64);
                match way {
                    Way::Straight => {
                        prop_assert!(first.is_multiple_of(sector as u64) && length.is_multiple_of(sector));
                        prop_assert!(start.is_multiple_of(BLOCK_ALIGNMENT), "blocks are split there");
                    }
                    Way::Detour => prop_assert!((sectors.end - sectors.start) as usize * sector <= BOUNCE_BYTES),
                }
                prop_assert!(last_sector <= Some(sectors.start), "two chunks touch one sector");
                last_sector = Some(sectors.end);
            }
            prop_assert_eq!(end, length);
        }
    }
}
