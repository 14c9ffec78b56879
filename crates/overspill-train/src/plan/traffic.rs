//! What a step moves, array by array, if the array does not stay in memory (pure).
//!
//! | array | read | written | of those, a commit needs |
//! |---|---|---|---|
//! | weights of a layer | forward, backward, for the update | by the update | the write |
//! | weights of the embedding and the head | forward, for the update | by the update | the write |
//! | gradient, saved input | once | once | nothing |
//! | optimizer state | for the update | by the update | the write |
//!
//! A head that is tied to the embedding reads the embedding's weights once more, and puts its share of the embedding's
//! gradient away before the embedding adds its own. How many bytes each array has is the recipe's choice, and no matter
//! here.

use std::ops::AddAssign;

use overspill_swap::Durability;

use super::MemoryPlan;
use crate::layout::{ModelLayout, Unit, UnitLayout};

/// What an array is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Weights,
    Gradient,
    Input,
    Moments,
}

/// An array that a step moves unless it stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mover {
    pub(super) kind: Kind,
    /// Its place among those of its kind: the unit's, or [`MemoryPlan::input_index`].
    pub(super) index: usize,
    pub(super) bytes: usize,
    reads: usize,
    writes: usize,
}

impl Mover {
    /// How often a step moves each byte.
    pub(super) fn moves(&self) -> usize {
        self.reads + self.writes
    }

    /// How often it moves each byte that stays, at most: what is committed is written all the same.
    pub(super) fn moves_that_stay(&self) -> usize {
        match self.kind {
            Kind::Weights | Kind::Moments => self.writes,
            Kind::Gradient | Kind::Input => 0,
        }
    }

    /// What a step moves of it.
    pub(super) fn traffic(&self, stays: bool, durability: Durability) -> Traffic {
        let (reads, writes) = match (stays, durability) {
            (false, _) => (self.reads, self.writes),
            (true, Durability::Step) => (0, self.moves_that_stay()),
            (true, Durability::None) => (0, 0),
        };
        let bytes = self.bytes as u64;
        Traffic { bytes_read: bytes * reads as u64, bytes_written: bytes * writes as u64 }
    }
}

/// What a step moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
}

impl Traffic {
    /// Bytes in both directions.
    pub fn bytes(&self) -> u64 {
        self.bytes_read + self.bytes_written
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
    }
}

impl MemoryPlan {
    /// What a step moves with this plan. What stays in memory is written by a step that is committed only.
    pub fn traffic(&self, layout: &ModelLayout, durability: Durability) -> Traffic {
        self.traffic_of(self.movers(layout), durability)
    }

    /// Of that, weights and the optimizer's records: what is written of them is a whole new state.
    pub fn state_traffic(&self, layout: &ModelLayout, durability: Durability) -> Traffic {
        let is_state = |mover: &Mover| matches!(mover.kind, Kind::Weights | Kind::Moments);
        self.traffic_of(self.movers(layout).filter(is_state), durability)
    }

    fn traffic_of(&self, movers: impl Iterator<Item = Mover>, durability: Durability) -> Traffic {
        let mut all = Traffic::default();
        for mover in movers {
            all += mover.traffic(self.keeping.has(mover.kind, mover.index), durability);
        }
        all
    }

    /// Every array that could stay.
    pub(super) fn movers(&self, layout: &ModelLayout) -> impl Iterator<Item = Mover> {
        let (tile, has_tied_head) = (self.tile_elements, self.has_tied_head);
        let of = move |(index, unit): (usize, &UnitLayout)| {
            let is_tied = has_tied_head && unit.unit == Unit::Embedding;
            let passes = if is_tied || matches!(unit.unit, Unit::Layer(_)) { 2 } else { 1 };
            let shares = if is_tied { 2 } else { 1 };
            let mover = |kind, bytes, reads, writes| Mover { kind, index, bytes, reads, writes };
            [
                mover(Kind::Weights, layout.weights_bytes(unit), passes + 1, 1),
                mover(Kind::Gradient, unit.padded_bytes(), shares, shares),
                mover(Kind::Moments, layout.records_bytes(unit, tile), 1, 1),
            ]
        };
        let bytes = self.input_bytes();
        let input = move |index| Mover { kind: Kind::Input, index, bytes, reads: 1, writes: 1 };
        let inputs = (0..self.saved_inputs()).map(input);
        layout.units().iter().enumerate().flat_map(of).chain(inputs)
    }
}
