//! Records and the fused pass: the same bits on every path, in every combination of rule and formats; what the formats
//! promise; and calls that are refused.

use std::ops::Range;

use overspill_optim::{
    AdagradConfig, AdagradStep, AdamStep, AdamWConfig, AdamWStep, ApplyError, BLOCK_ELEMENTS, Gradient, Isa,
    LengthMismatch, LionConfig, LionStep, LossScaler, LossScalerConfig, MomentFormat, Origin, Outcome,
    Recipe, RecipeError, Rule, SgdConfig, SgdStep, Step, Tile, WeightFormat, Weights,
};
use proptest::prelude::*;

use crate::{CHUNK_ELEMENTS, bits, noise, on_threads};

const WEIGHTS: [WeightFormat; 4] = [
    WeightFormat::F32,
    WeightFormat::Bf16WithRemainder,
    WeightFormat::F16WithMaster,
    WeightFormat::Bf16Stochastic,
];
const MOMENTS: [MomentFormat; 3] = [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8];
const ADAMW: Rule = Rule::AdamW { amsgrad: false };
const ORIGIN: Origin = Origin { seed: 42, parameter: 7, step: 3, element: 0 };

/// Every rule, and its step number `step`.
fn rules(step: u64) -> Vec<(Rule, Step)> {
    let (lr, decay, scale) = (1e-2, 0.1, 0.5);
    let adam = AdamWConfig::default();
    let sgd = SgdConfig { momentum: 0.9, dampening: 0.1, nesterov: true };
    let adamw = Step::AdamW(AdamWStep::new(&adam, lr, decay, step, scale));
    let coupled = Step::Adam(AdamStep::new(&adam, lr, decay, step, scale));
    let sgd = Step::Sgd(SgdStep::new(&sgd, lr, decay, step, scale));
    let adagrad = Step::Adagrad(AdagradStep::new(&AdagradConfig::default(), lr, decay, step, scale));
    vec![
        (ADAMW, adamw),
        (Rule::AdamW { amsgrad: true }, adamw),
        (Rule::Adam { amsgrad: false }, coupled),
        (Rule::Adam { amsgrad: true }, coupled),
        (Rule::Sgd { momentum: false }, sgd),
        (Rule::Sgd { momentum: true }, sgd),
        (Rule::Adagrad { initial_accumulator: 0.1 }, adagrad),
        (Rule::Lion, Step::Lion(LionStep::new(&LionConfig::default(), lr, decay, scale))),
    ]
}

/// Every recipe that exists, with its step number `step`.
fn recipes(step: u64) -> Vec<(Recipe, Step)> {
    let mut recipes = Vec::new();
    for (rule, step) in rules(step) {
        for weights in WEIGHTS {
            for moments in MOMENTS {
                recipes.extend(Recipe::new(rule, weights, moments).map(|recipe| (recipe, step)));
            }
        }
    }
    assert_eq!(recipes.len(), 4 * (6 * 3 + 2));
    recipes
}

/// The gradient of a parameter in each format.
#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    Bf16,
    F16,
}

/// A tile's record and weights.
#[derive(Clone)]
struct State {
    recipe: Recipe,
    elements: usize,
    record: Vec<u64>,
    single: Vec<f32>,
    half: Vec<u16>,
}

impl State {
    fn new(recipe: Recipe, values: &[f32]) -> Self {
        let elements = values.len();
        let bytes = recipe.record_bytes(elements).expect("tests' records are small");
        let mut state = Self {
            recipe,
            elements,
            record: vec![0; bytes / 8],
            single: vec![0.0; elements],
            half: vec![0; elements],
        };
        let outcome =
            recipe.initialize(Isa::detect(), state.tile(0..elements), Gradient::F32(values), ORIGIN);
        assert_eq!(outcome, Ok(Outcome::Updated));
        state
    }

