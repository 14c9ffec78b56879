//! The store: one directory with a data file of extents and a manifest that says what they mean.
//!
//! A store knows, for every tensor, its name, its extent, and whether the extent holds the bytes whose checksum it
//! remembers. Tensors themselves are the values of [`crate::tensor`]; they ask the store for their extent when they
//! move, and tell it what became of it. The whole data file is preallocated at creation, so a disk that is too full
//! is found before anything depends on it.
//!
//! [`Store::commit`] writes down the state that storage holds. A store that is dropped removes its directory, unless
//! [`Store::keep`] was called.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use overspill_io::{Engine, File, IoError};
use rustix::fs::{Mode, OFlags};

use crate::directory::{self, DATA, Directory, MANIFEST, MANIFEST_NEW};
use crate::error::StoreError;
use crate::extent::{EXTENT_ALIGNMENT, Extent, Extents};
use crate::manifest::{Manifest, TensorRecord};
use crate::tensor::Vacant;

/// Tensors on storage. A handle: clones share one store.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    // Closed before the directory goes.
    engine: Engine,
    data: File,
    directory: Directory,
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
        Self::check(path, capacity_bytes)?;
        let directory = Directory::create(path)?;
        let capacity = capacity_bytes.next_multiple_of(EXTENT_ALIGNMENT);
        let data = engine.create(&path.join(DATA))?;
        data.allocate(capacity)?;
        directory.sync().map_err(|source| failed("flush", path, source))?;
        let table = Table {
            extents: Extents::new(capacity),
            entries: Vec::new(),
            names: HashSet::new(),
            poisoned: false,
        };
        let inner = Inner { engine: engine.clone(), data, directory, table: Mutex::new(table) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Finds out, without making anything, what [`Store::create`] would refuse: a directory in the way, a parent that
    /// is none, a file system that is too full.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn check(path: &Path, capacity_bytes: u64) -> Result<(), StoreError> {
        Directory::check_free(path)?;
        let needed = capacity_bytes.next_multiple_of(EXTENT_ALIGNMENT);
        let parent = directory::parent(path);
        let stat =
            rustix::fs::open(parent, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())
                .and_then(rustix::fs::fstatvfs)
                .map_err(|errno| failed("create", path, errno.into()))?;
        let available = stat.f_bavail.saturating_mul(stat.f_frsize);
        if available < needed {
            return Err(StoreError::NoSpace { path: parent.to_owned(), needed, available });
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
        let manifest = table.manifest()?;
        let flushed = self.inner.data.sync().map_err(StoreError::from);
        let committed = flushed.and_then(|()| self.write_manifest(&manifest.encode()));
        table.poisoned = committed.is_err();
        committed
    }

    /// Leaves the directory on storage when the store is dropped.
    pub fn keep(&self) {
        self.inner.directory.keep();
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        self.inner.directory.path()
    }

    /// What a user may want to know about the data file: why it is not written directly, say.
    pub fn note(&self) -> Option<&str> {
        self.inner.data.note()
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
            self.inner.directory.sync()
        };
        write().map_err(|source| failed("write", &aside, source))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code panics between two changes that belong together, so a poisoned lock guards a whole table.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data_path(&self) -> PathBuf {
        self.path().join(DATA)
    }
}

/// What the tensor states need.
impl Store {
    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(crate) fn data(&self) -> &File {
        &self.inner.data
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
            Contents::Stored { checksum: expected } => Err(StoreError::Corrupt {
                tensor: entry.name.clone(),
                path: self.data_path(),
                offset: entry.extent.offset,
                length: entry.bytes,
                expected,
                found,
            }),
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
    fn manifest(&self) -> Result<Manifest, StoreError> {
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
        Ok(Manifest { tensors })
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Directory { action, path: path.to_owned(), source }
}
