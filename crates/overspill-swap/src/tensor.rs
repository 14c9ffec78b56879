//! A tensor on its way out and back: its state is its type, and moving it is the only way to change it.
//!
//! ```text
//!                        ┌──save()──► Saving ──wait()──► Resident     a tensor that stays in memory
//! Vacant ──fill(block)──► Dirty ──store()──► Storing ──wait()──► Swapped
//!                           ▲ ▲                 └─ failed: Dirty again, the only copy comes home
//!                    edit() │ └──overwrite(block)──┐
//!                        Resident ◄──wait()── Loading ◄──load(block)── Swapped
//!                           └── release() or take(): Swapped; clean, so nothing is written
//! ```
//!
//! The checksum is taken when a tensor is stored, while its bytes are still in cache, and compared when it is loaded. Of
//! several tensors that move together, all cores compute them, those of what has landed while the rest is under way: the
//! caller's thread has something better to do. A tensor has one handle at a time; when it is dropped, [`Store::adopt`]
//! gives a new one for what is on storage.

use std::fmt;

use overspill_io::{BLOCK_ALIGNMENT, Block, Priority, Space, Ticket};
use rayon::prelude::*;

use crate::error::StoreError;
use crate::ledger::{Key, Version};
use crate::manifest::checksum;
use crate::store::Store;

/// What every state carries: which tensor of which store. There is one for each tensor at most.
pub(crate) struct Id {
    store: Store,
    key: Key,
}

impl Drop for Id {
    fn drop(&mut self) {
        self.store.disclaim(self.key);
    }
}

impl Id {
    /// Length of the tensor, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.store.bytes(self.key)
    }

    fn check_length(&self, block: &Block) -> Result<(), StoreError> {
        if self.store.bytes(self.key) == block.len() { Ok(()) } else { Err(self.wrong_length(block.len())) }
    }

    fn fit(&self, mut block: Block) -> Result<Block, StoreError> {
        let bytes = self.store.bytes(self.key);
        if bytes < block.len() && bytes.is_multiple_of(BLOCK_ALIGNMENT) {
            drop(block.split_off(bytes));
        }
        self.check_length(&block).map(|()| block)
    }

    pub(crate) fn wrong_length(&self, found: usize) -> StoreError {
        let expected = self.store.bytes(self.key);
        StoreError::WrongLength { tensor: self.store.name(self.key), expected, found }
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.store.name(self.key))
    }
}

/// A tensor with room on storage and no contents yet.
#[derive(Debug)]
#[must_use = "a dropped tensor without contents keeps its name, and nobody gets it any more"]
pub struct Vacant(Id);

/// A tensor whose only copy is on storage.
#[derive(Debug)]
#[must_use = "a dropped tensor keeps its room on storage and has to be adopted again"]
pub struct Swapped(Id);

/// A tensor on its way into a block.
#[derive(Debug)]
#[must_use = "a load that nobody waits for was for nothing"]
pub struct Loading {
    id: Id,
    reading: Reading,
}

/// Bytes on their way in, or why not.
#[derive(Debug)]
enum Reading {
    Begun { ticket: Ticket, version: Version },
    Refused(StoreError),
}

/// What was read for a tensor, whatever it is.
struct Landed {
    id: Id,
    block: Block,
    version: Version,
}

/// A tensor in memory, equal to its copy on storage.
#[derive(Debug)]
#[must_use = "a dropped tensor keeps its room on storage and has to be adopted again"]
pub struct Resident {
    id: Id,
    block: Block,
}

/// A tensor whose only valid copy is in memory.
#[derive(Debug)]
#[must_use = "this is the only copy of the tensor"]
pub struct Dirty {
    id: Id,
    block: Block,
}

/// A tensor on its way to storage. Dropping it waits, too: where a write is under way, nobody else may write.
#[derive(Debug)]
#[must_use = "whether the tensor was stored is known only after waiting"]
pub struct Storing(Option<Writing<()>>);

/// A tensor on its way to storage that stays in memory. Dropping it waits, as it does for [`Storing`].
#[derive(Debug)]
#[must_use = "whether the tensor was saved is known only after waiting"]
pub struct Saving(Option<Writing<Block>>);

/// Bytes on their way out, or why not; `T` is what comes back.
#[derive(Debug)]
enum Writing<T> {
    Begun { id: Id, ticket: Ticket<T>, checksum: u64 },
    Refused { tensor: Dirty, error: StoreError },
}

/// A block that was refused, because it does not have the tensor's length. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Refused<T> {
    /// [`StoreError::WrongLength`].
    pub error: StoreError,
    /// The tensor.
    pub tensor: T,
    /// The block.
    pub block: Block,
}

/// A load that failed. The copy on storage is untouched.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct LoadFailed {
    /// Why.
    pub error: StoreError,
    /// The tensor, to try again.
    pub tensor: Swapped,
}

/// A store that failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StoreFailed {
    /// Why.
    pub error: StoreError,
    /// The tensor with its data, to try again. `None` only when the kernel never gave the memory back.
    pub tensor: Option<Dirty>,
}

