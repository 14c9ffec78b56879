//! A writable array of `f32`, in a leased block or in memory of its own.

use std::ops::{Deref, DerefMut};

use bytes::Bytes;
use overspill_io::Block;

/// An array of `f32` that knows where its memory has to go back to.
#[derive(Debug)]
pub enum Buffer {
    /// A block of the pool; its length is a multiple of four bytes.
    Leased(Block),
    /// Ordinary memory.
    Owned(Vec<f32>),
}

impl Buffer {
    /// Makes the contents shareable; the memory goes back when the last reader is done.
    pub(crate) fn freeze(block: Block) -> Bytes {
        Bytes::from_owner(block)
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Leased(block) => floats(block),
            Self::Owned(values) => values,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Leased(block) => floats_mut(block),
            Self::Owned(values) => values,
        }
    }
}

// Blocks start at a disk block's alignment and units end at one, so the casts can't fail.
pub(crate) fn floats(bytes: &[u8]) -> &[f32] {
    bytemuck::cast_slice(bytes)
}

pub(crate) fn floats_mut(bytes: &mut [u8]) -> &mut [f32] {
    bytemuck::cast_slice_mut(bytes)
}
