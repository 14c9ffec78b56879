//! Making, opening and restoring stores: directories, locks, data files, and the manifest that says what they hold.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use overspill_io::{Engine, File, IoError, Lane, Space, Stripes};
use rustix::fs::{Mode, OFlags};

use super::{Inner, Standing, State, Store};
use crate::directory::{self, Directory, MANIFEST, MANIFEST_PREVIOUS, VOLUME};
use crate::error::{Remedy, StoreError};
use crate::extent::EXTENT_ALIGNMENT;
use crate::ledger::{Conflict, Durability, Ledger};
use crate::manifest::{Manifest, ManifestError};
use crate::snapshot::{self, Snapshot};
use crate::survey::is_store;
use crate::volume::{self, Volume};

impl Store {
    /// Creates the directory `path` (its parent must exist), locks it, and preallocates `capacity_bytes` of data.
    ///
    /// # Errors
    /// [`StoreError::Locked`] or [`StoreError::Leftover`] when the directory exists, [`StoreError::NoSpace`] when
    /// the file system is too full, [`StoreError::Directory`] and [`StoreError::Io`] for anything else the system
    /// refuses. Nothing is left behind then.
    pub fn create(
        path: &Path,
        durability: Durability,
        capacity_bytes: u64,
        engine: &Engine,
    ) -> Result<Self, StoreError> {
        Self::create_over(&[Volume::single(path, engine)], durability, capacity_bytes)
    }

    /// As [`Store::create`], with the data spread over several volumes in proportion to their weights. The first one
    /// is the store's home.
    ///
    /// # Errors
    /// As [`Store::create`], naming the volume; [`IoError::Config`] for no volumes, and for one without engines or
    /// weight.
    pub fn create_over(
        volumes: &[Volume],
        durability: Durability,
        capacity_bytes: u64,
    ) -> Result<Self, StoreError> {
        let weights = volume::lane_weights(volumes)?;
        let shares: Vec<_> = volumes.iter().map(|volume| (&*volume.directory, volume.weight)).collect();
        Self::check_over(&shares, capacity_bytes)?;
        let capacity_bytes = aligned(capacity_bytes);
        let identity = RandomState::new().build_hasher().finish().max(1);
        let create = |(index, volume): (usize, &Volume)| {
            let label = directory::label(identity, index);
            Directory::create(&volume.directory, volume.engines.len(), &label)
        };
        let directories = volumes.iter().enumerate().map(create).collect::<Result<Vec<_>, _>>()?;
        let mut lanes = Vec::with_capacity(weights.len());
        for ((engine, path), weight) in volumes.iter().flat_map(Volume::data_files).zip(weights) {
            lanes.push(Lane { engine: engine.clone(), file: engine.create(&path)?, weight });
        }
        let space = Space::new(lanes, Stripes::BYTES_DEFAULT)?;
        space.allocate(capacity_bytes)?;
        for directory in &directories {
            let flushed = directory.sync_names();
            flushed.map_err(|source| StoreError::directory("flush", directory.path(), source))?;
        }
        let ledger = Ledger::new(durability, capacity_bytes);
        let manifest = Manifest { store: identity, ..Manifest::default() };
        Ok(Self::over(space, directories, ledger, (Vec::new(), false), &manifest, Standing::Nothing))
    }

    /// Opens the directory of a process that has ended, at its last commit; snapshots included.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when its owner lives, [`StoreError::NothingCommitted`] when there is no manifest,
    /// [`StoreError::Manifest`] when it, or a snapshot's, is damaged or of an unknown version,
    /// [`StoreError::Truncated`] when a data file is shorter than the manifest says, [`StoreError::Volumes`] when the
    /// state lies in more data files than one, [`StoreError::Directory`] and [`StoreError::Io`] for what the system
    /// refuses. Nothing is changed then.
    pub fn open(path: &Path, durability: Durability, engine: &Engine) -> Result<Self, StoreError> {
        Self::open_over(&[Volume::single(path, engine)], durability)
    }

    /// As [`Store::open`], with all volumes in the order in which they were created, and as many engines for each as it
    /// has data files. The weights are those of the manifest.
    ///
    /// # Errors
    /// As [`Store::open`], naming the volume; [`StoreError::ForeignVolume`] when one is another store's, or in another's
    /// place.
    pub fn open_over(volumes: &[Volume], durability: Durability) -> Result<Self, StoreError> {
        Self::open_held(open_all(volumes)?, volumes, durability)
    }

