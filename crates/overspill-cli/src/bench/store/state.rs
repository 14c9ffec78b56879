//! A store of known tensors, moved through the store and, in turns, past it.
//!
//! Past it means through the same engine, to the same bytes of the same file, as many at a time, with the same contents;
//! what the store does more is checksums and bookkeeping. Both sides look at both ends of every tensor that they read.
//! The contents of a tensor depend on its number alone, so nothing can tell which side wrote it, and at the end every
//! byte is looked at, through the store.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, ensure};
use overspill_io::{Block, Engine, File, Pool, Priority};
use overspill_swap::{Durability, Store, Swapped, Worth};
use overspill_train::check_stop;
use xxhash_rust::xxh3::xxh3_64;

use crate::motion::files::FileSet;
use crate::motion::marks;

/// Tensors in motion.
pub(super) const IN_MOTION: usize = 8;

/// What tensors are marked with.
const VERSION: u64 = 1;

/// Tensors of one length in a store of their own, and the same bytes seen as a plain file.
pub(super) struct State<'a> {
    pub(super) store: Store,
    engine: &'a Engine,
    pool: &'a Pool,
    stop: &'a AtomicBool,
    data: File,
    tensors: Vec<Swapped>,
    bytes: usize,
    /// Where each tensor is in the file.
    offsets: Vec<u64>,
}

impl<'a> State<'a> {
    /// Makes a store at `path` with `count` tensors of `bytes` bytes, and commits it. One that is overwritten in place
    /// keeps its tensors where they are.
    pub(super) fn create(
        path: &Path,
        durability: Durability,
        (count, bytes): (usize, usize),
        (engine, pool): (&'a Engine, &'a Pool),
        stop: &'a AtomicBool,
    ) -> anyhow::Result<Self> {
        let mut blocks = pool.lease_all(&[bytes; IN_MOTION])?;
        blocks.iter_mut().for_each(|block| marks::fill(block));
        drop(blocks);
        let room = Store::capacity_for(durability, Worth::State, std::iter::repeat_n(bytes, count));
        let store = Store::create(path, durability, room, engine)?;
        let mut tensors = Vec::with_capacity(count);
        let mut storing = VecDeque::new();
        for index in 0..count {
            check_stop(stop)?;
            if storing.len() == IN_MOTION {
                tensors.extend(land(&mut storing)?);
            }
            let vacant = store.reserve(index.to_string(), bytes, Worth::State)?;
            let block = marked(pool, bytes, index)?;
            storing.push_back(vacant.fill(block).map_err(|refused| refused.error)?.store());
        }
        while let Some(tensor) = land(&mut storing)? {
            tensors.push(tensor);
        }
        store.commit(serde_json::Value::Null)?;
        let manifest = Store::committed(path)?;
        let mut block = pool.lease(bytes)?;
        for (index, record) in manifest.tensors.iter().enumerate() {
            marks::stamp(&mut block, index, VERSION);
            let is_known = record.name == index.to_string() && record.checksum == xxh3_64(&block);
            ensure!(is_known, "tensor {} has another checksum than XXH3-64", record.name);
        }
        let data = engine.open(&path.join("data"))?;
        let offsets = manifest.tensors.iter().map(|record| record.offset).collect();
        Ok(Self { store, engine, pool, stop, data, tensors, bytes, offsets })
    }

    pub(super) fn count(&self) -> usize {
        self.offsets.len()
    }

    /// Loads every tensor through the store; the rate, in 10⁹ bytes per second.
    pub(super) fn load(&mut self) -> anyhow::Result<f64> {
        self.load_and(ensure_marked)
    }

