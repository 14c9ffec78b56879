//! The committed generation, read by its owner and compared with what was stored, before anything depends on it.
//!
//! Whoever has to look up from it now and then breaks it off between two tensors, and goes on from there: the store can be
//! used meanwhile, and every block is back as soon as what was under way is over.

use std::ops::ControlFlow;

use super::{Standing, Store, begin_of};
use crate::error::StoreError;
use crate::manifest::TensorRecord;
use crate::survey::{Blocks, Read, read_extents};

/// How far the committed generation was compared; by default nothing of it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// The number of the generation: what was compared of one says nothing about the next.
    pub generation: u64,
    /// How many of its tensors, in the order of the data file.
    pub tensors: usize,
}

impl Store {
    /// Reads the committed versions of tensors, those that are `wanted` by their names, and compares them with what was
    /// stored: whether they are what [`Store::roll_back`] would bring back. Nothing changes; writes may be under way, as
    /// none goes there with [`Durability::Step`](crate::Durability::Step).
    ///
    /// It goes on from where it was `compared`, and after each tensor `progress` may break it off: the answer is how far it
    /// has come then, `None` when that is everything. Of a generation that was committed meanwhile it begins anew.
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
        compared: Compared,
        mut progress: impl FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Compared>, StoreError> {
        let (generation, mut records) = {
            let state = self.state();
            self.check_sound(&state)?;
            if !matches!(state.standing, Standing::Committed { .. }) {
                return Err(StoreError::NothingCommitted { path: self.path().to_owned() });
            }
            (state.generation, state.ledger.committed_records())
        };
        records.retain(|record| wanted(&record.name));
        records.sort_unstable_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
        let mut tensors = if compared.generation == generation { compared.tensors } else { 0 };
        let left = records.iter().skip(tensors);
        let extents = left.map(|record| (record, record.offset, record.length));
        let mut flaw = None;
        let read = read_extents(self.space(), blocks, extents, |Read { whole, .. }| {
            let Some((record, found)) = whole else { return ControlFlow::Continue(()) };
            flaw = match found {
                Ok(found) => self.difference(record, found),
                Err(source) => Some(StoreError::Transfer { tensor: record.name.clone(), source }),
            };
            tensors += 1;
            if flaw.is_some() { ControlFlow::Break(()) } else { progress() }
        });
        match flaw {
            Some(flaw) => Err(flaw),
            None => Ok(read?.is_break().then_some(Compared { generation, tensors })),
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
