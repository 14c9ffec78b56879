//! A store in a folder of its own, and helpers to fill and read tensors.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{Durability, Store, Swapped, Worth};
use tempfile::TempDir;

pub(crate) const BLOCK: usize = 64 << 10;

/// Fields are dropped from top to bottom.
pub(crate) struct Rig {
    pub(crate) store: Store,
    pub(crate) engine: Engine,
    pub(crate) pool: Pool,
    pub(crate) folder: TempDir,
}

pub(crate) const BACKENDS: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Threads];

/// The capacity that `tensors` tensors of [`BLOCK`] bytes need.
pub(crate) fn room(tensors: usize) -> u64 {
    Store::capacity_for(Durability::Step, Worth::State, vec![BLOCK; tensors])
}

impl Rig {
    /// A pool of `blocks` blocks of [`BLOCK`] bytes, and a store with room for `tensors` tensors of that size.
    pub(crate) fn new(backend: BackendChoice, blocks: usize, tensors: usize) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: BLOCK, count: blocks }]).unwrap();
        let engine = Engine::start(EngineConfig { backend, ..EngineConfig::default() }, &pool).unwrap();
        let store =
            Store::create(&folder.path().join("store"), Durability::Step, room(tensors), &engine).unwrap();
        Self { store, engine, pool, folder }
    }

    pub(crate) fn block(&self, byte: u8) -> Block {
        let mut block = self.pool.lease(BLOCK).unwrap();
        block.fill(byte);
        block
    }

    /// A tensor on storage, all of whose bytes are `byte`.
    pub(crate) fn tensor(&self, name: &str, byte: u8) -> Swapped {
        let vacant = self.store.reserve(name, BLOCK, Worth::State).unwrap();
        vacant.fill(self.block(byte)).unwrap().store().wait().unwrap()
    }

    pub(crate) fn read(&self, tensor: Swapped) -> (Swapped, Vec<u8>) {
        let resident = tensor.load(self.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
        let bytes = resident.bytes().to_vec();
        (resident.release(), bytes)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.store.path().join("data")
    }

    /// Flips one bit of the data file behind the store's back.
    pub(crate) fn flip_bit(&self, offset: u64) {
        let file = std::fs::File::options().read(true).write(true).open(self.data()).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        file.sync_all().unwrap();
    }
}
