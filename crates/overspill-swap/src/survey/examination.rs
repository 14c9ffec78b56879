//! Reading every byte that a store's generations name, and comparing it with what was stored.
//!
//! ```text
//! generations ─► distinct extents, by offset ─► read ─► checksums, compared
//! ```
//!
//! Beside the manifests an extent takes a claim of a few bytes for each generation. Versions that several generations share
//! are read once. Nobody can open the store meanwhile: its lock is held. The previous generation is read too, but nobody
//! promised it: what it names is free since the last commit, and may have been overwritten.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use overspill_io::{Engine, IoError, Space};

use super::reading::{Blocks, Read, read_extents};
use super::{Generation, GenerationState, check_store, read_generations};
use crate::directory::{Directory, MANIFEST};
use crate::error::StoreError;
use crate::ledger::Durability;
use crate::manifest::{Manifest, TensorRecord};
use crate::store::{Store, begin_of, check_dealt_alike, check_lengths, open_all, repair_label, space_over};
use crate::volume::Volume;

/// A store that is held locked to be looked through.
#[derive(Debug)]
pub struct Examination {
    // Closed before the directories are let go of.
    space: Space,
    generations: Vec<GenerationState>,
    volumes: Vec<Volume>,
    directories: Vec<Directory>,
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

/// A tensor of a generation, which has some extent. There is one for each tensor of each generation.
#[derive(Clone, Copy)]
struct Claim<'a> {
    record: &'a TensorRecord,
    generation: u32,
}

