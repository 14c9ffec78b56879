//! A training loop whose parameters, gradients and optimizer state live on storage.
//!
//! ```text
//! run ── prepares ──► data, checkpoint, plan        what was asked, checked before anything is made
//!  └── trainer ── asks ──► model                    the arithmetic of one unit (embedding, layer, head)
//!         └────── asks ──► home                     where weights, gradients, moments and saved inputs live
//!                           ├─ swapped: overspill-swap's tensors, tiles and pipeline
//!                           └─ memory: the reference
//! ```
//!
//! The state of a run goes to other programs and comes from them through [`transfer`].
//!
//! A unit's weights are fetched, used and released as a whole; gradients leave memory unit by unit; the optimizer
//! updates tile by tile. The plan decides how much memory each of them may take, before the first byte is allocated.
//!
//! ```
//! use overspill_train::{ByteSize, config::ModelConfig, layout::ModelLayout, model::BatchShape};
//! use overspill_train::plan::{Fixed, MemoryPlan, StepShape};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let text = r#"{"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
//!                "intermediate_size": 128}"#;
//! let config = ModelConfig::from_json(text, "config.json".as_ref())?;
//! let layout = ModelLayout::new(&config);
//! let shape = StepShape { batch: BatchShape { batch: 1, seq: 16 }, accumulate: 1 };
//! let budget: ByteSize = "64MiB".parse()?;
//! let plan = MemoryPlan::new(&config, &layout, shape, Fixed::default(), 0, budget.0 as usize)?;
//! assert!(plan.total_bytes() <= budget.0 as usize);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod data;
mod error;
pub mod home;
pub mod identity;
mod init;
pub mod layout;
pub mod model;
pub mod optimizer;
pub mod options;
pub mod path;
pub mod piece;
pub mod plan;
pub mod reading;
pub mod recipe;
mod regular;
pub mod report;
pub mod run;
mod scaling;
pub mod schedule;
mod size;
pub mod storage;
pub mod trainer;
pub mod transfer;
mod volumes;
pub mod wear;

pub use error::{TrainError, check_stop};
pub use init::Initializer;
pub use size::{ByteSize, NotASize};
