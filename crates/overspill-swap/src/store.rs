//! The store: data files of extents, and a manifest that says what they mean.
//!
//! A store knows, for every tensor, its name, its extent, and whether the extent holds the bytes whose checksum it
//! remembers. Tensors themselves are the values of [`crate::tensor`]; they ask the store for their extent when they
//! move, and tell it what became of it. All data files are preallocated at creation, so a disk that is too full
//! is found before anything depends on it.
//!
//! The extents lie in one space of bytes over all volumes. The first volume's directory is the store's home, with the
//! manifest in it; the others hold data files only. A volume that fails fails the tensors that have bytes there.
//!
//! [`Store::commit`] writes down the state that storage holds. A store that is dropped removes its directories, unless
//! [`Store::keep`] was called.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use overspill_io::{Engine, EngineStats, IoError, Lane, Space, Stripes};
use rustix::fs::{Mode, OFlags};

use crate::directory::{self, Directory, MANIFEST, MANIFEST_NEW};
use crate::error::StoreError;
use crate::extent::{EXTENT_ALIGNMENT, Extent, Extents};
use crate::manifest::{LaneRecord, Manifest, TensorRecord};
use crate::tensor::Vacant;
use crate::volume::{self, Volume};

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
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    extents: Extents,
    entries: Vec<Entry>,
    names: HashSet<String>,
    poisoned: bool,
}

#[derive(Debug)]
struct Entry {
    name: String,
    bytes: usize,
    extent: Extent,
    contents: Contents,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug)]
enum Contents {
    /// Nothing that anybody may read.
    Nothing,
    /// Something between the old and the new: a write is under way, failed, or was not waited for.
    Unknown,
    /// The bytes with this checksum.
    Stored { checksum: u64 },
}

/// Names one tensor of one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(usize);

/// How much of a store is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes their extents take.
    pub allocated_bytes: u64,
    /// Bytes of the data file.
    pub capacity_bytes: u64,
}

impl Store {
    /// Creates the directory `path` (its parent must exist), locks it, and preallocates `capacity_bytes` of data.
    ///
    /// # Errors
    /// [`StoreError::Locked`] or [`StoreError::Leftover`] when the directory exists, [`StoreError::NoSpace`] when
    /// the file system is too full, [`StoreError::Directory`] and [`StoreError::Io`] for anything else the system
    /// refuses. Nothing is left behind then.
    pub fn create(path: &Path, capacity_bytes: u64, engine: &Engine) -> Result<Self, StoreError> {
        let volume = Volume { directory: path.to_owned(), engines: vec![engine.clone()], weight: 1 };
        Self::create_over(&[volume], capacity_bytes)
    }

    /// As [`Store::create`], with the data spread over several volumes in proportion to their weights. The first one
    /// is the store's home.
    ///
    /// # Errors
    /// As [`Store::create`], naming the volume; [`IoError::Config`] for no volumes, and for one without engines or
    /// weight.
    pub fn create_over(volumes: &[Volume], capacity_bytes: u64) -> Result<Self, StoreError> {
        let weights = volume::lane_weights(volumes)?;
        let shares: Vec<_> = volumes.iter().map(|volume| (&*volume.directory, volume.weight)).collect();
        Self::check_over(&shares, capacity_bytes)?;
        let capacity = capacity_bytes.next_multiple_of(EXTENT_ALIGNMENT);
        let create = |volume: &Volume| Directory::create(&volume.directory, volume.engines.len());
        let mut others = volumes.iter().map(create).collect::<Result<Vec<_>, _>>()?;
        let mut lanes = Vec::with_capacity(weights.len());
        let rings = volumes.iter().zip(&others).flat_map(|(volume, directory)| {
            volume.engines.iter().enumerate().map(|(ring, engine)| (engine, directory.data(ring)))
        });
        for ((engine, path), weight) in rings.zip(weights) {
            lanes.push(Lane { engine: engine.clone(), file: engine.create(&path)?, weight });
        }
        let space = Space::new(lanes, Stripes::BYTES_DEFAULT)?;
        space.allocate(capacity)?;
        for directory in &others {
            directory.sync().map_err(|source| failed("flush", directory.path(), source))?;
        }
        let home = others.remove(0);
        let table = Table {
            extents: Extents::new(capacity),
            entries: Vec::new(),
            names: HashSet::new(),
            poisoned: false,
        };
        Ok(Self { inner: Arc::new(Inner { space, others, home, table: Mutex::new(table) }) })
    }

