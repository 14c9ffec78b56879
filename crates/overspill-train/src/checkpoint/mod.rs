//! Models in folders as Hugging Face's `transformers` library keeps them.
//!
//! Such a folder holds `config.json`, the weights in `model.safetensors` (or in shards that
//! `model.safetensors.index.json` lists), and the tokenizer's files. [`Checkpoint`] reads one: headers are checked
//! completely when it is opened, weights are read a parameter at a time at their place. [`CheckpointWriter`] writes
//! one, a unit at a time, beside its final name, and gives it that name when it is whole. A whole training state, with
//! all moments, goes into a folder of its own kind (`state.rs`). What a process that died was writing is found, and removed,
//! by [`unfinished`].

mod checksum;
mod error;
mod folder;
mod header;
mod plan;
mod reader;
mod staging;
mod state;
mod tensors;
mod unfinished;
mod writer;

pub use error::{Action, CheckpointError};
pub(crate) use folder::TOKENIZER;
pub use plan::Precision;
pub(crate) use plan::TensorPlan;
pub use reader::Checkpoint;
pub(crate) use state::{Naming, StateFolder, StateWriter};
pub use unfinished::{Unfinished, Writer, unfinished};
pub use writer::{CheckpointWriter, SHARD_BYTES_MAX};

/// Where the model's shape is.
const CONFIG: &str = "config.json";
/// What files of weights are called.
const MODEL: plan::Stem = plan::Stem("model");

// Numbers go between file and memory as they are; the format's byte order is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));
