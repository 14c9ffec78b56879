//! State and weights as generations of the store: committed, compared, gone back to.
//!
//! Weights go along as tensors of the store's own. What is gone back to is compared with what was stored before anything is
//! changed; a roll-back that fails after that leaves no state, until another succeeds.

use overspill_swap::optimizer::{OptimizerError, OptimizerSwapper};
use overspill_swap::{Compared, Durability, StoreError};
use serde_json::Value;

use super::super::identity::{difference, identity};
use super::super::{restoring, weights};
use super::{Options, Swapped, plan, pool_for, specs, weight_bytes};
use crate::error::Error;
use crate::tensor::Tensor;

impl Swapped {
    /// Makes state and weights the next generation.
    pub(in super::super) fn commit(&mut self, tensors: &[Tensor], user: &Value) -> Result<(), Error> {
        self.check_weights(tensors)?;
        let durability = self.options.durability;
        if durability == Durability::None {
            let message = "durability is 'none': make the optimizer with durability='step' to commit";
            return Err(Error::State(message.to_owned()));
        }
        let begins = self.begins_tile();
        let swapper = self.swapper.as_mut().ok_or(OptimizerError::Lost)?;
        let weights_bytes = weights::storage_bytes(durability, weight_bytes(&self.parameters));
        let needed = swapper.plan().storage_bytes(durability) + weights_bytes;
        self.store.provide(needed)?;
        weights::store(&self.store, &self.transport.pool, tensors)?;
        let mut meta = identity(&self.described, &self.options.formats, &begins);
        // Where whoever looks at the store from outside finds it.
        meta["step"] = user["step"].clone();
        meta["user"] = user.clone();
        swapper.commit(&meta)?;
        self.store.keep();
        Ok(())
    }

    /// Reads the last commit for a short while, from where it was `compared`, and compares it: how far it has come, `None`
    /// when that is everything. Nothing is changed, and signals are handled between two calls.
    pub(in super::super) fn compare(
        &mut self,
        tensors: &[Tensor],
        compared: Compared,
    ) -> Result<Option<Compared>, Error> {
        self.committed_of(tensors)?;
        let generation = self.store.generation();
        let left = restoring::glance(&self.store, |_| true, weights::blocks(&self.transport.pool), compared)?;
        self.compared = left.is_none().then_some(generation);
        Ok(left)
    }

    /// Goes back to the last commit, if that is the one that was compared last: damage changes nothing. What fails here leaves
    /// no state, until this succeeds.
    pub(in super::super) fn roll_back(&mut self, tensors: &mut [Tensor]) -> Result<bool, Error> {
        let committed = self.committed_of(tensors)?;
        if self.compared != Some(self.store.generation()) {
            return Ok(false);
        }
        let swapper = match self.swapper.take() {
            Some(mut swapper) => swapper.roll_back().map(|()| swapper)?,
            None => self.reopen(&committed)?,
        };
        weights::load(&self.store, &self.transport.pool, tensors)?;
        self.swapper = Some(swapper);
        Ok(true)
    }

    /// What went with the last commit, if it is of these parameters.
    fn committed_of(&self, tensors: &[Tensor]) -> Result<Value, Error> {
        self.check_weights(tensors)?;
        let committed = self.store.meta();
        if committed.is_null() {
            return Err(StoreError::NothingCommitted { path: self.store.path().to_owned() }.into());
        }
        let expected = identity(&self.described, &self.options.formats, &self.begins_tile());
        if let Some(difference) = difference(&committed["meta"], &expected) {
            return Err(Error::State(format!("the last commit is of other parameters: {difference}")));
        }
        Ok(committed)
    }

    /// The committed state, once the one in use was lost.
    fn reopen(&self, committed: &Value) -> Result<OptimizerSwapper, Error> {
        self.store.roll_back()?;
        let specs = specs(&self.parameters)?;
        let tile_bytes = OptimizerSwapper::tile_bytes(committed);
        let plan = plan(
            &self.parameters,
            &specs,
            &Options { tile_bytes, ..self.options.clone() },
            self.transport.engines_bytes,
        )?;
        let tiles = pool_for(&plan)?;
        Ok(OptimizerSwapper::open(&specs, plan, &self.store, &tiles)?)
    }

    /// Gives the state up, until [`Swapped::roll_back`] succeeds: the weights that it was of could not be put where they
    /// belong.
    pub(in super::super) fn lose(&mut self) {
        self.swapper = None;
    }

    /// What went with the last commit.
    pub(in super::super) fn meta(&self) -> Value {
        self.store.meta()["meta"]["user"].clone()
    }
}
