//! How numbers are stored between steps: gradients, weights, moments, and the noise that rounds some of them.

pub(crate) mod blocks;
pub(crate) mod gradient;
pub(crate) mod half;
pub(crate) mod moment;
pub(crate) mod noise;
pub(crate) mod weight;
