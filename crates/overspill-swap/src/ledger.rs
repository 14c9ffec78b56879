//! Which bytes of the data file hold which version of which tensor.
//!
//! Pure bookkeeping, no I/O. A tensor of the state has up to three kinds of versions: the *working* one, which changes;
//! the *committed* one, which the manifest on storage names; and *pinned* ones, which snapshots name. Versions share
//! extents, and an extent is free when no version has it. The one law: what a committed or pinned version has is not
//! written to. So a write goes to an extent that only the working version has, or else to a free one:
//!
//! ```text
//!             begin_write               end_write               commit
//! committed ─────────────► new extent ────────────► working ────────────► committed; the old extent is free
//!                              │ fail_write             │ roll_back
//!                              ▼                        ▼
//!                      its bytes are unknown     working = committed; the new extent is free
//! ```
//!
//! The room does not grow with the number of steps: every step takes extents of the lengths that the one before it freed,
//! and best fit puts them there. With `n` snapshots at a time the data file has at most [`Ledger::needed_bytes`], `n` times
//! the state, and one growth (64 MiB or the longest tensor) beyond that; free ranges number a few for each length that
//! tensors have, not for each tensor. Ten thousand steps of the default model, of 1134 tensors of eight lengths, have 26
//! at most (`long_run.rs`).
//!
//! [`Durability::None`] and scratch tensors overwrite in place; of a committed version that is lost in this way nothing
//! may be promised any more, and [`Begun::committed_version_lost`] says so.

use std::collections::{BTreeMap, HashMap};

use crate::extent::{EXTENT_ALIGNMENT, Extent, Extents, Full};
use crate::manifest::TensorRecord;

/// Room for the gaps between extents when there are snapshots, in bytes.
const GAPS_BYTES: u64 = 64 << 20;

/// What a tensor is worth after its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worth {
    /// A part of the state: commits and snapshots hold it.
    State,
    /// Of use while a step lasts: overwritten in place, and not committed.
    Scratch,
}

/// What a crash may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The step that was under way. The state takes the room of two.
    Step,
    /// Everything: the state is overwritten in place.
    None,
}

/// Names one tensor of one ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(usize);

/// Bytes on storage, and how to know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) extent: Extent,
    pub(crate) checksum: u64,
}

/// The working version of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Working {
    /// Nothing was written yet.
    Nothing,
    /// Something between the old and the new: a write is under way.
    Writing(Extent),
    /// The same, for good: the write failed.
    Lost(Extent),
    /// The bytes with this checksum.
    Stored(Version),
}

/// A write that may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    /// Where it goes.
    pub(crate) extent: Extent,
    /// Whether it destroys what the manifest on storage names, which must be gone before.
    pub(crate) committed_version_lost: bool,
}

/// A name that is taken, or a pinned version that contradicts another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) tensor: String,
}

/// All tensors of a store.
#[derive(Debug)]
pub(crate) struct Ledger {
    durability: Durability,
    extents: Extents,
    tensors: Vec<Tensor>,
    keys: HashMap<String, Key>,
    /// The extents that somebody has, by their offsets.
    held: HashMap<u64, Held>,
    pins: BTreeMap<String, Vec<Extent>>,
    needed_bytes: u64,
}

/// An extent that is not free.
#[derive(Clone, Copy, Debug)]
struct Held {
    length: u64,
    /// How many versions have it.
    versions: u32,
}

#[derive(Debug)]
struct Tensor {
    name: String,
    bytes: usize,
    worth: Worth,
    working: Working,
    committed: Option<Version>,
}

impl Ledger {
    /// No tensors in a data file of `capacity` bytes.
    pub(crate) fn new(durability: Durability, capacity: u64) -> Self {
        Self {
            durability,
            extents: Extents::new(capacity),
            tensors: Vec::new(),
            keys: HashMap::new(),
            held: HashMap::new(),
            pins: BTreeMap::new(),
            needed_bytes: 0,
        }
    }

    /// The committed state that a manifest describes.
    ///
    /// # Errors
    /// [`Conflict`] with the first tensor that does not fit into the data file.
    pub(crate) fn restore(
        durability: Durability,
        capacity: u64,
        records: &[TensorRecord],
    ) -> Result<Self, Conflict> {
        let mut ledger = Self::new(durability, capacity);
        for record in records {
            let conflict = || Conflict { tensor: record.name.clone() };
            let extent = record.extent().ok_or_else(conflict)?;
            let bytes = usize::try_from(record.length).map_err(|_| conflict())?;
            let version = Version { extent, checksum: record.checksum };
            let key = ledger.reserve(&record.name, bytes, Worth::State)?;
            ledger.extents.claim(extent).map_err(|()| conflict())?;
            // The working and the committed version.
            ledger.held.insert(extent.offset, Held { length: extent.length, versions: 2 });
            ledger.tensors[key.0].working = Working::Stored(version);
            ledger.tensors[key.0].committed = Some(version);
        }
        Ok(ledger)
    }

