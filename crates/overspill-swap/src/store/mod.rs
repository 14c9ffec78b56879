//! The store: data files of extents, and manifests that say what they mean.
//!
//! A store knows, for every tensor, where its versions are: the [ledger](crate::ledger) keeps that, in plain data, and
//! this module does what it says. Tensors themselves are the values of [`crate::tensor`]; they ask the store where to
//! move to, and tell it what became of it.
//!
//! ```text
//! reserve ─► tensors move: begin_write … end_write ─► commit ─► the next generation
//!                                                       │ data flushed; manifest.new written, flushed;
//!                                                       │ manifest → manifest.previous, manifest.new → manifest;
//!                                                       ▼ directory flushed; what nobody refers to any more is free
//! ```
//!
//! With [`Durability::Step`] no byte of the committed generation is written to, so a process that dies at any moment
//! leaves the state of its last commit, and [`Store::open`] finds it. A snapshot is one more name for a manifest,
//! whose extents are not free while it has it. The data files are preallocated at creation for all that commits need,
//! so a disk that is too full is found before anything depends on it; a snapshot makes them grow, or is refused.
//!
//! The extents lie in one space of bytes over all volumes. The first volume's directory is the store's home, with the
//! manifests in it; the others hold data files only. A volume that fails fails the tensors that have bytes there.
//!
//! A store that is dropped removes its directories, unless [`Store::keep`] was called or it was opened. One of them that
//! was moved, or whose path leads to another's, is left alone, as is the other's; nothing is committed meanwhile.

mod attending;
mod checking;
mod moves;
mod opening;
mod view;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use self::opening::{
    check_dealt_alike, check_length, check_lengths, open_all, other_files, repair_label, space_over,
};

use overspill_io::{EngineStats, Lane, Space};

pub use self::checking::Compared;
pub use self::view::{View, ViewLoading};
use crate::directory::Directory;
use crate::error::{Fallback, StoreError};
use crate::extent::EXTENT_ALIGNMENT;
use crate::ledger::{self, Durability, Key, Ledger, Working, Worth};
use crate::manifest::{LaneRecord, META_LEVELS_MAX, Manifest, is_deeper};
use crate::steps::{Step, step};
use crate::tensor::{Swapped, Vacant};
use crate::wish::Sight;
use crate::{directory, snapshot, wish};

/// Least number of bytes by which the data file grows.
const GROWTH_BYTES: u64 = 64 << 20;

/// Tensors on storage. A handle: clones share one store.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    // Closed before the directories go.
    space: Space,
    /// All volumes but the home.
    others: Vec<Directory>,
    home: Directory,
    /// Files in the home that are named like snapshots and are none.
    foreign: Vec<String>,
    /// The home's label was missing or damaged.
    relabeled: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    /// Tensors that somebody has a handle of.
    claimed: HashSet<Key>,
    /// What the manifest on storage is worth.
    standing: Standing,
    /// Random; every volume knows it, so that those of two stores are not taken for one.
    store: u64,
    /// Number of the last commit.
    generation: u64,
    /// Bytes written for tensors, in all runs together, as far as they committed.
    bytes_written: u64,
    /// A flush of the home's names failed: which of them survive a loss of power is not known any more.
    names_unknown: bool,
}

/// What the manifest on storage is worth.
#[derive(Debug)]
enum Standing {
    /// There is none yet.
    Nothing,
    /// It names the committed versions, and this came with them.
    Committed { meta: serde_json::Value },
    /// It was taken away, because what it named is overwritten.
    Withdrawn,
    /// A flush failed, so that two of them may be what is found. What either names is not written to.
    Unknown,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Files that only look like snapshots are somebody else's.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.home.forget(state.ledger.pins().map(snapshot::file_name));
        let Sight { wishes, .. } = wish::look(self.home.path()).unwrap_or_default();
        self.home.forget(wishes.iter().map(|name| wish::file_name(name)));
    }
}

/// How much of a store is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes that versions of tensors take.
    pub allocated_bytes: u64,
    /// Bytes of the data file.
    pub capacity_bytes: u64,
    /// Bytes of the longest free range.
    pub longest_free_bytes: u64,
    /// Number of free ranges.
    pub free_ranges: usize,
}

