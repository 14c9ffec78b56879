//! Integration tests of the trainer, one binary.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, its helpers too")]

mod case;
mod checkpoint;
mod data;
mod model;
mod parity;
mod scaling;
mod training;
mod whole;