impl Vacant {
    pub(crate) fn new(store: Store, key: Key) -> Self {
        Self(Id { store, key })
    }

    /// Length of the tensor, in bytes.
    pub fn bytes(&self) -> usize {
        self.0.store.bytes(self.0.key)
    }

    pub(crate) fn id(&self) -> &Id {
        &self.0
    }

    /// Cuts a block that may be longer to the tensor's length.
    ///
    /// # Errors
    /// [`StoreError::WrongLength`] when it is shorter, or can't be cut there.
    pub(crate) fn fit(&self, block: Block) -> Result<Block, StoreError> {
        self.0.fit(block)
    }

    /// Gives the tensor its first contents.
    ///
    /// # Errors
    /// [`Refused`] when the block does not have the tensor's length.
    pub fn fill(self, block: Block) -> Result<Dirty, Refused<Self>> {
        match self.0.check_length(&block) {
            Ok(()) => Ok(Dirty { id: self.0, block }),
            Err(error) => Err(Refused { error, tensor: self, block }),
        }
    }
}

impl Swapped {
    pub(crate) fn new(store: Store, key: Key) -> Self {
        Self(Id { store, key })
    }

    /// Length of the tensor, in bytes.
    pub fn bytes(&self) -> usize {
        self.0.store.bytes(self.0.key)
    }

    pub(crate) fn id(&self) -> &Id {
        &self.0
    }

    /// Starts reading the tensor into a block of its length.
    ///
    /// # Errors
    /// [`Refused`] when the block does not have the tensor's length.
    pub fn load(self, block: Block) -> Result<Loading, Refused<Self>> {
        if let Err(error) = self.0.check_length(&block) {
            return Err(Refused { error, tensor: self, block });
        }
        let Id { store, key } = &self.0;
        let reading = match store.version(*key) {
            Ok(version) => {
                let ticket = store.space().read(version.extent.offset, block, Priority::Urgent);
                Reading::Begun { ticket, version }
            }
            Err(error) => Reading::Refused(error),
        };
        Ok(Loading { id: self.0, reading })
    }

    /// As [`Vacant::fit`].
    pub(crate) fn fit(&self, block: Block) -> Result<Block, StoreError> {
        self.0.fit(block)
    }

    /// Replaces the contents without reading them.
    ///
    /// # Errors
    /// [`Refused`] when the block does not have the tensor's length.
    pub fn overwrite(self, block: Block) -> Result<Dirty, Refused<Self>> {
        match self.0.check_length(&block) {
            Ok(()) => Ok(Dirty { id: self.0, block }),
            Err(error) => Err(Refused { error, tensor: self, block }),
        }
    }
}

impl Loading {
    pub(crate) fn id(&self) -> &Id {
        &self.id
    }

    /// Whether [`Loading::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        match &self.reading {
            Reading::Begun { ticket, .. } => ticket.is_done(),
            Reading::Refused(_) => true,
        }
    }

    /// Waits for the bytes and compares their checksum with what was stored.
    ///
    /// # Errors
    /// [`LoadFailed`] with [`StoreError::Transfer`] or [`StoreError::Corrupt`]; with [`StoreError::Unfinished`] when its
    /// last write failed.
    pub fn wait(self) -> Result<Resident, LoadFailed> {
        self.land().and_then(Landed::verify)
    }

    /// Waits for all of them, as [`Loading::wait`] does for one.
    pub(crate) fn wait_all(all: Vec<Self>) -> Vec<Result<Resident, LoadFailed>> {
        if all.len() < 2 {
            return all.into_iter().map(Self::wait).collect();
        }
        let mut results: Vec<_> = all.iter().map(|_| None).collect();
        rayon::in_place_scope(|scope| {
            for (result, loading) in results.iter_mut().zip(all) {
                match loading.land() {
                    Ok(landed) => scope.spawn(move |_| *result = Some(landed.verify())),
                    Err(failed) => *result = Some(Err(failed)),
                }
            }
        });
        results.into_iter().map(|result| result.expect("the scope ends when all of them are there")).collect()
    }

    /// Waits for the bytes.
    fn land(self) -> Result<Landed, LoadFailed> {
        let Self { id, reading } = self;
        let (ticket, version) = match reading {
            Reading::Begun { ticket, version } => (ticket, version),
            Reading::Refused(error) => return Err(LoadFailed { error, tensor: Swapped(id) }),
        };
        match ticket.wait() {
            Ok(block) => Ok(Landed { id, block, version }),
            Err(failed) => {
                let error = id.store.transfer_error(id.key, failed.error);
                Err(LoadFailed { error, tensor: Swapped(id) })
            }
        }
    }
}

impl Landed {
    /// Compares the checksum of the bytes with what was stored.
    fn verify(self) -> Result<Resident, LoadFailed> {
        let Self { id, block, version } = self;
        match id.store.verify(id.key, version, checksum(&block)) {
            Ok(()) => Ok(Resident { id, block }),
            Err(error) => Err(LoadFailed { error, tensor: Swapped(id) }),
        }
    }
}

impl Resident {
    pub(crate) fn id(&self) -> &Id {
        &self.id
    }

