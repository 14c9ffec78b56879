//! Text in, batches of token ids out.
//!
//! A [`Tokenizer`] turns text into ids: single bytes, or what a `tokenizer.json` says. A [`Corpus`] is all the
//! tokens of a run, read once and kept at one or four bytes each. [`Batches`] binds a corpus to a model's
//! vocabulary and draws windows from it; the draw is a pure function of seed, step and micro-batch, so a resumed
//! run sees the same batches without any state having been kept.

mod batches;
mod corpus;
mod error;
mod tokenizer;

pub use batches::Batches;
pub use corpus::Corpus;
pub use error::DataError;
pub use tokenizer::{ByteLevelFiles, JsonTokenizer, Tokenizer, byte_level_files};
