//! The real thing: all training state on storage, and in memory only what is being used or about to be.
//!
//! Per unit there are three long tensors, cut into the same [pieces](crate::piece): the weights, the gradient, and the
//! optimizer state, whose piece is the record that the recipe makes of it (of AdamW in single precision both moments, one
//! behind the other), so that a piece of state is one read and one write. Pieces are tiles of one length, but for
//! parameters that are updated as a whole, which are one piece each. A unit's weights are loaded into one block and
//! lent to the model; the block returns to the pool when the model's last tensor over it is dropped. Weights of two
//! bytes are loaded as they are, half as many bytes, and widened into another block. The update runs piece by piece
//! through the pipeline.
//!
//! What will be asked for is known for a whole step, so the next unit loads while this one computes, the update's first
//! pieces come in during the end of the backward pass, and its last ones go out during the next forward pass.
//!
//! What the plan [keeps](crate::plan::Keeping) stays in memory: weights and optimizer state as tiles that are written only
//! when they are committed, gradients and saved inputs as ordinary arrays that are never written.

mod opening;

use std::collections::VecDeque;
use std::mem;
use std::path::Path;

use bytes::Bytes;
use overspill_io::{Block, EngineStats, Pool, PoolError};
use overspill_swap::pipeline::{self, Item, Limits};
use overspill_swap::tiles::{self, LoadingTiles};
use overspill_swap::{Durability, Slot, Store, StoreError, Volume};

use super::buffer::{Buffer, floats, floats_mut};
use super::io::IoReport;
use super::place::Place;
use super::tile::widen;
use super::{GradientStart, Home, Left, Masters, PieceState, SavedInput, Update, Visit};
use crate::error::{TrainError, check_stop};
use crate::identity::{Identity, Reached};
use crate::layout::{ModelLayout, Unit};
use crate::piece::Piece;
use crate::plan::MemoryPlan;

/// Keeps everything on storage.
#[derive(Debug)]
pub struct SwappedHome {
    layout: ModelLayout,
    plan: MemoryPlan,
    identity: Identity,
    units: Vec<UnitState>,
    inputs: Vec<Place<Bytes>>,
    /// What the trainer will ask for, nearest first.
    upcoming: VecDeque<Visit>,
    /// What is being fetched ahead: the first of `upcoming`, in the same order.
    ahead: VecDeque<(Visit, LoadingTiles)>,
    pool: Pool,
    store: Store,
}

/// Where a home's state lives, what a crash may cost there, and whose it is.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// The directories and the engines that serve them; the first one is the store's home.
    pub volumes: &'a [Volume],
    /// What a crash may cost.
    pub durability: Durability,
    /// The run that the state is of.
    pub identity: &'a Identity,
}

#[derive(Debug)]
struct UnitState {
    weights: Vec<Slot>,
    gradient: Place<Vec<f32>>,
    moments: Vec<Slot>,
}

impl SwappedHome {
    /// What a user may want to know about the data files.
    pub fn note(&self) -> Option<String> {
        self.store.note()
    }

    /// Where the store's home is.
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// Leaves the state on storage when this home is dropped.
    pub fn keep(&self) {
        self.store.keep();
    }

    /// What was asked for next, from what was fetched ahead or now; then fetches further ahead.
    fn take(&mut self, visit: Visit) -> Result<Block, TrainError> {
        self.arrive(visit);
        let loading = match self.ahead.pop_front() {
            Some((fetched, loading)) => {
                assert_eq!(fetched, visit, "visits are fetched in their order");
                loading
            }
            None => {
                let block = lease_part(&self.pool, self.block_bytes(visit), self.bytes(visit))?;
                LoadingTiles::start(self.tiles(visit), block)?
            }
        };
        let (tiles, block) = loading.wait()?;
        self.put_back(visit, tiles);
        self.fetch_ahead()?;
        Ok(block)
    }

    /// Looks at what was announced.
    fn arrive(&mut self, visit: Visit) {
        let announced = self.upcoming.pop_front();
        assert_eq!(announced, Some(visit), "the trainer visits what it announced, in that order");
    }

    /// The tiles that a visit is for; they are put back after it.
    fn tiles(&mut self, visit: Visit) -> Vec<Slot> {
        match visit {
            Visit::Weights(unit) => mem::take(&mut self.units[self.layout.index(unit)].weights),
            Visit::Input(which) => match &mut self.inputs[self.plan.input_index(which)] {
                Place::Tiles(tiles) => mem::take(tiles),
                Place::Memory(_) => unreachable!("what stays in memory is not loaded"),
            },
        }
    }