    /// As [`Store::open_over`], with the directories of the volumes, which are held locked already.
    pub(crate) fn open_held(
        directories: Vec<Directory>,
        volumes: &[Volume],
        durability: Durability,
    ) -> Result<Self, StoreError> {
        let path = volumes.first().map_or(Path::new(""), |home| &home.directory);
        let manifest_path = path.join(MANIFEST);
        let manifest = Self::committed(path)?;
        let space = space_over(volumes, &manifest, &manifest_path, Engine::open)?;
        let (snapshots, foreign) = snapshot::list(path, Some(manifest.store))?;
        // The data files grow and never shrink; a restored snapshot knows only how long they were then.
        let capacities = snapshots.iter().map(|snapshot| snapshot.manifest.capacity());
        let capacity_bytes = capacities.fold(manifest.capacity(), u64::max);
        check_lengths(&space, capacity_bytes)?;
        let contradicts = |path: PathBuf| {
            |Conflict { tensor }| {
                let reason = format!("tensor {tensor} has bytes of another");
                StoreError::Manifest {
                    path,
                    source: ManifestError::Malformed { reason },
                    remedy: Remedy::None,
                }
            }
        };
        let mut ledger = Ledger::restore(durability, capacity_bytes, &manifest.tensors)
            .map_err(contradicts(manifest_path))?;
        for Snapshot { name, manifest: pinned } in snapshots {
            let path = snapshot::path(path, &name);
            check_dealt_alike(&path, &pinned, &manifest)?;
            ledger.pin(&name, &pinned.tensors).map_err(contradicts(path))?;
        }
        for directory in &directories {
            directory.sign()?;
        }
        let relabeled = repair_label(&directories[0], manifest.store);
        let standing = Standing::Committed { meta: manifest.meta.clone() };
        let notes = (foreign, relabeled);
        Ok(Self::over(space, directories, ledger, notes, &manifest, standing))
    }

    /// What was committed to the store in `path`, whoever has it open.
    ///
    /// # Errors
    /// [`StoreError::NothingCommitted`], [`StoreError::ManifestLost`] when only earlier generations or snapshots are
    /// left, [`StoreError::Misplaced`] for a volume that is not the home; [`StoreError::Manifest`],
    /// [`StoreError::Directory`].
    pub fn committed(path: &Path) -> Result<Manifest, StoreError> {
        match directory::read_manifest(&path.join(MANIFEST)) {
            Err(StoreError::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(without_manifest(path))
            }
            Err(StoreError::Manifest { path: manifest, source, .. }) => {
                let remedy = Remedy::for_manifest(&source, || {
                    let previous = directory::read_manifest(&path.join(MANIFEST_PREVIOUS));
                    previous.map_or(Remedy::None, |_| Remedy::RestorePrevious { path: path.to_owned() })
                });
                Err(StoreError::Manifest { path: manifest, source, remedy })
            }
            read => read,
        }
    }

    /// Number of data files in a volume's directory; 0 if there is no such directory.
    pub fn data_files(directory: &Path) -> usize {
        (0..).take_while(|&number| directory.join(directory::data_name(number)).exists()).count()
    }

    /// Makes a snapshot the current generation of a store that nobody has open. The snapshot stays.
    ///
    /// # Errors
    /// As [`Store::open`], and [`StoreError::NoSnapshot`].
    pub fn restore(path: &Path, snapshot: &str) -> Result<(), StoreError> {
        snapshot::check_name(snapshot)?;
        let directory = Directory::open(path, 0)?;
        let store = directory::read_label(path).map(|(store, _)| store);
        Self::make_current(&directory, snapshot::get(path, snapshot, store)?).map(drop)
    }

