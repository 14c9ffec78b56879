//! What an optimizer swapper's memory is spent on, decided before anything is allocated.
//!
//! The budget is a total: for what the pipeline holds while it moves tiles, for the books, and for the tiles that stay in
//! memory for good. The pipeline comes first, but takes no more than a third if shorter tiles do. What is left keeps as
//! many tiles as it holds, spread evenly over the pass, so that transfers and computation of kept tiles take turns. A
//! fixed share is the best there is for a pass that touches everything once: any policy that forgets the oldest would
//! forget each tile just before its use.

use overspill_io::{BLOCK_ALIGNMENT, BlockClass};

use super::packing::{ParameterSpec, Tile, pack, spread};
use crate::ledger::{Durability, Worth};
use crate::pipeline;
use crate::store::Store;

/// What a user may decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// All the memory that state, and gradients if they are swapped, may take, in bytes.
    pub memory_bytes: usize,
    /// The most that may stay in memory, in bytes, however much of it there is; `None` for as much as fits.
    pub kept_bytes_max: Option<usize>,
    /// Tiles that load ahead, and tiles that store behind; as many as fit, up to [`DEPTH_DEFAULT`], when not given, and more
    /// where memory is left that may not keep state.
    pub depth: Option<usize>,
    /// Bytes of a tile; [`TILE_BYTES_DEFAULT`] or less, as the memory allows, when not given.
    pub tile_bytes: Option<usize>,
    /// Bytes of an element of a gradient, when gradients are swapped, too.
    pub gradient_bytes: Option<usize>,
}

/// Depth of the pipeline when nobody says.
pub const DEPTH_DEFAULT: usize = 4;

/// The part of the memory that the pipeline takes at most, as long as there are shorter tiles and something to keep.
const PIPELINE_PART: usize = 3;

/// The same when memory is left that may not keep state.
const DEPTH_MAX: usize = 32;

/// Longest and shortest tile when nobody says, in bytes.
pub const TILE_BYTES_DEFAULT: usize = 8 << 20;
const TILE_BYTES_MIN: usize = 128 << 10;

/// What a tile takes in the books: names, extents, handles; and what each part takes in it beside.
const TILE_RECORD_BYTES: usize = 2 << 10;
const PART_RECORD_BYTES: usize = 192;

/// No books are kept of more tiles than these, and nothing longer is counted.
const TILES_MAX: usize = 1 << 24;
const BYTES_MAX: usize = isize::MAX as usize >> 8;

/// Tiles whose gradients may be gathered at a time, if they are this short together; one in any case.
const GATHERED_TILES: usize = 3;
const GATHERED_BYTES_MAX: usize = 16 << 20;

/// The memory is too small for any plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{memory_bytes} bytes of memory are too few to swap with: {least_bytes} would do")]
pub struct TooSmall {
    /// The budget, in bytes.
    pub memory_bytes: usize,
    /// The smallest budget that would do, in bytes.
    pub least_bytes: usize,
}

/// What the memory is spent on.
#[derive(Clone, Debug)]
pub struct OptimizerPlan {
    pub(crate) tiles: Vec<Tile>,
    /// Whether each tile stays in memory.
    pub(crate) kept: Vec<bool>,
    pub(crate) tile_bytes: usize,
    pub(crate) depth: usize,
    pub(crate) gradient_bytes: Option<usize>,
}

impl OptimizerPlan {
    /// Finds the plan with the deepest pipeline that fits and the longest tiles that leave room to keep some, and keeps
    /// what is left room for.
    ///
    /// # Errors
    /// [`TooSmall`] when the pipeline alone does not fit; with `usize::MAX` when no machine would do.
    pub fn new(specs: &[ParameterSpec], options: &PlanOptions) -> Result<Self, TooSmall> {
        let gradient_bytes = options.gradient_bytes.filter(|&bytes| bytes > 0);
        let lengths = specs.iter().map(|ParameterSpec { numel, state, .. }| {
            let gradient = numel.saturating_mul(gradient_bytes.unwrap_or(0));
            state.bytes(*numel).max(*numel).saturating_add(gradient)
        });
        let all_bytes = lengths.fold(0, usize::saturating_add);
        let memory_bytes = options.memory_bytes;
        if all_bytes > BYTES_MAX {
            return Err(TooSmall { memory_bytes, least_bytes: usize::MAX });
        }
        let tile_lengths = match options.tile_bytes {
            Some(bytes) => vec![bytes.clamp(1, BYTES_MAX).next_multiple_of(BLOCK_ALIGNMENT)],
            None => std::iter::successors(Some(TILE_BYTES_DEFAULT), |bytes| Some(bytes / 2))
                .take_while(|&bytes| bytes >= TILE_BYTES_MIN)
                .collect(),
        };
        let depths = match options.depth {
            Some(depth) => vec![depth],
            None => (0..=DEPTH_DEFAULT).rev().collect(),
        };
        let kept_bytes_max = options.kept_bytes_max.unwrap_or(usize::MAX);
        let mut least_bytes = usize::MAX;
        for &depth in &depths {
            let mut found = None;
            for &tile_bytes in tile_lengths.iter().filter(|&&bytes| all_bytes / bytes < TILES_MAX) {
                let mut plan = Self {
                    tiles: pack(specs, tile_bytes),
                    kept: Vec::new(),
                    tile_bytes,
                    depth,
                    gradient_bytes,
                };
                let whole =
                    plan.books_bytes() + (0..plan.tiles.len()).map(|i| plan.keeping_bytes(i)).sum::<usize>();
                if whole <= options.memory_bytes && whole <= kept_bytes_max {
                    plan.kept = vec![true; plan.tiles.len()];
                    return Ok(plan);
                }
                plan.kept = vec![false; plan.tiles.len()];
                let moving = plan.total_bytes();
                least_bytes =
                    least_bytes.min(if whole <= kept_bytes_max { moving.min(whole) } else { moving });
                if moving > memory_bytes {
                    continue;
                }
                if found.as_ref().is_none_or(|(_, least)| moving < *least) {
                    found = Some((plan, moving));
                }
                if moving <= memory_bytes / PIPELINE_PART || memory_bytes - moving >= kept_bytes_max {
                    break;
                }
            }
            if let Some((mut plan, moving)) = found {
                plan.keep((memory_bytes - moving).min(kept_bytes_max));
                if options.depth.is_none() && options.kept_bytes_max.is_some() {
                    plan.deepen(memory_bytes);
                }
                return Ok(plan);
            }
        }
        Err(TooSmall { memory_bytes, least_bytes })
    }

