//! The long tensors of a swapped home: what they are called, how they are cut, and where one is at the moment.

use std::mem;

use overspill_io::Block;
use overspill_swap::tiles::{self, StoringTiles};
use overspill_swap::{Store, StoreError, Swapped, Vacant, Worth};

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
    pub(crate) fn reserve(&self, store: &Store, worth: Worth) -> Result<Vec<Vacant>, StoreError> {
        tiles::reserve(store, &self.name, self.bytes, self.tile_bytes, worth)
    }

    /// Takes up what was committed.
    pub(crate) fn adopt(&self, store: &Store) -> Result<Vec<Swapped>, StoreError> {
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

/// Where a tensor that is written once and read once per step is.
#[derive(Debug)]
pub(super) enum Place {
    Vacant(Vec<Vacant>),
    Storing(StoringTiles),
    Swapped(Vec<Swapped>),
    /// Being moved from one of the others to another.
    Moving,
}

impl Place {
    pub(super) fn take(&mut self) -> Self {
        mem::replace(self, Self::Moving)
    }

    /// The tiles on storage, after waiting for the write that may be under way.
    pub(super) fn settle(&mut self) -> Result<Vec<Swapped>, StoreError> {
        match self.take() {
            Self::Storing(tiles) => tiles.wait(),
            Self::Swapped(tiles) => Ok(tiles),
            Self::Vacant(_) | Self::Moving => unreachable!("a tensor is put away before it is asked for"),
        }
    }

    /// Starts writing new contents.
    pub(super) fn put(&mut self, block: Block) -> Result<(), StoreError> {
        let storing = match self.take() {
            Self::Vacant(tiles) => StoringTiles::fill(tiles, block)?,
            Self::Swapped(tiles) => StoringTiles::overwrite(tiles, block)?,
            Self::Storing(tiles) => StoringTiles::overwrite(tiles.wait()?, block)?,
            Self::Moving => unreachable!("a tensor that is being moved is not put away"),
        };
        *self = Self::Storing(storing);
        Ok(())
    }

    /// Whether reading could start without waiting for a write.
    pub(super) fn is_settled(&self) -> bool {
        match self {
            Self::Swapped(_) => true,
            Self::Storing(tiles) => tiles.is_done(),
            Self::Vacant(_) | Self::Moving => false,
        }
    }
}
