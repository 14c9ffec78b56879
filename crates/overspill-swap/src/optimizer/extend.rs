//! Parameters that are added to those that have state already.
//!
//! The tiles that were there stay what they are, on storage; new ones follow. Which of all of them stay in memory, and how
//! long the pipeline is, is a new plan's decision, with a pool of its own: the old pool is empty before the new one is
//! made, so the budget holds in between.

use overspill_io::Pool;

use super::packing::ParameterSpec;
use super::plan::OptimizerPlan;
use super::{OptimizerError, OptimizerSwapper, tile_name};
use crate::ledger::Worth;
use crate::slot::{Kept, Slot};

impl OptimizerSwapper {
    /// The same state with more parameters: `specs` are all of them, those that are there first and as they are, the
    /// first new one [beginning a tile](ParameterSpec::begins_tile); `plan` is one for all, with tiles of the same
    /// length. Gradients are forgotten.
    ///
    /// # Errors
    /// [`OptimizerError::OtherParameters`] when the first ones are not those that are there, [`OptimizerError::Lost`] after a
    /// pass that failed, [`OptimizerError::Store`] when there is no room or no memory; the state is lost then as far as it
    /// was not committed.
    pub fn extend(self, specs: &[ParameterSpec], plan: OptimizerPlan) -> Result<Self, OptimizerError> {
        self.check_extension(specs, &plan)?;
        let durability = self.store.durability();
        // The store remembers the room that the old plan had for gradients.
        let remembered = self.plan.gradient_storage_bytes(durability);
        self.store.provide(plan.storage_bytes(durability) + remembered)?;
        let Self { slots, mut gradients, mut new, store, pool, phases, .. } = self;
        gradients.iter_mut().for_each(super::TileGradient::give_up);
        drop(gradients);
        let slots =
            slots.into_iter().map(|slot| slot.ok_or(OptimizerError::Lost)).collect::<Result<Vec<_>, _>>()?;
        let saving: Vec<Slot> = slots.into_iter().map(Slot::save).collect();
        let leave = |slot: Slot| match slot.settle()? {
            Slot::Kept(Kept::Clean(tensor)) => Ok(Slot::Swapped(tensor.release())),
            settled => Ok(settled),
        };
        let mut slots = saving.into_iter().map(leave).collect::<Result<Vec<_>, OptimizerError>>()?;
        drop(pool);

        let pool = Pool::new(&plan.classes()).map_err(crate::StoreError::from)?;
        let mut extended = Self::over(specs, plan, &store, &pool)?;
        for (index, tile) in extended.plan.tiles.iter().enumerate().skip(slots.len()) {
            slots.push(Slot::Vacant(store.vacant(&tile_name(index), tile.bytes(), Worth::State)?));
            new.extend((0..tile.parts.len()).map(|part| (index, part)));
        }
        for (index, slot) in slots.into_iter().enumerate() {
            extended.slots[index] = Some(extended.stay(index, slot)?);
        }
        (extended.new, extended.phases) = (new, phases);
        Ok(extended)
    }

    fn check_extension(&self, specs: &[ParameterSpec], plan: &OptimizerPlan) -> Result<(), OptimizerError> {
        let mut known = self.names.iter().zip(&self.numels);
        let are_first = specs.len() >= self.names.len()
            && known
                .by_ref()
                .zip(specs)
                .all(|((name, numel), spec)| *name == spec.name && *numel == spec.numel)
            && plan.tiles.starts_with(&self.plan.tiles);
        let reason = "more were to be added, but the first ones are not those that have state".to_owned();
        if are_first { Ok(()) } else { Err(OptimizerError::OtherParameters { reason }) }
    }
}
