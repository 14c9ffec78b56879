//! `overspill bench`: what this machine gives, beside the best that is known.
//!
//! Machines are noisy, so two sides are never measured one after the other but in turns, and what is quoted are
//! medians and the median of the ratios of neighbors. A bench checks its own results and refuses a degraded engine.

pub(crate) mod adam;
mod fio;
pub(crate) mod io;
mod pairs;
