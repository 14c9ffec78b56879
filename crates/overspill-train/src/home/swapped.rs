//! The real thing: all training state on storage, and in memory only what is being used or about to be.
//!
//! Per unit there are three long tensors, cut into tiles at the same borders: the weights, the gradient, and the
//! optimizer state, whose tile holds both moments one behind the other (`exp_avg`, then `exp_avg_sq`), so that a tile
//! of state is one read and one write. A unit's weights are loaded into one block and lent to the model; the block
//! returns to the pool when the model's last tensor over it is dropped. The update runs tile by tile through the
//! pipeline.
//!
//! What will be asked for is known for a whole step, so the next unit loads while this one computes.

use std::collections::VecDeque;
use std::mem;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use overspill_io::{Block, EngineStats, Pool, PoolError};
use overspill_swap::pipeline::{self, Item, Lanes};
use overspill_swap::tiles::{LoadingTiles, StoringTiles};
use overspill_swap::{Durability, Store, StoreError, Swapped, Volume, Worth};

use super::buffer::{Buffer, floats, floats_mut};
use super::place::{Array, Place, halves};
use super::{GradientStart, Home, Left, SavedInput, Source, Update, Visit};
use crate::error::{TrainError, check_stop};
use crate::identity::Identity;
use crate::layout::{ModelLayout, Unit, UnitLayout};
use crate::plan::MemoryPlan;

/// Keeps everything on storage.
#[derive(Debug)]
pub struct SwappedHome {
    layout: ModelLayout,
    plan: MemoryPlan,
    identity: Identity,
    units: Vec<UnitState>,
    inputs: Vec<Place>,
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

/// Totals of a home's transfers since it was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct IoReport {
    /// Bytes read from storage.
    pub bytes_read: u64,
    /// Bytes written to storage.
    pub bytes_written: u64,
    /// Bytes written for the state since it was made, in all runs together.
    pub bytes_written_lifetime: u64,
    /// Time during which at least one transfer was under way.
    pub busy: Duration,
    /// Time during which at least one read was under way.
    pub read_busy: Duration,
    /// Time during which at least one write was under way.
    pub write_busy: Duration,
    /// Time the trainer stood still for a transfer or for a block.
    pub waited: Duration,
}

/// Room for a gradient, which no step finds from the one before.
fn vacant_gradient(store: &Store, unit: &UnitLayout, plan: &MemoryPlan) -> Result<Place, StoreError> {
    Array::gradient(unit, plan.tile_bytes()).reserve(store, Worth::Scratch).map(Place::Vacant)
}

#[derive(Debug)]
struct UnitState {
    weights: Vec<Swapped>,
    gradient: Place,
    moments: Vec<Swapped>,
}

impl SwappedHome {
    /// Creates the store and writes the initial state: weights from `source`, moments zero.
    ///
    /// # Errors
    /// [`TrainError`] when the store can't be created, a transfer fails, or `source` does; nothing is left behind.
    pub fn create(
        layout: &ModelLayout,
        plan: &MemoryPlan,
        site: Site<'_>,
        pool: &Pool,
        source: &mut Source<'_>,
    ) -> Result<Self, TrainError> {
        let Site { volumes, durability, identity } = site;
        let store = Store::create_over(volumes, durability, plan.storage_bytes(layout, durability))?;
        let mut units = Vec::with_capacity(layout.units().len());
        for unit in layout.units() {
            let weights = Array::weights(unit, plan.tile_bytes()).reserve(&store, Worth::State)?;
            let moments = Array::moments(unit, plan.tile_bytes()).reserve(&store, Worth::State)?;

            let mut block = lease_part(pool, plan.unit_block_bytes(layout, unit.unit), unit.padded_bytes())?;
            let values = floats_mut(&mut block);
            values.fill(0.0);
            source(unit, values)?;
            let weights = StoringTiles::fill(weights, block)?;
            let mut zeros = Vec::with_capacity(moments.len());
            for tile in moments {
                let mut block = lease_part(pool, 2 * plan.tile_bytes(), tile.bytes())?;
                block.fill(0);
                zeros.push(StoringTiles::fill(vec![tile], block)?);
            }
            let mut moments = Vec::with_capacity(zeros.len());
            for zero in zeros {
                moments.extend(zero.wait()?);
            }
            let gradient = vacant_gradient(&store, unit, plan)?;
            units.push(UnitState { weights: weights.wait()?, gradient, moments });
        }
        Self::over(layout, plan, identity.clone(), pool, store, units)
    }

