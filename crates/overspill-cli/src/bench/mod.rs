//! `overspill bench`: what this machine gives, beside the best that is known.
//!
//! Machines are noisy, so two sides are never measured one after the other but in turns, and what is quoted are
//! medians and the median of the ratios of neighbors. A bench checks its own results and refuses a degraded engine.

pub(crate) mod adam;
pub(crate) mod cells;
mod fio;
pub(crate) mod io;
pub(crate) mod pairs;
pub(crate) mod step;
pub(crate) mod store;
pub(crate) mod turns;
