//! Pinned memory: blocks of huge pages, from which tensors are made.
//!
//! An allocation is as large as was asked for, and arenas are mapped as they are needed: a large one has an arena of its
//! own, small ones of about the same size share one, because mappings of less than a huge page are never on one. What is
//! pinned is known to all handles of the process by its address. It is pinned until it is given up or nobody has it any
//! more, and its memory lives until nobody does, I/O under way included.
//!
//! All locks here are taken by whoever has the GIL, so a fork finds them free.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use overspill_io::{Block, BlockClass, Pool};
use pyo3::prelude::*;

use crate::border::{Owned, outside};
use crate::error::Error;

/// From this size on an allocation has an arena of its own.
const LARGE_BYTES: usize = 1 << 20;
/// The least that small ones are rounded up to.
const SMALL_BYTES_MIN: usize = 4096;
/// What small ones of one size share.
const SLAB_BYTES: usize = 4 << 20;

/// First addresses of what is pinned, and the addresses behind.
static RANGES: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());
/// Arenas for small allocations, by the size of their blocks.
static SLABS: Mutex<BTreeMap<usize, Vec<Pool>>> = Mutex::new(BTreeMap::new());

/// Memory that a tensor is made over, given back when Python drops it.
#[pyclass(frozen, module = "overspill._native")]
pub(crate) struct Pinned {
    address: usize,
    block: Owned<Block>,
}

#[pymethods]
impl Pinned {
    /// Pins `bytes` bytes, at least one; their contents are anything.
    #[new]
    fn new(py: Python<'_>, bytes: usize) -> PyResult<Self> {
        if bytes == 0 {
            return Err(Error::Argument("cannot pin 0 bytes".into()).into());
        }
        let block = if bytes >= LARGE_BYTES {
            outside(py, || pool("pinned", bytes, 1)?.lease(bytes).map_err(Error::from))?
        } else {
            small(bytes).map_err(PyErr::from)?
        };
        let address = block.as_ptr().addr();
        lock(&RANGES).insert(address, address + bytes);
        Ok(Self { address, block: Owned::new(block) })
    }

    /// The address of the first byte.
    #[getter]
    fn address(&self) -> usize {
        self.address
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.block.get()?.len())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        lock(&RANGES).remove(&self.address);
    }
}

/// Gives the pinned memory that begins at `address` up, and says whether there was any. It lives on until no tensor has it.
#[pyfunction]
pub(crate) fn unpin(address: usize) -> bool {
    lock(&RANGES).remove(&address).is_some()
}

/// Whether all of the `bytes` bytes at `address` are pinned memory of one allocation.
#[pyfunction]
pub(crate) fn is_pinned(address: usize, bytes: usize) -> bool {
    covers(&lock(&RANGES), address..address.saturating_add(bytes))
}

fn covers(ranges: &BTreeMap<usize, usize>, asked: Range<usize>) -> bool {
    let found = ranges.range(..=asked.start).next_back();
    found.is_some_and(|(&start, &end)| start <= asked.start && asked.end <= end && asked.start < end)
}

fn small(bytes: usize) -> Result<Block, Error> {
    let block_bytes = bytes.next_power_of_two().max(SMALL_BYTES_MIN);
    let mut slabs = lock(&SLABS);
    // Those that nobody uses any more go, but for the one that serves this.
    let free =
        slabs.get(&block_bytes).and_then(|slabs| slabs.iter().find_map(|slab| slab.try_lease(bytes).ok()));
    slabs.values_mut().for_each(|slabs| slabs.retain(|slab| slab.leased_blocks() > 0));
    if let Some(block) = free {
        return Ok(block);
    }
    let slab = pool("pinned", block_bytes, SLAB_BYTES / block_bytes)?;
    let block = slab.try_lease(bytes)?;
    slabs.entry(block_bytes).or_default().push(slab);
    Ok(block)
}

/// A pool of `count` blocks.
pub(super) fn pool(name: &'static str, block_bytes: usize, count: usize) -> Result<Pool, Error> {
    Ok(Pool::new(&[BlockClass { name, block_bytes, count }])?)
}

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
