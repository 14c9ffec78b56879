//! The memory plan: what the budget is spent on, decided before anything is allocated.
//!
//! Memory goes to the pool (one class of blocks for each kind of holder, as many blocks as can be held at once), to
//! the activations that live between layers, to the workspace of the computation inside one layer, to the training
//! text, and to the process itself. Everything but the pool follows from the model and the batch; the pool's share
//! is made to fit by shortening the tiles, then by shortening the pipeline. What is left [keeps](Keeping) arrays in
//! memory for good. The longer the tiles, the less is left, and the shorter, the more of it go into the tables: of the
//! good lengths, the plan has the one with which a step [moves](Traffic) the least. So more memory never
//! moves more bytes, but where a good tile, or a deeper pipeline, is what it has become enough for.

mod choices;
mod keeping;
mod traffic;

use overspill_io::{BLOCK_ALIGNMENT, BlockClass};
use overspill_swap::{Durability, Store, Worth, pipeline};

use self::choices::Choices;
pub use self::choices::{DEPTH_DEFAULT, Fixed};
pub(crate) use self::choices::{has_tiles_of, tile_bytes_for_any};
pub use self::keeping::Keeping;
pub use self::traffic::Traffic;
use crate::config::{ConfigError, ModelConfig};
use crate::home::SavedInput;
use crate::layout::{ModelLayout, Unit, UnitLayout};
use crate::model::{BatchShape, Model};
use crate::size::ByteSize;

/// What one optimizer step works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// One micro-batch.
    pub batch: BatchShape,
    /// Micro-batches per step.
    pub accumulate: usize,
}

/// More tokens than this are not worked on at a time; their arithmetic would overflow.
const TOKENS_MAX: usize = 1 << 30;

impl StepShape {
    /// Checks that the sizes can be computed with and returns the shape.
    ///
    /// # Errors
    /// [`ConfigError::Impossible`] when one is zero, or all of them make too many tokens.
    pub fn checked(self) -> Result<Self, ConfigError> {
        let sizes = [("batch", self.batch.batch), ("seq", self.batch.seq), ("accumulate", self.accumulate)];
        let mut tokens = 1_usize;
        for (field, value) in sizes {
            tokens = tokens.saturating_mul(value);
            if value == 0 || tokens > TOKENS_MAX {
                let reason = format!("a step must have between 1 and {TOKENS_MAX} tokens");
                return Err(ConfigError::Impossible { field, value, reason });
            }
        }
        Ok(self)
    }

    /// Tokens per optimizer step.
    pub fn tokens(&self) -> usize {
        self.batch.tokens() * self.accumulate
    }
}

/// What the budget is spent on.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    depth: usize,
    tile_elements: usize,
    /// Elements of the longest piece: a tile, or a parameter that is updated as a whole.
    piece_elements: usize,
    /// Bytes of the longest record of a piece.
    record_bytes: usize,
    accumulate: usize,
    layers: usize,
    /// Whether the head computes with the embedding's weights.
    has_tied_head: bool,
    input_elements: usize,
    holders: Vec<BlockClass>,
    keeping: Keeping,
    /// Bytes that stay in memory, those of the pool and others.
    kept_bytes: usize,
    /// Bytes of the computation inside one layer, of the activations between layers, of the text and of the tables.
    compute_bytes: usize,
}

/// The budget does not hold the least that training needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "--memory {budget} is too small: the least that would do is {least} ({blocks} of blocks for {largest} and all \
     that moves, {computation} of computation and text, {process} for the process)",
    budget = ByteSize(*budget as u64), least = mebibytes(*least), blocks = ByteSize(*blocks as u64),
    computation = ByteSize(*computation as u64), process = ByteSize(*process as u64)
)]
pub struct TooSmall {
    /// The budget, in bytes.
    pub budget: usize,
    /// The smallest budget that would do, in bytes.
    pub least: usize,
    /// The longest unit of the model.
    pub largest: Unit,
    /// Of the least: bytes of the pool.
    pub blocks: usize,
    /// Of the least: bytes of activations, matrices, text and tables.
    pub computation: usize,
    /// Of the least: bytes of the process itself.
    pub process: usize,
}

/// Of these lengths, those of what does not stay.
fn moving(lengths: impl Iterator<Item = usize>, kept: &[bool]) -> impl Iterator<Item = usize> {
    lengths.zip(kept).filter(|(_, kept)| !**kept).map(|(length, _)| length)
}