    /// Makes the generation before the last commit the current one again, of a store that nobody has open: what it
    /// has lost since shows when it is verified.
    ///
    /// # Errors
    /// As [`Store::open`], and [`StoreError::NoPrevious`].
    pub fn restore_previous(path: &Path) -> Result<(), StoreError> {
        let directory = Directory::open(path, 0)?;
        let manifest = match directory::read_manifest(&path.join(MANIFEST_PREVIOUS)) {
            Err(StoreError::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NoPrevious { path: path.to_owned() });
            }
            read => read?,
        };
        Self::make_current(&directory, manifest).map(drop)
    }

    /// Commits the generation that a manifest describes once more, under a number of its own, which is returned.
    pub(crate) fn make_current(directory: &Directory, mut next: Manifest) -> Result<u64, StoreError> {
        // The one that is current now may be what is damaged.
        let current = directory::read_manifest(&directory.path().join(MANIFEST));
        let (generation, bytes_written) =
            current.map_or((0, 0), |current| (current.generation, current.bytes_written));
        next.generation = generation.max(next.generation).saturating_add(1);
        // What was written since wore the drives, too.
        next.bytes_written = bytes_written.max(next.bytes_written);
        directory.sign()?;
        directory.publish(&next.encode())?;
        Ok(next.generation)
    }

    fn over(
        space: Space,
        mut directories: Vec<Directory>,
        ledger: Ledger,
        (foreign, relabeled): (Vec<String>, bool),
        manifest: &Manifest,
        standing: Standing,
    ) -> Self {
        let &Manifest { store, generation, bytes_written, .. } = manifest;
        let (claimed, names_unknown) = (HashSet::new(), false);
        let state = State { ledger, claimed, standing, store, generation, bytes_written, names_unknown };
        let home = directories.remove(0);
        let (others, state) = (directories, Mutex::new(state));
        Self { inner: Arc::new(Inner { space, others, home, foreign, relabeled, state }) }
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
        let capacity = aligned(capacity_bytes);
        let stripes = volume::stripes(volumes.iter().map(|&(_, weight)| weight.into()))?;
        let mut claims: Vec<(u64, u64)> = Vec::with_capacity(volumes.len());
        for (index, &(path, _)) in volumes.iter().enumerate() {
            Directory::check_free(path).map_err(with_flaw)?;
            let parent = directory::parent(path);
            let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
            let (space, device) = rustix::fs::open(parent, flags, Mode::empty())
                .and_then(|parent| Ok((rustix::fs::fstatvfs(&parent)?, rustix::fs::fstat(&parent)?.st_dev)))
                .map_err(|errno| StoreError::directory("create", path, errno.into()))?;
            claims.push((device, stripes.lane_bytes(index, capacity)));
            let needed = claims
                .iter()
                .filter(|claim| claim.0 == device)
                .fold(0_u64, |sum, claim| sum.saturating_add(claim.1));
            let available = space.f_bavail.saturating_mul(space.f_frsize);
            if available < needed {
                return Err(StoreError::NoSpace { path: parent.to_owned(), needed, available });
            }
        }
        Ok(())
    }
}

/// The space over the data files of all volumes, as a manifest deals it to them; the files are opened by `open`.
///
/// # Errors
/// [`StoreError::Volumes`] and [`StoreError::ForeignVolume`] when these are not the volumes that it means.
pub(crate) fn space_over(
    volumes: &[Volume],
    manifest: &Manifest,
    manifest_path: &Path,
    open: impl Fn(&Engine, &Path) -> Result<File, IoError>,
) -> Result<Space, StoreError> {
    let files: Vec<(&Engine, PathBuf)> = volumes.iter().flat_map(Volume::data_files).collect();
    if manifest.lanes.len() != files.len() {
        return Err(other_files(manifest, manifest_path, files.len()));
    }
    for (index, Volume { directory, .. }) in volumes.iter().enumerate() {
        if manifest.store == 0 {
            continue;
        }
        let (path, home) = (directory.clone(), volumes[0].directory.clone());
        match directory::read_label(directory) {
            Some(label) if label == (manifest.store, index) => {}
            Some(_) => return Err(StoreError::ForeignVolume { path, home }),
            // Whoever has the manifest is the home.
            None if index == 0 => {}
            None => {
                let (path, text) = (path.join(VOLUME), directory::label(manifest.store, index));
                return Err(StoreError::Label { path, home, number: index + 1, text });
            }
        }
    }
    let mut lanes = Vec::with_capacity(files.len());
    for ((engine, path), record) in files.into_iter().zip(&manifest.lanes) {
        lanes.push(Lane { engine: engine.clone(), file: open(engine, &path)?, weight: record.weight });
    }
    Ok(Space::new(lanes, manifest.stripe_bytes)?)
}

