//! The directories that a run swaps to: what is known of them, who serves them, and how much each one gets.
//!
//! [`Volumes::find`] reads what `overspill tune`, or an earlier run, has found out about each directory's disk;
//! [`Volumes::open`] starts the engines accordingly. The first directory is the home of the store. Several share the
//! state in proportion to their bandwidths; one whose bandwidth nobody knows is measured first, which is remembered
//! beside it.

use std::path::{Path, PathBuf};

use overspill_io::{Engine, EngineConfig, EngineReport, Pool};
use overspill_swap::{Bandwidth, Manifest, Profile, Store, Volume, measure, weights};

use crate::error::TrainError;
use crate::options::StorageChoice;
use crate::report::VolumeSummary;

/// The name of a run's own directory inside `--swap-dir`.
pub(crate) const STORE_NAME: &str = "overspill-store";

/// How many leftovers of dead runs a fresh name steps around.
const NAMES_MAX: u32 = 1000;

/// What an engine takes beside its blocks: stacks and heaps of its threads, and its ring by the depth of the queue.
const ENGINE_BYTES: usize = 512 << 10;
const QUEUE_ENTRY_BYTES: usize = 512;

/// The directories of a run, before anything is made in them; at least one.
pub(crate) struct Volumes {
    found: Vec<Found>,
    /// What was committed to them, if a run is resumed.
    committed: Option<Manifest>,
}

struct Found {
    /// What the user named.
    directory: PathBuf,
    /// What the store will make there.
    store: PathBuf,
    /// What is known of its disk.
    profile: Option<Profile>,
    /// Engines side by side, each with a data file of its own.
    rings: usize,
}

/// The volumes with their engines at work.
pub(crate) struct Opened {
    pub(crate) volumes: Vec<Volume>,
    /// The same, in the words of the report.
    pub(crate) summaries: Vec<VolumeSummary>,
    /// What a user may want to know of them.
    pub(crate) notes: Vec<String>,
}

impl Volumes {
    /// Looks up what is known of the directories.
    ///
    /// # Errors
    /// [`TrainError::Profile`] when a profile is damaged, [`TrainError::SwapTwice`] for a directory named twice.
    pub(crate) fn find(storage: &StorageChoice) -> Result<Self, TrainError> {
        let find = |directory: &Path, store: PathBuf| -> Result<_, TrainError> {
            let profile = Profile::load(directory)?;
            let wished = profile.as_ref().map_or(1, |profile| profile.rings);
            // What was made with some number of data files has that number.
            let rings = if storage.resume { Store::data_files(&store).max(1) } else { wished };
            Ok(Found { directory: directory.to_owned(), store, profile, rings })
        };
        if storage.directories.is_empty() && storage.resume {
            return Err(TrainError::ResumeWhere);
        }
        if storage.directories.is_empty() {
            return Ok(Self { found: vec![find(Path::new("."), fresh_name())?], committed: None });
        }
        let mut real: Vec<PathBuf> = Vec::with_capacity(storage.directories.len());
        let mut found = Vec::with_capacity(storage.directories.len());
        for directory in &storage.directories {
            // What does not exist is refused later, by what cannot be made in it.
            let path = directory.canonicalize().unwrap_or_else(|_| directory.clone());
            if real.contains(&path) {
                return Err(TrainError::SwapTwice { directory: directory.clone() });
            }
            real.push(path);
            found.push(find(directory, directory.join(STORE_NAME))?);
        }
        let home = found.first().filter(|_| storage.resume);
        let committed = home.map(|home| Store::committed(&home.store)).transpose()?;
        Ok(Self { found, committed })
    }

    /// What came with the state that is resumed.
    pub(crate) fn committed(&self) -> Option<&serde_json::Value> {
        self.committed.as_ref().map(|manifest| &manifest.meta)
    }

    /// The store's home.
    pub(crate) fn home(&self) -> &Path {
        &self.found.first().expect("there is at least one directory").store
    }

    /// What their engines take, as far as that is more than a single one of the usual depth.
    pub(crate) fn memory_bytes(&self) -> usize {
        let usual = engine_bytes(EngineConfig::default().queue_depth);
        let all: usize = self
            .found
            .iter()
            .map(|found| found.rings * engine_bytes(found.config(EngineConfig::default()).queue_depth))
            .sum();
        all.saturating_sub(usual)
    }

    /// Finds out whether the store can be made. Before all bandwidths are known, nobody can say whether each disk has
    /// room for its share; then it is found out when the store is made.
    ///
    /// # Errors
    /// As [`Store::check_over`].
    pub(crate) fn check(&self, storage_bytes: u64) -> Result<(), TrainError> {
        let (shares, storage_bytes) = match self.known() {
            Some(bandwidths) => (weights(&bandwidths), storage_bytes),
            None => (vec![1; self.found.len()], 0),
        };
        let volumes: Vec<_> =
            self.found.iter().zip(shares).map(|(found, share)| (&*found.store, share)).collect();
        Ok(Store::check_over(&volumes, storage_bytes)?)
    }

