//! A generation of a store, to be read and nothing else.
//!
//! [`View::of_snapshot`] takes no lock: what a snapshot names is not written to while the snapshot exists, so its bytes
//! can be read beside the owner, who goes on working. [`View::open`] shows the committed generation of a store whose
//! owner has ended, and keeps the lock for as long as it lives. Either way the data files are opened for reading, and
//! every tensor's checksum is compared when it is loaded: a snapshot that is deleted meanwhile shows as one that is not
//! there, never as other bytes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use overspill_io::{Block, Engine, IoError, Priority, Space, Ticket};

use super::{Store, begin_of, check_lengths, open_all, space_over};
use crate::directory::{self, Directory, MANIFEST};
use crate::error::StoreError;
use crate::extent::Extent;
use crate::manifest::{Manifest, TensorRecord, checksum};
use crate::snapshot;
use crate::volume::Volume;

/// A generation of a store, open for reading.
#[derive(Debug)]
pub struct View {
    // Closed before the locks go.
    space: Space,
    home: PathBuf,
    /// The snapshot that is looked at.
    snapshot: Option<String>,
    meta: serde_json::Value,
    generation: u64,
    tensors: HashMap<String, Version>,
    /// Of a store that nobody else may open meanwhile.
    _locked: Vec<Directory>,
}

/// Where a tensor is, and how to know it.
#[derive(Clone, Copy, Debug)]
struct Version {
    extent: Extent,
    bytes: usize,
    checksum: u64,
}

/// A tensor on its way into a block.
#[derive(Debug)]
#[must_use = "a load that nobody waits for was for nothing"]
pub struct ViewLoading<'a> {
    view: &'a View,
    tensor: String,
    version: Version,
    ticket: Ticket,
}

impl View {
    /// The committed generation of a store that nobody has open; nobody can open it until the view is dropped. The
    /// volumes are given as for [`Store::open_over`].
    ///
    /// # Errors
    /// [`StoreError::Locked`] when the owner lives, [`StoreError::NothingCommitted`], and those of
    /// [`View::of_snapshot`].
    pub fn open(volumes: &[Volume]) -> Result<Self, StoreError> {
        let locked = open_all(volumes)?;
        let home = home(volumes)?;
        let view = Self::over(volumes, &home.join(MANIFEST), Store::committed(home)?, None)?;
        for directory in &locked {
            directory.sign()?;
        }
        Ok(Self { _locked: locked, ..view })
    }

