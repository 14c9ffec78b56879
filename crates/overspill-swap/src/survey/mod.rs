//! Looking at stores from outside.
//!
//! ```text
//! Survey       whoever has the store open; reads manifests and lengths     ──► what is there, damage included
//! Examination  holds the lock; reads every byte that a generation names    ──► what is whole; makes one the current one
//! leftovers    directories of stores that nobody has open                  ──► what may go; removes it by name
//! ```
//!
//! A survey changes nothing and takes no lock for longer than it takes to see whether somebody has it. What cannot be
//! read is a finding, not a failure: the only error is that there is no store.

mod examination;
mod leftovers;
mod reading;

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use overspill_io::Stripes;

pub use self::examination::{Damage, Damaged, Examination, Findings, Scope, Verdict};
pub use self::leftovers::{Leftover, Remains, Removal, Removed, leftovers, remove_leftover};
pub use self::reading::Blocks;
pub(crate) use self::reading::{Read, read_extents};
use crate::directory::{self, MANIFEST, MANIFEST_PREVIOUS, Owner};
use crate::error::StoreError;
use crate::extent::Extent;
use crate::manifest::{Manifest, TensorRecord};
use crate::snapshot::{self, Found};
use crate::store::{Store, check_length, other_files};

/// How often a store that commits while it is looked at is looked at again.
const LOOKS_MAX: u32 = 4;

/// Bytes that the system counts allocated space in.
const SECTOR_BYTES: u64 = 512;

/// Names a generation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    /// The current one.
    Committed,
    /// The one before. What was overwritten since belongs to nobody's promise.
    Previous,
    /// One that was kept, by its name.
    Snapshot(String),
}

/// A generation, as far as it can be read.
#[derive(Debug)]
pub struct GenerationState {
    /// Which one.
    pub generation: Generation,
    /// Its manifest, if that can be read.
    pub manifest: Option<Manifest>,
    /// Why it is not whole: [`StoreError::Manifest`], [`StoreError::Truncated`], [`StoreError::Volumes`],
    /// [`StoreError::Directory`]. The bytes of the tensors are not looked at.
    pub flaw: Option<StoreError>,
}

/// One data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length, in bytes.
    pub length: u64,
    /// What it takes of its file system, in bytes.
    pub allocated_bytes: u64,
}

/// How the free space is scattered, as of the last commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragmentation {
    /// Bytes of the space that the data files make up.
    pub capacity_bytes: u64,
    /// Bytes that neither the committed generation nor a snapshot has.
    pub free_bytes: u64,
    /// Bytes of the longest free range.
    pub longest_free_bytes: u64,
    /// Number of free ranges.
    pub free_ranges: usize,
}

/// What there is of a store.
#[derive(Debug)]
pub struct Survey {
    /// The store's home.
    pub path: PathBuf,
    /// All its directories, the home first, as far as they were found.
    pub directories: Vec<PathBuf>,
    /// Who has it open.
    pub owner: Owner,
    /// The committed generation, the previous one, and the snapshots by name, as far as there are any.
    pub generations: Vec<GenerationState>,
    /// Data files, in the order of their directories.
    pub files: Vec<DataFile>,
    /// Files in the home that are named like snapshots and are none of this store.
    pub foreign: Vec<String>,
    /// How its free space is scattered.
    pub fragmentation: Fragmentation,
    /// What all its files take, in bytes.
    pub bytes_on_disk: u64,
}

impl Survey {
    /// Looks at the store whose home and further directories these are. If only the home is given, the others are
    /// looked for where its manifest says that they were.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] when the first directory is none, [`StoreError::Directory`] when it may not be read.
    pub fn of(directories: &[PathBuf]) -> Result<Self, StoreError> {
        let path = directories.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        check_store(path)?;
        let mut looks = LOOKS_MAX;
        loop {
            let survey = Self::look(path, directories);
            looks -= 1;
            // Two generations in one picture would make a third that never was.
            let number = |manifest: &Manifest| manifest.generation;
            let now = Store::committed(path).ok().map(|manifest| number(&manifest));
            if looks == 0 || survey.committed().map(number) == now {
                return Ok(survey);
            }
        }
    }