    /// Starts the engines, all of them over `pool`, and measures what has to be measured.
    ///
    /// # Errors
    /// [`TrainError`] when an engine can't be started, or a directory can't be written; nothing is left behind.
    pub(crate) fn open(&self, storage: &StorageChoice, pool: &Pool) -> Result<Opened, TrainError> {
        let config = EngineConfig { backend: storage.backend, ..EngineConfig::default() };
        let several = self.found.len() > 1;
        let mut opened = Opened { volumes: Vec::new(), summaries: Vec::new(), notes: Vec::new() };
        let mut bandwidths = Vec::with_capacity(self.found.len());
        for found in &self.found {
            let config = found.config(config.clone());
            let start = || Engine::start(config.clone(), pool);
            let engines: Vec<Engine> = (0..found.rings).map(|_| start()).collect::<Result<_, _>>()?;
            let report = merged(&engines);
            let name = found.directory.display();
            // What an engine has to say is about memory and the kernel, which all volumes share.
            for note in report.notes {
                if !opened.notes.contains(&note) {
                    opened.notes.push(note);
                }
            }
            let mut known = found.bandwidth();
            if several && known.is_none() && self.committed.is_none() {
                let measured = measure(&found.directory, &engines, pool)?;
                known = Some(measured);
                let profile = found.profile_of(&config, measured);
                if let Err(error) = profile.save(&found.directory) {
                    let again = "its bandwidth will be measured again next time";
                    opened.notes.push(format!("volume {name}: {again}: {error}"));
                }
            }
            bandwidths.push(known.map_or(1.0, Bandwidth::mean_gbps));
            opened.summaries.push(VolumeSummary {
                directory: name.to_string(),
                weight: 1,
                backend: report.backend.to_string(),
                degraded_reason: report.degraded,
                rings: engines.len(),
                chunk_bytes: config.chunk_bytes,
                queue_depth: config.queue_depth,
                read_gbps: known.map(|known| known.read_gbps),
                write_gbps: known.map(|known| known.write_gbps),
            });
            opened.volumes.push(Volume { directory: found.store.clone(), engines, weight: 1 });
        }
        for ((volume, summary), weight) in
            opened.volumes.iter_mut().zip(&mut opened.summaries).zip(self.shares(&bandwidths))
        {
            (volume.weight, summary.weight) = (weight, weight);
            if several || summary.read_gbps.is_some() {
                opened.notes.push(summary.to_string());
            }
        }
        Ok(opened)
    }

    /// Each volume's share: what it was when the state was made, or by bandwidth.
    fn shares(&self, bandwidths: &[f64]) -> Vec<u32> {
        let Some(manifest) = &self.committed else { return weights(bandwidths) };
        let mut lanes = manifest.lanes.iter().map(|lane| lane.weight);
        let share = |found: &Found| lanes.by_ref().take(found.rings).fold(0, u32::saturating_add);
        self.found.iter().map(share).collect()
    }

    /// The bandwidths of all volumes, if they are known; of a single one it does not matter.
    fn known(&self) -> Option<Vec<f64>> {
        match &*self.found {
            [_] => Some(vec![1.0]),
            several => several.iter().map(|found| found.bandwidth().map(Bandwidth::mean_gbps)).collect(),
        }
    }
}

impl Found {
    fn bandwidth(&self) -> Option<Bandwidth> {
        let Profile { read_gbps, write_gbps, .. } = *self.profile.as_ref()?;
        Some(Bandwidth { read_gbps, write_gbps })
    }

    /// How its engines work.
    fn config(&self, config: EngineConfig) -> EngineConfig {
        match self.profile {
            Some(Profile { chunk_bytes, queue_depth, .. }) => {
                EngineConfig { chunk_bytes, queue_depth, ..config }
            }
            None => config,
        }
    }

    /// What is to be remembered.
    fn profile_of(&self, config: &EngineConfig, measured: Bandwidth) -> Profile {
        Profile {
            chunk_bytes: config.chunk_bytes,
            queue_depth: config.queue_depth,
            rings: self.rings,
            read_gbps: measured.read_gbps,
            write_gbps: measured.write_gbps,
        }
    }
}

fn engine_bytes(queue_depth: usize) -> usize {
    ENGINE_BYTES + queue_depth * QUEUE_ENTRY_BYTES
}

