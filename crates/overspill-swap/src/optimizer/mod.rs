//! Optimizer state that lives on storage, for whoever has the parameters in memory.
//!
//! ```text
//! backward:  pre_backward(): earlier writes have ended well, first tiles come in
//!            swap_out_gradient(parameter, offset, bytes) ─► gathered, or on storage
//!            post_backward(): gradients are there
//! step:      pass(…): tile ─load─► each part { state, gradient } ─► compute ─store─► tile     the last writes go on behind
//! forward:   …                                                                             settle(): they have ended well
//! ```
//!
//! An optimizer says how many bytes of state each parameter has ([`ParameterSpec`]); what they mean is its own matter. The
//! [plan](OptimizerPlan) cuts and packs them into tiles and decides which tiles stay in memory. A pass shows the
//! computation each part of each wanted parameter, with its state to be changed and its gradient if that was swapped
//! out, always in the same order, so every depth and every share in memory give the same bits. Of a parameter that got any
//! piece of a gradient the whole is shown, with zeros for what is missing; one that got none has none, whoever else is in
//! its tiles.
//!
//! State has no contents until the first pass that changes it: the computation sees zeros then, and
//! [`PartView::is_new`]. When a pass fails, the state is lost as far as it was not committed, and
//! [`OptimizerSwapper::roll_back`] brings the committed one back.
//!
//! Where the time goes is summed up in [`Phases`]. Whoever subscribes to [`tracing`] at the debug level sees each phase as
//! a span: `pre_backward`, `gradient_swap_out`, `post_backward`, a `pass` with the spans of its
//! [pipeline](crate::pipeline), `settle`, and a `wait` within whatever waits.

mod backward;
mod error;
mod extend;
mod gradient;
mod packing;
mod pass;
mod phases;
mod plan;

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::time::Instant;

use overspill_io::Pool;
use serde_json::{Value, json};
use tracing::debug_span;

pub use self::error::{OptimizerError, PassError};
use self::gradient::TileGradient;
pub use self::packing::{PART_ALIGNMENT, ParameterSpec, Part, StateSize, Tile, pack};
pub use self::pass::PartView;
pub use self::phases::Phases;
pub use self::plan::{DEPTH_DEFAULT, OptimizerPlan, PlanOptions, TILE_BYTES_DEFAULT, TooSmall};
use crate::error::StoreError;
use crate::ledger::Worth;
use crate::manifest::checksum;
use crate::pipeline::waiting;
use crate::slot::{Kept, Slot};
use crate::store::Store;

/// Least number of bytes that are worth moving on their own.
const SWAPPABLE_BYTES: usize = 1 << 20;

/// Whether so many bytes of state are worth a place on storage of their own: a megabyte, or a block of the engine if that
/// is longer. Smaller ones share a tile.
pub fn is_swappable(bytes: usize, block_bytes: usize) -> bool {
    bytes >= SWAPPABLE_BYTES.max(block_bytes)
}

/// Optimizer state in tiles, on storage but for those that memory has room for.
#[derive(Debug)]
pub struct OptimizerSwapper {
    names: Vec<String>,
    numels: Vec<usize>,
    plan: OptimizerPlan,
    /// The state of every tile; `None` once it is lost.
    slots: Vec<Option<Slot>>,
    gradients: Vec<TileGradient>,
    /// Whether each parameter got a piece of its gradient since the last step.
    has_gradient: Vec<bool>,
    /// Bytes of a block for gradients, and of those gradients of tiles that move that may be in memory.
    gradient_block_bytes: usize,
    gathering_bytes: usize,
    /// Tiles that move and whose gradients are in memory, the one for the longest time first.
    gathering: VecDeque<usize>,
    /// Tiles whose gradients are on their way to storage, the oldest first.
    writing: VecDeque<usize>,
    /// Parts without contents, by tile and place in it.
    new: HashSet<(usize, usize)>,
    /// Tiles of each parameter.
    tiles_of: Vec<Range<usize>>,
    phases: Phases,
    pool: Pool,
    store: Store,
}

impl OptimizerSwapper {
    /// State without contents, in a store that was made with room for the plan's
    /// [storage](OptimizerPlan::storage_bytes), with a pool of its [classes](OptimizerPlan::classes).
    ///
    /// # Errors
    /// [`OptimizerError::Store`] when the store has no room, or has such tensors already.
    pub fn create(
        specs: &[ParameterSpec],
        plan: OptimizerPlan,
        store: &Store,
        pool: &Pool,
    ) -> Result<Self, OptimizerError> {
        let mut swapper = Self::over(specs, plan, store, pool)?;
        for (index, tile) in swapper.plan.tiles.iter().enumerate() {
            let slot = Slot::Vacant(store.reserve(tile_name(index), tile.bytes(), Worth::State)?);
            swapper.slots[index] = Some(swapper.stay(index, slot)?);
            swapper.new.extend((0..tile.parts.len()).map(|part| (index, part)));
        }
        Ok(swapper)
    }

