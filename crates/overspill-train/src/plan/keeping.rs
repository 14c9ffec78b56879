//! Which arrays stay in memory for good, when the budget has room beside all that moves.
//!
//! A step goes through everything once, in the same order each time, so whatever was used longest ago is what is used
//! next: a cache that forgets the oldest would forget each array just before its use. A fixed share has no such trouble,
//! and saves the same traffic for every byte of memory. What a step [moves](super::traffic) most often stays first, and of
//! that, what a commit needs least: weights of layers, those of the embedding and the head, gradients and saved inputs, then
//! moments.
//!
//! The order does not depend on the room, and nothing behind an array in it saves more per byte. So more room never moves
//! more bytes, whatever is left unfilled because the next array is too long for it.
//!
//! Units of a kind are chosen evenly, so that transfers and computation take turns.

use std::cmp::Reverse;

use super::MemoryPlan;
use super::traffic::{Kind, Mover};
use crate::layout::ModelLayout;

/// The arrays that stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keeping {
    /// By the unit's place.
    pub weights: Vec<bool>,
    /// By the unit's place.
    pub gradients: Vec<bool>,
    /// By the unit's place.
    pub moments: Vec<bool>,
    /// By [`MemoryPlan::input_index`](super::MemoryPlan::input_index).
    pub inputs: Vec<bool>,
}

/// Of the room beside everything else, this part is left alone: for what the plan may have underestimated.
const MARGIN: usize = 8;

impl Keeping {
    /// Nothing.
    pub fn nothing(units: usize, inputs: usize) -> Self {
        let none = vec![false; units];
        Self { weights: none.clone(), gradients: none.clone(), moments: none, inputs: vec![false; inputs] }
    }

    /// What of `bytes` that nothing else needs may be kept in.
    pub(super) fn room(bytes: usize) -> usize {
        bytes - bytes / MARGIN
    }

    /// What `room` bytes hold of what this plan moves, and how many of them it takes.
    pub(super) fn choose(plan: &MemoryPlan, layout: &ModelLayout, room: usize) -> (Self, usize) {
        let mut keeping = Self::nothing(layout.units().len(), plan.saved_inputs());
        let mut left = room;
        for mover in in_order(&Vec::from_iter(plan.movers(layout))) {
            if mover.bytes <= left {
                *keeping.of(mover.kind, mover.index) = true;
                left -= mover.bytes;
            }
        }
        (keeping, room - left)
    }

    /// Whether an array stays.
    pub(super) fn has(&self, kind: Kind, index: usize) -> bool {
        match kind {
            Kind::Weights => self.weights[index],
            Kind::Gradient => self.gradients[index],
            Kind::Input => self.inputs[index],
            Kind::Moments => self.moments[index],
        }
    }

    fn of(&mut self, kind: Kind, index: usize) -> &mut bool {
        match kind {
            Kind::Weights => &mut self.weights[index],
            Kind::Gradient => &mut self.gradients[index],
            Kind::Input => &mut self.inputs[index],
            Kind::Moments => &mut self.moments[index],
        }
    }

    /// Whether everything stays.
    pub fn is_everything(&self) -> bool {
        let all = [&self.weights, &self.gradients, &self.moments, &self.inputs];
        all.into_iter().flatten().all(|&kept| kept)
    }
}

/// What a byte of memory saves most traffic for comes first; of equal ones each kind by itself, and evenly.
fn in_order(movers: &[Mover]) -> Vec<Mover> {
    let kinds = [Kind::Weights, Kind::Gradient, Kind::Input, Kind::Moments];
    let of_kind = |kind| {
        let all = Vec::from_iter(movers.iter().filter(|mover| mover.kind == kind).copied());
        evenly(all.len()).map(move |place| all[place])
    };
    let mut order = Vec::from_iter(kinds.into_iter().flat_map(of_kind));
    order.sort_by_key(|mover| Reverse((mover.moves(), mover.moves() - mover.moves_that_stay())));
    order
}

/// All numbers below `count`, each as far from those before it as can be: any first part of them is spread evenly.
fn evenly(count: usize) -> impl Iterator<Item = usize> {
    let bits = count.next_power_of_two().trailing_zeros();
    let reversed =
        move |number: usize| if bits == 0 { 0 } else { number.reverse_bits() >> (usize::BITS - bits) };
    (0..count.next_power_of_two()).map(reversed).filter(move |&index| index < count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once_and_half_of_them_are_every_other_one() {
        for count in 0..70 {
            let mut order: Vec<usize> = evenly(count).collect();
            order.sort_unstable();
            assert_eq!(order, Vec::from_iter(0..count));
        }
        assert_eq!(Vec::from_iter(evenly(8)), [0, 4, 2, 6, 1, 5, 3, 7]);
    }
}