impl Store {
    /// The bytes that tensors of these lengths take in a data file.
    pub fn capacity_for(
        durability: Durability,
        worth: Worth,
        lengths: impl IntoIterator<Item = usize>,
    ) -> u64 {
        let needed = lengths.into_iter().map(|bytes| ledger::needed_bytes(durability, worth, bytes));
        needed.fold(0, u64::saturating_add)
    }

    /// Takes up a new tensor of `bytes` bytes.
    ///
    /// # Errors
    /// [`StoreError::Full`] when the data file was not made for so much, [`StoreError::DuplicateName`].
    pub fn reserve(&self, name: impl Into<String>, bytes: usize, worth: Worth) -> Result<Vacant, StoreError> {
        let name = name.into();
        let mut state = self.state();
        let State { ledger, claimed, .. } = &mut *state;
        if ledger.find(&name).is_some() {
            return Err(StoreError::DuplicateName { tensor: name, path: self.path().to_owned() });
        }
        let more = ledger::needed_bytes(ledger.durability(), worth, bytes);
        let needed = ledger.needed_bytes().saturating_add(more);
        let capacity = ledger.extents().capacity();
        if needed > capacity {
            return Err(StoreError::Full { tensor: name, path: self.data_path(), needed, capacity });
        }
        let key = ledger.reserve(&name, bytes, worth).expect("nobody has the name, as was just seen");
        claimed.insert(key);
        Ok(Vacant::new(self.clone(), key))
    }

    /// Takes up a tensor of the committed state, or one whose handle was lost, as it is on storage.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when there is none of this name, or nothing was stored, [`StoreError::WrongLength`],
    /// [`StoreError::InUse`] when somebody has its handle.
    pub fn adopt(&self, name: &str, bytes: usize) -> Result<Swapped, StoreError> {
        let mut state = self.state();
        let missing = || StoreError::Missing { tensor: name.to_owned(), path: self.path().to_owned() };
        let key = state.ledger.find(name).ok_or_else(missing)?;
        let found = state.ledger.bytes(key);
        if found != bytes {
            return Err(StoreError::WrongLength { tensor: name.to_owned(), expected: found, found: bytes });
        }
        if !matches!(state.ledger.working(key), Working::Stored(_)) {
            return Err(missing());
        }
        if !state.claimed.insert(key) {
            return Err(StoreError::InUse { tensor: name.to_owned() });
        }
        Ok(Swapped::new(self.clone(), key))
    }

    /// A handle of a tensor whose contents, if it has any, count no more; it is taken up if there is none of this name.
    ///
    /// # Errors
    /// As [`Store::reserve`] and [`Store::adopt`].
    pub fn vacant(&self, name: &str, bytes: usize, worth: Worth) -> Result<Vacant, StoreError> {
        let mut state = self.state();
        let Some(key) = state.ledger.find(name) else {
            drop(state);
            return self.reserve(name, bytes, worth);
        };
        let found = state.ledger.bytes(key);
        if found != bytes {
            return Err(StoreError::WrongLength { tensor: name.to_owned(), expected: found, found: bytes });
        }
        if !state.claimed.insert(key) {
            return Err(StoreError::InUse { tensor: name.to_owned() });
        }
        Ok(Vacant::new(self.clone(), key))
    }

