//! How a home begins: with first weights and moments in a store that it makes, or with what an earlier run left.
//!
//! A unit at a time: its first weights come in single precision, each piece makes its weights and its record of them, and
//! both go where they will live, or stay. What was left is taken up where it is; only what is to stay is loaded. Gradients and
//! saved inputs have a place in the store and no contents, either way. Whatever fails, the store goes as its directory does.

use std::collections::VecDeque;
use std::mem;

use overspill_io::Pool;
use overspill_swap::tiles::{self, LoadingTiles};
use overspill_swap::{Slot, Store, StoreError, Worth};

use super::super::buffer::{floats, floats_mut};
use super::super::place::{Array, Place};
use super::super::{PieceState, Source};
use super::{Site, SwappedHome, UnitState, lease_part, settle};
use crate::error::TrainError;
use crate::identity::{Identity, Reached};
use crate::layout::{ModelLayout, UnitLayout};
use crate::plan::MemoryPlan;

impl SwappedHome {
    /// Creates the store and writes the initial state: weights from `source`, moments as the recipe begins with them.
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
        let mut home = Self::over(layout, plan, identity.clone(), pool, store)?;
        for (index, unit) in layout.units().iter().enumerate() {
            let tile_elements = plan.tile_elements();
            let weights = Array::weights(layout, unit, tile_elements).reserve(&home.store, Worth::State)?;
            let moments = Array::moments(layout, unit, tile_elements).reserve(&home.store, Worth::State)?;

            let values_bytes = plan.unit_block_bytes(layout, unit.unit);
            let mut values = lease_part(pool, values_bytes, unit.padded_bytes())?;
            values.fill(0);
            source(unit, floats_mut(&mut values))?;
            let values = floats(&values);

            let weights_bytes = layout.weights_bytes(unit);
            let stays = plan.keeping().weights[index];
            let block_bytes = if stays { weights_bytes } else { plan.stored_block_bytes(layout, unit.unit) };
            let mut block = lease_part(pool, block_bytes, weights_bytes)?;
            block.fill(0);
            let moments = {
                let (mut pieces, mut unfilled) = (unit.pieces(tile_elements), &mut block[..]);
                let mut fill = |record: &mut [u8]| {
                    record.fill(0);
                    let piece = pieces.next().expect("there is a record for each piece");
                    let weights_bytes = piece.elements() * layout.weight_bytes();
                    let (weights, rest) = mem::take(&mut unfilled).split_at_mut(weights_bytes);
                    unfilled = rest;
                    let values = &values[piece.range.clone()];
                    PieceState { unit, piece: &piece, weights, record }.initialize(values);
                };
                if moments.is_empty() {
                    (0..unit.piece_count(tile_elements)).for_each(|_| fill(&mut []));
                    moments
                } else if plan.keeping().moments[index] {
                    let mut records = pool.lease(layout.records_bytes(unit, tile_elements))?;
                    let mut rest = &mut records[..];
                    for piece in &moments {
                        let (record, others) = rest.split_at_mut(piece.bytes());
                        fill(record);
                        rest = others;
                    }
                    tiles::keep(moments, records)?
                } else {
                    let mut stored = Vec::with_capacity(moments.len());
                    for piece in moments {
                        let mut record = lease_part(pool, plan.record_bytes(), piece.bytes())?;
                        fill(&mut record);
                        stored.extend(tiles::store(vec![piece], record)?);
                    }
                    settle(stored)?
                }
            };
            let keep_or_store = if stays { tiles::keep } else { tiles::store };
            home.units[index].weights = settle(keep_or_store(weights, block)?)?;
            home.units[index].moments = moments;
        }
        Ok(home)
    }

    /// Opens the state that an earlier run left, and says what that had reached.
    ///
    /// # Errors
    /// [`TrainError::OtherRun`] when that run was not the same one, [`TrainError`] when the store can't be opened.
    pub fn open(
        layout: &ModelLayout,
        plan: &MemoryPlan,
        site: Site<'_>,
        pool: &Pool,
    ) -> Result<(Self, Reached), TrainError> {
        let Site { volumes, durability, identity } = site;
        let store = Store::open_over(volumes, durability)?;
        let reached = identity.check(store.path(), &store.meta(), layout.state_recipe())?;
        store.provide(plan.storage_bytes(layout, durability))?;
        let mut home = Self::over(layout, plan, identity.clone(), pool, store)?;
        for (index, unit) in layout.units().iter().enumerate() {
            let take_up = |array: Array, stays: bool| -> Result<Vec<Slot>, TrainError> {
                let tiles = array.adopt(&home.store)?;
                if !stays || tiles.is_empty() {
                    return Ok(tiles);
                }
                Ok(LoadingTiles::start(tiles, pool.lease(array.bytes())?)?.stay()?)
            };
            let (tile_elements, keeping) = (plan.tile_elements(), plan.keeping());
            let weights = take_up(Array::weights(layout, unit, tile_elements), keeping.weights[index])?;
            let moments = take_up(Array::moments(layout, unit, tile_elements), keeping.moments[index])?;
            home.units[index].weights = weights;
            home.units[index].moments = moments;
        }
        Ok((home, reached))
    }

    /// A home whose weights and moments are still to come.
    fn over(
        layout: &ModelLayout,
        plan: &MemoryPlan,
        identity: Identity,
        pool: &Pool,
        store: Store,
    ) -> Result<Self, TrainError> {
        let unit = |(unit, &stays): (&UnitLayout, &bool)| {
            let reserve = || Array::gradient(unit, plan.tile_elements()).reserve(&store, Worth::Scratch);
            let gradient = Place::new(stays, reserve)?;
            Ok(UnitState { weights: Vec::new(), gradient, moments: Vec::new() })
        };
        let units = layout.units().iter().zip(&plan.keeping().gradients).map(unit);
        let units = units.collect::<Result<_, StoreError>>()?;
        let input = |(i, &stays): (usize, &bool)| {
            let (name, bytes) = (format!("input/{i}"), plan.input_bytes());
            Place::new(stays, || Ok(vec![Slot::Vacant(store.reserve(name, bytes, Worth::Scratch)?)]))
        };
        let inputs = plan.keeping().inputs.iter().enumerate().map(input);
        let inputs = inputs.collect::<Result<_, StoreError>>()?;
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
}