    /// Keeps as many tiles as `bytes` hold.
    fn keep(&mut self, bytes: usize) {
        let lengths: Vec<usize> = (0..self.tiles.len()).map(|index| self.keeping_bytes(index)).collect();
        self.kept = spread(&lengths, bytes);
    }

    /// Spends memory that may not keep state on loading and storing more of it at a time: what is loaded before a pass
    /// begins, and stored after it has ended, takes no time of it.
    fn deepen(&mut self, memory_bytes: usize) {
        while self.depth < DEPTH_MAX.min(self.tiles.len()) {
            self.depth += 1;
            if self.total_bytes() > memory_bytes {
                self.depth -= 1;
                return;
            }
        }
    }

    /// Bytes that a tile takes for good, with its gradient.
    fn keeping_bytes(&self, index: usize) -> usize {
        let tile = &self.tiles[index];
        tile.bytes() + self.gradient_bytes.map_or(0, |bytes| bytes * tile.elements())
    }

    fn books_bytes(&self) -> usize {
        let parts: usize = self.tiles.iter().map(|tile| tile.parts.len()).sum();
        self.tiles.len() * TILE_RECORD_BYTES + parts * PART_RECORD_BYTES
    }

    /// Who holds blocks, and how many at once.
    pub fn classes(&self) -> Vec<BlockClass> {
        let mut classes: Vec<BlockClass> = Vec::new();
        let mut add =
            |name, block_bytes, count| match classes.iter_mut().find(|c| c.block_bytes == block_bytes) {
                Some(class) => class.count = usize::saturating_add(class.count, count),
                None => classes.push(BlockClass { name, block_bytes, count }),
            };
        if self.swaps() {
            add("tile of optimizer state", self.longest_tile(), pipeline::items_in_memory(self.depth));
            if let Some(bytes) = self.longest_gradient() {
                add("tile of gradients", bytes, pipeline::items_in_memory(self.depth));
            }
        }
        for (tile, _) in self.tiles.iter().zip(&self.kept).filter(|(_, kept)| **kept) {
            add("tile that stays", tile.bytes(), 1);
        }
        classes
    }

    /// Bytes of everything: what the budget has to hold.
    pub fn total_bytes(&self) -> usize {
        let lengths = self.classes().into_iter().map(|class| class.block_bytes.saturating_mul(class.count));
        let blocks = lengths.fold(0, usize::saturating_add);
        let gradients = self.gradient_bytes.unwrap_or(0);
        let kept = self.tiles.iter().zip(&self.kept).filter(|(_, kept)| **kept);
        let kept_gradients: usize = kept.map(|(tile, _)| gradients * tile.elements()).sum();
        // Gradients that arrive in pieces are gathered outside of the pool, and one is on its way in or out.
        let gathering = self.gathering_bytes() + self.longest_gradient().unwrap_or(0);
        blocks.saturating_add(kept_gradients + gathering + self.books_bytes())
    }

    /// Bytes of the gradients, of tiles that move, that are gathered in memory at most.
    pub(crate) fn gathering_bytes(&self) -> usize {
        let longest = self.longest_gradient().unwrap_or(0);
        longest.max((longest * GATHERED_TILES).min(GATHERED_BYTES_MAX))
    }

    /// Bytes that the store will take.
    pub fn storage_bytes(&self, durability: Durability) -> u64 {
        let state = self.tiles.iter().map(Tile::bytes);
        Store::capacity_for(durability, Worth::State, state) + self.gradient_storage_bytes(durability)
    }