const _: () =
    assert!(size_of::<Claim<'_>>() <= 16, "a store of a million tensors is verified in little memory");

impl Examination {
    /// Locks the store with these directories, in the order in which they were created.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when its owner lives, [`StoreError::NothingCommitted`] and [`StoreError::Manifest`] when
    /// there is no generation that could be read, and as [`Store::open_over`] for what the directories are.
    pub fn begin(volumes: &[Volume]) -> Result<Self, StoreError> {
        let home = volumes.first().map_or(Path::new(""), |home| &home.directory);
        check_store(home)?;
        let directories = open_all(volumes)?;
        let (mut generations, _foreign) = read_generations(home);
        let Some(reference) = generations.iter().find_map(|state| state.manifest.clone()) else {
            let flaw = generations.into_iter().find_map(|state| state.flaw);
            let nothing = || StoreError::NothingCommitted { path: home.to_owned() };
            return Err(flaw.or_else(|| Store::committed(home).err()).unwrap_or_else(nothing));
        };
        let space = space_over(volumes, &reference, &home.join(MANIFEST), Engine::open)?;
        for directory in &directories {
            directory.sign()?;
        }
        repair_label(&directories[0], reference.store);
        for state in &mut generations {
            let Some(manifest) = &state.manifest else { continue };
            let dealt = check_dealt_alike(&home.join(MANIFEST), manifest, &reference);
            state.flaw = dealt.and_then(|()| check_lengths(&space, manifest.capacity())).err();
        }
        Ok(Self { space, generations, volumes: volumes.to_vec(), directories })
    }

    /// Reads what is in scope, as many blocks at a time as there are. `progress` is told how many bytes of how many were
    /// read, and may break it off; nothing is found then.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`], [`StoreError::NoPrevious`] and [`StoreError::NothingCommitted`] when there is no
    /// generation in scope, [`StoreError::Pool`]. Damage is no error.
    ///
    /// # Panics
    /// When the length of a block is no multiple of [`EXTENT_ALIGNMENT`](crate::EXTENT_ALIGNMENT).
    pub fn verify(
        &self,
        scope: Scope<'_>,
        blocks: Blocks<'_>,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Option<Findings>, StoreError> {
        let in_scope = |state: &&GenerationState| match scope {
            Scope::Everything => true,
            Scope::Only(generation) => state.generation == *generation,
        };
        let states: Vec<&GenerationState> = self.generations.iter().filter(in_scope).collect();
        if let (Scope::Only(generation), []) = (scope, &*states) {
            return Err(self.missing(generation));
        }
        let claims = claims(&states);
        let extents = || claims.chunk_by(|a, b| a.extent() == b.extent());
        let total = extents().fold(0, |sum: u64, claims| sum.saturating_add(claims[0].record.length));
        let mut findings = Findings::before(&states);
        findings.bytes = total;
        let wanted = extents().map(|claims| (claims, claims[0].record.offset, claims[0].record.length));
        let mut done = 0_u64;
        let read = read_extents(&self.space, blocks, wanted, |Read { bytes, whole }| {
            if let Some((claims, found)) = whole {
                findings.judge(claims, &found, &self.space);
            }
            done += bytes as u64;
            progress(done, total)
        })?;
        Ok(read.is_continue().then_some(findings))
    }

    /// What a generation says of itself, if there is one and it can be read.
    pub fn manifest(&self, generation: &Generation) -> Option<&Manifest> {
        self.generations.iter().find(|state| state.generation == *generation)?.manifest.as_ref()
    }

    /// Makes a generation the current one, under a number of its own, which is returned.
    ///
    /// # Errors
    /// As [`Store::restore`].
    pub fn restore(&self, generation: &Generation) -> Result<u64, StoreError> {
        let manifest = self.manifest(generation).ok_or_else(|| self.missing(generation))?;
        Store::make_current(&self.directories[0], manifest.clone())
    }

    /// As [`Examination::restore`], and opens the store at that generation; nobody else can have it in between.
    ///
    /// # Errors
    /// As [`Examination::restore`] and [`Store::open_over`].
    pub fn restore_and_open(
        self,
        generation: &Generation,
        durability: Durability,
    ) -> Result<Store, StoreError> {
        self.restore(generation)?;
        let Self { space, volumes, directories, .. } = self;
        // The store opens the data files itself.
        drop(space);
        Store::open_held(directories, &volumes, durability)
    }

    fn missing(&self, generation: &Generation) -> StoreError {
        let path = self.directories[0].path().to_owned();
        let name = match generation {
            Generation::Committed => return StoreError::NothingCommitted { path },
            Generation::Previous => return StoreError::NoPrevious { path },
            Generation::Snapshot(name) => name,
        };
        let known = self.generations.iter().filter_map(|state| match &state.generation {
            Generation::Snapshot(name) => Some(name.clone()),
            Generation::Committed | Generation::Previous => None,
        });
        StoreError::NoSnapshot { name: name.clone(), path, known: known.collect() }
    }
}

impl Findings {
    /// What is known of these generations before they are read.
    fn before(states: &[&GenerationState]) -> Self {
        let verdict = |state: &&GenerationState| Verdict {
            generation: state.generation.clone(),
            number: state.manifest.as_ref().map(|manifest| manifest.generation),
            step: state.manifest.as_ref().and_then(Manifest::step),
            tensors: state.manifest.as_ref().map_or(0, |manifest| manifest.tensors.len()),
            damaged: 0,
            flaw: state.flaw.as_ref().map(ToString::to_string),
        };
        let verdicts = states.iter().map(verdict).collect();
        Self { verdicts, damaged: Vec::new(), extents: 0, bytes: 0 }
    }

    /// Takes up what the bytes of one extent were `found` to be, which all of these have.
    fn judge(&mut self, claims: &[Claim<'_>], found: &Result<u64, IoError>, space: &Space) {
        self.extents += 1;
        let first = self.damaged.len();
        for &Claim { record, generation } in claims {
            let damage = match found {
                Err(error) => Damage::Unreadable(error.clone()),
                Ok(found) if record.checksum == *found => continue,
                &Ok(found) => Damage::Checksum { expected: record.checksum, found },
            };
            let verdict = &mut self.verdicts[generation as usize];
            verdict.damaged += 1;
            let generation = verdict.generation.clone();
            let same = |other: &&mut Damaged| {
                other.tensor == record.name && other.damage.expected() == damage.expected()
            };
            match self.damaged[first..].iter_mut().find(same) {
                Some(known) => known.generations.push(generation),
                None => {
                    let (path, offset) = begin_of(space, record.offset);
                    let (tensor, generations, length) =
                        (record.name.clone(), vec![generation], record.length);
                    self.damaged.push(Damaged { tensor, generations, path, offset, length, damage });
                }
            }
        }
    }

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

impl Claim<'_> {
    /// Offset and length.
    fn extent(&self) -> (u64, u64) {
        (self.record.offset, self.record.length)
    }
}

/// Who has which extent, by offset and length. What the files cannot have is known to be damaged and still read.
fn claims<'a>(states: &[&'a GenerationState]) -> Vec<Claim<'a>> {
    // Of bytes that are dealt in another way nothing can be said.
    let is_readable =
        |state: &GenerationState| matches!(state.flaw, None | Some(StoreError::Truncated { .. }));
    let records = |state: &'a GenerationState| {
        let manifest = state.manifest.as_ref().filter(|_| is_readable(state));
        manifest.map_or(&[][..], |manifest| &manifest.tensors)
    };
    let mut claims = Vec::with_capacity(states.iter().map(|state| records(state).len()).sum());
    for (generation, state) in (0..).zip(states) {
        claims.extend(records(state).iter().map(|record| Claim { record, generation }));
    }
    claims.sort_unstable_by_key(|claim| (claim.extent(), claim.generation));
    claims
}