/// Locks the directories of a store.
///
/// # Errors
/// [`StoreError::GivenTwice`], and those of [`Directory::open`].
pub(crate) fn open_all(volumes: &[Volume]) -> Result<Vec<Directory>, StoreError> {
    let mut seen = HashSet::new();
    for Volume { directory, .. } in volumes {
        // What is not there is said when it is opened.
        let is_new = std::fs::canonicalize(directory).map_or(true, |real| seen.insert(real));
        if !is_new {
            return Err(StoreError::GivenTwice { path: directory.clone() });
        }
    }
    volumes.iter().map(|volume| Directory::open(&volume.directory, volume.engines.len())).collect()
}

/// Writes the label of a home anew if it cannot be read: it follows from the manifest. Whether it could not be read.
pub(crate) fn repair_label(home: &Directory, store: u64) -> bool {
    if store == 0 || directory::read_label(home.path()).is_some() {
        return false;
    }
    // Nothing depends on it as long as the manifest can be read.
    drop(home.relabel(&directory::label(store, 0)));
    true
}

/// Why there is no manifest in a directory, and what there is instead.
fn without_manifest(path: &Path) -> StoreError {
    let label = directory::read_label(path);
    if let Some((_, index)) = label.filter(|&(_, index)| index > 0) {
        return StoreError::Misplaced { path: path.to_owned(), number: index + 1 };
    }
    let store = label.map(|(store, _)| store);
    let known = snapshot::known(path, store).unwrap_or_default();
    let previous = path.join(MANIFEST_PREVIOUS);
    if known.is_empty() && std::fs::symlink_metadata(&previous).is_err() {
        return StoreError::NothingCommitted { path: path.to_owned() };
    }
    let newest = known
        .into_iter()
        .filter_map(|name| Some((snapshot::get(path, &name, store).ok()?.generation, name)))
        .max();
    let remedy = match (directory::read_manifest(&previous), newest) {
        (Ok(_), _) => Remedy::RestorePrevious { path: path.to_owned() },
        (Err(_), Some((_, name))) => Remedy::RestoreSnapshot { path: path.to_owned(), name },
        (Err(_), None) => Remedy::Verify { path: path.to_owned() },
    };
    StoreError::ManifestLost { path: path.join(MANIFEST), remedy }
}

/// Says of a store that is in the way why it cannot be gone on from, if it cannot.
fn with_flaw(error: StoreError) -> StoreError {
    match error {
        StoreError::Leftover { path, .. } if is_store(&path) => {
            let flaw = Store::committed(&path).err().map(Box::new);
            StoreError::Leftover { path, flaw }
        }
        error => error,
    }
}

/// Says that a manifest is about other data files than the `found` ones.
pub(crate) fn other_files(manifest: &Manifest, manifest_path: &Path, found: usize) -> StoreError {
    let files = manifest.lanes.iter().map(|lane| lane.file.clone()).collect();
    StoreError::Volumes { path: manifest_path.to_owned(), files, found }
}

/// Whether the data files are as long as a space of so many bytes.
pub(crate) fn check_lengths(space: &Space, capacity_bytes: u64) -> Result<(), StoreError> {
    for (index, lane) in space.lanes().iter().enumerate() {
        let needed = space.stripes().lane_bytes(index, capacity_bytes);
        check_length(lane.file.path(), lane.file.len()?, needed)?;
    }
    Ok(())
}

/// Whether a data file is as long as it has to be.
pub(crate) fn check_length(path: &Path, length: u64, needed: u64) -> Result<(), StoreError> {
    if length >= needed {
        Ok(())
    } else {
        Err(StoreError::Truncated { path: path.to_owned(), length, needed })
    }
}

/// A snapshot's offsets mean something only in the space of the current generation.
pub(crate) fn check_dealt_alike(path: &Path, other: &Manifest, current: &Manifest) -> Result<(), StoreError> {
    let weights = |manifest: &Manifest| -> Vec<_> { manifest.lanes.iter().map(|lane| lane.weight).collect() };
    if (other.stripe_bytes, weights(other)) == (current.stripe_bytes, weights(current)) {
        return Ok(());
    }
    let source = ManifestError::Malformed { reason: "its bytes are dealt to other data files".to_owned() };
    Err(StoreError::Manifest { path: path.to_owned(), source, remedy: Remedy::None })
}

/// More than any file can have stays more than that.
fn aligned(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(EXTENT_ALIGNMENT).unwrap_or(u64::MAX - u64::MAX % EXTENT_ALIGNMENT)
}