    /// Bytes that the store will take for gradients.
    pub(crate) fn gradient_storage_bytes(&self, durability: Durability) -> u64 {
        let moving = self.tiles.iter().zip(&self.kept).filter(|(_, kept)| !**kept);
        let gradients = moving.filter_map(|(tile, _)| self.gradient_tile_bytes(tile));
        Store::capacity_for(durability, Worth::Scratch, gradients)
    }

    /// Tiles that load ahead, and tiles that store behind.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        self.tile_bytes
    }

    /// Bytes of all state.
    pub fn state_bytes(&self) -> usize {
        self.tiles.iter().map(Tile::bytes).sum()
    }

    /// Bytes of the state that stays in memory.
    pub fn kept_bytes(&self) -> usize {
        self.tiles.iter().zip(&self.kept).filter(|(_, kept)| **kept).map(|(tile, _)| tile.bytes()).sum()
    }

    /// Whether anything moves.
    fn swaps(&self) -> bool {
        self.kept.contains(&false)
    }

    /// Bytes of the longest tile that moves.
    pub(crate) fn longest_tile(&self) -> usize {
        let moving = self.tiles.iter().zip(&self.kept).filter(|(_, kept)| !**kept);
        moving.map(|(tile, _)| tile.bytes()).max().unwrap_or(0)
    }

    pub(crate) fn longest_gradient(&self) -> Option<usize> {
        let moving = self.tiles.iter().zip(&self.kept).filter(|(_, kept)| !**kept);
        moving.filter_map(|(tile, _)| self.gradient_tile_bytes(tile)).max()
    }

    /// Bytes of a tile's gradients on storage.
    pub(crate) fn gradient_tile_bytes(&self, tile: &Tile) -> Option<usize> {
        self.gradient_bytes.map(|bytes| (bytes * tile.elements()).next_multiple_of(BLOCK_ALIGNMENT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::packing::StateSize;

    fn specs(count: usize) -> Vec<ParameterSpec> {
        let state = StateSize::per_element(10);
        (0..count)
            .map(|i| ParameterSpec {
                name: format!("p{i}"),
                numel: 1_000_003,
                state: state.clone(),
                begins_tile: false,
            })
            .collect()
    }

    #[test]
    fn every_budget_is_kept_and_more_memory_keeps_more() {
        let specs = specs(20);
        for gradient_bytes in [None, Some(4)] {
            let mut kept = 0;
            for memory_bytes in (1..400).map(|mib| mib << 20) {
                let options = PlanOptions {
                    memory_bytes,
                    kept_bytes_max: None,
                    depth: None,
                    tile_bytes: Some(1 << 20),
                    gradient_bytes,
                };
                match OptimizerPlan::new(&specs, &options) {
                    Ok(plan) => {
                        assert!(plan.total_bytes() <= memory_bytes, "{memory_bytes}");
                        // A deeper pipeline comes first, and takes some of what could be kept.
                        assert!(plan.kept_bytes() + (13 << 20) >= kept);
                        kept = plan.kept_bytes();
                    }
                    Err(TooSmall { least_bytes, .. }) => {
                        assert!(least_bytes > memory_bytes && kept == 0);
                        let enough = PlanOptions { memory_bytes: least_bytes, ..options };
                        assert!(OptimizerPlan::new(&specs, &enough).is_ok());
                    }
                }
            }
            let all: usize = specs.iter().map(|spec| spec.numel * 10).sum();
            assert!(kept >= all, "{kept} of {all}");
        }
    }

    #[test]
    fn memory_that_may_not_keep_state_loads_and_stores_more_of_it_at_a_time() {
        let specs = specs(20);
        let plan = |mib: usize, kept_bytes_max| {
            let options = PlanOptions {
                memory_bytes: mib << 20,
                kept_bytes_max,
                depth: None,
                tile_bytes: Some(1 << 20),
                gradient_bytes: None,
            };
            OptimizerPlan::new(&specs, &options).unwrap()
        };
        let mut depth = 0;
        for mib in (4..120).chain([1000]) {
            let plan = plan(mib, Some(0));
            assert!(plan.total_bytes() <= mib << 20 && plan.kept_bytes() == 0);
            assert!(plan.depth() >= depth, "{mib} MiB: {} after {depth}", plan.depth());
            depth = plan.depth();
        }
        assert_eq!(depth, DEPTH_MAX);
        assert_eq!(plan(60, None).depth(), DEPTH_DEFAULT);
    }

    #[test]
    fn long_tiles_leave_room_to_keep_some() {
        let specs = specs(20);
        for memory_bytes in (24..190).map(|mib| mib << 20) {
            let options = PlanOptions {
                memory_bytes,
                kept_bytes_max: None,
                depth: None,
                tile_bytes: None,
                gradient_bytes: Some(4),
            };
            let plan = OptimizerPlan::new(&specs, &options).unwrap();
            assert!(plan.total_bytes() <= memory_bytes);
            // The state, its gradients, and a tile that is too long for the rest.
            let kept = plan.kept_bytes() / 10 * 14 + 2 * TILE_BYTES_DEFAULT.min(plan.tile_bytes());
            assert!(kept >= memory_bytes / 2, "{kept} of {memory_bytes} with tiles of {}", plan.tile_bytes());
            assert_eq!(plan.depth(), DEPTH_DEFAULT);
        }
    }
}
