//! Which arrays stay in memory for good, when the budget has room beside all that moves.
//!
//! A step goes through everything once, in the same order each time, so whatever was used longest ago is what is used
//! next: a cache that forgets the oldest would forget each array just before its use. A fixed share has no such trouble,
//! and saves the same traffic for every byte of memory. What saves most of it stays first:
//!
//! | array | moves per step | of those, a checkpoint needs |
//! |---|---|---|
//! | weights | read forward, backward and for the update; written once | the write |
//! | gradient, saved input | written once, read once | nothing |
//! | optimizer state | read once, written once | the write |
//!
//! How many bytes each has is the recipe's choice, and no matter here.
//!
//! Units of a kind are chosen evenly, so that transfers and computation take turns.

use crate::layout::{ModelLayout, UnitLayout};

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

    /// What `room` bytes hold.
    pub(super) fn choose(
        layout: &ModelLayout,
        tile_elements: usize,
        inputs: usize,
        input_bytes: usize,
        mut room: usize,
    ) -> Self {
        let mut keeping = Self::nothing(layout.units().len(), inputs);
        let lengths = |bytes: &dyn Fn(&UnitLayout) -> usize| Vec::from_iter(layout.units().iter().map(bytes));
        let weights = lengths(&|unit| layout.weights_bytes(unit));
        let gradients = lengths(&UnitLayout::padded_bytes);
        let moments = lengths(&|unit| layout.records_bytes(unit, tile_elements));
        take(&weights, &mut keeping.weights, &mut room);
        take(&gradients, &mut keeping.gradients, &mut room);
        take(&vec![input_bytes; inputs], &mut keeping.inputs, &mut room);
        take(&moments, &mut keeping.moments, &mut room);
        keeping
    }

    /// Bytes that stay, with arrays of units and saved inputs of these lengths.
    pub(super) fn bytes(&self, layout: &ModelLayout, tile_elements: usize, input_bytes: usize) -> usize {
        let per_unit = layout.units().iter().zip(self.weights.iter().zip(&self.gradients).zip(&self.moments));
        let of_units = per_unit.map(|(unit, ((&weights, &gradient), &moments))| {
            usize::from(weights) * layout.weights_bytes(unit)
                + usize::from(gradient) * unit.padded_bytes()
                + usize::from(moments) * layout.records_bytes(unit, tile_elements)
        });
        of_units.sum::<usize>() + input_bytes * self.inputs.iter().filter(|&&kept| kept).count()
    }

    /// Whether everything stays.
    pub fn is_everything(&self) -> bool {
        let all = [&self.weights, &self.gradients, &self.moments, &self.inputs];
        all.into_iter().flatten().all(|&kept| kept)
    }
}

/// Chooses as many of these lengths as fit, evenly, and takes them off the room.
fn take(lengths: &[usize], chosen: &mut [bool], room: &mut usize) {
    for index in evenly(lengths.len()) {
        if lengths[index] <= *room {
            chosen[index] = true;
            *room -= lengths[index];
        }
    }
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

    #[test]
    fn what_fits_is_taken_and_no_more() {
        let (mut chosen, mut room) = ([false; 4], 21);
        take(&[10, 10, 2, 10], &mut chosen, &mut room);
        assert_eq!((chosen, room), ([true, false, true, false], 9));
    }
}
