//! The long tensors of a swapped home: what they are called, how they are cut, and where one is at the moment.

use overspill_swap::tiles::tile_name;
use overspill_swap::{Slot, Store, StoreError, Worth};

use crate::layout::{ModelLayout, Unit, UnitLayout};

/// A long tensor of a unit, and the lengths of the pieces that it is cut into.
pub(crate) struct Array {
    name: String,
    lengths: Vec<usize>,
}

impl Array {
    /// Weights as the recipe stores them; tiles are of so many elements, here and below.
    pub(crate) fn weights(layout: &ModelLayout, unit: &UnitLayout, tile_elements: usize) -> Self {
        let lengths = unit.pieces(tile_elements).map(|piece| piece.elements() * layout.weight_bytes());
        Self { name: weights_name(unit.unit), lengths: lengths.collect() }
    }

    pub(crate) fn gradient(unit: &UnitLayout, tile_elements: usize) -> Self {
        let lengths = unit.pieces(tile_elements).map(|piece| piece.elements() * size_of::<f32>());
        Self { name: format!("gradient/{}", unit.unit), lengths: lengths.collect() }
    }

    /// The record of each piece; of some recipes nothing.
    pub(crate) fn moments(layout: &ModelLayout, unit: &UnitLayout, tile_elements: usize) -> Self {
        let lengths = unit.pieces(tile_elements).map(|piece| piece.record_bytes());
        let lengths = match layout.records_bytes(unit, tile_elements) {
            0 => Vec::new(),
            _ => lengths.collect(),
        };
        Self { name: moments_name(unit.unit), lengths }
    }

    /// Length of all pieces, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Makes room for it.
    pub(crate) fn reserve(&self, store: &Store, worth: Worth) -> Result<Vec<Slot>, StoreError> {
        self.pieces().map(|(name, bytes)| store.reserve(name, bytes, worth).map(Slot::Vacant)).collect()
    }

    /// Takes up what was committed.
    pub(crate) fn adopt(&self, store: &Store) -> Result<Vec<Slot>, StoreError> {
        self.pieces().map(|(name, bytes)| store.adopt(&name, bytes).map(Slot::Swapped)).collect()
    }

    /// What each piece is called, and its length.
    fn pieces(&self) -> impl Iterator<Item = (String, usize)> {
        self.lengths.iter().enumerate().map(|(index, &bytes)| (tile_name(&self.name, index), bytes))
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
