//! Reading every byte that a store's generations name, and comparing it with what was stored.
//!
//! ```text
//! generations ─► distinct extents, by offset ─► blocks of a pool, many with the kernel at a time ─► checksum, in order
//! ```
//!
//! Versions that several generations share are read once. Nobody can open the store meanwhile: its lock is held. The
//! previous generation is read too, but nobody promised it: what it names is free since the last commit, and may have
//! been overwritten.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use overspill_io::{IoError, Pool, Priority, Space, Ticket};
use xxhash_rust::xxh3::Xxh3;

use super::{Generation, GenerationState, is_store, read_generations};
use crate::directory::{Directory, MANIFEST};
use crate::error::StoreError;
use crate::extent::EXTENT_ALIGNMENT;
use crate::manifest::Manifest;
use crate::store::{Store, check_dealt_alike, space_over};
use crate::volume::Volume;

/// A store that is held locked to be looked through.
#[derive(Debug)]
pub struct Examination {
    // Closed before the directories are let go of.
    space: Space,
    generations: Vec<GenerationState>,
    directories: Vec<Directory>,
}

/// The memory to read into.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    /// Has the blocks.
    pub pool: &'a Pool,
    /// Bytes of one; a multiple of [`EXTENT_ALIGNMENT`].
    pub block_bytes: usize,
    /// How many are used at a time.
    pub count: usize,
}

/// What is to be read.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// All generations.
    Everything,
    /// This one.
    Only(&'a Generation),
}

/// What is wrong with the bytes of a tensor.
#[derive(Debug)]
pub enum Damage {
    /// They are not those that were stored.
    Checksum {
        /// Checksum (XXH3-64) when they were stored.
        expected: u64,
        /// Checksum of what was read.
        found: u64,
    },
    /// They cannot be read.
    Unreadable(IoError),
}

/// A version of a tensor that is not what was stored.
#[derive(Debug)]
pub struct Damaged {
    /// The tensor.
    pub tensor: String,
    /// The generations that name this version of it.
    pub generations: Vec<Generation>,
    /// The data file; of several that the tensor is spread over, the one that it begins in.
    pub path: PathBuf,
    /// Where the tensor begins in that file, in bytes.
    pub offset: u64,
    /// Length of the tensor, in bytes.
    pub length: u64,
    /// What is wrong.
    pub damage: Damage,
}

/// What is known of a generation after it was read.
#[derive(Debug)]
pub struct Verdict {
    /// Which one.
    pub generation: Generation,
    /// Number of its commit, if its manifest can be read.
    pub number: Option<u64>,
    /// The step it is of, if it says so.
    pub step: Option<u64>,
    /// Number of its tensors.
    pub tensors: usize,
    /// How many of them are damaged.
    pub damaged: usize,
    /// Why it is not whole, apart from damage to its tensors.
    pub flaw: Option<String>,
}

/// What was found.
#[derive(Debug)]
pub struct Findings {
    /// All generations that were read.
    pub verdicts: Vec<Verdict>,
    /// Every version that is damaged, by offset.
    pub damaged: Vec<Damaged>,
    /// Number of distinct extents.
    pub extents: usize,
    /// Bytes that were compared.
    pub bytes: u64,
}

/// A tensor of a generation, which has some extent.
struct Claim<'a> {
    tensor: &'a str,
    checksum: u64,
    generation: usize,
}

/// The bytes of one extent, so far.
struct Sum {
    hasher: Xxh3,
    failed: Option<IoError>,
}

/// A part of an extent, on its way in.
struct Reading {
    ticket: Ticket,
    /// Bytes of the tensor in it; the rest pads it.
    bytes: usize,
    extent: usize,
}

impl Examination {
    /// Locks the store with these directories, in the order in which they were created.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when its owner lives, [`StoreError::NothingCommitted`] and [`StoreError::Manifest`] when
    /// there is no generation that could be read, and as [`Store::open_over`] for what the directories are.
    pub fn begin(volumes: &[Volume]) -> Result<Self, StoreError> {
        let home = volumes.first().map_or(Path::new(""), |home| &home.directory);
        if !is_store(home) {
            return Err(StoreError::NotAStore { path: home.to_owned() });
        }
        let open = |volume: &Volume| Directory::open(&volume.directory, volume.engines.len());
        let directories = volumes.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let (mut generations, _foreign) = read_generations(home);
        let Some(reference) = generations.iter().find_map(|state| state.manifest.clone()) else {
            let flaw = generations.into_iter().find_map(|state| state.flaw);
            return Err(flaw.unwrap_or_else(|| StoreError::NothingCommitted { path: home.to_owned() }));
        };
        let space = space_over(volumes, &directories, &reference)?;
        for directory in &directories {
            directory.sign()?;
        }
        for state in &mut generations {
            let Some(manifest) = &state.manifest else { continue };
            let dealt = check_dealt_alike(&home.join(MANIFEST), manifest, &reference);
            state.flaw = dealt.and_then(|()| check_lengths(&space, manifest)).err();
        }
        Ok(Self { space, generations, directories })
    }

