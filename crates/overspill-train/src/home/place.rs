//! The long tensors of a swapped home: what they are called, how they are cut, and where one is at the moment.

use overspill_swap::tiles;
use overspill_swap::{Slot, Store, StoreError, Worth};

use crate::layout::{Unit, UnitLayout};

/// A long tensor of a unit, and the tiles that it is cut into.
pub(crate) struct Array {
    pub(crate) name: String,
    pub(crate) bytes: usize,
    pub(crate) tile_bytes: usize,
}

impl Array {
    /// `tile_bytes` are those of a tile of weights, here and below.
    pub(crate) fn weights(unit: &UnitLayout, tile_bytes: usize) -> Self {
        Self { name: weights_name(unit.unit), bytes: unit.padded_bytes(), tile_bytes }
    }

    pub(crate) fn gradient(unit: &UnitLayout, tile_bytes: usize) -> Self {
        Self { name: format!("gradient/{}", unit.unit), ..Self::weights(unit, tile_bytes) }
    }

    /// Both moments of each tile, one behind the other.
    pub(crate) fn moments(unit: &UnitLayout, tile_bytes: usize) -> Self {
        let (name, bytes) = (moments_name(unit.unit), 2 * unit.padded_bytes());
        Self { name, bytes, tile_bytes: 2 * tile_bytes }
    }

    /// Makes room for it.
    pub(crate) fn reserve(&self, store: &Store, worth: Worth) -> Result<Vec<Slot>, StoreError> {
        tiles::reserve(store, &self.name, self.bytes, self.tile_bytes, worth)
    }

    /// Takes up what was committed.
    pub(crate) fn adopt(&self, store: &Store) -> Result<Vec<Slot>, StoreError> {
        tiles::adopt(store, &self.name, self.bytes, self.tile_bytes)
    }
}

/// What the weights of a unit are called in the store.
pub(crate) fn weights_name(unit: Unit) -> String {
    format!("weights/{unit}")
}

/// What both moments of a unit are called.
pub(crate) fn moments_name(unit: Unit) -> String {
    format!("moments/{unit}")
}

/// Both moments of a tile.
pub(crate) fn halves(moments: &mut [f32]) -> (&mut [f32], &mut [f32]) {
    let middle = moments.len() / 2;
    moments.split_at_mut(middle)
}

/// Where a tensor that is written once and read once per step is put.
#[derive(Debug)]
pub(super) enum Place<M> {
    /// On storage, or on its way; empty while it is being moved.
    Tiles(Vec<Slot>),
    /// In ordinary memory.
    Memory(M),
}

impl<M: Default> Place<M> {
    /// In memory if it is to stay there, on storage otherwise.
    pub(super) fn new(
        stays: bool,
        reserve: impl FnOnce() -> Result<Vec<Slot>, StoreError>,
    ) -> Result<Self, StoreError> {
        if stays { Ok(Self::Memory(M::default())) } else { reserve().map(Self::Tiles) }
    }
}