    /// Opens the state that an earlier run left, and says after which step it is.
    ///
    /// # Errors
    /// [`TrainError::OtherRun`] when that run was not the same one, [`TrainError`] when the store can't be opened.
    pub fn open(
        layout: &ModelLayout,
        plan: &MemoryPlan,
        site: Site<'_>,
        pool: &Pool,
    ) -> Result<(Self, u64), TrainError> {
        let Site { volumes, durability, identity } = site;
        let store = Store::open_over(volumes, durability)?;
        let step = identity.check(store.path(), &store.meta())?;
        store.provide(plan.storage_bytes(layout, durability))?;
        let mut units = Vec::with_capacity(layout.units().len());
        for unit in layout.units() {
            let weights = Array::weights(unit, plan.tile_bytes()).adopt(&store)?;
            let moments = Array::moments(unit, plan.tile_bytes()).adopt(&store)?;
            units.push(UnitState { weights, gradient: vacant_gradient(&store, unit, plan)?, moments });
        }
        Ok((Self::over(layout, plan, identity.clone(), pool, store, units)?, step))
    }

    fn over(
        layout: &ModelLayout,
        plan: &MemoryPlan,
        identity: Identity,
        pool: &Pool,
        store: Store,
        units: Vec<UnitState>,
    ) -> Result<Self, TrainError> {
        let input = |i| store.reserve(format!("input/{i}"), plan.input_bytes(), Worth::Scratch);
        let inputs = (0..plan.saved_inputs())
            .map(|i| Ok(Place::Vacant(vec![input(i)?])))
            .collect::<Result<_, StoreError>>()?;
        Ok(Self {
            layout: layout.clone(),
            plan: plan.clone(),
            identity,
            units,
            inputs,
            upcoming: VecDeque::new(),
            ahead: VecDeque::new(),
            pool: pool.clone(),
            store,
        })
    }

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
        let announced = self.upcoming.pop_front();
        assert_eq!(announced, Some(visit), "the trainer visits what it announced, in that order");
        let loading = match self.ahead.pop_front() {
            Some((fetched, loading)) => {
                assert_eq!(fetched, visit, "visits are fetched in their order");
                loading
            }
            None => {
                let block = lease_part(&self.pool, self.block_bytes(visit), self.bytes(visit))?;
                self.load(visit, block)?
            }
        };
        let (tiles, block) = loading.wait()?;
        self.put_back(visit, tiles);
        self.fetch_ahead()?;
        Ok(block)
    }

    fn put_back(&mut self, visit: Visit, tiles: Vec<Swapped>) {
        match visit {
            Visit::Weights(unit) => self.units[self.layout.index(unit)].weights = tiles,
            Visit::Input(which) => self.inputs[self.plan.input_index(which)] = Place::Swapped(tiles),
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
                Visit::Input(which) => self.inputs[self.plan.input_index(which)].is_settled(),
            };
            if !ready {
                break;
            }
            let block = match self.pool.try_lease(self.block_bytes(visit)) {
                Ok(block) => shorten(block, self.bytes(visit)),
                Err(PoolError::Exhausted { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            let loading = self.load(visit, block)?;
            self.ahead.push_back((visit, loading));
        }
        Ok(())
    }

    fn load(&mut self, visit: Visit, block: Block) -> Result<LoadingTiles, StoreError> {
        let tiles = match visit {
            Visit::Weights(unit) => mem::take(&mut self.units[self.layout.index(unit)].weights),
            Visit::Input(which) => self.inputs[self.plan.input_index(which)].settle()?,
        };
        LoadingTiles::start(tiles, block)
    }

    fn bytes(&self, visit: Visit) -> usize {
        match visit {
            Visit::Weights(unit) => self.layout.unit(unit).padded_bytes(),
            Visit::Input(_) => self.plan.input_bytes(),
        }
    }

    fn block_bytes(&self, visit: Visit) -> usize {
        match visit {
            Visit::Weights(unit) => self.plan.unit_block_bytes(&self.layout, unit),
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
        self.take(Visit::Weights(unit)).map(Buffer::freeze)
    }

    fn gradient(&mut self, unit: Unit, start: GradientStart) -> Result<Buffer, TrainError> {
        let bytes = self.layout.unit(unit).padded_bytes();
        let mut block = lease_part(&self.pool, self.plan.unit_block_bytes(&self.layout, unit), bytes)?;
        let place = &mut self.units[self.layout.index(unit)].gradient;
        match start {
            GradientStart::Zero => block.fill(0),
            GradientStart::Resume => {
                let (tiles, loaded) = LoadingTiles::start(place.settle()?, block)?.wait()?;
                *place = Place::Swapped(tiles);
                block = loaded;
            }
        }
        Ok(Buffer::Leased(block))
    }

    fn put_gradient(&mut self, unit: Unit, gradient: Buffer) -> Result<(), TrainError> {
        let Buffer::Leased(block) = gradient else { unreachable!("this home hands out no other buffers") };
        Ok(self.units[self.layout.index(unit)].gradient.put(block)?)
    }

    fn save_input(&mut self, which: SavedInput, input: &[f32]) -> Result<(), TrainError> {
        let mut block = self.pool.lease(self.plan.input_bytes())?;
        let (values, padding) = floats_mut(&mut block).split_at_mut(input.len());
        values.copy_from_slice(input);
        padding.fill(0.0);
        Ok(self.inputs[self.plan.input_index(which)].put(block)?)
    }

    fn saved_input(&mut self, which: SavedInput) -> Result<Bytes, TrainError> {
        let mut input = Buffer::freeze(self.take(Visit::Input(which))?);
        input.truncate(self.plan.input_elements() * size_of::<f32>());
        Ok(input)
    }

    fn update(&mut self, update: &Update<'_>) -> Result<(), TrainError> {
        let mut tiles = Vec::new();
        let mut items = Vec::new();
        for (layout, state) in self.layout.units().iter().zip(&mut self.units) {
            let weights = mem::take(&mut state.weights).into_iter();
            let moments = mem::take(&mut state.moments).into_iter();
            let gradient = state.gradient.settle()?.into_iter();
            for (i, ((weights, moments), gradient)) in weights.zip(moments).zip(gradient).enumerate() {
                tiles.push((layout, i * self.plan.tile_elements()));
                items.push(Item { edited: vec![weights, moments], read: vec![gradient] });
            }
        }
        let tile_bytes = self.plan.tile_bytes();
        let lanes = Lanes {
            pool: &self.pool,
            depth: self.plan.depth(),
            block_bytes: &[tile_bytes, 2 * tile_bytes, tile_bytes],
        };
        let done = pipeline::run(lanes, items, |index, edited, read| {
            check_stop(update.stop)?;
            let (layout, start) = tiles[index];
            let [weights, moments] = edited else { unreachable!("an item edits weights and moments") };
            let (exp_avg, exp_avg_sq) = halves(floats_mut(moments));
            update.apply(layout, start, floats_mut(weights), floats(read[0]), exp_avg, exp_avg_sq);
            Ok::<(), TrainError>(())
        })?;
        let owners = tiles.iter().map(|(layout, _)| self.layout.index(layout.unit));
        for (owner, item) in owners.zip(done) {
            let state = &mut self.units[owner];
            let mut edited = item.edited.into_iter();
            state.weights.extend(edited.next());
            state.moments.extend(edited.next());
            if matches!(state.gradient, Place::Moving) {
                state.gradient = Place::Swapped(Vec::new());
            }
            if let Place::Swapped(gradient) = &mut state.gradient {
                gradient.extend(item.read);
            }
        }
        Ok(())
    }

    fn commit(&mut self, step: u64) -> Result<(), TrainError> {
        Ok(self.store.commit(self.identity.meta(step, self.plan.tile_bytes()))?)
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
