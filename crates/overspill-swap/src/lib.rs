//! What lives where and when: a store of tensors on storage, tensors whose state is their type, and the pipeline that
//! moves them past a computation.
//!
//! ```text
//! Store ── reserve ──► tensor states (Vacant, Swapped, Loading, Resident, Dirty, Storing) ──► Engine
//!   │                        ▲
//!   └─ commit: generation    └── tiles: one block, many tensors      pipeline: many items, one computation
//! ```
//!
//! This crate does not know what the bytes mean: the pipeline runs a closure over them. It knows nothing of how
//! they move either; that is `overspill-io`.
//!
//! ```
//! use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
//! use overspill_swap::{Durability, Store, Worth};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let parent = tempfile::tempdir()?;
//! let pool = Pool::new(&[BlockClass { name: "example", block_bytes: 8192, count: 1 }])?;
//! let engine = Engine::start(EngineConfig::default(), &pool)?;
//! let directory = parent.path().join("store");
//! // Room for the committed version and the next one.
//! let store = Store::create(&directory, Durability::Step, 2 * 8192, &engine)?;
//!
//! let mut block = pool.lease(8192)?;
//! block.fill(7);
//! let swapped = store.reserve("bias", 8192, Worth::State)?.fill(block)?.store().wait()?;
//! store.commit(serde_json::json!({ "step": 1 }))?;
//! let resident = swapped.load(pool.lease(8192)?)?.wait()?;
//! assert!(resident.bytes().iter().all(|&byte| byte == 7));
//! # Ok(())
//! # }
//! ```
//!
//! # Tensors in files of their own
//!
//! Where every tensor is to have its own file, [`buffers`] packs them into pinned memory and moves them, and the
//! [`swapper`] does so behind the caller's back. A file holds the tensor, and zeros up to a multiple of 4096 bytes.
//!
//! ```
//! use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
//! use overspill_swap::buffers::{Alignment, Dtype, SwapBuffer};
//! use overspill_swap::swapper::AsyncTensorSwapper;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let pool = Pool::new(&[BlockClass { name: "example", block_bytes: 1 << 20, count: 2 }])?;
//! let engine = Engine::start(EngineConfig::default(), &pool)?;
//! let alignment = Alignment::probe(&engine, folder.path())?;
//! let path = folder.path().join("exp_avg");
//!
//! let mut swapper = AsyncTensorSwapper::new(&engine, alignment);
//! swapper.add_buffers(pool.lease_all(&[1 << 20, 1 << 20])?, Dtype::F32)?;
//! let moments = vec![0.5_f32; 1000];
//! swapper.swap_out_tensors(&[moments.as_slice().into()], &[&path])?;
//! drop(moments); // It was copied; the write goes on behind our back.
//! let mut released = swapper.release_buffers()?;
//! assert_eq!(released.stats.numel, 1000);
//!
//! let mut buffer = SwapBuffer::new(released.blocks.remove(0), Dtype::F32, alignment);
//! buffer.allocate(1000, &path)?;
//! let buffer = buffer.swap_in(&engine)?.wait()?;
//! let moments = buffer.view_at(0).ok_or("one tensor is in the buffer")?;
//! assert_eq!(moments.elements::<f32>()?, vec![0.5; 1000]);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "fuzz"))]
pub mod attack;
mod bandwidth;
pub mod buffers;
mod directory;
mod error;
mod extent;
mod ledger;
mod manifest;
mod names;
pub mod optimizer;
pub mod pipeline;
mod profile;
mod sites;
mod slot;
mod snapshot;
mod steps;
mod store;
mod survey;
pub mod swapper;
mod tensor;
pub mod tiles;
mod volume;
mod wish;

pub use bandwidth::{Bandwidth, measure};
pub use directory::Owner;
pub use error::{Fallback, Remedy, StoreError};
pub use extent::{EXTENT_ALIGNMENT, Extent, Extents, Full};
pub use ledger::{Durability, Worth};
pub use manifest::{LaneRecord, Manifest, ManifestError, TensorRecord, VERSION as MANIFEST_VERSION};
#[cfg(feature = "sim")]
pub use names::outage::{Endangered, Links, endanger};
pub use profile::{Profile, ProfileError};
pub use sites::{ServedVolume, VolumeSite, VolumeSites};
pub use slot::{Kept, Slot};
#[cfg(feature = "sim")]
pub use steps::{Step, watch_steps};
pub use store::{Compared, Store, Usage, View, ViewLoading};
pub use survey::{
    Blocks, Damage, Damaged, DataFile, Examination, Findings, Fragmentation, Generation, GenerationState,
    Leftover, Remains, Removal, Removed, Scope, Survey, Verdict, leftovers, remove_leftover,
};
pub use tensor::{
    Dirty, LoadFailed, Loading, Refused, Resident, Saving, StoreFailed, Storing, Swapped, Vacant,
};
pub use volume::{Volume, weights};
pub use wish::{Answer, Asked, Deleted, Wish};