/// What the engines of one volume work with; each thing is said once.
fn merged(engines: &[Engine]) -> EngineReport {
    let mut reports = engines.iter().map(Engine::report);
    let first = reports.next().expect("a volume has at least one engine");
    reports.fold(first, |mut merged, report| {
        merged.degraded = merged.degraded.or(report.degraded);
        merged.notes.extend(report.notes);
        merged.notes.dedup();
        merged
    })
}

/// The directory that the store will make in the current one. Inside `--swap-dir` it has one name, so that two runs
/// on it meet and the second is refused; in the current directory each run has a name of its own.
fn fresh_name() -> PathBuf {
    let process = std::process::id();
    let mut names = (0..NAMES_MAX).map(|n| PathBuf::from(format!("{STORE_NAME}-{process}-{n}")));
    names.find(|path| !path.exists()).unwrap_or_else(|| PathBuf::from(STORE_NAME))
}

#[cfg(test)]
mod tests {
    use overspill_io::{BackendChoice, BlockClass};
    use overspill_swap::Durability;

    use super::*;

    const SLOW: Profile =
        Profile { chunk_bytes: 1 << 16, queue_depth: 8, rings: 2, read_gbps: 1.0, write_gbps: 1.0 };

    fn storage(directories: &[&Path]) -> StorageChoice {
        let directories = directories.iter().map(|&path| path.to_owned()).collect();
        let (durability, backend) = (Durability::None, BackendChoice::Threads);
        StorageChoice {
            directories,
            keep: false,
            resume: false,
            durability,
            backend,
            depth: None,
            resident_bytes_max: None,
        }
    }

    fn pool() -> Pool {
        Pool::new(&[BlockClass { name: "test", block_bytes: 1 << 20, count: 2 }]).unwrap()
    }

    #[test]
    fn profiles_say_how_engines_work_and_what_each_volume_gets() {
        let (slow, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        SLOW.save(slow.path()).unwrap();
        Profile { rings: 1, read_gbps: 4.0, write_gbps: 2.4, ..SLOW }.save(fast.path()).unwrap();
        let storage = storage(&[slow.path(), fast.path()]);
        let volumes = Volumes::find(&storage).unwrap();
        let opened = volumes.open(&storage, &pool()).unwrap();
        let [slow, fast] = &opened.summaries[..] else { panic!("two volumes") };
        assert_eq!((slow.weight, fast.weight), (1, 3));
        assert_eq!((slow.rings, slow.chunk_bytes, slow.queue_depth), (2, 1 << 16, 8));
        assert_eq!(opened.volumes.iter().map(|volume| volume.engines.len()).collect::<Vec<_>>(), [2, 1]);
        let usual = EngineConfig::default().queue_depth;
        let expected = 3 * engine_bytes(8) - engine_bytes(usual);
        assert_eq!(volumes.memory_bytes(), expected, "the first engine is in every plan");
        assert!(opened.notes.iter().any(|note| note.contains("weight 3")), "{:?}", opened.notes);
    }

    #[test]
    fn what_was_measured_is_remembered() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        SLOW.save(first.path()).unwrap();
        let storage = storage(&[first.path(), second.path()]);
        let volumes = Volumes::find(&storage).unwrap();
        assert!(volumes.known().is_none());
        let opened = volumes.open(&storage, &pool()).unwrap();
        let remembered = Profile::load(second.path()).unwrap().unwrap();
        let found = opened.summaries[1].read_gbps.unwrap();
        assert!((remembered.read_gbps / found - 1.0).abs() < 1e-9, "{remembered:?} and {found}");
        assert_eq!(remembered.rings, 1);
        assert!(Volumes::find(&storage).unwrap().known().is_some(), "it need not be measured again");
        let names: Vec<_> =
            std::fs::read_dir(second.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [Profile::FILE]);
    }

    #[test]
    fn one_volume_is_not_measured_and_takes_no_more_memory() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(&[folder.path()]);
        let volumes = Volumes::find(&storage).unwrap();
        let opened = volumes.open(&storage, &pool()).unwrap();
        assert_eq!((opened.summaries[0].read_gbps, opened.notes), (None, Vec::new()));
        assert_eq!(volumes.memory_bytes(), 0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_profile_and_a_directory_named_twice_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let again = folder.path().join(".");
        let twice = Volumes::find(&storage(&[folder.path(), &again])).err().unwrap();
        assert!(matches!(&twice, TrainError::SwapTwice { directory } if *directory == again), "{twice}");
        std::fs::write(folder.path().join(Profile::FILE), "{").unwrap();
        let damaged = Volumes::find(&storage(&[folder.path()])).err().unwrap();
        assert!(matches!(damaged, TrainError::Profile(_)), "{damaged}");
    }
}