    /// The state that is committed in `store`, with the same parameters; `plan` has the tiles that
    /// [`OptimizerSwapper::tile_bytes`] says.
    ///
    /// # Errors
    /// [`OptimizerError::OtherParameters`] when they are not, [`OptimizerError::Store`] for what cannot be read.
    pub fn open(
        specs: &[ParameterSpec],
        plan: OptimizerPlan,
        store: &Store,
        pool: &Pool,
    ) -> Result<Self, OptimizerError> {
        // With less memory, more gradients go to storage.
        store.provide(plan.storage_bytes(store.durability()))?;
        let mut swapper = Self::over(specs, plan, store, pool)?;
        swapper.take_up()?;
        Ok(swapper)
    }

    /// The tiles of the state that was committed with `meta`; `None` if it does not say.
    pub fn tile_bytes(meta: &Value) -> Option<usize> {
        usize::try_from(meta["optimizer"]["tile_bytes"].as_u64()?).ok()
    }

    fn over(
        specs: &[ParameterSpec],
        plan: OptimizerPlan,
        store: &Store,
        pool: &Pool,
    ) -> Result<Self, OptimizerError> {
        let mut tiles_of = vec![0..0; specs.len()];
        let mut gradients = Vec::with_capacity(plan.tiles.len());
        for (index, tile) in plan.tiles.iter().enumerate() {
            for part in &tile.parts {
                let tiles = &mut tiles_of[part.parameter];
                *tiles = if tiles.end == 0 { index } else { tiles.start }..index + 1;
            }
            let padded = plan.gradient_tile_bytes(tile).filter(|_| !plan.kept[index]);
            let bytes = tile.elements() * plan.gradient_bytes.unwrap_or(0);
            let mut gradient = TileGradient::new(index, bytes, padded);
            gradient.renew(store)?;
            gradients.push(gradient);
        }
        Ok(Self {
            names: specs.iter().map(|spec| spec.name.clone()).collect(),
            numels: specs.iter().map(|spec| spec.numel).collect(),
            slots: plan.tiles.iter().map(|_| None).collect(),
            gradients,
            has_gradient: vec![false; specs.len()],
            gradient_block_bytes: plan.longest_gradient().unwrap_or(0),
            gathering_bytes: plan.gathering_bytes(),
            gathering: VecDeque::new(),
            writing: VecDeque::new(),
            new: HashSet::new(),
            tiles_of,
            plan,
            phases: Phases::default(),
            pool: pool.clone(),
            store: store.clone(),
        })
    }

    /// Takes up the committed state.
    fn take_up(&mut self) -> Result<(), OptimizerError> {
        let meta = self.store.meta();
        let found = &meta["optimizer"];
        if *found != self.identity(&found["new"]) {
            let reason = if found.is_null() {
                "nothing of an optimizer is committed".to_owned()
            } else {
                "names, lengths or tiles are different".to_owned()
            };
            return Err(OptimizerError::OtherParameters { reason });
        }
        let pair = |pair: &Value| Some((pair[0].as_u64()? as usize, pair[1].as_u64()? as usize));
        self.new = found["new"].as_array().into_iter().flatten().filter_map(pair).collect();
        for (index, tile) in self.plan.tiles.iter().enumerate() {
            let slot = match self.store.adopt(&tile_name(index), tile.bytes()) {
                Ok(tensor) => Slot::Swapped(tensor),
                Err(StoreError::Missing { .. }) => {
                    self.new.extend((0..tile.parts.len()).map(|part| (index, part)));
                    Slot::Vacant(self.store.vacant(&tile_name(index), tile.bytes(), Worth::State)?)
                }
                Err(error) => return Err(error.into()),
            };
            self.slots[index] = Some(self.stay(index, slot)?);
            self.gradients[index].renew(&self.store)?;
        }
        Ok(())
    }

    /// Brings a tile that stays in memory there.
    fn stay(&self, index: usize, slot: Slot) -> Result<Slot, OptimizerError> {
        if !self.plan.kept[index] {
            return Ok(slot);
        }
        let block = self.pool.lease(self.plan.tiles[index].bytes()).map_err(StoreError::from)?;
        Ok(Slot::Kept(slot.begin(Some(block))?.wait()?.tensor))
    }

    /// What has to be equal for a state to be that of these parameters.
    fn identity(&self, new: &Value) -> Value {
        let mut text = String::new();
        for (name, numel) in self.names.iter().zip(&self.numels) {
            text += &format!("{name:?} {numel}\n");
        }
        for tile in &self.plan.tiles {
            text += &format!("{} {}\n", tile.elements(), tile.bytes());
        }
        let digest = format!("{:016x}", checksum(text.as_bytes()));
        json!({ "tile_bytes": self.plan.tile_bytes, "parameters": self.names.len(), "digest": digest, "new": new })
    }