    fn tile(&mut self, range: Range<usize>) -> Tile<'_> {
        let weights = match self.recipe.weights() {
            WeightFormat::F32 => Weights::F32(&mut self.single[range.clone()]),
            WeightFormat::F16WithMaster => Weights::F16(&mut self.half[range.clone()]),
            WeightFormat::Bf16WithRemainder | WeightFormat::Bf16Stochastic => {
                Weights::Bf16(&mut self.half[range.clone()])
            }
        };
        Tile { record: bytemuck::cast_slice_mut(&mut self.record), elements: self.elements, range, weights }
    }

    /// Updates a range, which begins `origin.element` elements into its parameter.
    fn step(
        &mut self,
        isa: Isa,
        step: &Step,
        range: Range<usize>,
        grad: &[f32],
        kind: Kind,
        origin: Origin,
    ) -> Outcome {
        let recipe = self.recipe;
        let upper: Vec<u16> = grad.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
        let small: Vec<u16> = grad.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let gradient = match kind {
            Kind::F32 => Gradient::F32(grad),
            Kind::Bf16 => Gradient::Bf16(&upper),
            Kind::F16 => Gradient::F16(&small),
        };
        recipe.apply(isa, step, self.tile(range), gradient, origin).expect("the range is in the tile")
    }

    /// As [`State::step`], with a gradient that is finite.
    fn good_step(
        &mut self,
        isa: Isa,
        step: &Step,
        range: Range<usize>,
        grad: &[f32],
        kind: Kind,
        origin: Origin,
    ) {
        assert_eq!(self.step(isa, step, range, grad, kind, origin), Outcome::Updated);
    }

    fn masters(&mut self) -> Vec<f32> {
        let mut masters = vec![0.0; self.elements];
        let recipe = self.recipe;
        recipe.read_masters(self.tile(0..self.elements), &mut masters).expect("the range is in the tile");
        masters
    }

    fn same(&self, other: &Self) -> bool {
        self.record == other.record && bits(&self.single) == bits(&other.single) && self.half == other.half
    }
}

#[test]
fn every_recipe_gives_the_bits_of_the_scalar_reference_on_every_instruction_set() {
    for (recipe, step) in recipes(2) {
        for kind in [Kind::F32, Kind::Bf16, Kind::F16] {
            for elements in [0, 1, 31, 255, 256, 600] {
                let (values, grad) = (noise(elements, 1), noise(elements, 2));
                let stepped = |isa| {
                    let mut state = State::new(recipe, &values);
                    for number in 3..5 {
                        let origin = Origin { step: number, ..ORIGIN };
                        let outcome = state.step(isa, &step, 0..elements, &grad, kind, origin);
                        assert_eq!(outcome, Outcome::Updated);
                    }
                    state
                };
                let scalar = stepped(Isa::Scalar);
                for isa in Isa::available() {
                    assert!(stepped(isa).same(&scalar), "{isa} {recipe:?} {kind:?} {elements}");
                }
            }
        }
    }
}

