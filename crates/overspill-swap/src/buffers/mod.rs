//! Tensors on their way between memory and files of their own, packed into pinned buffers.
//!
//! ```text
//! Block ──► SwapBuffer ──insert(tensor, path)──► SwapBuffer ──swap_out(engine)──► BufferInFlight ──wait()──► SwapBuffer
//!             ▲    └─ allocate(numel, path) ──► compute view, swap view                 └─ failed: everything comes home
//!             └────────────────────────────── reset() ───────────────────────────────────────┘
//! ```
//!
//! [`swap_in_tensors`] and [`swap_out_tensors`] move whole blocks, one file each. A [`SwapBuffer`] packs many tensors
//! of one [`Dtype`] into one block, a [`SwapBufferPool`] packs them into several, and a [`SwapBufferManager`] is where
//! a fixed set of such blocks comes from. Each of them can be shown with [`dump`].
//!
//! # What is in a buffer, and what is in a file
//!
//! A tensor of `numel` elements has a *compute view*, which is exactly those elements, and a *swap view*, which is the
//! aligned number of elements: `numel` rounded up to the [`Alignment`] that was probed for the file system. Its region
//! of the buffer begins at a multiple of [`BLOCK_ALIGNMENT`](overspill_io::BLOCK_ALIGNMENT) and is the swap view
//! rounded up to that, so it can be cut off as a block of its own, goes to the device without a copy, and is the same
//! on every file system. A file holds one region: the tensor, then zeros, which no view of the reader's shows beyond
//! the aligned number of elements. What is behind the compute view is zeroed when a region is handed out and again
//! when it was read, and nobody can write there.
//!
//! # Who owns what
//!
//! A buffer whose regions are with the engine is a [`BufferInFlight`], which has no views: nobody can touch what the
//! kernel may touch. Its end is the buffer again, after failures too; the error names the first file that failed.
//! Either every file of a call was opened and every transfer was begun, or none was.

mod alignment;
mod buffer;
mod dtype;
mod dump;
mod error;
mod flight;
mod layout;
mod manager;
mod pool;
mod transfer;
mod view;

pub use alignment::{Alignment, MIN_SWAPPABLE_BYTES, Swappable};
pub use buffer::SwapBuffer;
pub use dtype::{Dtype, Element, TensorBytes, UnknownDtype};
pub use dump::{Describe, Dump, Field, dump};
pub use error::SwapError;
pub use flight::{BufferFailed, BufferInFlight, Part, Remains};
pub use manager::SwapBufferManager;
pub use pool::{PoolFailed, PoolInFlight, SwapBufferPool};
pub use transfer::{Refused, SwapFailed, SwapTicket, swap_in_tensors, swap_out_tensors};
pub use view::{View, ViewMut, sized_view, sized_view_mut, sized_views};

pub(crate) use buffer::check_dtype;
pub(crate) use pool::buffers_over;
pub(crate) use transfer::Targets;