    /// Drops a parameter's state: the next pass finds it new.
    ///
    /// # Errors
    /// [`OptimizerError::NoParameter`].
    pub fn purge(&mut self, parameter: usize) -> Result<(), OptimizerError> {
        let tiles = self.tiles(parameter)?;
        self.new.extend(tiles.map(|index| (index, self.plan.tiles[index].part_of(parameter).0)));
        Ok(())
    }

    /// Whether a parameter has no state: no pass that changes it has seen it, or it was purged.
    ///
    /// # Errors
    /// [`OptimizerError::NoParameter`].
    pub fn is_new(&self, parameter: usize) -> Result<bool, OptimizerError> {
        let mut tiles = self.tiles(parameter)?;
        Ok(tiles.all(|index| {
            let mut parts = self.plan.tiles[index].parts.iter().enumerate();
            parts.all(|(i, part)| part.parameter != parameter || self.new.contains(&(index, i)))
        }))
    }

    /// Waits for every write that is under way, and learns how it ended.
    ///
    /// # Errors
    /// [`OptimizerError::Store`] of the first one that failed; that tile's state is lost if it does not stay in memory.
    pub fn settle(&mut self) -> Result<(), OptimizerError> {
        self.settle_those(|_| true)
    }

    fn settle_those(&mut self, are_meant: impl Fn(&Slot) -> bool) -> Result<(), OptimizerError> {
        let started = Instant::now();
        let _span = debug_span!("settle").entered();
        let settle = || {
            let mut first_error = Ok(());
            for slot in self.slots.iter_mut().filter(|slot| slot.as_ref().is_some_and(&are_meant)) {
                let settled = match slot.take() {
                    Some(Slot::Saving(saving)) => {
                        let saved = saving.wait().map(|tensor| Some(Slot::Kept(Kept::Clean(tensor))));
                        saved.map_err(|failed| {
                            *slot = failed.tensor.map(|tensor| Slot::Kept(Kept::Dirty(tensor)));
                            failed.error
                        })
                    }
                    others => others.map(Slot::settle).transpose(),
                };
                match settled {
                    Ok(settled) => *slot = settled,
                    Err(error) => first_error = first_error.and(Err(error)),
                }
            }
            first_error
        };
        let settled = waiting(&mut self.phases.wait, settle);
        self.phases.swap_out += started.elapsed();
        Ok(settled?)
    }

    /// Makes the state the next generation of the store, with what is only in memory; `meta` goes with it.
    ///
    /// # Errors
    /// [`OptimizerError::Lost`] after a pass that failed, [`OptimizerError::Store`] as [`Store::commit`]; what stays in
    /// memory is not lost by a write that fails, and the commit can be tried again.
    pub fn commit(&mut self, meta: &Value) -> Result<(), OptimizerError> {
        if self.slots.iter().any(Option::is_none) {
            return Err(OptimizerError::Lost);
        }
        for slot in &mut self.slots {
            *slot = slot.take().map(Slot::save);
        }
        self.settle()?;
        let is_vacant = |index: usize| matches!(self.slots[index], Some(Slot::Vacant(_)));
        let mut new: Vec<_> = self.new.iter().filter(|(index, _)| !is_vacant(*index)).collect();
        new.sort_unstable();
        let optimizer = self.identity(&json!(new));
        Ok(self.store.commit(json!({ "optimizer": optimizer, "meta": meta }))?)
    }

    /// What was committed with the state.
    pub fn meta(&self) -> Value {
        self.store.meta()["meta"].clone()
    }

    /// Goes back to the committed state: of a step that shall not count, or after one that failed. Gradients are
    /// forgotten.
    ///
    /// # Errors
    /// [`OptimizerError::Store`] when nothing is committed or it cannot be read.
    pub fn roll_back(&mut self) -> Result<(), OptimizerError> {
        // What was under way does not count any more, however it ends.
        for slot in &mut self.slots {
            drop(slot.take().map(Slot::settle));
        }
        self.gradients.iter_mut().for_each(TileGradient::give_up);
        self.clear_gradients();
        self.store.roll_back()?;
        self.take_up()
    }

    /// Where the time went; as text it is one line, for whoever logs it.
    pub fn phases(&self) -> Phases {
        self.phases
    }

    /// What the memory is spent on.
    pub fn plan(&self) -> &OptimizerPlan {
        &self.plan
    }

    /// Where the state is.
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn tiles(&self, parameter: usize) -> Result<Range<usize>, OptimizerError> {
        let count = self.names.len();
        self.tiles_of.get(parameter).cloned().ok_or(OptimizerError::NoParameter { parameter, count })
    }
}

fn tile_name(index: usize) -> String {
    format!("state/{index}")
}