#[test]
fn every_recipe_gives_the_same_bits_on_one_thread_and_on_many() {
    let elements = 3 * CHUNK_ELEMENTS + 77;
    let (values, grad) = (noise(elements, 1), noise(elements, 2));
    for (recipe, step) in recipes(2) {
        let stepped = || {
            let mut state = State::new(recipe, &values);
            // The index of the last elements does not fit into 32 bits.
            let origin = ORIGIN.advance((1 << 32) - 2 * CHUNK_ELEMENTS as u64);
            state.good_step(Isa::detect(), &step, 0..elements, &grad, Kind::Bf16, origin);
            state
        };
        assert!(on_threads(1, stepped).same(&on_threads(5, stepped)), "{recipe:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_recipe_gives_the_same_bits_for_any_cut_into_ranges_and_tiles(
        blocks in 1..6_usize,
        rest in 0..BLOCK_ELEMENTS,
        cut in 0.0..1.0_f64,
        before in 0..700_usize,
        seed in 1..u64::MAX / 2,
    ) {
        let elements = blocks * BLOCK_ELEMENTS + rest;
        let (values, grad) = (noise(elements, seed), noise(elements, seed + 1));
        for (recipe, step) in recipes(2) {
            let unit = recipe.cut_elements();
            let cut = (elements as f64 * cut) as usize / unit * unit;
            let before = before / unit * unit;
            let mut whole = State::new(recipe, &values);
            whole.good_step(Isa::detect(), &step, 0..elements, &grad, Kind::F32, ORIGIN);

            let mut ranges = State::new(recipe, &values);
            for range in [cut..elements, 0..cut] {
                let origin = ORIGIN.advance(range.start as u64);
                ranges.good_step(Isa::detect(), &step, range.clone(), &grad[range], Kind::F32, origin);
            }
            prop_assert!(ranges.same(&whole), "{:?}", recipe);

            // A tile that begins with something else, and ends with the parameter's first part.
            let mut tile = State::new(recipe, &noise(before + cut, seed + 2));
            let origin = ORIGIN;
            let adopted = recipe.initialize(Isa::detect(), tile.tile(before..before + cut), Gradient::F32(&values[..cut]), origin);
            prop_assert_eq!(adopted, Ok(Outcome::Updated));
            let others = tile.masters()[..before].to_vec();
            tile.good_step(Isa::detect(), &step, before..before + cut, &grad[..cut], Kind::F32, origin);
            prop_assert_eq!(bits(&tile.masters()[before..]), bits(&whole.masters()[..cut]), "{:?}", recipe);
            prop_assert_eq!(bits(&tile.masters()[..before]), bits(&others));
            let (tile_layout, layout) = (recipe.layout(before + cut).unwrap(), recipe.layout(elements).unwrap());
            for (theirs, ours) in tile_layout.fields().iter().zip(layout.fields()) {
                let start = theirs.start + before / theirs.cell_elements * theirs.cell_bytes;
                let bytes = cut / theirs.cell_elements * theirs.cell_bytes;
                let (tile, whole): (&[u8], &[u8]) = (bytemuck::cast_slice(&tile.record), bytemuck::cast_slice(&whole.record));
                prop_assert!(tile[start..start + bytes] == whole[ours.start..ours.start + bytes], "{:?}", recipe);
            }
        }
    }
}

#[test]
fn a_master_in_two_halves_learns_the_bits_of_a_master_in_one() {
    for moments in MOMENTS {
        for (rule, _) in rules(1) {
            let Ok(split) = Recipe::new(rule, WeightFormat::Bf16WithRemainder, moments) else { continue };
            let whole = Recipe::new(rule, WeightFormat::F32, moments).unwrap();
            let values = noise(1000, 4);
            let (mut split, mut whole) = (State::new(split, &values), State::new(whole, &values));
            for number in 1..20 {
                let (_, step) = rules(number).into_iter().find(|(other, _)| *other == rule).unwrap();
                let grad = noise(1000, 10 + number);
                let origin = Origin { step: number, ..ORIGIN };
                for state in [&mut split, &mut whole] {
                    let outcome = state.step(Isa::detect(), &step, 0..1000, &grad, Kind::Bf16, origin);
                    assert_eq!(outcome, Outcome::Updated);
                }
            }
            assert_eq!(bits(&split.masters()), bits(&whole.single), "{rule:?} {moments:?}");
            for (weight, master) in split.half.iter().zip(&whole.single) {
                assert_eq!(u32::from(*weight), (master.to_bits() + 0x8000) >> 16);
            }
        }
    }
}

#[test]
fn adamw_with_remainders_keeps_ten_bytes_of_an_element_in_its_record() {
    let bytes =
        |weights, moments| Recipe::new(ADAMW, weights, moments).unwrap().record_bytes(1 << 20).unwrap() >> 10;
    assert_eq!(bytes(WeightFormat::Bf16WithRemainder, MomentFormat::F32), 10 << 10);
    assert_eq!(bytes(WeightFormat::F32, MomentFormat::F32), 8 << 10);
    assert_eq!(bytes(WeightFormat::F16WithMaster, MomentFormat::F32), 12 << 10);
    assert_eq!(bytes(WeightFormat::Bf16WithRemainder, MomentFormat::Bf16), 6 << 10);
    // Two codes, and a scale of four bytes for 256 of each.
    assert_eq!(bytes(WeightFormat::Bf16Stochastic, MomentFormat::Blocks8), (2 << 10) + 32);
}

#[test]
fn fields_follow_each_other_at_cache_lines_and_a_record_that_cannot_be_counted_is_refused() {
    for (recipe, _) in recipes(1) {
        for elements in [0, 1, 255, 257, 4096] {
            let layout = recipe.layout(elements).unwrap();
            let mut end = 0;
            for field in layout.fields() {
                assert!(field.start.is_multiple_of(64) && field.start >= end && field.start - end < 64);
                assert_eq!(field.cells, elements.div_ceil(field.cell_elements));
                assert_eq!(layout.field(field.name), Some(field));
                end = field.bytes().end;
            }
            assert!(layout.bytes() >= end && layout.bytes() - end < 64 && layout.elements() == elements);
        }
        let refused = recipe.layout(usize::MAX);
        assert!(
            recipe.layout(1).unwrap().bytes() == 0
                || refused == Err(ApplyError::TooLarge { elements: usize::MAX })
        );
    }
}

#[test]
fn a_gradient_that_is_not_finite_is_reported_wherever_it_is() {
    let elements = 2 * CHUNK_ELEMENTS + 300;
    let values = noise(elements, 1);
    for moments in MOMENTS {
        let recipe = Recipe::new(ADAMW, WeightFormat::Bf16WithRemainder, moments).unwrap();
        let step = rules(1)[0].1;
        for kind in [Kind::F32, Kind::Bf16, Kind::F16] {
            for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                for at in [0, 255, CHUNK_ELEMENTS, elements - 1] {
                    let mut grad = noise(elements, 2);
                    grad[at] = bad;
                    let mut state = State::new(recipe, &values);
                    let outcome = state.step(Isa::detect(), &step, 0..elements, &grad, kind, ORIGIN);
                    assert_eq!(outcome, Outcome::NonFinite, "{moments:?} {kind:?} {bad} {at}");
                }
            }
        }
    }
    // The scale can overflow what was finite.
    let recipe = Recipe::new(ADAMW, WeightFormat::F32, MomentFormat::F32).unwrap();
    let step = Step::AdamW(AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.0, 1, 1e10));
    let outcome = State::new(recipe, &[1.0]).step(Isa::detect(), &step, 0..1, &[1e30], Kind::F32, ORIGIN);
    assert_eq!(outcome, Outcome::NonFinite);
    assert_eq!(Outcome::Updated.and(outcome), Outcome::NonFinite);
    assert_eq!(Outcome::Updated.and(Outcome::Updated), Outcome::Updated);
}