/// Rounded up, so that the amount named does suffice.
fn mebibytes(bytes: usize) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// What the store and the home take of the heap for a piece of weights, gradient and moments: names, extents, handles,
/// what the update makes of them, and the manifest while it is written. A saved input takes no more. A test compares it
/// with what the allocator sees.
pub const TILE_RECORD_BYTES: usize = 5 << 9;

/// What the layouts of a unit take in memory, as if it were this many more tiles.
const UNIT_TILES: usize = 4;

/// Code, stacks, the allocator's slack, tables: what a process needs beside what it was asked to hold.
const PROCESS_BYTES: usize = 24 << 20;

fn process_bytes() -> usize {
    PROCESS_BYTES + rayon::current_num_threads() * THREAD_BYTES
}

/// What each computing thread keeps for good: the buffer in which a product packs its operands.
const THREAD_BYTES: usize = 4 << 20;

impl MemoryPlan {
    /// Finds the plan with the deepest pipeline that fits the budget, and of those with good tiles the one that moves the
    /// least in a step, with the shortest tiles if there are several; only when none of them fits, the longest of the short
    /// tiles that do.
    ///
    /// `fixed` is what it may not choose; `held_bytes` is what is in memory beside: the training text, its tokenizer, and what
    /// more engines than one take.
    ///
    /// # Errors
    /// [`TooSmall`] when nothing fits.
    pub fn new(
        config: &ModelConfig,
        layout: &ModelLayout,
        shape: StepShape,
        fixed: Fixed,
        held_bytes: usize,
        budget: usize,
    ) -> Result<Self, TooSmall> {
        let choices = Choices::new(fixed, layout);
        let with = |depth, tile| Self::with(config, layout, shape, depth, tile, held_bytes);
        let room = |plan: &Self| {
            let room = Keeping::room(budget.checked_sub(plan.total_bytes())?);
            Some(fixed.resident_bytes_max.map_or(room, |most| room.min(most)))
        };
        for depth in choices.depths() {
            let fitting = |&tile: &usize| {
                let plan = with(depth, tile);
                room(&plan).map(|room| plan.keep(layout, room))
            };
            let moved = |plan: &Self| plan.traffic(layout, Durability::None).bytes();
            let good = choices.good.iter().rev().filter_map(fitting).min_by_key(moved);
            if let Some(plan) = good.or_else(|| choices.short.iter().find_map(fitting)) {
                return Ok(plan);
            }
        }
        let all = choices.depths().flat_map(|depth| choices.tiles().map(move |tile| with(depth, tile)));
        let least = all.min_by_key(Self::total_bytes).expect("there are depths and tiles to choose from");
        // The first of the longest.
        let largest = layout.units().iter().rev().max_by_key(|unit| unit.padded).expect("a model has units");
        Err(TooSmall {
            budget,
            least: least.total_bytes(),
            largest: largest.unit,
            blocks: least.pool_bytes(),
            computation: least.compute_bytes,
            process: process_bytes(),
        })
    }

    /// The smallest budget for which there is a plan, in bytes.
    pub fn least_bytes(
        config: &ModelConfig,
        layout: &ModelLayout,
        shape: StepShape,
        fixed: Fixed,
        held_bytes: usize,
    ) -> usize {
        match Self::new(config, layout, shape, fixed, held_bytes, 0) {
            Ok(plan) => plan.total_bytes(),
            Err(refused) => refused.least,
        }
    }