    /// Takes up a tensor.
    ///
    /// # Errors
    /// [`Conflict`] when the name is taken.
    pub(crate) fn reserve(&mut self, name: &str, bytes: usize, worth: Worth) -> Result<Key, Conflict> {
        let key = Key(self.tensors.len());
        if self.keys.contains_key(name) {
            return Err(Conflict { tensor: name.to_owned() });
        }
        self.keys.insert(name.to_owned(), key);
        self.needed_bytes = self.needed_bytes.saturating_add(needed_bytes(self.durability, worth, bytes));
        let (working, committed) = (Working::Nothing, None);
        self.tensors.push(Tensor { name: name.to_owned(), bytes, worth, working, committed });
        Ok(key)
    }

    pub(crate) fn find(&self, name: &str) -> Option<Key> {
        self.keys.get(name).copied()
    }

    pub(crate) fn name(&self, key: Key) -> &str {
        &self.tensors[key.0].name
    }

    /// Length of the tensor, in bytes.
    pub(crate) fn bytes(&self, key: Key) -> usize {
        self.tensors[key.0].bytes
    }

    pub(crate) fn working(&self, key: Key) -> Working {
        self.tensors[key.0].working
    }

    pub(crate) fn len(&self) -> usize {
        self.tensors.len()
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Names of what is pinned.
    pub(crate) fn pins(&self) -> impl Iterator<Item = &str> {
        self.pins.keys().map(String::as_str)
    }

    /// What the manifest on storage says.
    pub(crate) fn committed_records(&self) -> Vec<TensorRecord> {
        let record = |tensor: &Tensor| tensor.committed.map(|version| tensor.record(version));
        self.tensors.iter().filter_map(record).collect()
    }

    pub(crate) fn extents(&self) -> &Extents {
        &self.extents
    }

    /// Room that all tensors need, snapshots and gaps aside.
    pub(crate) fn needed_bytes(&self) -> u64 {
        self.needed_bytes
    }

    /// Room that the steps to come need beside what snapshots keep, as far as `needed` bytes do without any. What is
    /// pinned now may still be what is committed; after the next steps it is one more copy of the state. Where lengths
    /// are mixed there are gaps, too, for which there is some room more; a small store has small gaps.
    pub(crate) fn room_bytes(&self, needed: u64) -> u64 {
        if self.pins.is_empty() {
            return needed;
        }
        // Snapshots share what did not change between them.
        let pinned: HashMap<u64, u64> =
            self.pins.values().flatten().map(|extent| (extent.offset, extent.length)).collect();
        let longest = self.tensors.iter().map(|tensor| aligned_bytes(tensor.bytes)).max().unwrap_or(0);
        let gaps = longest.max(GAPS_BYTES).min(self.needed_bytes);
        pinned.values().copied().chain([gaps]).fold(needed, u64::saturating_add)
    }

    /// The data file is `capacity` bytes long now.
    pub(crate) fn grow(&mut self, capacity: u64) {
        self.extents.grow(capacity);
    }

    /// Finds the extent for a new version.
    ///
    /// # Errors
    /// [`Full`] when there is none: the data file must grow. Nothing has changed.
    pub(crate) fn begin_write(&mut self, key: Key) -> Result<Begun, Full> {
        let tensor = &self.tensors[key.0];
        let present = match tensor.working {
            Working::Nothing => None,
            Working::Lost(extent) | Working::Writing(extent) => Some(extent),
            Working::Stored(version) => Some(version.extent),
        };
        let is_committed = tensor.committed.is_some_and(|version| Some(version.extent) == present);
        let in_place = |extent: &Extent| {
            let versions = self.held[&extent.offset].versions;
            match self.durability {
                Durability::None => versions == 1 + u32::from(is_committed),
                Durability::Step => versions == 1,
            }
        };
        if let Some(extent) = present.filter(in_place) {
            if is_committed {
                self.release(extent);
                self.tensors[key.0].committed = None;
            }
            self.tensors[key.0].working = Working::Writing(extent);
            return Ok(Begun { extent, committed_version_lost: is_committed });
        }
        let extent = self.extents.allocate(tensor.bytes as u64)?;
        self.held.insert(extent.offset, Held { length: extent.length, versions: 1 });
        if let Some(extent) = present {
            self.release(extent);
        }
        self.tensors[key.0].working = Working::Writing(extent);
        Ok(Begun { extent, committed_version_lost: false })
    }

    /// The write that began has succeeded.
    pub(crate) fn end_write(&mut self, key: Key, checksum: u64) {
        if let Working::Writing(extent) = self.tensors[key.0].working {
            self.tensors[key.0].working = Working::Stored(Version { extent, checksum });
        }
    }

    /// The write that began has failed.
    pub(crate) fn fail_write(&mut self, key: Key) {
        if let Working::Writing(extent) = self.tensors[key.0].working {
            self.tensors[key.0].working = Working::Lost(extent);
        }
    }

    /// What a manifest of the working versions says.
    ///
    /// # Errors
    /// The first tensor whose working version is not whole.
    pub(crate) fn records(&self) -> Result<Vec<TensorRecord>, Key> {
        let mut records = Vec::with_capacity(self.tensors.len());
        for (index, tensor) in self.tensors.iter().enumerate() {
            match tensor.working {
                _ if tensor.worth == Worth::Scratch => {}
                Working::Nothing => {}
                Working::Writing(_) | Working::Lost(_) => return Err(Key(index)),
                Working::Stored(version) => records.push(tensor.record(version)),
            }
        }
        Ok(records)
    }

    /// The working versions are the committed ones now.
    ///
    /// # Panics
    /// When [`Ledger::records`] would refuse: nobody can have written such a manifest.
    pub(crate) fn commit(&mut self) {
        for index in 0..self.tensors.len() {
            let Tensor { worth, working, committed, .. } = self.tensors[index];
            let next = match working {
                _ if worth == Worth::Scratch => continue,
                Working::Nothing => None,
                Working::Stored(version) => Some(version),
                Working::Writing(_) | Working::Lost(_) => panic!("a version that is not whole was committed"),
            };
            if next == committed {
                continue;
            }
            if let Some(version) = next {
                self.hold(version.extent);
            }
            if let Some(version) = committed {
                self.release(version.extent);
            }
            self.tensors[index].committed = next;
        }
    }

    /// The committed versions are the working ones again.
    ///
    /// # Errors
    /// The first tensor with a write under way: its extent cannot be given to anybody else. Nothing has changed.
    pub(crate) fn roll_back(&mut self) -> Result<(), Key> {
        let writing = |tensor: &Tensor| matches!(tensor.working, Working::Writing(_));
        if let Some(index) = self.tensors.iter().position(writing) {
            return Err(Key(index));
        }
        for index in 0..self.tensors.len() {
            let Tensor { worth, working, committed, .. } = self.tensors[index];
            if worth == Worth::Scratch || working == committed.map_or(Working::Nothing, Working::Stored) {
                continue;
            }
            if let Some(version) = committed {
                self.hold(version.extent);
            }
            match working {
                Working::Stored(Version { extent, .. }) | Working::Lost(extent) => self.release(extent),
                Working::Nothing | Working::Writing(_) => {}
            }
            self.tensors[index].working = committed.map_or(Working::Nothing, Working::Stored);
        }
        Ok(())
    }

    /// Keeps the versions that a snapshot's manifest names.
    ///
    /// # Errors
    /// [`Conflict`] when the snapshot is pinned already, or names bytes that overlap with those of another version
    /// without being the same. Nothing has changed.
    pub(crate) fn pin(&mut self, snapshot: &str, records: &[TensorRecord]) -> Result<(), Conflict> {
        if self.pins.contains_key(snapshot) {
            return Err(Conflict { tensor: snapshot.to_owned() });
        }
        let mut pinned = Vec::with_capacity(records.len());
        for record in records {
            let taken = record.extent().is_some_and(|extent| self.share(extent));
            match record.extent().filter(|_| taken) {
                Some(extent) => pinned.push(extent),
                None => {
                    pinned.into_iter().for_each(|extent| self.release(extent));
                    return Err(Conflict { tensor: record.name.clone() });
                }
            }
        }
        self.pins.insert(snapshot.to_owned(), pinned);
        Ok(())
    }

    /// Lets go of what a snapshot kept; whether there was such a snapshot.
    pub(crate) fn unpin(&mut self, snapshot: &str) -> bool {
        let pinned = self.pins.remove(snapshot);
        let found = pinned.is_some();
        pinned.into_iter().flatten().for_each(|extent| self.release(extent));
        found
    }

    /// Adds a version to an extent that others have as it is, or that nobody has.
    fn share(&mut self, extent: Extent) -> bool {
        match self.held.get_mut(&extent.offset) {
            Some(held) if held.length == extent.length => held.versions += 1,
            None if self.extents.claim(extent).is_ok() => {
                self.held.insert(extent.offset, Held { length: extent.length, versions: 1 });
            }
            Some(_) | None => return false,
        }
        true
    }

    fn hold(&mut self, extent: Extent) {
        self.held.get_mut(&extent.offset).expect("somebody has it").versions += 1;
    }

    fn release(&mut self, extent: Extent) {
        let held = self.held.get_mut(&extent.offset).expect("who lets go of it has it");
        held.versions -= 1;
        if held.versions == 0 {
            self.held.remove(&extent.offset);
            self.extents.release(extent);
        }
    }
}

impl Tensor {
    fn record(&self, version: Version) -> TensorRecord {
        TensorRecord {
            name: self.name.clone(),
            offset: version.extent.offset,
            length: self.bytes as u64,
            checksum: version.checksum,
        }
    }
}

/// Room that a tensor needs in the data file.
pub(crate) fn needed_bytes(durability: Durability, worth: Worth, bytes: usize) -> u64 {
    match (durability, worth) {
        (Durability::Step, Worth::State) => aligned_bytes(bytes).saturating_mul(2),
        (Durability::None, _) | (_, Worth::Scratch) => aligned_bytes(bytes),
    }
}

fn aligned_bytes(bytes: usize) -> u64 {
    (bytes.max(1) as u64).checked_next_multiple_of(EXTENT_ALIGNMENT).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod long_run;
#[cfg(test)]
mod tests;
