//! Arithmetic on slices: fused optimizer updates, conversions and norms; no files.
//!
//! Every function takes plain slices and works in place, so the caller decides where the memory comes from. A slice is
//! cut into chunks of a fixed size, the chunks are spread over rayon's threads, and each chunk is one pass of a plain
//! loop that the compiler vectorizes once per instruction set ([`Isa`]). Slices of at most one chunk stay on the
//! calling thread.
//!
//! The results do not depend on any of that: the element-wise functions round every element on its own, with fused
//! multiply-adds only where the source says so, and the reductions add in an order fixed by the length alone. The same input
//! gives the same bits on one thread or many, on every instruction set, and for the element-wise functions in one call
//! or many over parts. (Only the payload of a NaN is left open.)
//!
//! # Example
//!
//! ```
//! use overspill_optim::{AdamWConfig, AdamWStep, Isa, adamw, sum_of_squares};
//!
//! let isa = Isa::detect();
//! let mut param = vec![1.0_f32; 1000];
//! let grad = vec![0.5_f32; 1000];
//! let (mut exp_avg, mut exp_avg_sq) = (vec![0.0; 1000], vec![0.0; 1000]);
//!
//! // Clip the gradient to a global norm of 1.
//! let norm = sum_of_squares(isa, &grad).sqrt();
//! let clip = (1.0 / norm).min(1.0) as f32;
//!
//! let step = AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.0, 1, clip);
//! adamw(isa, &step, &mut param, &grad, &mut exp_avg, &mut exp_avg_sq)?;
//! // The first step of Adam moves every element by the learning rate.
//! assert!((param[0] - 0.999).abs() < 1e-6);
//! # Ok::<(), overspill_optim::LengthMismatch>(())
//! ```
#![forbid(unsafe_code)]

mod adamw;
mod convert;
mod error;
mod fields;
mod format;
mod isa;
mod job;
mod norm;
mod pass;
mod recipe;
mod record;
mod remainder;
mod rule;
mod scaler;
mod stream;
mod whole;

pub use adamw::adamw;
pub use convert::{widen_bf16, widen_f16};
pub use error::{ApplyError, LengthMismatch, RecipeError};
pub use format::gradient::Gradient;
pub use format::moment::{BLOCK_ELEMENTS, MomentFormat};
pub use format::noise::Origin;
pub use format::weight::{WeightFormat, Weights};
pub use isa::Isa;
pub use norm::sum_of_squares;
pub use recipe::{Outcome, Recipe, Tile};
pub use record::{FIELD_ALIGNMENT_BYTES, Field, RecordLayout};
pub use remainder::{join_remainders, split_remainders};
pub use rule::adafactor::{AdafactorConfig, AdafactorStep};
pub use rule::adagrad::{AdagradConfig, AdagradStep};
pub use rule::adam::{AdamStep, AdamWConfig, AdamWStep};
pub use rule::lion::{LionConfig, LionStep};
pub use rule::muon::{LearningRateAdjustment, MuonConfig, MuonStep};
pub use rule::sgd::{SgdConfig, SgdStep};
pub use rule::{Rule, Step};
pub use scaler::{LossScaler, LossScalerConfig};
pub use stream::{add_assign, triad};
pub use whole::{Shape, WholeRecipe, WholeRule, WholeStep};

/// Elements of one chunk: the unit of work of a thread, and the block of a reduction. Large enough that handing it out
/// costs nothing beside the pass over it, small enough that a layer's parameters fill every thread.
const CHUNK_ELEMENTS: usize = 64 * 1024;
