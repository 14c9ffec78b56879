//! A folder for files of tensors, an engine, and what it takes to see faults: pipes that hold writes up, and name
//! spaces of their own in which disks are full.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, Pool};
use tempfile::TempDir;

pub(crate) const BOTH: [BackendChoice; 2] = [BackendChoice::Uring, BackendChoice::Threads];
pub(crate) const KIB: usize = 1 << 10;
/// Longer than anything here takes on a slow machine.
const BOUND: Duration = Duration::from_secs(60);

/// Fields are dropped from top to bottom.
pub(crate) struct Folder {
    pub(crate) engine: Engine,
    pub(crate) pool: Pool,
    pub(crate) folder: TempDir,
}

impl Folder {
    /// A pool of `count` blocks of `block_bytes`, and a folder on the disk of the build.
    pub(crate) fn new(backend: BackendChoice, block_bytes: usize, count: usize) -> Folder {
        Folder::with(EngineConfig { backend, ..EngineConfig::default() }, block_bytes, count)
    }

    pub(crate) fn with(config: EngineConfig, block_bytes: usize, count: usize) -> Folder {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes, count }]).unwrap();
        let engine = Engine::start(config, &pool).unwrap();
        Folder { engine, pool, folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn paths<const N: usize>(&self, names: [&str; N]) -> [PathBuf; N] {
        names.map(|name| self.path(name))
    }

    /// A block of `bytes` bytes with the pattern of `seed`.
    pub(crate) fn block(&self, bytes: usize, seed: u8) -> Block {
        let mut block = self.pool.lease(bytes).unwrap();
        block.copy_from_slice(&pattern(bytes, seed));
        block
    }

    /// A pipe in the folder, on which the engine's writes stay until `drain` reads them.
    pub(crate) fn pipe(&self, name: &str) -> Pipe {
        let path = self.path(name);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let reader = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        Pipe { path, reader }
    }

    /// Names of everything in the folder, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

pub(crate) struct Pipe {
    pub(crate) path: PathBuf,
    reader: std::fs::File,
}

impl Pipe {
    /// The next `bytes` bytes that were written to it.
    pub(crate) fn drain(&self, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        std::io::Read::read_exact(&mut &self.reader, &mut read).unwrap();
        read
    }
}

/// Bytes that differ from those of other seeds, and from page to page.
pub(crate) fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|i| (i as u8).wrapping_mul(31) ^ ((i >> 8) as u8).wrapping_mul(17) ^ seed).collect()
}

/// Waits for a condition, but not for ever.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !condition() {
        assert!(Instant::now() < deadline, "after {BOUND:?} it is still not so that {what}");
        std::thread::park_timeout(Duration::from_micros(200));
    }
}

/// Whether `path` holds `tensor` and zeros up to a multiple of 4096 bytes, and nothing else.
#[track_caller]
pub(crate) fn assert_file(path: &Path, tensor: &[u8]) {
    let mut expected = tensor.to_vec();
    expected.resize(tensor.len().next_multiple_of(4096), 0);
    let found = std::fs::read(path).unwrap();
    assert_eq!(found.len(), expected.len(), "length of {}", path.display());
    let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte of {} that is not the tensor's", path.display());
}
