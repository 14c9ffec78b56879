//! Laws of the plan over budgets, shapes and recipes: what is bought with more memory.

use std::path::Path;

use overspill_optim::{MomentFormat, WeightFormat};
use proptest::prelude::*;

use super::*;
use crate::optimizer::Optimizer;
use crate::recipe::StateRecipe;

/// A model, how its state is stored, and what a step works on.
#[derive(Debug)]
struct Case {
    config: ModelConfig,
    layout: ModelLayout,
    shape: StepShape,
}

impl Case {
    fn new(sizes: [usize; 4], tied: bool, recipe: StateRecipe, batch: usize, accumulate: usize) -> Self {
        let [layers, hidden, ffn, vocab] = sizes;
        let text = format!(
            r#"{{"vocab_size": {vocab}, "hidden_size": {hidden}, "num_hidden_layers": {layers},
            "num_attention_heads": 4, "intermediate_size": {ffn}, "tie_word_embeddings": {tied}}}"#
        );
        let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
        let layout = ModelLayout::of(&config, recipe);
        let shape = StepShape { batch: BatchShape { batch, seq: 128 }, accumulate };
        Self { config, layout, shape }
    }

    fn plan(&self, fixed: Fixed, budget: usize) -> Result<MemoryPlan, TooSmall> {
        MemoryPlan::new(&self.config, &self.layout, self.shape, fixed, 0, budget)
    }

    fn least(&self, fixed: Fixed) -> usize {
        MemoryPlan::least_bytes(&self.config, &self.layout, self.shape, fixed, 0)
    }

    fn has_good_tiles(&self, plan: &MemoryPlan) -> bool {
        Choices::new(Fixed::default(), &self.layout).good.contains(&plan.tile_elements())
    }

    fn bytes(&self, plan: &MemoryPlan, durability: Durability) -> u64 {
        plan.traffic(&self.layout, durability).bytes()
    }
}

fn elements(weights: WeightFormat, moments: MomentFormat) -> StateRecipe {
    Optimizer::default().recipe(weights, moments).unwrap()
}

/// The model of `overspill train`.
fn default_model() -> Case {
    Case::new([16, 384, 1024, 256], false, elements(WeightFormat::F32, MomentFormat::F32), 4, 1)
}

fn recipe() -> impl Strategy<Value = StateRecipe> {
    let weights = prop::sample::select(vec![
        WeightFormat::F32,
        WeightFormat::F16WithMaster,
        WeightFormat::Bf16WithRemainder,
        WeightFormat::Bf16Stochastic,
    ]);
    let moments = prop::sample::select(vec![MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8]);
    (weights, moments, 0..4).prop_map(|(weights, moments, rule)| match rule {
        0 => StateRecipe::Adafactor(weights),
        1 => StateRecipe::Muon(weights),
        _ => elements(weights, moments),
    })
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (1..24usize, 1..12usize, 1..40usize, prop::sample::select(vec![256, 3000, 32_000, 70_001]));
    let sizes = sizes.prop_map(|(layers, hidden, ffn, vocab)| [layers, 64 * hidden, 64 * ffn, vocab]);
    (sizes, any::<bool>(), recipe(), 1..5usize, 1..4usize)
        .prop_map(|(sizes, tied, recipe, batch, micros)| Case::new(sizes, tied, recipe, batch, micros))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn more_memory_never_moves_more_bytes_but_for_a_good_tile_or_a_deeper_pipeline(case in case()) {
        let least = case.least(Fixed::default());
        let everything = case.least(Fixed::depth(Some(DEPTH_DEFAULT))) + 2 * case.layout.state_bytes(1 << 14);
        let mut before: Option<MemoryPlan> = None;
        for budget in (least..everything).step_by((everything - least) / 300) {
            let plan = case.plan(Fixed::default(), budget).unwrap();
            prop_assert!(plan.total_bytes() <= budget);
            let before = before.replace(plan.clone()).unwrap_or(plan.clone());
            prop_assert!(plan.depth() >= before.depth(), "a pipeline of {} at {budget}", plan.depth());
            let is_good = |plan: &MemoryPlan| case.has_good_tiles(plan);
            let has_grown = plan.depth() > before.depth() || is_good(&plan) != is_good(&before)
                || (!is_good(&plan) && plan.tile_elements() > before.tile_elements());
            // No byte of memory saves more than four, and the array that now is too long may have filled the room.
            let needed = |plan: &MemoryPlan| plan.total_bytes() - plan.resident_bytes();
            let taken = needed(&plan).saturating_sub(needed(&before)) as u64;
            let longest = plan.movers(&case.layout).map(|mover| (mover.bytes * mover.moves()) as u64).max();
            let slack = if has_grown { 4 * taken + longest.unwrap_or(0) } else { 0 };
            let grown = |durability| case.bytes(&plan, durability) as i64 - case.bytes(&before, durability) as i64;
            let by = grown(Durability::None);
            prop_assert!(by <= slack as i64, "{by} bytes more at {budget}, {slack} of them for {plan:?}");
            // Commits write what stays, too, which may not make up for less in tables.
            if plan.tile_elements() == before.tile_elements() && plan.depth() == before.depth() {
                prop_assert!(grown(Durability::Step) <= 0, "at {budget}");
            }
        }
        let all = case.plan(Fixed::default(), usize::MAX).unwrap();
        prop_assert_eq!(case.bytes(&all, Durability::None), 0);
        prop_assert!(all.keeping().is_everything());
    }

    #[test]
    fn whoever_chooses_the_depth_or_the_tiles_gets_them(case in case(), depth in 0..5usize, short in any::<bool>()) {
        let tile_bytes = match short {
            true => Choices::new(Fixed::default(), &case.layout).tiles().last().unwrap() * size_of::<f32>(),
            false => tile_bytes_for_any(&case.layout),
        };
        let fixed = Fixed { depth: Some(depth), tile_bytes: Some(tile_bytes), resident_bytes_max: Some(1 << 20) };
        let least = case.least(fixed);
        prop_assert_eq!(case.plan(fixed, least - 1).unwrap_err().least, least);
        for budget in [least, least + (8 << 20), usize::MAX] {
            let plan = case.plan(fixed, budget).unwrap();
            prop_assert_eq!((plan.depth(), plan.tile_bytes()), (depth, tile_bytes));
            prop_assert!(plan.resident_bytes() <= 1 << 20);
        }
    }
}

#[test]
fn short_tiles_at_full_depth_are_taken_before_a_shallower_pipeline_and_good_ones_before_long_ones() {
    let case = default_model();
    let deep = case.least(Fixed::depth(Some(DEPTH_DEFAULT)));
    let tight = case.plan(Fixed::default(), deep).unwrap();
    assert_eq!(tight.depth(), DEPTH_DEFAULT);
    assert!(!case.has_good_tiles(&tight));
    assert!(case.plan(Fixed::default(), deep - 1).unwrap().depth() < DEPTH_DEFAULT);
    let roomy = case.plan(Fixed::default(), deep + (64 << 20)).unwrap();
    assert_eq!(Some(&roomy.tile_elements()), Choices::new(Fixed::default(), &case.layout).good.last());
}
