//! The long tensors of a swapped home: what they are called, how they are cut, and where one is at the moment.

use overspill_io::BLOCK_ALIGNMENT;
use overspill_swap::tiles;
use overspill_swap::{Slot, Store, StoreError, Worth};

use crate::layout::{ModelLayout, Unit, UnitLayout};

/// A long tensor of a unit, and the tiles that it is cut into.
pub(crate) struct Array {
    pub(crate) name: String,
    pub(crate) bytes: usize,
    pub(crate) tile_bytes: usize,
}

impl Array {
    /// Weights as the recipe stores them; tiles are of so many elements, here and below.
    pub(crate) fn weights(layout: &ModelLayout, unit: &UnitLayout, tile_elements: usize) -> Self {
        let tile_bytes = tile_elements * layout.weight_bytes();
        Self { name: weights_name(unit.unit), bytes: layout.weights_bytes(unit), tile_bytes }
    }

    pub(crate) fn gradient(unit: &UnitLayout, tile_elements: usize) -> Self {
        let name = format!("gradient/{}", unit.unit);
        Self { name, bytes: unit.padded_bytes(), tile_bytes: tile_elements * size_of::<f32>() }
    }

    /// The record of each tile; of some recipes nothing.
    pub(crate) fn moments(layout: &ModelLayout, unit: &UnitLayout, tile_elements: usize) -> Self {
        let (name, bytes) = (moments_name(unit.unit), layout.records_bytes(unit, tile_elements));
        Self { name, bytes, tile_bytes: layout.record_bytes(tile_elements).max(BLOCK_ALIGNMENT) }
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

/// What the records of a unit are called: its moments, and of some recipes the rest of its weights.
pub(crate) fn moments_name(unit: Unit) -> String {
    format!("moments/{unit}")
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