    /// A snapshot, whoever has the store open; the volumes are given as for [`Store::open_over`].
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::SnapshotName`], [`StoreError::Manifest`] when its manifest is damaged,
    /// [`StoreError::Volumes`] and [`StoreError::ForeignVolume`] for volumes that are not the store's,
    /// [`StoreError::Truncated`] for a data file that is too short, [`StoreError::Directory`] and [`StoreError::Io`] for
    /// what the system refuses.
    pub fn of_snapshot(volumes: &[Volume], name: &str) -> Result<Self, StoreError> {
        let home = home(volumes)?;
        Self::over(volumes, &snapshot::path(home, name), Store::snapshot_of(home, name)?, Some(name))
    }

    fn over(
        volumes: &[Volume],
        manifest_path: &Path,
        manifest: Manifest,
        snapshot: Option<&str>,
    ) -> Result<Self, StoreError> {
        let home = home(volumes)?.to_owned();
        let space = space_over(volumes, &manifest, manifest_path, Engine::open_to_read)?;
        let tensors = manifest.tensors.iter().map(|record| {
            let extent = record.extent().expect("a decoded manifest has possible extents only");
            (record, extent)
        });
        let end = tensors.clone().map(|(_, extent)| extent.end()).max().unwrap_or(0);
        check_lengths(&space, end)?;
        let version = |(record, extent): (&TensorRecord, Extent)| {
            let bytes = usize::try_from(record.length).unwrap_or(usize::MAX);
            (record.name.clone(), Version { extent, bytes, checksum: record.checksum })
        };
        let tensors = tensors.map(version).collect();
        let (snapshot, Manifest { meta, generation, .. }) = (snapshot.map(str::to_owned), manifest);
        Ok(Self { space, home, snapshot, meta, generation, tensors, _locked: Vec::new() })
    }

    /// What was committed with the tensors.
    pub fn meta(&self) -> &serde_json::Value {
        &self.meta
    }

    /// Number of the commit.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The store's home.
    pub fn path(&self) -> &Path {
        &self.home
    }

    /// What a user may want to know about the data files: why one is not read directly, say.
    pub fn note(&self) -> Option<String> {
        self.space.note()
    }

    /// Length of a tensor, in bytes.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when there is none of this name.
    pub fn bytes(&self, tensor: &str) -> Result<usize, StoreError> {
        self.version(tensor).map(|version| version.bytes)
    }

    /// Starts reading a tensor into a block of its length, behind everything that is urgent.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::WrongLength`].
    pub fn load(&self, tensor: &str, block: Block) -> Result<ViewLoading<'_>, StoreError> {
        let version = self.version(tensor)?;
        let tensor = tensor.to_owned();
        if version.bytes != block.len() {
            return Err(StoreError::WrongLength { tensor, expected: version.bytes, found: block.len() });
        }
        let ticket = self.space.read(version.extent.offset, block, Priority::Background);
        Ok(ViewLoading { view: self, tensor, version, ticket })
    }

    fn version(&self, tensor: &str) -> Result<Version, StoreError> {
        let missing = || StoreError::Missing { tensor: tensor.to_owned(), path: self.home.clone() };
        self.tensors.get(tensor).copied().ok_or_else(missing)
    }

    /// Why the bytes are others than those that were stored.
    fn lost(&self, tensor: String, version: Version, found: u64) -> StoreError {
        // Without the snapshot its owner may put other tensors there.
        if let Some(name) = &self.snapshot {
            match Store::snapshot_of(&self.home, name) {
                Err(gone @ StoreError::NoSnapshot { .. }) => return gone,
                Ok(other) if other.generation != self.generation => {
                    return StoreError::SnapshotReplaced { name: name.clone(), path: self.home.clone() };
                }
                Ok(_) | Err(_) => {}
            }
        }
        let (path, offset) = begin_of(&self.space, version.extent.offset);
        let Version { bytes: length, checksum: expected, .. } = version;
        StoreError::Corrupt { tensor, path, offset, length, expected, found }
    }
}

impl ViewLoading<'_> {
    /// Waits for the bytes and compares their checksum with what was stored.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`], [`StoreError::Transfer`]; when the bytes are others because the snapshot was deleted,
    /// [`StoreError::NoSnapshot`], or [`StoreError::SnapshotReplaced`] if there is another one of its name.
    pub fn wait(self) -> Result<Block, StoreError> {
        let Self { view, tensor, version, ticket } = self;
        let block = match ticket.wait() {
            Ok(block) => block,
            Err(failed) => return Err(StoreError::Transfer { tensor, source: failed.error }),
        };
        let found = checksum(&block);
        if found == version.checksum { Ok(block) } else { Err(view.lost(tensor, version, found)) }
    }
}

impl Store {
    /// A snapshot of the store in `path`, whoever has it open.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::SnapshotName`], [`StoreError::Manifest`], [`StoreError::Directory`].
    pub fn snapshot_of(path: &Path, name: &str) -> Result<Manifest, StoreError> {
        snapshot::check_name(name)?;
        let store = directory::read_label(path).map(|(store, _)| store);
        snapshot::get(path, name, store)
    }
}

fn home(volumes: &[Volume]) -> Result<&Path, StoreError> {
    let none = IoError::Config { field: "volumes", value: 0, requirement: "at least 1" };
    volumes.first().map(|home| &*home.directory).ok_or(StoreError::Io(none))
}