#[test]
fn weights_without_masters_move_by_the_mean_of_steps_too_small_for_them() {
    const ELEMENTS: usize = 20_000;
    const STEPS: u64 = 100;
    // A step is a 64th of the spacing of bf16 at 1: rounded to the nearest, none would ever count.
    let lr = 2.0_f64.powi(-7 - 6);
    let recipe =
        Recipe::new(Rule::Sgd { momentum: false }, WeightFormat::Bf16Stochastic, MomentFormat::F32).unwrap();
    let step = Step::Sgd(SgdStep::new(&SgdConfig::default(), lr, 0.0, 1, 1.0));
    let mut state = State::new(recipe, &[1.5; ELEMENTS]);
    for number in 0..STEPS {
        let origin = Origin { step: number, ..ORIGIN };
        state.good_step(Isa::detect(), &step, 0..ELEMENTS, &[1.0; ELEMENTS], Kind::F32, origin);
    }
    let mean = state.masters().iter().map(|x| f64::from(*x)).sum::<f64>() / ELEMENTS as f64;
    let moved = (1.5 - mean) / (lr * STEPS as f64);
    // A walk of 100 steps of 2⁻⁷ with probability 1/64 spreads by 0.8 of its mean; 20,000 of them by 0.6 %.
    assert!((moved - 1.0).abs() < 0.03, "{moved}");
}