    fn look(path: &Path, directories: &[PathBuf]) -> Self {
        // A lock that cannot be opened is not held by anybody who could be asked.
        let owner = directory::owner(path).unwrap_or(Owner::Nobody);
        let (mut generations, foreign) = read_generations(path);
        let reference = generations.iter().find_map(|state| state.manifest.as_ref());
        let directories = match directories {
            [_] => reference.map_or_else(|| directories.to_vec(), |manifest| volumes_of(path, manifest)),
            several => several.to_vec(),
        };
        let files: Vec<DataFile> = directories.iter().flat_map(|directory| data_files(directory)).collect();
        for state in &mut generations {
            if let Some(manifest) = state.manifest.as_ref().filter(|_| state.flaw.is_none()) {
                state.flaw = check_files(path, manifest, &files).err();
            }
        }
        let kept = generations.iter().filter(|state| state.generation != Generation::Previous);
        let fragmentation = Fragmentation::of(kept.filter_map(|state| state.manifest.as_ref()));
        let bytes_on_disk = directories.iter().map(|directory| bytes_on_disk(directory)).sum();
        let path = path.to_owned();
        Self { path, directories, owner, generations, files, foreign, fragmentation, bytes_on_disk }
    }

    /// A generation, if there is such a one.
    pub fn generation(&self, generation: &Generation) -> Option<&GenerationState> {
        self.generations.iter().find(|state| state.generation == *generation)
    }

    /// The committed manifest, if it can be read.
    pub fn committed(&self) -> Option<&Manifest> {
        self.generation(&Generation::Committed)?.manifest.as_ref()
    }
}

impl GenerationState {
    /// Whether everything is there, as far as can be seen without reading tensors.
    pub fn is_whole(&self) -> bool {
        self.flaw.is_none()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Committed => f.write_str("the committed generation"),
            Self::Previous => f.write_str("the previous generation"),
            Self::Snapshot(name) => write!(f, "snapshot {name}"),
        }
    }
}

impl Manifest {
    /// The step that the tensors are of, if whoever committed them said so under `step`; an optimizer says it in what
    /// its user gave ([`OptimizerSwapper::commit`](crate::optimizer::OptimizerSwapper::commit)).
    pub fn step(&self) -> Option<u64> {
        let step = self.meta.get("step").or_else(|| self.meta.get("meta")?.get("step"));
        step?.as_u64()
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, tensor| sum.saturating_add(tensor.length))
    }
}

impl Fragmentation {
    /// What the manifests leave free. Versions that they share count once.
    fn of<'a>(manifests: impl Iterator<Item = &'a Manifest>) -> Self {
        let (mut capacity_bytes, mut extents) = (0, Vec::new());
        for manifest in manifests {
            capacity_bytes = manifest.capacity().max(capacity_bytes);
            extents.extend(manifest.tensors.iter().filter_map(TensorRecord::extent));
        }
        extents.sort_unstable();
        // The end of the space, as if something lay there.
        extents.push(Extent { offset: capacity_bytes, length: 0 });
        let (mut free, mut end) = (Self { capacity_bytes, ..Self::default() }, 0);
        for extent in extents {
            let gap = extent.offset.saturating_sub(end);
            if gap > 0 {
                free.free_ranges += 1;
                free.free_bytes += gap;
                free.longest_free_bytes = free.longest_free_bytes.max(gap);
            }
            end = extent.end().max(end);
        }
        free
    }

    /// Part of the free space that lies outside of the longest free range; 0 when nothing is free.
    pub fn scattered_share(&self) -> f64 {
        if self.free_bytes == 0 {
            return 0.0;
        }
        1.0 - self.longest_free_bytes as f64 / self.free_bytes as f64
    }
}

/// Whether a store was made there: a directory with a lock of ours, or with something else of a store.
pub(crate) fn is_store(path: &Path) -> bool {
    let is_directory = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let is_manifest = |name| {
        let read = directory::read_manifest(&path.join(name));
        !matches!(&read, Err(StoreError::Directory { .. })) && !is_no_manifest(&read)
    };
    is_directory
        && (directory::read_label(path).is_some()
            || [MANIFEST, MANIFEST_PREVIOUS].into_iter().any(is_manifest))
}

/// Finds out whether a store was made there.
///
/// # Errors
/// [`StoreError::Directory`] when that may not be seen, [`StoreError::NotAStore`].
pub(crate) fn check_store(path: &Path) -> Result<(), StoreError> {
    if is_store(path) {
        return Ok(());
    }
    Err(directory::denied(path).unwrap_or_else(|| StoreError::NotAStore { path: path.to_owned() }))
}