    fn with(
        config: &ModelConfig,
        layout: &ModelLayout,
        shape: StepShape,
        depth: usize,
        tile_elements: usize,
        held_bytes: usize,
    ) -> Self {
        let longest = layout.largest_unit_bytes() / size_of::<f32>();
        let input_elements = shape.batch.tokens() * config.hidden;
        // Every micro-batch has an activation on its way up, and a gradient on its way down beside it.
        let between_layers = 2 * shape.accumulate * input_elements * size_of::<f32>();
        // The heap keeps some pages of what was dropped in a layer until the layer is done.
        let workspace = Model::workspace_bytes(config, shape.batch);
        // They take turns: nothing is updated before all gradients are there.
        let workspace = workspace.max(layout.update_workspace_bytes());
        let ids = 2 * shape.tokens() * size_of::<u32>();
        // Sine and cosine of the rotary embedding.
        let turns = shape.batch.seq * config.head_dim * size_of::<f32>();
        let mut plan = Self {
            depth,
            tile_elements: tile_elements.min(longest),
            piece_elements: layout.longest_piece(tile_elements),
            record_bytes: layout.longest_record_bytes(tile_elements),
            accumulate: shape.accumulate,
            layers: config.layers,
            has_tied_head: config.tied,
            input_elements,
            holders: Vec::new(),
            keeping: Keeping::default(),
            kept_bytes: 0,
            compute_bytes: workspace + workspace / 4 + between_layers + held_bytes + ids + turns,
        };
        let pieces = layout.units().iter().map(|unit| unit.piece_count(plan.tile_elements)).sum::<usize>();
        let records = pieces + plan.saved_inputs() + layout.units().len() * UNIT_TILES;
        plan.compute_bytes += records * TILE_RECORD_BYTES;
        plan.holders = plan.holders(config, layout);
        plan.keeping = Keeping::nothing(layout.units().len(), plan.saved_inputs());
        plan
    }

    /// Keeps in memory what `room` bytes hold.
    fn keep(mut self, layout: &ModelLayout, room: usize) -> Self {
        (self.keeping, self.kept_bytes) = Keeping::choose(&self, layout, room);
        let units = layout.units().iter().zip(self.keeping.weights.iter().zip(&self.keeping.moments));
        for (unit, (&weights, &moments)) in units {
            let class = |name, block_bytes| BlockClass { name, block_bytes, count: 1 };
            let records_bytes = layout.records_bytes(unit, self.tile_elements);
            self.holders.extend(weights.then(|| class("weights that stay", layout.weights_bytes(unit))));
            let moments = moments && records_bytes > 0;
            self.holders.extend(moments.then(|| class("moments that stay", records_bytes)));
        }
        self
    }

    /// Who can hold blocks, and how many at once.
    fn holders(&self, config: &ModelConfig, layout: &ModelLayout) -> Vec<BlockClass> {
        let bytes = |unit| self.unit_block_bytes(layout, unit);
        let stored_bytes = |unit| self.stored_block_bytes(layout, unit);
        let items = pipeline::items_in_memory(self.depth);
        let holder = |name, block_bytes, count| BlockClass { name, block_bytes, count };
        let ahead = self.units_ahead();
        // The layer at work and its gradient, and those being fetched if they are lent as they are.
        let layers = if layout.lends_weights() { 2 + ahead } else { 2 };
        let mut holders = vec![
            holder("layer", bytes(Unit::Layer(0)), layers),
            // Weights and gradient.
            holder("embedding", bytes(Unit::Embedding), 2),
            // One being saved or used, and those being fetched.
            holder("saved input", self.input_bytes(), 2 + self.look_ahead()),
            holder("piece of weights", self.piece_weights_bytes(layout), items),
            holder("piece of gradients", self.piece_gradient_bytes(), items),
        ];
        if self.record_bytes > 0 {
            holders.push(holder("piece of moments", self.record_bytes, items));
        }
        // An untied head is as long as the embedding and takes turns with it; a tied one is held beside it.
        if config.tied {
            holders.push(holder("head", bytes(Unit::Head), 2));
        }
        if !layout.lends_weights() {
            // One being widened, and those being fetched.
            holders.push(holder("stored layer", stored_bytes(Unit::Layer(0)), 1 + ahead));
            holders.push(holder("stored embedding", stored_bytes(Unit::Embedding), 1));
            holders.extend(config.tied.then(|| holder("stored head", stored_bytes(Unit::Head), 1)));
        }
        holders
    }

    /// The pool's classes: holders of equal blocks share a class that has room for all of them.
    pub fn classes(&self) -> Vec<BlockClass> {
        let mut classes: Vec<BlockClass> = Vec::new();
        for holder in &self.holders {
            match classes.iter_mut().find(|class| class.block_bytes == holder.block_bytes) {
                Some(class) => class.count += holder.count,
                None => classes.push(*holder),
            }
        }
        classes
    }

    /// Bytes of the pool.
    pub fn pool_bytes(&self) -> usize {
        self.holders.iter().map(|holder| holder.block_bytes * holder.count).sum()
    }

