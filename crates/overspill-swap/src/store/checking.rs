//! The committed generation, read by its owner and compared with what was stored, before anything depends on it.

use std::ops::ControlFlow;

use super::{Standing, Store, begin_of};
use crate::error::StoreError;
use crate::manifest::TensorRecord;
use crate::survey::{Blocks, Read, read_extents};

impl Store {
    /// Reads the committed versions of tensors, those that are `wanted` by their names, and compares them with what was
    /// stored: whether they are what [`Store::roll_back`] would bring back. Nothing changes; writes may be under way, as
    /// none goes there with [`Durability::Step`](crate::Durability::Step).
    ///
    /// # Errors
    /// The first tensor's in the order of the data file: [`StoreError::Corrupt`], [`StoreError::Transfer`].
    /// [`StoreError::NothingCommitted`], [`StoreError::Poisoned`] after a flush has failed, [`StoreError::Pool`].
    ///
    /// # Panics
    /// When the length of a block is no multiple of [`EXTENT_ALIGNMENT`](crate::EXTENT_ALIGNMENT).
    pub fn check_committed(
        &self,
        wanted: impl Fn(&str) -> bool,
        blocks: Blocks<'_>,
    ) -> Result<(), StoreError> {
        let mut records = {
            let state = self.state();
            self.check_sound(&state)?;
            if !matches!(state.standing, Standing::Committed { .. }) {
                return Err(StoreError::NothingCommitted { path: self.path().to_owned() });
            }
            state.ledger.committed_records()
        };
        records.retain(|record| wanted(&record.name));
        records.sort_unstable_by_key(|record| record.offset);
        let extents = records.iter().map(|record| (record, record.offset, record.length));
        let mut flaw = None;
        let read = read_extents(self.space(), blocks, extents, |Read { whole, .. }| {
            flaw = whole.and_then(|(record, found)| match found {
                Ok(found) => self.difference(record, found),
                Err(source) => Some(StoreError::Transfer { tensor: record.name.clone(), source }),
            });
            if flaw.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match flaw {
            Some(flaw) => Err(flaw),
            None => read.map(drop),
        }
    }

    fn difference(&self, record: &TensorRecord, found: u64) -> Option<StoreError> {
        let TensorRecord { name, checksum: expected, .. } = record;
        let (path, offset) = begin_of(self.space(), record.offset);
        let length = usize::try_from(record.length).unwrap_or(usize::MAX);
        let (tensor, expected) = (name.clone(), *expected);
        (expected != found).then_some(StoreError::Corrupt { tensor, path, offset, length, expected, found })
    }
}
