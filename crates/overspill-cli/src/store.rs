//! What it takes to read a store, and what is said when somebody else has it.

use std::path::PathBuf;

use anyhow::bail;
use overspill_io::{BackendChoice, BlockClass, Pool};
use overspill_swap::{Blocks, StoreError, Volume};
use overspill_train::reading;

/// The memory that a store is read into: as much as keeps a disk busy.
const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 32;

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
    /// Starts engines over the store whose home and further directories these are.
    pub(crate) fn start(directories: &[PathBuf], backend: BackendChoice) -> anyhow::Result<Self> {
        let class = BlockClass { name: "reading", block_bytes: BLOCK_BYTES, count: BLOCKS };
        let pool = Pool::new(&[class])?;
        let volumes = reading::volumes(directories, backend, &pool)?;
        Ok(Self { volumes, pool })
    }

    /// What is read: the directories of the store, the home first.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        self.volumes.iter().map(|volume| volume.directory.clone()).collect()
    }

    pub(crate) fn blocks(&self) -> Blocks<'_> {
        Blocks { pool: &self.pool, block_bytes: BLOCK_BYTES, count: BLOCKS }
    }
}