    /// Bytes of everything: what the budget has to hold.
    pub fn total_bytes(&self) -> usize {
        self.moving_bytes() + self.kept_bytes + self.compute_bytes + process_bytes()
    }

    /// Bytes of the blocks that are not kept.
    fn moving_bytes(&self) -> usize {
        let moving = self.holders.iter().filter(|holder| !holder.name.ends_with("that stay"));
        moving.map(|holder| holder.block_bytes * holder.count).sum()
    }

    /// What stays in memory.
    pub fn keeping(&self) -> &Keeping {
        &self.keeping
    }

    /// Bytes of the state that stay in memory, gradients and saved inputs included.
    pub fn resident_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// Bytes that the store will take: twice the weights and moments if a crash is to cost one step at most, and room
    /// for what steps leave to each other.
    pub fn storage_bytes(&self, layout: &ModelLayout, durability: Durability) -> u64 {
        let units = || layout.units().iter();
        let records_bytes = |unit| layout.records_bytes(unit, self.tile_elements);
        let state = units().flat_map(|unit| [layout.weights_bytes(unit), records_bytes(unit)]);
        let gradients = moving(units().map(UnitLayout::padded_bytes), &self.keeping.gradients);
        let inputs = moving(self.keeping.inputs.iter().map(|_| self.input_bytes()), &self.keeping.inputs);
        Store::capacity_for(durability, Worth::State, state)
            + Store::capacity_for(durability, Worth::Scratch, gradients.chain(inputs))
    }

    /// Items that the pipeline loads ahead and stores behind.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Visits that are fetched ahead: the next layer's weights and its saved input, or nothing at depth 0.
    pub fn look_ahead(&self) -> usize {
        2 * self.units_ahead()
    }

    /// Units that are fetched ahead: one is enough, since computing a layer takes longer than loading it.
    pub fn units_ahead(&self) -> usize {
        self.depth.min(1)
    }

    /// Elements of a tile.
    pub fn tile_elements(&self) -> usize {
        self.tile_elements
    }

    /// Bytes of a tile of gradients, which names the length of a state's tiles whatever else its recipe keeps of them.
    pub fn tile_bytes(&self) -> usize {
        self.tile_elements * size_of::<f32>()
    }

    /// Bytes of the blocks that hold a piece of weights as they are stored.
    pub fn piece_weights_bytes(&self, layout: &ModelLayout) -> usize {
        self.piece_elements * layout.weight_bytes()
    }

    /// Bytes of the blocks that hold a piece of gradients, or of exact weights.
    pub fn piece_gradient_bytes(&self) -> usize {
        self.piece_elements * size_of::<f32>()
    }

    /// Bytes of the longest record of a piece; 0 when the recipe has none.
    pub fn record_bytes(&self) -> usize {
        self.record_bytes
    }

    /// Bytes of the blocks that hold the weights of this unit as they are stored.
    pub fn stored_block_bytes(&self, layout: &ModelLayout, unit: Unit) -> usize {
        self.unit_block_bytes(layout, unit) / size_of::<f32>() * layout.weight_bytes()
    }

    /// Bytes of the blocks that hold this unit as the model computes with it.
    pub fn unit_block_bytes(&self, layout: &ModelLayout, unit: Unit) -> usize {
        let (embedding, head) = (layout.unit(Unit::Embedding), layout.unit(Unit::Head));
        match unit {
            Unit::Layer(_) => layout.unit(unit).padded_bytes(),
            Unit::Head if head.numel() < embedding.numel() => head.padded_bytes(),
            Unit::Embedding | Unit::Head => embedding.padded_bytes().max(head.padded_bytes()),
        }
    }

    /// Inputs that are saved at the same time: one per layer and micro-batch.
    pub fn saved_inputs(&self) -> usize {
        self.layers * self.accumulate
    }

    /// Where a saved input stands among all.
    pub fn input_index(&self, which: SavedInput) -> usize {
        which.layer * self.accumulate + which.micro
    }

    /// Elements of a layer's input.
    pub fn input_elements(&self) -> usize {
        self.input_elements
    }

    /// Bytes of a saved input, padded.
    pub fn input_bytes(&self) -> usize {
        (self.input_elements * size_of::<f32>()).next_multiple_of(BLOCK_ALIGNMENT)
    }
}

#[cfg(test)]
mod tests;