/// Whether a file was read, and was never a manifest.
fn is_no_manifest(read: &Result<Manifest, StoreError>) -> bool {
    let Err(StoreError::Manifest { source, .. }) = read else { return false };
    *source == crate::manifest::ManifestError::NotAManifest
}

/// All generations of a home, and the files that only look like snapshots.
fn read_generations(path: &Path) -> (Vec<GenerationState>, Vec<String>) {
    let state = |generation, read: Result<Manifest, StoreError>| match read {
        Ok(manifest) => GenerationState { generation, manifest: Some(manifest), flaw: None },
        Err(flaw) => GenerationState { generation, manifest: None, flaw: Some(flaw) },
    };
    let mut generations = Vec::new();
    match Store::committed(path) {
        Err(
            StoreError::NothingCommitted { .. }
            | StoreError::ManifestLost { .. }
            | StoreError::Misplaced { .. },
        ) => {}
        read => generations.push(state(Generation::Committed, read)),
    }
    match directory::read_manifest(&path.join(MANIFEST_PREVIOUS)) {
        Err(StoreError::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        read => generations.push(state(Generation::Previous, read)),
    }
    let known = generations.iter().find_map(|state| Some(state.manifest.as_ref()?.store));
    let store = known.or_else(|| directory::read_label(path).map(|(store, _)| store));
    let mut foreign = Vec::new();
    // A directory that cannot be listed has no snapshots that could be read.
    for name in snapshot::names(path).unwrap_or_default() {
        match snapshot::find(path, &name, store) {
            Ok(Found::Nothing) => {}
            Ok(Found::Foreign) => foreign.push(snapshot::file_name(&name)),
            Ok(Found::Snapshot(manifest)) => {
                generations.push(state(Generation::Snapshot(name), Ok(manifest)));
            }
            Err(error) => generations.push(state(Generation::Snapshot(name), Err(error))),
        }
    }
    (generations, foreign)
}

/// The directories of a store, as far as its manifest's paths lead to them.
fn volumes_of(home: &Path, manifest: &Manifest) -> Vec<PathBuf> {
    let mut directories = vec![home.to_owned()];
    for lane in &manifest.lanes {
        let Some(directory) = Path::new(&lane.file).parent().filter(|path| !path.as_os_str().is_empty())
        else {
            continue;
        };
        // One whose label cannot be read is shown, so that it can be named.
        let is_next = match directory::read_label(directory) {
            Some(label) => label == (manifest.store, directories.len()),
            None => directory::has_lock(directory),
        };
        if is_next && directories.last().is_some_and(|last| last != directory) {
            directories.push(directory.to_owned());
        }
    }
    directories
}

fn data_files(directory: &Path) -> Vec<DataFile> {
    let paths = (0..Store::data_files(directory)).map(|number| directory.join(directory::data_name(number)));
    let file = |path: PathBuf| {
        let metadata = std::fs::metadata(&path).ok()?;
        let allocated_bytes = metadata.blocks().saturating_mul(SECTOR_BYTES);
        Some(DataFile { path, length: metadata.len(), allocated_bytes })
    };
    paths.filter_map(file).collect()
}

/// Whether the data files are there, and as long as a generation needs them.
fn check_files(home: &Path, manifest: &Manifest, files: &[DataFile]) -> Result<(), StoreError> {
    if manifest.lanes.len() != files.len() {
        for lane in &manifest.lanes {
            let path = home.join(&lane.file);
            if let Err(source) = std::fs::metadata(&path) {
                return Err(StoreError::Directory { action: "find", path, source });
            }
        }
        return Err(other_files(manifest, &home.join(MANIFEST), files.len()));
    }
    let weights: Vec<u32> = manifest.lanes.iter().map(|lane| lane.weight).collect();
    let stripes = Stripes::new(manifest.stripe_bytes, &weights)?;
    for (lane, file) in files.iter().enumerate() {
        check_length(&file.path, file.length, stripes.lane_bytes(lane, manifest.capacity()))?;
    }
    Ok(())
}

/// What the files in a store's directory take; a file with two names counts once.
fn bytes_on_disk(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut seen = HashSet::new();
    let files = entries.filter_map(|entry| entry.metadata().ok()).filter(std::fs::Metadata::is_file);
    files.filter(|file| seen.insert(file.ino())).map(|file| file.blocks().saturating_mul(SECTOR_BYTES)).sum()
}