#[test]
fn moments_in_fewer_bits_train_as_well_as_in_32() {
    // Least squares: 512 unknowns from 2 noisy examples each, of sizes that differ by four orders of magnitude.
    const UNKNOWNS: usize = 512;
    let truth = noise(UNKNOWNS, 5);
    let sizes: Vec<f32> = (0..UNKNOWNS).map(|i| 10.0_f32.powi((i % 5) as i32 - 4)).collect();
    let mut losses = Vec::new();
    for moments in MOMENTS {
        let recipe = Recipe::new(ADAMW, WeightFormat::Bf16WithRemainder, moments).unwrap();
        let mut state = State::new(recipe, &[0.0; UNKNOWNS]);
        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-12 };
        for number in 1..=1000_u64 {
            let masters = state.masters();
            let jitter = noise(UNKNOWNS, 1000 + number);
            let grad: Vec<f32> =
                (0..UNKNOWNS).map(|i| (masters[i] - truth[i] + 0.1 * jitter[i]) * sizes[i]).collect();
            let lr = 0.02 * (1.0 - number as f64 / 1001.0);
            let step = Step::AdamW(AdamWStep::new(&config, lr, 0.0, number, 1.0));
            let origin = Origin { step: number, ..ORIGIN };
            state.good_step(Isa::detect(), &step, 0..UNKNOWNS, &grad, Kind::F32, origin);
        }
        let masters = state.masters();
        let loss = masters.iter().zip(&truth).map(|(x, t)| f64::from(x - t).powi(2)).sum::<f64>();
        losses.push(loss / UNKNOWNS as f64);
    }
    println!("mean squared errors with moments in 32, 16 and 8 bits: {losses:?}");
    assert!(losses[0] < 1e-3 && losses[1] < 1.5 * losses[0] && losses[2] < 2.5 * losses[0], "{losses:?}");
}

#[test]
fn loss_scaling_skips_bad_steps_and_gives_the_update_of_the_unscaled_gradient() {
    let mut scaler =
        LossScaler::new(LossScalerConfig { initial_scale: 4096.0, ..LossScalerConfig::default() });
    let (values, grad) = (noise(100, 1), noise(100, 2));
    let recipe = Recipe::new(ADAMW, WeightFormat::F16WithMaster, MomentFormat::F32).unwrap();
    let stepped = |loss_scale: f32, unscale: f32| {
        let scaled: Vec<f32> =
            grad.iter().map(|x| half::f16::from_f32(x * 64.0).to_f32() / 64.0 * loss_scale).collect();
        let step = Step::AdamW(AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.1, 1, unscale));
        let mut state = State::new(recipe, &values);
        let outcome = state.step(Isa::detect(), &step, 0..100, &scaled, Kind::F16, ORIGIN);
        (outcome, state)
    };
    let (_, plain) = stepped(64.0, 1.0 / 64.0);
    loop {
        // 65504 is the largest half; a scale of 4096 is too much for what was scaled by 64 already.
        let (outcome, state) = stepped(scaler.scale() * 64.0, scaler.unscale() / 64.0);
        scaler.update(outcome);
        if outcome == Outcome::Updated {
            assert!(scaler.scale() < 4096.0 && state.same(&plain));
            return;
        }
    }
}

#[test]
fn the_accumulator_begins_with_its_value_in_every_format() {
    for moments in MOMENTS {
        let rule = Rule::Adagrad { initial_accumulator: 0.25 };
        let mut state = State::new(Recipe::new(rule, WeightFormat::F32, moments).unwrap(), &[1.0; 300]);
        // g² = 0, so p moves by nothing; with g = 0.5 it would by lr * 0.5 / sqrt(0.25 + 0.25).
        let step = Step::Adagrad(AdagradStep::new(&AdagradConfig::default(), 0.5, 0.0, 1, 1.0));
        state.good_step(Isa::detect(), &step, 0..300, &[0.5; 300], Kind::F32, ORIGIN);
        let expected = 1.0 - 0.25 / 0.5_f32.sqrt();
        assert!(state.single.iter().all(|p| (p - expected).abs() < 1e-6), "{moments:?} {}", state.single[0]);
    }
}

