//! What a plan may choose: the depth of the pipeline and the length of its tiles.
//!
//! Depths come deepest first: a pipeline that does not overlap costs a step more than the short tiles with which it would.
//! Good tiles come before shorter ones, and none is longer than the longest unit. Somebody may have decided on
//! either: a user on the depth, a state that a run goes on from on its tiles.

use crate::layout::ModelLayout;

/// Depth of the pipeline when the user does not say.
pub const DEPTH_DEFAULT: usize = 2;

/// Longest tile, shortest tile whose requests cost little beside its bytes, and shortest tile at all, in elements. With half
/// the good one, a step takes a twentieth more of the cores.
const TILE_ELEMENTS_MAX: usize = 1 << 20;
const TILE_ELEMENTS_GOOD: usize = 1 << 17;
const TILE_ELEMENTS_MIN: usize = 1 << 14;

/// Tiles for which there is a plan with a pipeline in most budgets, in elements.
const TILE_ELEMENTS_ANY: usize = 1 << 16;

/// What is not for the plan to choose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fixed {
    /// Depth of the pipeline.
    pub depth: Option<usize>,
    /// Bytes of a tile: those of the state that a run goes on from.
    pub tile_bytes: Option<usize>,
    /// The most that may stay in memory for good, in bytes, however much room there is.
    pub resident_bytes_max: Option<usize>,
}

impl Fixed {
    /// The depth only.
    #[must_use]
    pub fn depth(depth: Option<usize>) -> Self {
        Self { depth, ..Self::default() }
    }
}

/// What is left to choose from; lengths of tiles in elements, the longest first.
#[derive(Debug)]
pub(super) struct Choices {
    depth: Option<usize>,
    /// Good ones, or the only ones; never empty.
    pub(super) good: Vec<usize>,
    /// Shorter ones, for budgets that have no room for others.
    pub(super) short: Vec<usize>,
}

impl Choices {
    pub(super) fn new(fixed: Fixed, layout: &ModelLayout) -> Self {
        let Fixed { depth, tile_bytes, .. } = fixed;
        let longest = layout.largest_unit_bytes() / size_of::<f32>();
        let lengths = |from: usize, to: usize| {
            let halves = std::iter::successors(Some(from), |tile| Some(tile / 2));
            let mut tiles =
                Vec::from_iter(halves.take_while(|&tile| tile >= to).map(|tile| tile.min(longest)));
            tiles.dedup();
            tiles
        };
        let good = lengths(TILE_ELEMENTS_MAX, TILE_ELEMENTS_GOOD);
        let mut short = lengths(TILE_ELEMENTS_GOOD / 2, TILE_ELEMENTS_MIN);
        short.retain(|tile| !good.contains(tile));
        let all = good.iter().chain(&short).copied();
        match all.into_iter().find(|tile| Some(tile * size_of::<f32>()) == tile_bytes) {
            Some(only) => Self { depth, good: vec![only], short: Vec::new() },
            // A tile that no plan has, as a damaged state may say, is none to keep to.
            None => Self { depth, good, short },
        }
    }

    pub(super) fn depths(&self) -> impl Iterator<Item = usize> + use<> {
        self.depth.map_or(0..=DEPTH_DEFAULT, |depth| depth..=depth).rev()
    }

    /// Lengths of tiles, the longest first.
    pub(super) fn tiles(&self) -> impl Iterator<Item = usize> {
        self.good.iter().chain(&self.short).copied()
    }
}

/// Bytes of the tiles that a state is cut into before anybody knows the run.
pub(crate) fn tile_bytes_for_any(layout: &ModelLayout) -> usize {
    let longest = layout.largest_unit_bytes() / size_of::<f32>();
    TILE_ELEMENTS_ANY.min(longest) * size_of::<f32>()
}

/// Whether there are plans with tiles of this length.
pub(crate) fn has_tiles_of(layout: &ModelLayout, tile_bytes: usize) -> bool {
    Choices::new(Fixed::default(), layout).tiles().any(|tile| tile * size_of::<f32>() == tile_bytes)
}
