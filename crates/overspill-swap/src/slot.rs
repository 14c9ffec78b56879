//! Where a tensor is between its uses: on storage, on the way, or in memory for good.
//!
//! The [tensor states](crate::tensor) say what one use does with a tensor. A [`Slot`] is what its owner holds from one
//! use to the next, when it is not known which state that is: the write of the last use may still be under way, the
//! read for the next one may have begun, or the tensor may be one of those that memory has room for, which are read
//! never and written only when somebody wants them on storage.
//!
//! ```text
//!   Vacant ─────┐                                            ┌──► Storing ──settle()──► Swapped
//!   Swapped ────┼─ prefetch() ► Loading ─┐                   │
//!   Storing ────┘                        ├─ the next use ────┤
//!   Kept ────────────────────────────────┘                   └──► Kept ──save()──► Saving ──settle()──► Kept
//! ```

use overspill_io::{Block, Pool, PoolError};

use crate::error::StoreError;
use crate::tensor::{Dirty, Id, Loading, Resident, Saving, Storing, Swapped, Vacant};

/// A tensor between two uses.
#[derive(Debug)]
#[must_use = "a dropped tensor has to be adopted again, and what is only in memory is lost"]
pub enum Slot {
    /// Nowhere: it has no contents yet.
    Vacant(Vacant),
    /// On storage.
    Swapped(Swapped),
    /// On its way into a block, ahead of its use.
    Loading(Loading),
    /// On its way to storage, behind its use.
    Storing(Storing),
    /// In memory for good.
    Kept(Kept),
    /// In memory for good, and on its way to storage.
    Saving(Saving),
}

/// A tensor in memory.
#[derive(Debug)]
#[must_use = "a dropped tensor has to be adopted again, and what is only in memory is lost"]
pub enum Kept {
    /// The same on storage.
    Clean(Resident),
    /// Newer than what is on storage, if there is anything.
    Dirty(Dirty),
}

impl Kept {
    /// The tensor's bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Clean(tensor) => tensor.bytes(),
            Self::Dirty(tensor) => tensor.bytes(),
        }
    }

    /// Takes the tensor to change it.
    pub fn edit(self) -> Dirty {
        match self {
            Self::Clean(tensor) => tensor.edit(),
            Self::Dirty(tensor) => tensor,
        }
    }
}

impl Slot {
    /// Length of the tensor, in bytes.
    pub fn bytes(&self) -> usize {
        self.id().bytes()
    }

    pub(crate) fn wrong_length(&self, found: usize) -> StoreError {
        self.id().wrong_length(found)
    }

    fn id(&self) -> &Id {
        match self {
            Self::Vacant(tensor) => tensor.id(),
            Self::Swapped(tensor) => tensor.id(),
            Self::Loading(tensor) => tensor.id(),
            Self::Storing(tensor) => tensor.id(),
            Self::Kept(Kept::Clean(tensor)) => tensor.id(),
            Self::Kept(Kept::Dirty(tensor)) => tensor.id(),
            Self::Saving(tensor) => tensor.id(),
        }
    }

    /// Whether the next use could begin without waiting for a write.
    pub fn is_at_rest(&self) -> bool {
        match self {
            Self::Storing(tensor) => tensor.is_done(),
            Self::Saving(tensor) => tensor.is_done(),
            Self::Vacant(_) | Self::Swapped(_) | Self::Loading(_) | Self::Kept(_) => true,
        }
    }

    /// Whether the next use needs a block.
    pub fn needs_block(&self) -> bool {
        matches!(self, Self::Vacant(_) | Self::Swapped(_) | Self::Storing(_))
    }