    /// Makes the state that is on storage the next generation, durably and all at once; `meta` goes with it. Then
    /// snapshots that other processes wish for are made ([`Store::ask_for_snapshot`]), and those that they deleted are
    /// let go of.
    ///
    /// # Errors
    /// [`StoreError::MetaDepth`] for a `meta` that could not be read again. [`StoreError::Unfinished`] when a write was
    /// not waited for or failed, [`StoreError::DiskFull`] and [`StoreError::Directory`] with the action "write" when the
    /// next manifest could not be written, [`StoreError::Displaced`] when a directory or a data file is not where it
    /// was: the last generation is the committed one then, and the commit can be tried again. [`StoreError::Io`] when the
    /// data could not be flushed and [`StoreError::Directory`] with the action "replace" when the manifest could not be
    /// replaced, or [`StoreError::Displaced`] when something was moved while it was:
    /// which of the two generations survives a loss of power is unknown then, and every later commit is
    /// [`StoreError::Poisoned`].
    pub fn commit(&self, meta: serde_json::Value) -> Result<(), StoreError> {
        let mut state = self.state();
        self.check_sound(&state)?;
        if is_deeper(&meta, META_LEVELS_MAX) {
            return Err(StoreError::MetaDepth { path: self.path().to_owned(), levels_max: META_LEVELS_MAX });
        }
        let unfinished = |key| StoreError::Unfinished { tensor: state.ledger.name(key).to_owned() };
        let manifest = Manifest {
            store: state.store,
            generation: state.generation.saturating_add(1),
            capacity_bytes: state.ledger.extents().capacity(),
            bytes_written: state.bytes_written,
            meta,
            stripe_bytes: self.inner.space.stripes().stripe_bytes() as usize,
            lanes: self.lane_records(),
            tensors: state.ledger.records().map_err(unfinished)?,
        };
        step(Step::FlushData);
        if let Err(error) = self.inner.space.sync() {
            state.standing = Standing::Unknown;
            return Err(error.into());
        }
        let fallback = match state.standing {
            Standing::Committed { .. } => Fallback::LastCommit,
            Standing::Nothing | Standing::Withdrawn | Standing::Unknown => Fallback::Nothing,
        };
        self.inner.home.prepare(&manifest.encode(), fallback)?;
        // After everything that takes long, and while it can still be tried again.
        self.check_own()?;
        // What was displaced meanwhile may have either generation, wherever it is.
        if let Err(error) = self.inner.home.replace().and_then(|()| self.check_own()) {
            state.standing = Standing::Unknown;
            return Err(error);
        }
        state.ledger.commit();
        state.generation = manifest.generation;
        state.standing = Standing::Committed { meta: manifest.meta };
        self.attend(&mut state);
        Ok(())
    }

    /// Takes the state back to the last commit. A [`Swapped`] tensor means its committed contents then; one that is in
    /// memory or on its way there keeps the bytes it has. Lost handles are had again by [`Store::adopt`].
    ///
    /// # Errors
    /// [`StoreError::Unfinished`] when a write is under way, [`StoreError::NothingCommitted`] when the last commit was
    /// overwritten, [`StoreError::Poisoned`] after a flush has failed.
    pub fn roll_back(&self) -> Result<(), StoreError> {
        let mut state = self.state();
        self.check_sound(&state)?;
        if matches!(state.standing, Standing::Withdrawn) {
            return Err(StoreError::NothingCommitted { path: self.path().to_owned() });
        }
        let rolled = state.ledger.roll_back();
        rolled.map_err(|key| StoreError::Unfinished { tensor: state.ledger.name(key).to_owned() })
    }

    /// Keeps the committed generation under `name` until [`Store::delete_snapshot`], without copying a byte of it.
    ///
    /// # Errors
    /// [`StoreError::SnapshotName`] for a name that could not be a file's, [`StoreError::SnapshotExists`],
    /// [`StoreError::NothingCommitted`], [`StoreError::SnapshotRoom`] when there is no room for the steps after it,
    /// [`StoreError::Poisoned`], [`StoreError::Displaced`], [`StoreError::Directory`], [`StoreError::Io`].
    pub fn snapshot(&self, name: &str) -> Result<(), StoreError> {
        let mut state = self.state();
        snapshot::check_new_name(name)?;
        self.check_sound(&state)?;
        self.check_own()?;
        // Another process may have given it up since the last commit.
        self.let_go(&mut state, vec![name.to_owned()]);
        self.keep_committed(&mut state, name)
    }

    /// Gives up a snapshot; what only it kept is free.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::Displaced`], [`StoreError::Directory`].
    pub fn delete_snapshot(&self, name: &str) -> Result<(), StoreError> {
        let mut state = self.state();
        snapshot::check_name(name)?;
        self.check_own()?;
        match snapshot::delete(self.path(), name, Some(state.store)) {
            // An earlier call took the name away, and could not make that durable.
            Err(StoreError::NoSnapshot { .. }) if state.ledger.pins().any(|pin| pin == name) => {}
            deleted => deleted?,
        }
        // Only a name that is durably gone may lose its extents.
        self.flush_names(&mut state)?;
        state.ledger.unpin(name);
        Ok(())
    }

    /// Names of the snapshots.
    pub fn snapshots(&self) -> Vec<String> {
        self.state().ledger.pins().map(str::to_owned).collect()
    }

    /// What a crash may cost.
    pub fn durability(&self) -> Durability {
        self.state().ledger.durability()
    }