#[test]
fn calls_that_do_not_fit_are_refused_and_change_nothing() {
    let recipe = Recipe::new(ADAMW, WeightFormat::Bf16WithRemainder, MomentFormat::Blocks8).unwrap();
    let (adamw, sgd) = (rules(1)[0].1, rules(1)[4].1);
    let state = State::new(recipe, &noise(600, 1));
    let grad = [1.0; 600];
    let mut changed = state.clone();
    let mut refused = |step: &Step, elements: usize, range: Range<usize>, grad: usize, element: u64| {
        let before = changed.clone();
        let half = &mut changed.half[..range.len().min(600)];
        let record: &mut [u8] = bytemuck::cast_slice_mut(&mut changed.record);
        let tile = Tile { record, elements, range, weights: Weights::Bf16(half) };
        let origin = Origin { element, ..ORIGIN };
        let error =
            recipe.apply(Isa::detect(), step, tile, Gradient::F32(&[1.0; 600][..grad]), origin).unwrap_err();
        assert!(changed.same(&before), "{error}");
        error
    };
    let bytes = recipe.record_bytes(600).unwrap();
    let length = |operand, length, expected| ApplyError::Length(LengthMismatch { operand, length, expected });
    assert_eq!(refused(&adamw, 600, 0..600, 599, 0), length("gradient", 599, 600));
    assert_eq!(refused(&adamw, 601, 0..601, 600, 0), length("gradient", 600, 601));
    assert_eq!(
        refused(&adamw, 1000, 0..600, 600, 0),
        length("record", bytes, recipe.record_bytes(1000).unwrap())
    );
    assert_eq!(
        refused(&adamw, 600, 256..601, 345, 0),
        ApplyError::Range { start: 256, end: 601, elements: 600 }
    );
    assert_eq!(refused(&adamw, 600, 255..600, 345, 0), ApplyError::CutBlock { operand: "range", index: 255 });
    assert_eq!(refused(&adamw, 600, 256..600, 344, 1), ApplyError::CutBlock { operand: "element", index: 1 });
    assert_eq!(refused(&sgd, 600, 0..600, 600, 0), ApplyError::WrongStep { step: "SGD", rule: "AdamW" });

    let mut other = state.clone();
    let mut single = [0.0; 600];
    let record: &mut [u8] = bytemuck::cast_slice_mut(&mut other.record);
    let tile = Tile { record, elements: 600, range: 0..600, weights: Weights::F32(&mut single) };
    let error = recipe.apply(Isa::detect(), &adamw, tile, Gradient::F32(&grad), ORIGIN).unwrap_err();
    assert_eq!(error, ApplyError::WrongWeights { weights: "f32", expected: "bf16" });
    assert_eq!(error.to_string(), "weights in f32 for a recipe of bf16");

    let mut moved = vec![0_u64; bytes / 8 + 1];
    let record: &mut [u8] = bytemuck::cast_slice_mut(&mut moved);
    let record = &mut record[1..=bytes];
    let tile = Tile { record, elements: 600, range: 0..600, weights: Weights::Bf16(&mut other.half) };
    let error = recipe.apply(Isa::detect(), &adamw, tile, Gradient::F32(&grad), ORIGIN).unwrap_err();
    assert_eq!(error, ApplyError::Misaligned { field: "remainder" });
    assert!(moved.iter().all(|x| *x == 0) && other.half == state.half);
}

#[test]
fn a_running_maximum_is_not_kept_in_moments_that_are_rounded_at_random() {
    for moments in [MomentFormat::Bf16, MomentFormat::Blocks8] {
        let refused = Recipe::new(Rule::Adam { amsgrad: true }, WeightFormat::F32, moments);
        assert_eq!(refused, Err(RecipeError::NarrowMaximum { moments }));
    }
}