    /// Reads what is in scope, as many blocks at a time as there are. `progress` is told how many bytes of how many were
    /// read, and may break it off; nothing is found then.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`] and [`StoreError::NothingCommitted`] when there is no generation in scope,
    /// [`StoreError::Pool`]. Damage is no error.
    ///
    /// # Panics
    /// When the length of a block is no multiple of [`EXTENT_ALIGNMENT`].
    pub fn verify(
        &self,
        scope: Scope<'_>,
        blocks: Blocks<'_>,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Option<Findings>, StoreError> {
        let Blocks { pool, block_bytes, count } = blocks;
        assert!(block_bytes > 0 && (block_bytes as u64).is_multiple_of(EXTENT_ALIGNMENT), "{block_bytes}");
        let in_scope = |state: &&GenerationState| match scope {
            Scope::Everything => true,
            Scope::Only(generation) => state.generation == *generation,
        };
        let states: Vec<&GenerationState> = self.generations.iter().filter(in_scope).collect();
        if let (Scope::Only(generation), []) = (scope, &*states) {
            return Err(self.missing(generation));
        }
        let claims = claims(&states);
        let keys: Vec<(u64, u64)> = claims.keys().copied().collect();
        let total = keys.iter().fold(0, |sum: u64, key| sum.saturating_add(key.1));
        let mut sums: Vec<Sum> = Vec::with_capacity(keys.len());
        sums.resize_with(keys.len(), || Sum { hasher: Xxh3::new(), failed: None });
        let mut parts = keys.iter().enumerate().flat_map(|(extent, &(offset, length))| {
            (0..length).step_by(block_bytes).map(move |at| {
                let bytes = (length - at).min(block_bytes as u64) as usize;
                (extent, offset + at, bytes)
            })
        });
        let (mut under_way, mut done) = (VecDeque::<Reading>::new(), 0_u64);
        loop {
            while under_way.len() < count.max(1)
                && let Some((extent, offset, bytes)) = parts.next()
            {
                let padded = bytes.next_multiple_of(EXTENT_ALIGNMENT as usize);
                let block = pool.lease(padded)?;
                let ticket = self.space.read(offset, block, Priority::Background);
                under_way.push_back(Reading { ticket, bytes, extent });
            }
            let Some(Reading { ticket, bytes, extent }) = under_way.pop_front() else { break };
            match ticket.wait() {
                Ok(block) => sums[extent].hasher.update(&block[..bytes]),
                Err(failed) => {
                    sums[extent].failed.get_or_insert(failed.error);
                }
            }
            done += bytes as u64;
            if progress(done, total).is_break() {
                return Ok(None);
            }
        }
        Ok(Some(self.findings(&states, &claims, sums, total)))
    }

    /// Makes a generation the current one, under a number of its own, which is returned.
    ///
    /// # Errors
    /// As [`Store::restore`].
    pub fn restore(&self, generation: &Generation) -> Result<u64, StoreError> {
        let state = self.generations.iter().find(|state| state.generation == *generation);
        let manifest =
            state.and_then(|state| state.manifest.clone()).ok_or_else(|| self.missing(generation))?;
        Store::make_current(&self.directories[0], manifest)
    }

    fn missing(&self, generation: &Generation) -> StoreError {
        let path = self.directories[0].path().to_owned();
        let Generation::Snapshot(name) = generation else { return StoreError::NothingCommitted { path } };
        let known = self.generations.iter().filter_map(|state| match &state.generation {
            Generation::Snapshot(name) => Some(name.clone()),
            Generation::Committed | Generation::Previous => None,
        });
        StoreError::NoSnapshot { name: name.clone(), path, known: known.collect() }
    }

