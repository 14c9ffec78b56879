//! Memory and motion: pinned blocks, a pool of leases, files, and the asynchronous I/O engine.
//!
//! This crate moves bytes between files and memory as fast as the device allows, and knows nothing of what they mean.
//!
//! ```
//! use overspill_io::{BlockClass, Engine, EngineConfig, Pool, Priority};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! // Two blocks of 1 MiB are all the memory there is.
//! let pool = Pool::new(&[BlockClass { name: "example", block_bytes: 1 << 20, count: 2 }])?;
//! let engine = Engine::start(EngineConfig::default(), &pool)?;
//! let file = engine.create(&folder.path().join("state"))?;
//!
//! let mut block = pool.lease(1 << 20)?;
//! block.fill(7);
//! let ticket = engine.write(&file, 0, block, Priority::Background);
//! // … compute meanwhile …
//! let block = ticket.wait()?;
//!
//! let block = engine.read(&file, 0, block, Priority::Urgent).wait()?;
//! assert!(block.iter().all(|&byte| byte == 7));
//! engine.shutdown()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Memory
//!
//! A [`Pool`] is one mapping, cut into blocks whose number is the sum of everybody who can hold one. Who wants to
//! move bytes leases a [`Block`] first, and waits if there is none; nothing else holds requests back. A block is an
//! exclusive range of memory that can be split and joined, never aliased. [`Pool::register_with_cuda`] pins the memory
//! for GPUs as well, with whatever driver is installed where the program runs.
//!
//! # The data path
//!
//! ```text
//! caller          Engine::write(file, offset, block) ──► Ticket
//!                        │ Op { file, offset, block, reply }             ▲ Ok(block) or Failed { error, block }
//!                 bounded channel                                        │
//! driver thread   Queue: ops ─► chunks, by turns ──► Transfer { chunk, file, block part }
//!                        ▲                                  │ submit     │ Arrival { transfer, result }
//! backend                └──────────── classify ◄───────────┴── kernel ──┘
//! ```
//!
//! An operation is cut into chunks, which take turns with those of all other operations, so that the device has a
//! full queue whatever the sizes of the requests, and a small one does not wait for a large one. A chunk takes its
//! bytes along as a block of its own: splitting is what proves that no byte is issued twice. Every answer of the
//! kernel is read by one function; short transfers go on where they stopped, interrupted ones are made again, and
//! anything else is a typed [`IoError`].
//!
//! Offsets and lengths are the caller's choice. What begins or ends inside a sector of a file that is open for direct
//! I/O goes through a bounce block of the engine's; such a write has its file to itself while it lasts, since it also
//! reads and writes what is around it.
//!
//! # Several files as one
//!
//! A [`Space`] takes the same calls as an engine with a file, and deals its bytes to several [`Lane`]s, each a file
//! with an engine of its own, in [`Stripes`]. What fails is what touches the lane that fails; a block comes back whole.
//!
//! # Who owns what
//!
//! The operation owns the block, the file and the reply. While a chunk is with the kernel, the backend owns its part
//! of the block and a handle of the file, in a table that only a completion takes them out of. The caller owns a
//! [`Ticket`], never memory in flight: dropping it abandons the answer, not the operation. An operation is over when
//! its last chunk is home, also after a failure, and its block is whole only then. A failed operation gives the block
//! back: after a failed write it may be the only copy.
//!
//! # Waking and sleeping
//!
//! The driver thread has one place to sleep: in the kernel, waiting for a completion or for its doorbell. Whoever
//! sends an operation, drops the last handle of a registered file or shuts down rings the doorbell; a burst of
//! rings is one wake-up. An idle engine uses no processor time.
//!
//! # Shutting down
//!
//! [`Engine::shutdown`], also by dropping the last [`Engine`], closes the intake; from then on operations come back
//! at once with [`IoError::EngineStopped`] and their block. What was accepted is carried out, within
//! [`EngineConfig::drain_patience`]. What is still with the kernel then is given up: its memory is leased for good
//! and counted in [`EngineStats::leaked_blocks`], for the kernel may write to it at any time. What never went to the
//! kernel comes back with its block.
//!
//! A backend that breaks, or a panic of the driver thread, stops the engine early. Nobody waits in vain then either:
//! what was accepted and what is sent later fails with [`IoError::EngineStopped`], and [`Engine::shutdown`] tells why.
//!
//! # Backends
//!
//! | name | what it is | taken by [`BackendChoice::Auto`] |
//! |---|---|---|
//! | `io_uring` | a ring with registered memory and files | wherever it works |
//! | `aio` | Linux AIO; threads for files that go through the page cache | where io_uring is forbidden |
//! | `threads` | positioned reads and writes | where neither works |
//!
//! Many containers forbid io_uring and leave Linux AIO, which needs a kernel from 4.18 on; threads need nothing that
//! files do not. A backend is used only after it has written and read back a file, with registered memory too if a
//! block is free for it. Falling back to a backend that is not the best one carries the reason of every better one in
//! [`EngineReport::degraded`].
//!
//! With the feature `sim` there is one more, for tests: a simulated kernel that moves real bytes, but answers late, out
//! of order, in part or with errors, all by a seed, and that can lose its power.

mod backend;
mod engine;
mod error;
mod file;
mod memory;
mod probe;
mod space;
mod sync;

#[cfg(feature = "sim")]
pub use backend::fate::SimConfig;
#[cfg(feature = "sim")]
pub use backend::power::Power;
pub use backend::{BackendChoice, BackendKind, UnknownBackend};
pub use engine::Engine;
pub use engine::config::{EngineConfig, EngineReport};
pub use engine::queue::Priority;
pub use engine::stats::EngineStats;
pub use engine::ticket::Ticket;
pub use error::{Direction, Failed, IoError};
pub use file::File;
pub use memory::BLOCK_ALIGNMENT;
pub use memory::arena::MemoryReport;
pub use memory::block::Block;
pub use memory::cuda::{CudaError, CudaReport};
pub use memory::heap::trim_heap;
pub use memory::locking::Locking;
pub use memory::pool::{Pool, PoolError};
pub use memory::shelves::BlockClass;
pub use space::{Lane, Piece, Space, Stripes};
