//! What the tensor states ask of their store: where to move to, and what became of it.

use overspill_io::{IoError, Space};

use super::{GROWTH_BYTES, Standing, State, Store, begin_of};
use crate::error::StoreError;
use crate::extent::{EXTENT_ALIGNMENT, Extent};
use crate::ledger::{Begun, Durability, Key, Version, Working};
use crate::steps::{Step, step};

impl Store {
    pub(crate) fn space(&self) -> &Space {
        &self.inner.space
    }

    pub(crate) fn name(&self, key: Key) -> String {
        self.state().ledger.name(key).to_owned()
    }

    /// Length of the tensor, in bytes.
    pub(crate) fn bytes(&self, key: Key) -> usize {
        self.state().ledger.bytes(key)
    }

    /// Its handle is gone.
    pub(crate) fn disclaim(&self, key: Key) {
        self.state().claimed.remove(&key);
    }

    /// Where the tensor's bytes are, and how to know them.
    pub(crate) fn version(&self, key: Key) -> Result<Version, StoreError> {
        let state = self.state();
        match state.ledger.working(key) {
            Working::Stored(version) => Ok(version),
            Working::Nothing | Working::Writing(_) | Working::Lost(_) => {
                Err(StoreError::Unfinished { tensor: state.ledger.name(key).to_owned() })
            }
        }
    }

    /// A write begins: until it is known to have succeeded, the tensor has no certain bytes.
    pub(crate) fn begin_write(&self, key: Key) -> Result<Extent, StoreError> {
        let mut state = self.state();
        self.check_sound(&state)?;
        if state.ledger.durability() == Durability::None
            && matches!(state.standing, Standing::Committed { .. })
        {
            // The manifests may have to go, and only before the ledger knows of it can it be tried again.
            self.check_own()?;
        }
        let Begun { extent, committed_version_lost } = match state.ledger.begin_write(key) {
            Ok(begun) => begun,
            Err(full) => {
                let grown = self.grow(&mut state, full.requested);
                grown.map_err(|error| self.no_room(&state, error))?;
                let again = state.ledger.begin_write(key);
                again.expect("the space has just grown by more than this")
            }
        };
        if committed_version_lost && matches!(state.standing, Standing::Committed { .. }) {
            // Durably: what they name is about to be overwritten.
            if let Err(error) = self.inner.home.withdraw() {
                state.ledger.fail_write(key);
                state.standing = Standing::Unknown;
                return Err(error);
            }
            state.standing = Standing::Withdrawn;
        }
        state.bytes_written = state.bytes_written.saturating_add(extent.length);
        Ok(extent)
    }

    /// The write succeeded.
    pub(crate) fn end_write(&self, key: Key, checksum: u64) {
        self.state().ledger.end_write(key, checksum);
    }

    /// The write failed.
    pub(crate) fn fail_write(&self, key: Key) {
        self.state().ledger.fail_write(key);
    }

    /// Compares what was read with what was stored.
    pub(crate) fn verify(&self, key: Key, version: Version, found: u64) -> Result<(), StoreError> {
        if version.checksum == found {
            return Ok(());
        }
        let (tensor, length) = (self.name(key), self.bytes(key));
        let (path, offset) = begin_of(self.space(), version.extent.offset);
        Err(StoreError::Corrupt { tensor, path, offset, length, expected: version.checksum, found })
    }

    pub(crate) fn transfer_error(&self, key: Key, source: IoError) -> StoreError {
        StoreError::Transfer { tensor: self.name(key), source }
    }

    /// Makes the data files as long as [`Store::create`] would have made them, and longer by what snapshots keep.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the file systems cannot hold them, [`StoreError::KeptRoom`] when there are snapshots that
    /// could be given up, and [`StoreError::Displaced`] when the files are not where they were.
    pub fn provide(&self, capacity_bytes: u64) -> Result<(), StoreError> {
        let mut state = self.state();
        let room = state.ledger.room_bytes(capacity_bytes);
        self.grow_to(&mut state, room).map_err(|error| self.no_room(&state, error))
    }

    /// Makes the data files at least so long.
    pub(super) fn grow_to(&self, state: &mut State, capacity_bytes: u64) -> Result<(), StoreError> {
        match capacity_bytes.saturating_sub(state.ledger.extents().capacity()) {
            0 => Ok(()),
            missing => self.grow(state, missing),
        }
    }

    /// Says why there is no room; where snapshots are a reason they are named.
    fn no_room(&self, state: &State, error: StoreError) -> StoreError {
        let snapshots: Vec<String> = state.ledger.pins().map(str::to_owned).collect();
        match error {
            StoreError::Io(source @ IoError::NoSpace { .. }) if !snapshots.is_empty() => {
                StoreError::KeptRoom { path: self.path().to_owned(), snapshots, source }
            }
            error => error,
        }
    }

    /// Makes the data files longer by so many bytes at least.
    fn grow(&self, state: &mut State, bytes: u64) -> Result<(), StoreError> {
        // Nobody will find what would be written there.
        self.check_own()?;
        let present = state.ledger.extents().capacity();
        let aligned = |bytes: u64| bytes.checked_next_multiple_of(EXTENT_ALIGNMENT).unwrap_or(u64::MAX);
        let capacity = present.saturating_add(aligned(bytes.max(GROWTH_BYTES)));
        // The whole of a small disk may be less than a comfortable step.
        let enough = present.saturating_add(aligned(bytes));
        step(Step::Grow);
        let grown = match self.inner.space.allocate(capacity) {
            Ok(()) => capacity,
            Err(IoError::NoSpace { .. }) => self.inner.space.allocate(enough).map(|()| enough)?,
            Err(error) => return Err(error.into()),
        };
        step(Step::Grown);
        state.ledger.grow(grown);
        Ok(())
    }
}