    fn findings(
        &self,
        states: &[&GenerationState],
        claims: &BTreeMap<(u64, u64), Vec<Claim<'_>>>,
        sums: Vec<Sum>,
        bytes: u64,
    ) -> Findings {
        let verdict = |state: &&GenerationState| Verdict {
            generation: state.generation.clone(),
            number: state.manifest.as_ref().map(|manifest| manifest.generation),
            step: state.manifest.as_ref().and_then(Manifest::step),
            tensors: state.manifest.as_ref().map_or(0, |manifest| manifest.tensors.len()),
            damaged: 0,
            flaw: state.flaw.as_ref().map(ToString::to_string),
        };
        let mut verdicts: Vec<Verdict> = states.iter().map(verdict).collect();
        let mut damaged: Vec<Damaged> = Vec::new();
        for ((&(offset, length), claims), sum) in claims.iter().zip(sums) {
            let found = sum.hasher.digest();
            let first = damaged.len();
            for claim in claims {
                let damage = match &sum.failed {
                    Some(error) => Damage::Unreadable(error.clone()),
                    None if claim.checksum == found => continue,
                    None => Damage::Checksum { expected: claim.checksum, found },
                };
                verdicts[claim.generation].damaged += 1;
                let generation = verdicts[claim.generation].generation.clone();
                let same = |other: &&mut Damaged| {
                    other.tensor == claim.tensor && other.damage.expected() == damage.expected()
                };
                match damaged[first..].iter_mut().find(same) {
                    Some(known) => known.generations.push(generation),
                    None => {
                        let (path, offset) = self.begin_of(offset);
                        let (tensor, generations) = (claim.tensor.to_owned(), vec![generation]);
                        damaged.push(Damaged { tensor, generations, path, offset, length, damage });
                    }
                }
            }
        }
        Findings { verdicts, damaged, extents: claims.len(), bytes }
    }

    /// The data file that a byte of the space is in, and where in it.
    fn begin_of(&self, offset: u64) -> (PathBuf, u64) {
        let mut pieces = self.space.stripes().pieces(offset, EXTENT_ALIGNMENT as usize);
        let piece = pieces.next().expect("a unit of the space has a first byte");
        (self.space.lanes()[piece.lane].file.path().to_owned(), piece.offset)
    }
}

impl Findings {
    /// Whether a generation is whole.
    pub fn is_whole(&self, generation: &Generation) -> bool {
        self.verdicts.iter().any(|verdict| verdict.generation == *generation && verdict.is_whole())
    }

    /// What the committed state can be replaced with: the newest other generation that is whole.
    pub fn restorable(&self) -> Option<&Generation> {
        let others = self.verdicts.iter().filter(|verdict| verdict.generation != Generation::Committed);
        let newest = others.filter(|verdict| verdict.is_whole()).max_by_key(|verdict| verdict.number);
        newest.map(|verdict| &verdict.generation)
    }
}

impl Verdict {
    /// Whether it is what was committed, to the last bit.
    pub fn is_whole(&self) -> bool {
        self.flaw.is_none() && self.damaged == 0
    }
}

impl Damage {
    fn expected(&self) -> Option<u64> {
        match self {
            Self::Checksum { expected, .. } => Some(*expected),
            Self::Unreadable(_) => None,
        }
    }
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, path, offset, length, .. } = self;
        let path = path.display();
        match &self.damage {
            Damage::Checksum { expected, found } => write!(
                f,
                "tensor {tensor}: {length} bytes at offset {offset} of {path} are damaged \
                 (checksum {found:016x}, stored as {expected:016x})"
            )?,
            Damage::Unreadable(error) => {
                write!(f, "tensor {tensor}: {length} bytes at offset {offset} of {path}: {error}")?;
            }
        }
        let generations: Vec<String> = self.generations.iter().map(ToString::to_string).collect();
        write!(f, ", of {}", generations.join(", "))
    }
}

/// Who has which extent, by offset and length. What the files cannot have is known to be damaged and still read.
fn claims<'a>(states: &[&'a GenerationState]) -> BTreeMap<(u64, u64), Vec<Claim<'a>>> {
    let mut claims: BTreeMap<(u64, u64), Vec<Claim<'a>>> = BTreeMap::new();
    for (generation, state) in states.iter().enumerate() {
        // Of bytes that are dealt in another way nothing can be said.
        let readable = matches!(state.flaw, None | Some(StoreError::Truncated { .. }));
        for record in state.manifest.iter().filter(|_| readable).flat_map(|manifest| &manifest.tensors) {
            let claim = Claim { tensor: &record.name, checksum: record.checksum, generation };
            claims.entry((record.offset, record.length)).or_default().push(claim);
        }
    }
    claims
}

fn check_lengths(space: &Space, manifest: &Manifest) -> Result<(), StoreError> {
    for (index, lane) in space.lanes().iter().enumerate() {
        let (length, needed) = (lane.file.len()?, space.stripes().lane_bytes(index, manifest.capacity()));
        if length < needed {
            return Err(StoreError::Truncated { path: lane.file.path().to_owned(), length, needed });
        }
    }
    Ok(())
}
