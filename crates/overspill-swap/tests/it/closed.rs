//! A store with a past that nobody has open, and damage to it.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use overspill_io::{BackendChoice, Engine, Pool};
use overspill_swap::{
    Blocks, Durability, Examination, Findings, Generation, Scope, Store, StoreError, Survey, Swapped, Volume,
};
use serde_json::json;
use tempfile::TempDir;

use crate::rig::Rig;

pub(crate) fn overwrite(rig: &Rig, tensor: Swapped, byte: u8) -> Swapped {
    tensor.overwrite(rig.block(byte)).unwrap().store().wait().unwrap()
}

/// A store that nobody has open. Fields are dropped from top to bottom.
pub(crate) struct Closed {
    pub(crate) path: PathBuf,
    pub(crate) engine: Engine,
    pub(crate) pool: Pool,
    _folder: TempDir,
}

impl Closed {
    /// Tensors `a` and `b`. `a` is 3 in the committed generation, 2 in the previous one, 1 in the snapshot `first`;
    /// `b` is the same in all.
    pub(crate) fn new() -> Self {
        let rig = Rig::new(BackendChoice::Auto, 4, 3);
        let (mut a, b) = (rig.tensor("a", 1), rig.tensor("b", 9));
        rig.store.commit(json!({ "step": 1 })).unwrap();
        rig.store.snapshot("first").unwrap();
        for (step, byte) in [(2, 2), (3, 3)] {
            a = overwrite(&rig, a, byte);
            rig.store.commit(json!({ "step": step })).unwrap();
        }
        drop((a, b));
        rig.store.keep();
        let Rig { store, engine, pool, folder } = rig;
        let path = store.path().to_owned();
        drop(store);
        Self { path, engine, pool, _folder: folder }
    }

    pub(crate) fn survey(&self) -> Survey {
        Survey::of(std::slice::from_ref(&self.path)).unwrap()
    }

    pub(crate) fn open(&self) -> Result<Store, StoreError> {
        Store::open(&self.path, Durability::Step, &self.engine)
    }

    pub(crate) fn volumes(&self) -> [Volume; 1] {
        [Volume { directory: self.path.clone(), engines: vec![self.engine.clone()], weight: 1 }]
    }

    pub(crate) fn findings(&self, scope: Scope<'_>, block_bytes: usize) -> Findings {
        let examination = Examination::begin(&self.volumes()).unwrap();
        let blocks = Blocks { pool: &self.pool, block_bytes, count: 3 };
        examination.verify(scope, blocks, |_, _| ControlFlow::Continue(())).unwrap().unwrap()
    }

    pub(crate) fn offset(&self, generation: &Generation, tensor: &str) -> u64 {
        let survey = self.survey();
        let manifest = survey.generation(generation).unwrap().manifest.as_ref().unwrap();
        manifest.tensors.iter().find(|record| record.name == tensor).unwrap().offset
    }

    pub(crate) fn snapshot_file(&self) -> PathBuf {
        self.path.join("snapshot.first")
    }
}

pub(crate) fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
}

pub(crate) fn first() -> Generation {
    Generation::Snapshot("first".to_owned())
}