    /// Finds out, without making anything, what [`Store::create`] would refuse: a directory in the way, a parent that
    /// is none, a file system that is too full.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn check(path: &Path, capacity_bytes: u64) -> Result<(), StoreError> {
        Self::check_over(&[(path, 1)], capacity_bytes)
    }

    /// As [`Store::check`], for the directories and weights of several volumes. Those on one file system are asked
    /// for together.
    ///
    /// # Errors
    /// As [`Store::create_over`].
    pub fn check_over(volumes: &[(&Path, u32)], capacity_bytes: u64) -> Result<(), StoreError> {
        let capacity = capacity_bytes.next_multiple_of(EXTENT_ALIGNMENT);
        let stripes = volume::stripes(volumes.iter().map(|&(_, weight)| weight.into()))?;
        let mut claims: Vec<(u64, u64)> = Vec::with_capacity(volumes.len());
        for (index, &(path, _)) in volumes.iter().enumerate() {
            Directory::check_free(path)?;
            let parent = directory::parent(path);
            let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
            let (space, device) = rustix::fs::open(parent, flags, Mode::empty())
                .and_then(|parent| Ok((rustix::fs::fstatvfs(&parent)?, rustix::fs::fstat(&parent)?.st_dev)))
                .map_err(|errno| failed("create", path, errno.into()))?;
            claims.push((device, stripes.lane_bytes(index, capacity)));
            let needed = claims.iter().filter(|claim| claim.0 == device).map(|claim| claim.1).sum();
            let available = space.f_bavail.saturating_mul(space.f_frsize);
            if available < needed {
                return Err(StoreError::NoSpace { path: parent.to_owned(), needed, available });
            }
        }
        Ok(())
    }

    /// The bytes that `tensors` of these lengths take in a data file.
    pub fn capacity_for(lengths: impl IntoIterator<Item = usize>) -> u64 {
        lengths.into_iter().map(|bytes| (bytes.max(1) as u64).next_multiple_of(EXTENT_ALIGNMENT)).sum()
    }

    /// Reserves room for a new tensor of `bytes` bytes.
    ///
    /// # Errors
    /// [`StoreError::Full`] when no free range is long enough, [`StoreError::DuplicateName`].
    pub fn reserve(&self, name: impl Into<String>, bytes: usize) -> Result<Vacant, StoreError> {
        let name = name.into();
        let mut table = self.table();
        if table.names.contains(&name) {
            return Err(StoreError::DuplicateName { tensor: name, path: self.path().to_owned() });
        }
        let extent = match table.extents.allocate(bytes as u64) {
            Ok(extent) => extent,
            Err(source) => return Err(StoreError::Full { tensor: name, path: self.data_path(), source }),
        };
        let key = Key(table.entries.len());
        table.names.insert(name.clone());
        table.entries.push(Entry { name, bytes, extent, contents: Contents::Nothing });
        Ok(Vacant::new(self.clone(), key))
    }

    /// Makes the state that is on storage durable and writes the manifest of it.
    ///
    /// # Errors
    /// [`StoreError::Unfinished`] when a write was not waited for or failed; the manifest of the last commit is in
    /// place then. [`StoreError::Io`] and [`StoreError::Directory`] when the system could not make something durable:
    /// which of the two manifests survives a loss of power is unknown then, and every later commit is
    /// [`StoreError::Poisoned`].
    pub fn commit(&self) -> Result<(), StoreError> {
        let mut table = self.table();
        if table.poisoned {
            return Err(StoreError::Poisoned { path: self.data_path() });
        }
        let manifest = Manifest {
            stripe_bytes: Stripes::BYTES_DEFAULT,
            lanes: self.lane_records(),
            tensors: table.tensors()?,
        };
        let flushed = self.inner.space.sync().map_err(StoreError::from);
        let committed = flushed.and_then(|()| self.write_manifest(&manifest.encode()));
        table.poisoned = committed.is_err();
        committed
    }

    /// Leaves the directories on storage when the store is dropped.
    pub fn keep(&self) {
        let Inner { home, others, .. } = &*self.inner;
        others.iter().chain([home]).for_each(Directory::keep);
    }

    /// The store's home.
    pub fn path(&self) -> &Path {
        self.inner.home.path()
    }

    /// What a user may want to know about the data files: why one is not written directly, say.
    pub fn note(&self) -> Option<String> {
        self.inner.space.note()
    }

    /// What was moved so far; see [`Space::stats`].
    pub fn stats(&self) -> EngineStats {
        self.inner.space.stats()
    }

    /// How much is in use.
    pub fn usage(&self) -> Usage {
        let table = self.table();
        Usage {
            tensors: table.entries.len(),
            allocated_bytes: table.extents.capacity() - table.extents.free_bytes(),
            capacity_bytes: table.extents.capacity(),
        }
    }

    /// The manifest is written aside, made durable and renamed: a reader finds the old one or the new one.
    fn write_manifest(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let aside = self.path().join(MANIFEST_NEW);
        let write = || -> io::Result<()> {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&aside, self.path().join(MANIFEST))?;
            self.inner.home.sync()
        };
        write().map_err(|source| failed("write", &aside, source))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code panics between two changes that belong together, so a poisoned lock guards a whole table.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The home's first data file.
    fn data_path(&self) -> PathBuf {
        self.inner.home.data(0)
    }

    fn lane_records(&self) -> Vec<LaneRecord> {
        let record = |lane: &Lane| {
            let path = lane.file.path();
            let file = path.strip_prefix(self.path()).unwrap_or(path).to_string_lossy().into_owned();
            LaneRecord { file, weight: lane.weight }
        };
        self.inner.space.lanes().iter().map(record).collect()
    }

    /// The data file that an extent begins in, and where in it.
    fn begin(&self, extent: Extent) -> (PathBuf, u64) {
        let space = &self.inner.space;
        let mut pieces = space.stripes().pieces(extent.offset, EXTENT_ALIGNMENT as usize);
        let piece = pieces.next().expect("an extent has a first byte");
        (space.lanes()[piece.lane].file.path().to_owned(), piece.offset)
    }
}

