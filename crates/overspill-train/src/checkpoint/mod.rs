//! Models in folders as Hugging Face's `transformers` library keeps them.
//!
//! Such a folder holds `config.json`, the weights in `model.safetensors` (or in shards that
//! `model.safetensors.index.json` lists), and the tokenizer's files. [`Checkpoint`] reads one: headers are checked
//! completely when it is opened, weights are read a parameter at a time at their place. [`CheckpointWriter`] writes
//! one, a unit at a time, beside its final name, and gives it that name when it is whole.

mod error;
mod header;
mod plan;
mod reader;
mod staging;
mod writer;

pub use error::{Action, CheckpointError};
pub use reader::Checkpoint;
pub use writer::{CheckpointWriter, SHARD_BYTES_MAX};

/// Where the model's shape is.
const CONFIG: &str = "config.json";
/// Where all weights are, unless they are in shards.
const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor.
const INDEX: &str = "model.safetensors.index.json";

// Weights go between file and memory as they are; the format's byte order is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));
