//! Which store is meant, and what it takes to read it: for whoever reads a store, but for the run that trains on it.
//!
//! A user names what the run had as `--swap-dir`, or the store in it; of several directories, the first is enough while
//! the others are where the manifest says.

use std::path::{Path, PathBuf};

use overspill_io::{BackendChoice, Engine, EngineConfig, Pool};
use overspill_swap::{Profile, Store, Survey, Volume};

use crate::error::TrainError;
use crate::volumes::STORE_NAME;

/// The store that a run has made in `directory`, or else `directory` itself. What else lies in the directory is of no
/// account: only the name of the store is.
pub fn store_in(directory: &Path) -> PathBuf {
    let inside = directory.join(STORE_NAME);
    if inside.is_dir() { inside } else { directory.to_owned() }
}

/// The directories of a store, by what was named.
pub fn stores_in(directories: &[PathBuf]) -> Vec<PathBuf> {
    directories.iter().map(|directory| store_in(directory)).collect()
}

/// The volumes of the store whose home and further directories these are, with engines over `pool`: as many as there are
/// data files, by the profiles of their disks. If only the home is given, the others are looked for where its manifest
/// says that they were; those that are not there are left out.
///
/// # Errors
/// [`TrainError::Store`] when the first directory is none of a store, [`TrainError::Io`] when an engine can't be started.
pub fn volumes(
    directories: &[PathBuf],
    backend: BackendChoice,
    pool: &Pool,
) -> Result<Vec<Volume>, TrainError> {
    let survey = Survey::of(directories)?;
    let mut volumes = Vec::with_capacity(survey.directories.len());
    for directory in survey.directories {
        let mut config = EngineConfig { backend, ..EngineConfig::default() };
        // Without one, or with one that is damaged, it is read a little slower: that is no reason not to get at it.
        if let Ok(Some(profile)) = Profile::load(&directory) {
            (config.chunk_bytes, config.queue_depth) = (profile.chunk_bytes, profile.queue_depth);
        }
        let files = Store::data_files(&directory).max(1);
        let engines = (0..files).map(|_| Engine::start(config.clone(), pool)).collect::<Result<_, _>>()?;
        volumes.push(Volume { directory, engines, weight: 1 });
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_in_a_directory_is_meant_whatever_else_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join(STORE_NAME);
        assert_eq!(store_in(folder.path()), folder.path());
        std::fs::create_dir(&store).unwrap();
        for name in ["lock", "manifest"] {
            std::fs::write(folder.path().join(name), "somebody else's").unwrap();
        }
        assert_eq!(stores_in(&[folder.path().to_owned(), store.clone()]), [store.clone(), store]);
    }
}
