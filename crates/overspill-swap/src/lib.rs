//! What lives where and when: a store of tensors on storage, tensors whose state is their type, and the pipeline that
//! moves them past a computation.
//!
//! ```text
//! Store ── reserve ──► tensor states (Vacant, Swapped, Loading, Resident, Dirty, Storing) ──► Engine
//!   │                        ▲
//!   └─ commit: manifest      └── tiles: one block, many tensors      pipeline: many items, one computation
//! ```
//!
//! This crate does not know what the bytes mean: the pipeline runs a closure over them. It knows nothing of how
//! they move either; that is `overspill-io`.
//!
//! ```
//! use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
//! use overspill_swap::Store;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let parent = tempfile::tempdir()?;
//! let pool = Pool::new(&[BlockClass { name: "example", block_bytes: 8192, count: 1 }])?;
//! let engine = Engine::start(EngineConfig::default(), &pool)?;
//! let store = Store::create(&parent.path().join("store"), 8192, &engine)?;
//!
//! let mut block = pool.lease(8192)?;
//! block.fill(7);
//! let swapped = store.reserve("bias", 8192)?.fill(block)?.store().wait()?;
//! let resident = swapped.load(pool.lease(8192)?)?.wait()?;
//! assert!(resident.bytes().iter().all(|&byte| byte == 7));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod directory;
mod error;
mod extent;
mod manifest;
pub mod pipeline;
mod store;
mod tensor;
pub mod tiles;

pub use error::StoreError;
pub use extent::{EXTENT_ALIGNMENT, Extent, Extents, Full};
pub use manifest::{Manifest, ManifestError, TensorRecord, VERSION as MANIFEST_VERSION};
pub use store::{Store, Usage};
pub use tensor::{Dirty, LoadFailed, Loading, Refused, Resident, StoreFailed, Storing, Swapped, Vacant};
