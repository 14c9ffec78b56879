//! Files full of known blocks, and an engine that moves them: what `bench io` and `tune` measure.
//!
//! A [`files::FileSet`] knows what each of its blocks should hold. A [`mover::Mover`] keeps a number of blocks in motion,
//! marks each before it is written, and looks at each that was read; so no figure is that of bytes that were lost.

pub(crate) mod driver;
pub(crate) mod files;
pub(crate) mod marks;
pub(crate) mod mover;
