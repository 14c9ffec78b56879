//! What every test here needs: a folder on a real disk, an engine, and patterns that tell bytes apart.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use overspill_io::{
    BackendChoice, Block, BlockClass, Engine, EngineConfig, Failed, File, Pool, Priority, SimConfig, Ticket,
};
use tempfile::TempDir;

pub(crate) const KIB: usize = 1 << 10;
pub(crate) const MIB: usize = 1 << 20;
/// Longer than anything here takes on a slow machine.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

/// Every backend, the simulated one in a calm.
pub(crate) fn backends() -> [BackendChoice; 4] {
    let sim = BackendChoice::Sim(SimConfig::calm(1));
    [BackendChoice::Uring, BackendChoice::Aio, BackendChoice::Threads, sim]
}

/// Makes each law a test of every backend.
macro_rules! laws {
    ($($law:ident)*) => {
        mod uring {
            $(#[test] fn $law() { super::$law(overspill_io::BackendChoice::Uring); })*
        }
        mod aio {
            $(#[test] fn $law() { super::$law(overspill_io::BackendChoice::Aio); })*
        }
        mod threads {
            $(#[test] fn $law() { super::$law(overspill_io::BackendChoice::Threads); })*
        }
        mod sim {
            $(#[test] fn $law() {
                super::$law(overspill_io::BackendChoice::Sim(overspill_io::SimConfig::calm(1)));
            })*
        }
    };
}

/// An engine over a pool of its own, and a folder that takes direct I/O where the build does.
pub(crate) struct Rig {
    pub(crate) engine: Engine,
    pub(crate) pool: Pool,
    pub(crate) folder: TempDir,
}

impl Rig {
    pub(crate) fn new(backend: BackendChoice, classes: &[BlockClass]) -> Rig {
        Rig::with(EngineConfig { backend, ..EngineConfig::default() }, classes)
    }

    pub(crate) fn with(config: EngineConfig, classes: &[BlockClass]) -> Rig {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::with_patience(classes, BOUND).unwrap();
        let engine = Engine::start(config, &pool).unwrap();
        Rig { engine, pool, folder }
    }

    /// One class of `count` blocks of `block_bytes`.
    pub(crate) fn blocks(backend: BackendChoice, block_bytes: usize, count: usize) -> Rig {
        Rig::new(backend, &[BlockClass { name: "test", block_bytes, count }])
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn create(&self, name: &str) -> File {
        self.engine.create(&self.path(name)).unwrap()
    }

    /// A fresh block that holds the pattern of `seed`.
    pub(crate) fn patterned(&self, bytes: usize, seed: u64) -> Block {
        let mut block = self.pool.lease(bytes).unwrap();
        fill(&mut block, seed);
        block
    }

    pub(crate) fn write(&self, file: &File, offset: u64, block: Block) -> Result<Block, Failed> {
        finish(self.engine.write(file, offset, block, Priority::Background))
    }

    pub(crate) fn read(&self, file: &File, offset: u64, block: Block) -> Result<Block, Failed> {
        finish(self.engine.read(file, offset, block, Priority::Urgent))
    }

    /// Waits until no block is leased.
    pub(crate) fn all_blocks_are_home(&self) {
        eventually("all blocks are home", || self.pool.leased_blocks() == 0);
    }
}

/// Waits for an answer, but not for ever.
pub(crate) fn finish(ticket: Ticket) -> Result<Block, Failed> {
    eventually("the operation is over", || ticket.is_done());
    ticket.wait()
}

pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < deadline, "after {BOUND:?} it is still not so that {what}");
        thread::park_timeout(Duration::from_micros(200));
    }
}

/// Eight bytes at a time, each different from all others of the same and of other seeds.
pub(crate) fn fill(bytes: &mut [u8], seed: u64) {
    for (index, word) in (0_u64..).zip(bytes.chunks_mut(8)) {
        let value = (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        word.copy_from_slice(&value[..word.len()]);
    }
}

#[track_caller]
pub(crate) fn assert_pattern(bytes: &[u8], seed: u64) {
    let mut expected = vec![0; bytes.len()];
    fill(&mut expected, seed);
    let differs = bytes.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte of {} that differs from pattern {seed}", bytes.len());
}