    /// The tensor's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.block
    }

    /// Takes the tensor to change it.
    pub fn edit(self) -> Dirty {
        Dirty { id: self.id, block: self.block }
    }

    /// Gives the memory back; the copy on storage is the same.
    pub fn release(self) -> Swapped {
        Swapped(self.id)
    }

    /// Separates the tensor from the memory, which holds a copy of it for as long as the caller likes.
    pub fn take(self) -> (Swapped, Block) {
        (Swapped(self.id), self.block)
    }
}

impl Dirty {
    pub(crate) fn id(&self) -> &Id {
        &self.id
    }

    /// What somebody is told who wanted to read a tensor that has no contents.
    pub(crate) fn unfinished(&self) -> StoreError {
        StoreError::Unfinished { tensor: self.id.store.name(self.id.key) }
    }

    /// The tensor's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.block
    }

    /// The tensor's bytes, to change them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.block
    }

    /// Starts writing the tensor behind the computation's back. Its block returns to the pool the moment it is
    /// written, whether or not anybody waits.
    pub fn store(self) -> Storing {
        let checksum = checksum(&self.block);
        self.store_as(checksum)
    }

    /// Starts writing all of them, in their order, as [`Dirty::store`] does with one.
    pub(crate) fn store_all(all: Vec<Self>) -> Vec<Storing> {
        let checksums: Vec<u64> = all.par_iter().map(|tensor| checksum(&tensor.block)).collect();
        all.into_iter().zip(checksums).map(|(tensor, checksum)| tensor.store_as(checksum)).collect()
    }

    fn store_as(self, checksum: u64) -> Storing {
        let write = |space: &Space, offset, block| space.write_behind(offset, block, Priority::Background);
        Storing(Some(self.begin(checksum, write)))
    }

    /// Starts writing the tensor, which stays in memory.
    pub fn save(self) -> Saving {
        let checksum = checksum(&self.block);
        let write = |space: &Space, offset, block| space.write(offset, block, Priority::Background);
        Saving(Some(self.begin(checksum, write)))
    }

    fn begin<T>(self, checksum: u64, write: impl FnOnce(&Space, u64, Block) -> Ticket<T>) -> Writing<T> {
        let Self { id, block } = self;
        match id.store.begin_write(id.key) {
            Ok(extent) => {
                let ticket = write(id.store.space(), extent.offset, block);
                Writing::Begun { id, ticket, checksum }
            }
            Err(error) => Writing::Refused { tensor: Self { id, block }, error },
        }
    }
}

impl Storing {
    pub(crate) fn id(&self) -> &Id {
        self.0.as_ref().expect("it is waited for once").id()
    }

    /// Whether [`Storing::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.0.as_ref().is_none_or(Writing::is_done)
    }

    /// Waits until the tensor is on storage.
    ///
    /// # Errors
    /// [`StoreFailed`] with [`StoreError::Transfer`], or with what kept the data file from growing, and the data.
    pub fn wait(mut self) -> Result<Swapped, StoreFailed> {
        let writing = self.0.take().expect("it is waited for once");
        writing.wait().map(|(id, ())| Swapped(id))
    }
}

impl Drop for Storing {
    fn drop(&mut self) {
        if let Some(writing) = self.0.take() {
            drop(writing.wait());
        }
    }
}

impl Saving {
    pub(crate) fn id(&self) -> &Id {
        self.0.as_ref().expect("it is waited for once").id()
    }

    /// Whether [`Saving::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.0.as_ref().is_none_or(Writing::is_done)
    }

    /// Waits until what is in memory is on storage, too.
    ///
    /// # Errors
    /// As [`Storing::wait`].
    pub fn wait(mut self) -> Result<Resident, StoreFailed> {
        let writing = self.0.take().expect("it is waited for once");
        writing.wait().map(|(id, block)| Resident { id, block })
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        if let Some(writing) = self.0.take() {
            drop(writing.wait());
        }
    }
}

impl<T> Writing<T> {
    fn id(&self) -> &Id {
        match self {
            Self::Begun { id, .. } => id,
            Self::Refused { tensor, .. } => &tensor.id,
        }
    }

    fn is_done(&self) -> bool {
        match self {
            Self::Begun { ticket, .. } => ticket.is_done(),
            Self::Refused { .. } => true,
        }
    }

    fn wait(self) -> Result<(Id, T), StoreFailed> {
        let (id, ticket, checksum) = match self {
            Self::Begun { id, ticket, checksum } => (id, ticket, checksum),
            Self::Refused { tensor, error } => return Err(StoreFailed { error, tensor: Some(tensor) }),
        };
        match ticket.wait() {
            Ok(back) => {
                id.store.end_write(id.key, checksum);
                Ok((id, back))
            }
            Err(failed) => {
                // Without its memory the write may still be going on: its extent stays taken.
                if failed.block.is_some() {
                    id.store.fail_write(id.key);
                }
                let error = id.store.transfer_error(id.key, failed.error);
                Err(StoreFailed { error, tensor: failed.block.map(|block| Dirty { id, block }) })
            }
        }
    }
}
