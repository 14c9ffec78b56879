//! The directories that a run swaps to: what is known of them, who serves them, and how much each one gets.
//!
//! [`Volumes::find`] reads what `overspill tune`, or an earlier run, has found out about each directory's disk;
//! [`Volumes::open`] starts the engines accordingly. The first directory is the home of the store. Several share the
//! state in proportion to their bandwidths; one whose bandwidth nobody knows is measured first, which is remembered
//! beside it. A profile that cannot be used is a note: a file that nobody named stops no run.

use std::path::{Path, PathBuf};

use overspill_io::{EngineConfig, Pool};
use overspill_swap::{Store, Volume, VolumeSite, VolumeSites};

use crate::error::TrainError;
use crate::options::StorageChoice;
use crate::report::VolumeSummary;

/// The name of a run's own directory inside `--swap-dir`.
pub(crate) const STORE_NAME: &str = "overspill-store";

/// How many leftovers of dead runs a fresh name steps around.
const NAMES_MAX: u32 = 1000;

/// The directories of a run, before anything is made in them; at least one.
pub(crate) struct Volumes {
    sites: VolumeSites,
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
    /// [`TrainError::SwapTwice`] for a directory named twice; to resume, [`TrainError::ResumeWhere`] and
    /// [`TrainError::Store`] when there is nothing to go on from.
    pub(crate) fn find(storage: &StorageChoice) -> Result<Self, TrainError> {
        if storage.directories.is_empty() && storage.resume {
            return Err(TrainError::ResumeWhere);
        }
        if storage.directories.is_empty() {
            let here = VolumeSite::find(PathBuf::from("."), fresh_name());
            return Ok(Self { sites: VolumeSites::to_make(vec![here]) });
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
            found.push(VolumeSite::find(directory.clone(), directory.join(STORE_NAME)));
        }
        let sites = if storage.resume {
            let committed = Store::committed(&found[0].store)?;
            VolumeSites::to_open(found, committed)
        } else {
            VolumeSites::to_make(found)
        };
        Ok(Self { sites })
    }

    /// What came with the state that is resumed.
    pub(crate) fn committed(&self) -> Option<&serde_json::Value> {
        self.sites.committed().map(|manifest| &manifest.meta)
    }

    /// The store's home.
    pub(crate) fn home(&self) -> &Path {
        &self.sites.iter().next().expect("there is at least one directory").store
    }

    /// What their engines take, as far as that is more than a single one of the usual depth.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.sites.memory_bytes()
    }

    /// Finds out whether the store can be made.
    ///
    /// # Errors
    /// As [`VolumeSites::check`].
    pub(crate) fn check(&self, storage_bytes: u64) -> Result<(), TrainError> {
        Ok(self.sites.check(storage_bytes)?)
    }

    /// Starts the engines, all of them over `pool`, and measures what has to be measured.
    ///
    /// # Errors
    /// [`TrainError`] when an engine can't be started, or a directory can't be written; nothing is left behind.
    pub(crate) fn open(&self, storage: &StorageChoice, pool: &Pool) -> Result<Opened, TrainError> {
        let config = EngineConfig { backend: storage.backend, ..EngineConfig::default() };
        let served = self.sites.open(&config, pool)?;
        let mut opened = Opened { volumes: Vec::new(), summaries: Vec::new(), notes: Vec::new() };
        for (site, served) in self.sites.iter().zip(&served) {
            let (name, report) = (site.directory.display(), served.report());
            // What an engine has to say is about memory and the kernel, which all volumes share.
            for note in report.notes {
                if !opened.notes.contains(&note) {
                    opened.notes.push(note);
                }
            }
            opened.notes.extend(site.flaw.clone());
            // What somebody has written there is theirs to mend.
            let measured = served.measured.as_ref().filter(|_| site.flaw.is_none());
            if let Some(Err(error)) = measured.map(|profile| profile.save(&site.directory)) {
                let again = "its bandwidth will be measured again next time";
                opened.notes.push(format!("volume {name}: {again}: {error}"));
            }
            opened.summaries.push(VolumeSummary {
                directory: name.to_string(),
                weight: served.volume.weight,
                backend: report.backend.to_string(),
                degraded_reason: report.degraded,
                rings: served.volume.engines.len(),
                chunk_bytes: served.chunk_bytes,
                queue_depth: served.queue_depth,
                read_gbps: served.bandwidth.map(|known| known.read_gbps),
                write_gbps: served.bandwidth.map(|known| known.write_gbps),
            });
        }
        let several = served.len() > 1;
        let told = opened.summaries.iter().filter(|summary| several || summary.read_gbps.is_some());
        opened.notes.extend(told.map(VolumeSummary::to_string));
        opened.volumes = served.into_iter().map(|served| served.volume).collect();
        Ok(opened)
    }
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
    use overspill_swap::{Durability, Profile};

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
        assert_ne!(volumes.memory_bytes(), 0, "of three engines, the first is in every plan");
        assert!(opened.notes.iter().any(|note| note.contains("weight 3")), "{:?}", opened.notes);
    }

    #[test]
    fn what_was_measured_is_remembered() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        SLOW.save(first.path()).unwrap();
        let storage = storage(&[first.path(), second.path()]);
        let volumes = Volumes::find(&storage).unwrap();
        let opened = volumes.open(&storage, &pool()).unwrap();
        let remembered = Profile::load(second.path()).unwrap().unwrap();
        let found = opened.summaries[1].read_gbps.unwrap();
        assert!((remembered.read_gbps / found - 1.0).abs() < 1e-9, "{remembered:?} and {found}");
        assert_eq!(remembered.rings, 1);
        let again = Volumes::find(&storage).unwrap().sites.open(&EngineConfig::default(), &pool()).unwrap();
        assert!(again.iter().all(|served| served.measured.is_none()), "it need not be measured again");
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
    fn a_directory_named_twice_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let again = folder.path().join(".");
        let twice = Volumes::find(&storage(&[folder.path(), &again])).err().unwrap();
        assert!(matches!(&twice, TrainError::SwapTwice { directory } if *directory == again), "{twice}");
    }

    #[test]
    fn a_damaged_profile_is_told_measured_around_and_left_as_it_is() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(first.path().join(Profile::FILE), "{").unwrap();
        for directories in [&[first.path()][..], &[first.path(), second.path()]] {
            let storage = storage(directories);
            let opened = Volumes::find(&storage).unwrap().open(&storage, &pool()).unwrap();
            let told: Vec<_> = opened.notes.iter().filter(|note| note.contains("is not a profile")).collect();
            assert_eq!(told.len(), 1, "{:?}", opened.notes);
            assert!(told[0].ends_with("the disk is used as if nothing were known of it"), "{told:?}");
            assert_eq!(std::fs::read_to_string(first.path().join(Profile::FILE)).unwrap(), "{");
        }
        assert!(Profile::load(second.path()).unwrap().is_some(), "that one is remembered");
    }
}
