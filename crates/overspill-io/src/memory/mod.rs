//! Memory that the kernel may touch: one arena, cut into blocks, leased from a pool.
//!
//! [`arena`] maps the memory once, [`shelves`] lays it out in blocks, [`ledger`] says who gets which and who waits,
//! [`pool`] is what users see of that, and [`block`] is the holder's handle. All of it is fixed when the pool is made;
//! nothing is mapped or grown while training runs. [`cuda`] tells a GPU's driver about the memory, when asked to.

pub(crate) mod arena;
pub(crate) mod block;
pub(crate) mod cuda;
pub(crate) mod heap;
mod ledger;
pub(crate) mod locking;
pub(crate) mod pool;
pub(crate) mod shelves;

/// Every block starts at a multiple of this many bytes, and blocks are split only at multiples of it.
///
/// It is a multiple of what direct I/O asks of memory on every file system in use (512 or 4096 bytes).
pub const BLOCK_ALIGNMENT: usize = 4096;