/// What the tensor states need.
impl Store {
    pub(crate) fn space(&self) -> &Space {
        &self.inner.space
    }

    pub(crate) fn name(&self, key: Key) -> String {
        self.table().entries[key.0].name.clone()
    }

    /// Length of the tensor, in bytes.
    pub(crate) fn bytes(&self, key: Key) -> usize {
        self.table().entries[key.0].bytes
    }

    pub(crate) fn extent(&self, key: Key) -> Extent {
        self.table().entries[key.0].extent
    }

    /// A write to the extent begins: until it is known to have succeeded, the extent holds nothing certain.
    pub(crate) fn begin_write(&self, key: Key) -> Extent {
        let entry = &mut self.table().entries[key.0];
        entry.contents = Contents::Unknown;
        entry.extent
    }

    /// The write succeeded.
    pub(crate) fn end_write(&self, key: Key, checksum: u64) {
        self.table().entries[key.0].contents = Contents::Stored { checksum };
    }

    /// Compares what was read with what was stored.
    pub(crate) fn verify(&self, key: Key, found: u64) -> Result<(), StoreError> {
        let table = self.table();
        let entry = &table.entries[key.0];
        match entry.contents {
            Contents::Stored { checksum } if checksum == found => Ok(()),
            Contents::Stored { checksum: expected } => {
                let (tensor, length) = (entry.name.clone(), entry.bytes);
                let (path, offset) = self.begin(entry.extent);
                Err(StoreError::Corrupt { tensor, path, offset, length, expected, found })
            }
            Contents::Nothing | Contents::Unknown => {
                Err(StoreError::Unfinished { tensor: entry.name.clone() })
            }
        }
    }

    pub(crate) fn transfer_error(&self, key: Key, source: IoError) -> StoreError {
        StoreError::Transfer { tensor: self.name(key), source }
    }
}

impl Table {
    fn tensors(&self) -> Result<Vec<TensorRecord>, StoreError> {
        let mut tensors = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            match entry.contents {
                Contents::Nothing => {}
                Contents::Unknown => return Err(StoreError::Unfinished { tensor: entry.name.clone() }),
                Contents::Stored { checksum } => tensors.push(TensorRecord {
                    name: entry.name.clone(),
                    offset: entry.extent.offset,
                    length: entry.bytes as u64,
                    checksum,
                }),
            }
        }
        Ok(tensors)
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Directory { action, path: path.to_owned(), source }
}