    fn put_back(&mut self, visit: Visit, tiles: Vec<Slot>) {
        match visit {
            Visit::Weights(unit) => self.units[self.layout.index(unit)].weights = tiles,
            Visit::Input(which) => self.inputs[self.plan.input_index(which)] = Place::Tiles(tiles),
        }
    }

    /// Starts loading what comes next, as far as the plan allows and blocks are free.
    fn fetch_ahead(&mut self) -> Result<(), TrainError> {
        while self.ahead.len() < self.plan.look_ahead() {
            let Some(&visit) = self.upcoming.get(self.ahead.len()) else { break };
            let ready = match visit {
                Visit::Weights(unit) => {
                    let weights = self.ahead.iter().filter(|(visit, _)| matches!(visit, Visit::Weights(_)));
                    weights.count() < self.plan.units_ahead()
                        && !self.units[self.layout.index(unit)].weights.is_empty()
                }
                Visit::Input(which) => match &self.inputs[self.plan.input_index(which)] {
                    Place::Tiles(tiles) => !tiles.is_empty() && tiles::are_at_rest(tiles),
                    Place::Memory(_) => false,
                },
            };
            if !ready {
                break;
            }
            let block = match self.pool.try_lease(self.block_bytes(visit)) {
                Ok(block) => shorten(block, self.bytes(visit)),
                Err(PoolError::Exhausted { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            let loading = LoadingTiles::start(self.tiles(visit), block)?;
            self.ahead.push_back((visit, loading));
        }
        if self.upcoming.is_empty() {
            self.prefetch_update()?;
        }
        Ok(())
    }

    /// Starts loading what the update will need first, while the last gradients are computed.
    fn prefetch_update(&mut self) -> Result<(), TrainError> {
        let weights_bytes = self.plan.piece_weights_bytes(&self.layout);
        let mut left = self.plan.depth();
        for unit in &mut self.units {
            let arrays = [(&mut unit.weights, weights_bytes), (&mut unit.moments, self.plan.record_bytes())];
            for (array, block_bytes) in arrays {
                let count = left.min(array.len());
                let first: Vec<Slot> = array.drain(..count).collect();
                let begun = first.into_iter().map(|slot| slot.prefetch(&self.pool, block_bytes));
                let begun = begun.collect::<Result<Vec<_>, _>>()?;
                array.splice(..0, begun);
            }
            left = left.saturating_sub(unit.weights.len());
        }
        Ok(())
    }

    /// The arrays of the state.
    fn arrays(&mut self) -> impl Iterator<Item = &mut Vec<Slot>> {
        self.units.iter_mut().flat_map(|unit| [&mut unit.weights, &mut unit.moments])
    }

    fn bytes(&self, visit: Visit) -> usize {
        match visit {
            Visit::Weights(unit) => self.layout.weights_bytes(self.layout.unit(unit)),
            Visit::Input(_) => self.plan.input_bytes(),
        }
    }

    fn block_bytes(&self, visit: Visit) -> usize {
        match visit {
            Visit::Weights(unit) => self.plan.stored_block_bytes(&self.layout, unit),
            Visit::Input(_) => self.plan.input_bytes(),
        }
    }
}

impl Home for SwappedHome {
    fn announce(&mut self, visits: Vec<Visit>) -> Result<(), TrainError> {
        self.upcoming.clear();
        while let Some((visit, loading)) = self.ahead.pop_front() {
            let (tiles, _block) = loading.wait()?;
            self.put_back(visit, tiles);
        }
        self.upcoming = visits.into();
        Ok(())
    }

    fn weights(&mut self, unit: Unit) -> Result<Bytes, TrainError> {
        let stored = self.take(Visit::Weights(unit))?;
        if self.layout.lends_weights() {
            return Ok(Buffer::freeze(stored));
        }
        let block_bytes = self.plan.unit_block_bytes(&self.layout, unit);
        let mut widened = lease_part(&self.pool, block_bytes, self.layout.unit(unit).padded_bytes())?;
        widen(self.layout.weight_format(), &stored, floats_mut(&mut widened));
        Ok(Buffer::freeze(widened))
    }

    fn gradient(&mut self, unit: Unit, start: GradientStart) -> Result<Buffer, TrainError> {
        let layout = self.layout.unit(unit);
        let block_bytes = self.plan.unit_block_bytes(&self.layout, unit);
        match &mut self.units[self.layout.index(unit)].gradient {
            Place::Memory(values) => {
                let mut values = mem::take(values);
                values.resize(layout.padded, 0.0);
                if start == GradientStart::Zero {
                    values.fill(0.0);
                }
                Ok(Buffer::Owned(values))
            }
            Place::Tiles(tiles) => {
                let mut block = lease_part(&self.pool, block_bytes, layout.padded_bytes())?;
                match start {
                    GradientStart::Zero => block.fill(0),
                    GradientStart::Resume => {
                        (*tiles, block) = LoadingTiles::start(mem::take(tiles), block)?.wait()?;
                    }
                }
                Ok(Buffer::Leased(block))
            }
        }
    }

    fn put_gradient(&mut self, unit: Unit, gradient: Buffer) -> Result<(), TrainError> {
        match (&mut self.units[self.layout.index(unit)].gradient, gradient) {
            (Place::Memory(values), Buffer::Owned(gradient)) => *values = gradient,
            (Place::Tiles(tiles), Buffer::Leased(block)) => *tiles = tiles::store(mem::take(tiles), block)?,
            _ => unreachable!("what comes back is what was handed out"),
        }
        Ok(())
    }

    fn save_input(&mut self, which: SavedInput, input: &[f32]) -> Result<(), TrainError> {
        match &mut self.inputs[self.plan.input_index(which)] {
            Place::Memory(bytes) => *bytes = Bytes::copy_from_slice(bytemuck::cast_slice(input)),
            Place::Tiles(tiles) => {
                let mut block = self.pool.lease(self.plan.input_bytes())?;
                let (values, padding) = floats_mut(&mut block).split_at_mut(input.len());
                values.copy_from_slice(input);
                padding.fill(0.0);
                *tiles = tiles::store(mem::take(tiles), block)?;
            }
        }
        Ok(())
    }

    fn saved_input(&mut self, which: SavedInput) -> Result<Bytes, TrainError> {
        let visit = Visit::Input(which);
        if let Place::Memory(bytes) = &mut self.inputs[self.plan.input_index(which)] {
            let bytes = mem::take(bytes);
            self.arrive(visit);
            self.fetch_ahead()?;
            return Ok(bytes);
        }
        let mut input = Buffer::freeze(self.take(visit)?);
        input.truncate(self.plan.input_elements() * size_of::<f32>());
        Ok(input)
    }

    fn update(&mut self, update: &Update<'_>) -> Result<(), TrainError> {
        let tile_elements = self.plan.tile_elements();
        let mut parts = Vec::new();
        let mut items = Vec::new();
        let mut in_memory = Vec::with_capacity(self.units.len());
        for (index, (unit, state)) in self.layout.units().iter().zip(&mut self.units).enumerate() {
            let (values, mut stored) = match &mut state.gradient {
                Place::Memory(values) => (&values[..], Vec::new().into_iter()),
                Place::Tiles(tiles) => (&[][..], mem::take(tiles).into_iter()),
            };
            in_memory.push(values);
            let weights = mem::take(&mut state.weights).into_iter();
            let mut moments = mem::take(&mut state.moments).into_iter();
            for (piece, weights) in unit.pieces(tile_elements).zip(weights) {
                parts.push((index, piece));
                let edited = std::iter::once(weights).chain(moments.next()).collect();
                items.push(Item { edited, read: stored.next().into_iter().collect() });
            }
        }
        let gradient_bytes = self.plan.piece_gradient_bytes();
        let weights_bytes = self.plan.piece_weights_bytes(&self.layout);
        let all = [weights_bytes, self.plan.record_bytes(), gradient_bytes];
        let without_record = [weights_bytes, gradient_bytes];
        let block_bytes = if self.plan.record_bytes() > 0 { &all[..] } else { &without_record };
        let limits = Limits { pool: &self.pool, depth: self.plan.depth(), block_bytes };
        let units = self.layout.units();
        let done = pipeline::run(limits, items, |item, edited, read| {
            check_stop(update.stop)?;
            let (index, piece) = &parts[item];
            let (weights, record): (&mut [u8], &mut [u8]) = match edited {
                [weights, record] => (weights, record),
                [weights] => (weights, &mut []),
                _ => unreachable!("an item edits weights, and the record if there is one"),
            };
            let gradient = match read {
                [gradient] => floats(gradient),
                _ => &in_memory[*index][piece.range.clone()],
            };
            PieceState { unit: &units[*index], piece, weights, record }.update(gradient, update);
            Ok::<(), TrainError>(())
        })?;
        for ((index, _), item) in parts.into_iter().zip(done.items) {
            let state = &mut self.units[index];
            let mut edited = item.edited.into_iter();
            state.weights.extend(edited.next());
            state.moments.extend(edited.next());
            if let Place::Tiles(gradient) = &mut state.gradient {
                gradient.extend(item.read);
            }
        }
        Ok(())
    }

    fn masters(&mut self, unit: Unit, each: &mut Masters<'_>) -> Result<(), TrainError> {
        let index = self.layout.index(unit);
        let unit = self.layout.unit(unit);
        let state = &mut self.units[index];
        let moments = mem::take(&mut state.moments);
        let weights = mem::take(&mut state.weights);
        let weights_bytes = self.plan.piece_weights_bytes(&self.layout);
        let mut moments = moments.into_iter();
        let mut left = unit.pieces(self.plan.tile_elements()).zip(weights);
        let mut show = |(piece, slot): (Piece, Slot)| {
            let (slot, mut weights) = load(&self.pool, slot, weights_bytes)?;
            state.weights.push(slot);
            let record = moments.next().map(|slot| load(&self.pool, slot, self.plan.record_bytes()));
            let (slot, mut record) = record.transpose()?.unzip();
            state.moments.extend(slot);
            let bytes = piece.elements() * size_of::<f32>();
            let mut block = lease_part(&self.pool, self.plan.piece_gradient_bytes(), bytes)?;
            let record = record.as_deref_mut().unwrap_or_default();
            let masters = floats_mut(&mut block);
            PieceState { unit, piece: &piece, weights: &mut weights, record }.masters(masters);
            each(piece.range.start, masters)
        };
        let shown = left.by_ref().try_for_each(&mut show);
        // Whoever stops looking leaves the rest where it is.
        state.weights.extend(left.map(|(_, slot)| slot));
        state.moments.extend(moments);
        shown
    }

    fn settle(&mut self) -> Result<(), TrainError> {
        for array in self.arrays() {
            *array = settle(mem::take(array))?;
        }
        Ok(())
    }

    fn commit(&mut self, reached: &Reached) -> Result<(), TrainError> {
        for array in self.arrays() {
            *array = mem::take(array).into_iter().map(Slot::save).collect();
        }
        self.settle()?;
        let meta = self.identity.meta(reached, self.plan.tile_bytes(), self.layout.state_recipe());
        Ok(self.store.commit(meta)?)
    }

    fn left(&self) -> Option<Left> {
        if !self.store.is_kept() || self.store.generation() == 0 {
            return None;
        }
        let step = Identity::step(&self.store.meta())?;
        Some(Left { path: self.path().to_owned(), step })
    }

    fn io(&self) -> Option<IoReport> {
        let EngineStats { bytes_read, bytes_written, busy, read_busy, write_busy, waited, .. } =
            self.store.stats();
        let waited = waited + self.pool.waited();
        let bytes_written_lifetime = self.store.bytes_written();
        Some(IoReport {
            bytes_read,
            bytes_written,
            bytes_written_lifetime,
            busy,
            read_busy,
            write_busy,
            waited,
        })
    }
}

/// A tile, and its contents in a block of its class.
fn load(pool: &Pool, slot: Slot, block_bytes: usize) -> Result<(Slot, Block), TrainError> {
    let block = lease_part(pool, block_bytes, slot.bytes())?;
    let (mut slots, block) = LoadingTiles::start(vec![slot], block)?.wait()?;
    Ok((slots.remove(0), block))
}

/// Waits for the writes of all of them; the first error when all have come to rest.
fn settle(slots: Vec<Slot>) -> Result<Vec<Slot>, StoreError> {
    let settled: Vec<_> = slots.into_iter().map(Slot::settle).collect();
    settled.into_iter().collect()
}

/// A block of the class of `block_bytes`, cut to `bytes`. Every holder leases from its own class, so that nobody
/// can take the block that somebody else is waiting for.
fn lease_part(pool: &Pool, block_bytes: usize, bytes: usize) -> Result<Block, PoolError> {
    Ok(shorten(pool.lease(block_bytes)?, bytes))
}

fn shorten(mut block: Block, bytes: usize) -> Block {
    if bytes < block.len() {
        drop(block.split_off(bytes));
    }
    block
}
