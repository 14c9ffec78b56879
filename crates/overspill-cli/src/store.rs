//! Which store is meant, and what it takes to read it.

use std::path::{Path, PathBuf};

use anyhow::bail;
use overspill_io::{BackendChoice, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{Blocks, Profile, Store, StoreError, Survey, Volume};

/// What a run names the directory that it makes in the one it was told to swap to.
const STORE_NAME: &str = "overspill-store";

/// The memory that a store is read into: as much as keeps a disk busy.
const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 32;

/// The store in a directory: what was named, or the one that a run has made in it.
pub(crate) fn resolve(directory: &Path) -> PathBuf {
    let inside = directory.join(STORE_NAME);
    let is_store = |path: &Path| path.join("lock").exists() || path.join("manifest").exists();
    if !is_store(directory) && is_store(&inside) { inside } else { directory.to_owned() }
}

/// All directories of a store, by what was named.
pub(crate) fn resolve_all(directories: &[PathBuf]) -> Vec<PathBuf> {
    directories.iter().map(|directory| resolve(directory)).collect()
}

/// Says of a store that somebody has open what a command that needs it alone can say.
pub(crate) fn alone<T>(result: Result<T, StoreError>) -> anyhow::Result<T> {
    match result {
        Err(StoreError::Locked { path, pid }) => {
            let owner = pid.map(|pid| format!(" by process {pid}")).unwrap_or_default();
            bail!("{} is in use{owner}; try again when that has ended", path.display())
        }
        result => Ok(result?),
    }
}

/// Engines over the directories of a store, and memory to read into.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) volumes: Vec<Volume>,
    pool: Pool,
}

impl Reader {
    /// Starts as many engines as the store has data files, by the profiles of their disks. If only the home is given,
    /// the other directories are looked for where its manifest says that they were.
    pub(crate) fn start(directories: &[PathBuf], backend: BackendChoice) -> anyhow::Result<Self> {
        let survey = Survey::of(directories)?;
        let class = BlockClass { name: "reading", block_bytes: BLOCK_BYTES, count: BLOCKS };
        let pool = Pool::new(&[class])?;
        let mut volumes = Vec::with_capacity(survey.directories.len());
        for directory in survey.directories {
            let mut config = EngineConfig { backend, ..EngineConfig::default() };
            if let Some(profile) = Profile::load(&directory)? {
                (config.chunk_bytes, config.queue_depth) = (profile.chunk_bytes, profile.queue_depth);
            }
            let files = Store::data_files(&directory).max(1);
            let engines =
                (0..files).map(|_| Engine::start(config.clone(), &pool)).collect::<Result<_, _>>()?;
            volumes.push(Volume { directory, engines, weight: 1 });
        }
        Ok(Self { volumes, pool })
    }

    pub(crate) fn blocks(&self) -> Blocks<'_> {
        Blocks { pool: &self.pool, block_bytes: BLOCK_BYTES, count: BLOCKS }
    }
}