    /// Number of the committed generation; 0 before the first commit.
    pub fn generation(&self) -> u64 {
        let state = self.state();
        if matches!(state.standing, Standing::Committed { .. }) { state.generation } else { 0 }
    }

    /// What was committed with the tensors.
    pub fn meta(&self) -> serde_json::Value {
        match &self.state().standing {
            Standing::Committed { meta } => meta.clone(),
            Standing::Nothing | Standing::Withdrawn | Standing::Unknown => serde_json::Value::Null,
        }
    }

    /// Bytes written for tensors since the store was made, in all runs together.
    pub fn bytes_written(&self) -> u64 {
        self.state().bytes_written
    }

    /// Leaves the directories on storage when the store is dropped.
    pub fn keep(&self) {
        let Inner { home, others, .. } = &*self.inner;
        others.iter().chain([home]).for_each(Directory::keep);
    }

    /// Whether the directories stay on storage when the store is dropped.
    pub fn is_kept(&self) -> bool {
        self.inner.home.is_kept()
    }

    /// The store's home.
    pub fn path(&self) -> &Path {
        self.inner.home.path()
    }

    /// What a user may want to know about the files: why one is not written directly, say, or which are not ours.
    pub fn note(&self) -> Option<String> {
        let foreign = self.inner.foreign.join(", ");
        let ignored = (!foreign.is_empty()).then(|| {
            format!("{}: {foreign}: not a snapshot of this store, and ignored", self.path().display())
        });
        let relabeled = self.inner.relabeled.then(|| {
            let label = self.path().join(directory::VOLUME);
            format!("{}: missing or damaged, and written anew by what the manifest says", label.display())
        });
        let notes: Vec<String> =
            self.inner.space.note().into_iter().chain(ignored).chain(relabeled).collect();
        (!notes.is_empty()).then(|| notes.join("; "))
    }

    /// What was moved so far; see [`Space::stats`].
    pub fn stats(&self) -> EngineStats {
        self.inner.space.stats()
    }

    /// How much is in use.
    pub fn usage(&self) -> Usage {
        let state = self.state();
        let extents = state.ledger.extents();
        Usage {
            tensors: state.ledger.len(),
            allocated_bytes: extents.capacity() - extents.free_bytes(),
            capacity_bytes: extents.capacity(),
            longest_free_bytes: extents.longest(),
            free_ranges: extents.fragments(),
        }
    }

    /// After a failed flush either generation may be the one that is found: neither is written to.
    fn check_sound(&self, state: &State) -> Result<(), StoreError> {
        match state.standing {
            Standing::Unknown => Err(StoreError::Poisoned { path: self.data_path() }),
            Standing::Nothing | Standing::Committed { .. } | Standing::Withdrawn => Ok(()),
        }
    }

    /// Whether every directory is where it was, with the data files that are open: a manifest names them by their paths.
    fn check_own(&self) -> Result<(), StoreError> {
        let Inner { space, others, home, .. } = &*self.inner;
        [home].into_iter().chain(others).try_for_each(Directory::check_own)?;
        space.lanes().iter().try_for_each(|lane| directory::check_name(&lane.file, lane.file.path()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics between two changes that belong together, so a poisoned lock guards a whole state.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The home's first data file.
    fn data_path(&self) -> PathBuf {
        self.inner.home.data(0)
    }

    fn lane_records(&self) -> Vec<LaneRecord> {
        let record = |lane: &Lane| {
            let path = lane.file.path();
            // Another volume is looked for from any working directory.
            let absolute = || std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            let beside = path.file_name().filter(|_| path.parent() == Some(self.path()));
            let file = beside.map_or_else(absolute, PathBuf::from);
            LaneRecord { file: file.to_string_lossy().into_owned(), weight: lane.weight }
        };
        self.inner.space.lanes().iter().map(record).collect()
    }
}

/// The data file that the unit of a space at `offset` begins in, and where in it.
pub(crate) fn begin_of(space: &Space, offset: u64) -> (PathBuf, u64) {
    let mut pieces = space.stripes().pieces(offset, EXTENT_ALIGNMENT as usize);
    let piece = pieces.next().expect("a unit of the space has a first byte");
    (space.lanes()[piece.lane].file.path().to_owned(), piece.offset)
}