    /// Starts loading what is on storage and settled there, if `pool` has a block of `block_bytes` bytes free now. Whoever
    /// prefetches does so in the order of the uses: a later tensor must not hold the block that an earlier one needs.
    ///
    /// # Errors
    /// [`StoreError`] when the write before has failed, or the block cannot serve.
    pub fn prefetch(self, pool: &Pool, block_bytes: usize) -> Result<Self, StoreError> {
        let tensor = match self {
            Self::Swapped(tensor) => tensor,
            Self::Storing(tensor) if tensor.is_done() => tensor.wait().map_err(|failed| failed.error)?,
            other => return Ok(other),
        };
        match pool.try_lease(block_bytes) {
            Ok(block) => {
                let block = tensor.fit(block)?;
                tensor.load(block).map(Self::Loading).map_err(|refused| refused.error)
            }
            Err(PoolError::Exhausted { .. }) => Ok(Self::Swapped(tensor)),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for what is under way: what was on its way to storage is there, and what was on its way into memory is
    /// given up.
    ///
    /// # Errors
    /// [`StoreError`] of the write that failed.
    pub fn settle(self) -> Result<Self, StoreError> {
        match self {
            Self::Storing(tensor) => tensor.wait().map(Self::Swapped).map_err(|failed| failed.error),
            Self::Loading(tensor) => Ok(Self::Swapped(match tensor.wait() {
                Ok(tensor) => tensor.release(),
                Err(failed) => failed.tensor,
            })),
            Self::Saving(tensor) => {
                tensor.wait().map(|tensor| Self::Kept(Kept::Clean(tensor))).map_err(|failed| failed.error)
            }
            settled => Ok(settled),
        }
    }

    /// Starts writing what is newer in memory; it stays there.
    pub fn save(self) -> Self {
        match self {
            Self::Kept(Kept::Dirty(tensor)) => Self::Saving(tensor.save()),
            other => other,
        }
    }

    /// Begins a use, with the block that [`Slot::needs_block`] asked for.
    pub(crate) fn begin(self, block: Option<Block>) -> Result<Coming, StoreError> {
        match (self.rest()?, block) {
            (Self::Vacant(tensor), Some(block)) => {
                let mut block = tensor.fit(block)?;
                block.fill(0);
                tensor.fill(block).map(Coming::New).map_err(|refused| refused.error)
            }
            (Self::Swapped(tensor), Some(block)) => {
                let block = tensor.fit(block)?;
                tensor.load(block).map(Coming::Loading).map_err(|refused| refused.error)
            }
            (Self::Loading(tensor), _) => Ok(Coming::Loading(tensor)),
            (Self::Kept(tensor), _) => Ok(Coming::Kept(tensor)),
            (Self::Vacant(_) | Self::Swapped(_) | Self::Storing(_) | Self::Saving(_), _) => {
                unreachable!("a slot at rest is given the block that it needs")
            }
        }
    }

    /// Waits for a write that is under way.
    fn rest(self) -> Result<Self, StoreError> {
        if let Self::Loading(_) = self { Ok(self) } else { self.settle() }
    }
}

/// A tensor at the beginning of a use.
#[derive(Debug)]
pub(crate) enum Coming {
    /// On its way into memory.
    Loading(Loading),
    /// Zeros, as it had no contents.
    New(Dirty),
    /// In memory for good.
    Kept(Kept),
}

/// A tensor in use: in memory, for now or for good.
#[derive(Debug)]
pub(crate) struct Present<T = Kept> {
    pub(crate) tensor: T,
    stays: bool,
}

impl Coming {
    /// Waits until the tensor is there.
    pub(crate) fn wait(self) -> Result<Present, StoreError> {
        Self::wait_all(vec![self]).map(|mut all| all.remove(0))
    }

    /// Waits for all of them; the first one's error when all others have come to rest.
    pub(crate) fn wait_all(all: Vec<Self>) -> Result<Vec<Present>, StoreError> {
        let mut loading = Vec::with_capacity(all.len());
        let mut there = Vec::with_capacity(all.len());
        for tensor in all {
            match tensor {
                Self::Loading(tensor) => {
                    loading.push(tensor);
                    there.push(None);
                }
                Self::New(tensor) => there.push(Some(Present { tensor: Kept::Dirty(tensor), stays: false })),
                Self::Kept(tensor) => there.push(Some(Present { tensor, stays: true })),
            }
        }
        let mut loaded = Loading::wait_all(loading).into_iter();
        let present = |there: Option<Present>| match there {
            Some(present) => Ok(present),
            None => {
                let loaded = loaded.next().expect("one of those that were loading");
                let tensor = Kept::Clean(loaded.map_err(|failed| failed.error)?);
                Ok(Present { tensor, stays: false })
            }
        };
        there.into_iter().map(present).collect()
    }
}

impl Present {
    /// Takes the tensor to change it.
    pub(crate) fn edit(self) -> Present<Dirty> {
        Present { tensor: self.tensor.edit(), stays: self.stays }
    }

    /// Ends a use that changed nothing.
    pub(crate) fn release(self) -> Slot {
        match (self.tensor, self.stays) {
            (tensor, true) => Slot::Kept(tensor),
            (Kept::Clean(tensor), false) => Slot::Swapped(tensor.release()),
            (Kept::Dirty(tensor), false) => Slot::Storing(tensor.store()),
        }
    }
}

impl Present<Dirty> {
    /// Ends a use that changed the tensors.
    pub(crate) fn store_all(all: Vec<Self>) -> Vec<Slot> {
        let (stay, go): (Vec<_>, Vec<_>) =
            all.into_iter().enumerate().partition(|(_, present)| present.stays);
        let (places, tensors): (Vec<_>, Vec<_>) =
            go.into_iter().map(|(place, present)| (place, present.tensor)).unzip();
        let going = places.into_iter().zip(Dirty::store_all(tensors).into_iter().map(Slot::Storing));
        let staying =
            stay.into_iter().map(|(place, present)| (place, Slot::Kept(Kept::Dirty(present.tensor))));
        let mut slots: Vec<_> = going.chain(staying).collect();
        slots.sort_unstable_by_key(|(place, _)| *place);
        slots.into_iter().map(|(_, slot)| slot).collect()
    }
}
