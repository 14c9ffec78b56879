//! How a tensor is cut for its way to a file (pure).
//!
//! What the kernel can move from where it lies goes in one piece. Everything else goes through blocks of our own: memory
//! that is not pinned because small pages make direct I/O slow, odd addresses because it refuses them, and what is left at
//! the ends of an odd range. A piece of those begins and ends where a sector does, but at both ends of the whole, so that
//! only the ends are read to be written.

use std::ops::Range;

/// Bytes of a tensor that travel together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where in the tensor they are.
    pub(super) range: Range<usize>,
    pub(super) way: Way,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From where they lie.
    Direct,
    /// Through a block of at most as many bytes as pieces have.
    Copied,
}

/// Where a tensor lies, and where it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub(super) address: usize,
    pub(super) bytes: usize,
    /// Where in the file it begins.
    pub(super) offset: u64,
    /// What offsets, lengths and addresses must be multiples of; 1 through the page cache.
    pub(super) alignment: usize,
    /// Whether the memory is worth going there directly.
    pub(super) is_pinned: bool,
}

impl Route {
    /// Cuts the tensor into pieces of which each `Copied` one has at most `piece_bytes` bytes.
    pub(super) fn pieces(&self, piece_bytes: usize) -> Vec<Piece> {
        let &Self { address, bytes, offset, alignment, is_pinned } = self;
        let into_sector = (offset % alignment as u64) as usize;
        // What comes before the first sector that is all ours, and behind the last.
        let head = ((alignment - into_sector) % alignment).min(bytes);
        let body = head..bytes - (bytes - head) % alignment;
        let is_direct = alignment == 1 || is_pinned && (address + head).is_multiple_of(alignment);
        let mut pieces = Vec::new();
        let mut push = |range: Range<usize>, way| {
            if !range.is_empty() {
                pieces.push(Piece { range, way });
            }
        };
        push(0..head, Way::Copied);
        if is_direct {
            push(body.clone(), Way::Direct);
        } else {
            for start in body.clone().step_by(piece_bytes) {
                push(start..body.end.min(start + piece_bytes), Way::Copied);
            }
        }
        push(body.end..bytes, Way::Copied);
        pieces
    }
}