    /// As [`State::load`], looking at every byte.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let is_whole = |block: &Block, index| {
            ensure!(marks::is_filled(block), "tensor {index} is not what was stored");
            ensure_marked(block, index)
        };
        self.load_and(is_whole).map(drop)
    }

    fn load_and(&mut self, look: impl Fn(&Block, usize) -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let started = Instant::now();
        let count = self.count();
        let mut loading = VecDeque::with_capacity(IN_MOTION);
        let mut waiting = std::mem::take(&mut self.tensors).into_iter().enumerate();
        for _ in 0..count {
            check_stop(self.stop)?;
            while loading.len() < IN_MOTION
                && let Some((index, tensor)) = waiting.next()
            {
                let block = self.pool.lease(self.bytes)?;
                loading.push_back((index, tensor.load(block).map_err(|refused| refused.error)?));
            }
            let (index, oldest) = loading.pop_front().context("nothing is in motion")?;
            let (tensor, block) = oldest.wait().map_err(|failed| failed.error)?.take();
            look(&block, index)?;
            self.tensors.push(tensor);
        }
        Ok(self.gbps(started))
    }

    /// Loads the same bytes from the same places without the store.
    pub(super) fn load_past(&mut self) -> anyhow::Result<f64> {
        let started = Instant::now();
        let mut reading = VecDeque::with_capacity(IN_MOTION);
        let mut waiting = self.offsets.iter().enumerate();
        for _ in 0..self.count() {
            check_stop(self.stop)?;
            while reading.len() < IN_MOTION
                && let Some((index, &offset)) = waiting.next()
            {
                let block = self.pool.lease(self.bytes)?;
                reading.push_back((index, self.engine.read(&self.data, offset, block, Priority::Urgent)));
            }
            let (index, oldest) = reading.pop_front().context("nothing is in motion")?;
            ensure_marked(&oldest.wait().map_err(|failed| failed.error)?, index)?;
        }
        Ok(self.gbps(started))
    }

    /// Stores every tensor once more.
    pub(super) fn save(&mut self) -> anyhow::Result<f64> {
        let started = Instant::now();
        let mut storing = VecDeque::with_capacity(IN_MOTION);
        for (index, tensor) in std::mem::take(&mut self.tensors).into_iter().enumerate() {
            check_stop(self.stop)?;
            if storing.len() == IN_MOTION {
                self.tensors.extend(land(&mut storing)?);
            }
            let block = marked(self.pool, self.bytes, index)?;
            storing.push_back(tensor.overwrite(block).map_err(|refused| refused.error)?.store());
        }
        while let Some(tensor) = land(&mut storing)? {
            self.tensors.push(tensor);
        }
        Ok(self.gbps(started))
    }

    /// Writes the same bytes to the same places without the store.
    pub(super) fn save_past(&mut self) -> anyhow::Result<f64> {
        let started = Instant::now();
        let mut writing = VecDeque::with_capacity(IN_MOTION);
        for (index, &offset) in self.offsets.iter().enumerate() {
            check_stop(self.stop)?;
            if writing.len() == IN_MOTION {
                finish(writing.pop_front())?;
            }
            let block = marked(self.pool, self.bytes, index)?;
            writing.push_back(self.engine.write_behind(&self.data, offset, block, Priority::Background));
        }
        writing.into_iter().try_for_each(|oldest| finish(Some(oldest)))?;
        Ok(self.gbps(started))
    }

    /// Stores the first tensors once more, `count` of them.
    pub(super) fn touch(&mut self, count: usize) -> anyhow::Result<()> {
        for index in 0..count.min(self.count()) {
            let block = marked(self.pool, self.bytes, index)?;
            let tensor = self.tensors.swap_remove(index);
            let storing = tensor.overwrite(block).map_err(|refused| refused.error)?.store();
            self.tensors.push(storing.wait().map_err(|failed| failed.error)?);
            let last = self.tensors.len() - 1;
            self.tensors.swap(index, last);
        }
        Ok(())
    }

    /// Makes what is on storage the next generation; how many seconds that takes.
    pub(super) fn commit(&self) -> anyhow::Result<f64> {
        let started = Instant::now();
        self.store.commit(serde_json::Value::Null)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Takes a snapshot and gives it up again; at which rate the first of both made the state safe.
    pub(super) fn snapshot(&self) -> anyhow::Result<f64> {
        let started = Instant::now();
        self.store.snapshot("bench")?;
        let gbps = self.gbps(started);
        self.store.delete_snapshot("bench")?;
        Ok(gbps)
    }

    /// Copies every tensor into a file that is there already, durably.
    pub(super) fn copy(&self, into: &FileSet) -> anyhow::Result<f64> {
        let started = Instant::now();
        let mut reading = VecDeque::with_capacity(IN_MOTION);
        let mut writing = VecDeque::with_capacity(IN_MOTION);
        let mut waiting = self.offsets.iter();
        for index in 0..self.count() {
            check_stop(self.stop)?;
            // Half of the blocks for either way.
            while reading.len() < IN_MOTION / 2
                && let Some(&offset) = waiting.next()
            {
                let block = self.pool.lease(self.bytes)?;
                reading.push_back(self.engine.read(&self.data, offset, block, Priority::Urgent));
            }
            if writing.len() == IN_MOTION / 2 {
                finish(writing.pop_front())?;
            }
            let oldest = reading.pop_front().context("nothing is in motion")?;
            let block = oldest.wait().map_err(|failed| failed.error)?;
            let (file, offset) = into.place(index);
            writing.push_back(self.engine.write_behind(file, offset, block, Priority::Background));
        }
        writing.into_iter().try_for_each(|oldest| finish(Some(oldest)))?;
        into.place(0).0.sync()?;
        Ok(self.gbps(started))
    }

    /// Looks at every byte of a copy.
    pub(super) fn check_copy(&self, copy: &FileSet) -> anyhow::Result<()> {
        for index in 0..self.count() {
            check_stop(self.stop)?;
            let (file, offset) = copy.place(index);
            let block = self.engine.read(file, offset, self.pool.lease(self.bytes)?, Priority::Urgent);
            let block = block.wait().map_err(|failed| failed.error)?;
            ensure!(marks::is_filled(&block), "the copy of tensor {index} is not what was stored");
            ensure_marked(&block, index)?;
        }
        Ok(())
    }

    /// Bytes of the manifest that was committed last.
    pub(super) fn manifest_bytes(&self) -> anyhow::Result<u64> {
        let path = self.store.path().join("manifest");
        Ok(fs::metadata(&path).with_context(|| format!("cannot look at {}", path.display()))?.len())
    }

    fn gbps(&self, started: Instant) -> f64 {
        (self.count() * self.bytes) as f64 / started.elapsed().as_secs_f64() / 1e9
    }
}

/// A block with the contents of this tensor: every block has the pattern between its ends.
fn marked(pool: &Pool, bytes: usize, index: usize) -> anyhow::Result<Block> {
    let mut block = pool.lease(bytes)?;
    marks::stamp(&mut block, index, VERSION);
    Ok(block)
}

fn ensure_marked(block: &Block, index: usize) -> anyhow::Result<()> {
    ensure!(marks::is_stamped(block, index, VERSION), "tensor {index} is not what was stored");
    Ok(())
}

/// Waits for the oldest tensor, if there is one.
fn land(storing: &mut VecDeque<overspill_swap::Storing>) -> anyhow::Result<Option<Swapped>> {
    let landed = storing.pop_front().map(overspill_swap::Storing::wait).transpose();
    Ok(landed.map_err(|failed| failed.error)?)
}

fn finish(oldest: Option<overspill_io::Ticket<()>>) -> anyhow::Result<()> {
    let finished = oldest.map(overspill_io::Ticket::wait).transpose();
    Ok(finished.map(drop).map_err(|failed| failed.error)?)
}
