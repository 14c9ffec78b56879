//! The model of the bench: weights and gradients in memory, AdamW, and the same step in memory to compare with.

use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use overspill_optim::{
    AdamWConfig, AdamWStep, Gradient, Isa, MomentFormat, Origin, Outcome, Recipe, Rule, Step, Tile,
    WeightFormat, Weights,
};
use overspill_swap::optimizer::{OptimizerSwapper, ParameterSpec, PartView, StateSize};

/// Parameters of the model, of equal length.
const PARAMETERS: usize = 16;

/// Elements of the first parameter that are compared with the scalar code's.
const CHECKED: usize = 1 << 16;

/// What a training loop has in memory.
#[derive(Clone)]
pub(super) struct Model {
    recipe: Recipe,
    pub(super) isa: Isa,
    weights: Vec<Vec<u16>>,
    /// The same in every step, and of every copy.
    gradients: Arc<Vec<Vec<u16>>>,
    steps: u64,
}

/// A part of the state in memory, to see how fast the update alone is.
pub(super) struct InMemory {
    record: Vec<u8>,
    weights: Vec<u16>,
    gradients: Vec<u16>,
}

impl Model {
    /// At least so many parameters, rounded up to equal lengths.
    pub(super) fn new(parameters: usize) -> anyhow::Result<Self> {
        let rule = Rule::AdamW { amsgrad: false };
        let recipe = Recipe::new(rule, WeightFormat::Bf16WithRemainder, MomentFormat::F32)?;
        let numel = parameters.div_ceil(PARAMETERS);
        let gradient = |parameter: usize| -> Vec<u16> {
            (0..numel).map(|element| half::bf16::from_f32(gradient(parameter, element)).to_bits()).collect()
        };
        Ok(Self {
            recipe,
            isa: Isa::detect(),
            weights: vec![vec![0; numel]; PARAMETERS],
            gradients: Arc::new((0..PARAMETERS).map(gradient).collect()),
            steps: 0,
        })
    }

    /// What the swapper has to know of the parameters.
    pub(super) fn specs(&self) -> Vec<ParameterSpec> {
        let recipe = self.recipe;
        let bytes = move |elements| recipe.record_bytes(elements).unwrap_or(usize::MAX);
        let state = StateSize::Cut { elements: recipe.cut_elements(), bytes: Arc::new(bytes) };
        let numels = self.weights.iter().map(Vec::len).enumerate();
        numels
            .map(|(index, numel)| ParameterSpec {
                name: format!("p{index}"),
                numel,
                state: state.clone(),
                begins_tile: false,
            })
            .collect()
    }

    pub(super) fn parameters(&self) -> usize {
        self.weights.iter().map(Vec::len).sum()
    }

    /// The first weights, with masters and moments; no step has been taken.
    pub(super) fn initialize(&mut self, swapper: &mut OptimizerSwapper) -> anyhow::Result<()> {
        self.steps = 0;
        let Self { recipe, isa, weights, .. } = self;
        let mut values = Vec::new();
        swapper.edit(
            |_| true,
            |part: PartView<'_>| -> anyhow::Result<()> {
                values.clear();
                values.extend(part.elements.clone().map(|element| first(part.parameter, element)));
                let elements = part.elements.len();
                let weights = Weights::Bf16(&mut weights[part.parameter][part.elements]);
                let tile = Tile { record: part.state, elements, range: 0..elements, weights };
                let outcome = recipe.initialize(*isa, tile, Gradient::F32(&values), Origin::default())?;
                ensure!(outcome == Outcome::Updated, "the first weights are finite");
                Ok(())
            },
        )?;
        Ok(())
    }

    pub(super) fn step(&mut self, swapper: &mut OptimizerSwapper) -> anyhow::Result<()> {
        self.steps += 1;
        let step = adamw_step(self.steps);
        let Self { recipe, isa, weights, gradients, .. } = self;
        swapper.step(
            |_| true,
            |part: PartView<'_>| -> anyhow::Result<()> {
                let elements = part.elements.len();
                let gradient = Gradient::Bf16(&gradients[part.parameter][part.elements.clone()]);
                let weights = Weights::Bf16(&mut weights[part.parameter][part.elements]);
                let tile = Tile { record: part.state, elements, range: 0..elements, weights };
                let outcome = recipe.apply(*isa, &step, tile, gradient, Origin::default())?;
                ensure!(outcome == Outcome::Updated, "the update diverged");
                Ok(())
            },
        )?;
        Ok(())
    }

    /// The first weights of the first parameter are those that the scalar code makes in memory.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let elements = self.weights[0].len().min(CHECKED);
        let values: Vec<f32> = (0..elements).map(|element| first(0, element)).collect();
        let mut weights = vec![0; elements];
        let mut record = vec![0; self.recipe.record_bytes(elements)?];
        let range = 0..elements;
        let tile = Tile {
            record: &mut record,
            elements,
            range: range.clone(),
            weights: Weights::Bf16(&mut weights),
        };
        let outcome = self.recipe.initialize(Isa::Scalar, tile, Gradient::F32(&values), Origin::default())?;
        ensure!(outcome == Outcome::Updated, "the first weights are finite");
        for number in 1..=self.steps {
            let tile = Tile {
                record: &mut record,
                elements,
                range: range.clone(),
                weights: Weights::Bf16(&mut weights),
            };
            let gradient = Gradient::Bf16(&self.gradients[0][..elements]);
            let step = adamw_step(number);
            let outcome = self.recipe.apply(Isa::Scalar, &step, tile, gradient, Origin::default())?;
            ensure!(outcome == Outcome::Updated, "the update diverged");
        }
        ensure!(weights == self.weights[0][..elements], "steps on storage and in memory differ");
        Ok(())
    }
}

impl InMemory {
    pub(super) fn new(model: &Model, elements: usize) -> anyhow::Result<Self> {
        let record = vec![0; model.recipe.record_bytes(elements)?];
        let gradients: Vec<u16> = model.gradients.iter().flatten().copied().take(elements).collect();
        Ok(Self { record, weights: vec![0; gradients.len()], gradients })
    }

    pub(super) fn elements(&self) -> usize {
        self.weights.len()
    }

    /// One update, in seconds.
    pub(super) fn update(&mut self, model: &Model) -> anyhow::Result<f64> {
        let Self { record, weights, gradients } = self;
        let elements = weights.len();
        let started = Instant::now();
        let tile = Tile { record, elements, range: 0..elements, weights: Weights::Bf16(weights) };
        let gradients = Gradient::Bf16(gradients);
        let outcome = model.recipe.apply(model.isa, &adamw_step(1), tile, gradients, Origin::default())?;
        ensure!(outcome == Outcome::Updated, "the update diverged");
        Ok(started.elapsed().as_secs_f64())
    }
}

fn adamw_step(number: u64) -> Step {
    Step::AdamW(AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.1, number, 1.0))
}

/// Numbers that differ from element to element, of the sizes that weights and gradients have.
fn first(parameter: usize, element: usize) -> f32 {
    scattered(element.wrapping_mul(0x9e37_79b1).wrapping_add(parameter)) * 0.05
}

fn gradient(parameter: usize, element: usize) -> f32 {
    scattered(element.wrapping_mul(0x85eb_ca6b).wrapping_add(7 * parameter)) * 1e-3
}

/// From -1 up to 1.
fn scattered(number: usize) -> f32 {
    let mixed = (number as u32 ^ (number as u32 >> 15)).wrapping_mul(0x2c1b_3c6d);
    (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
}
