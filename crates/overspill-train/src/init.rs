//! First weights: drawn from a seed, parameter by parameter.
//!
//! Every parameter has its own stream of the generator, chosen by its place in the model, so its values depend on the
//! seed and on nothing else: not on the order of drawing, not on tiles, not on where the state lives.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal};

use crate::config::ModelConfig;
use crate::layout::{ModelLayout, Role, UnitLayout};

/// Draws the first weights of a model.
#[derive(Clone, Debug)]
pub struct Initializer {
    seed: u64,
    matrix: Normal<f32>,
    output: Normal<f32>,
    first_stream: Vec<u64>,
    layout: ModelLayout,
}

impl Initializer {
    /// Normal with the configuration's standard deviation; matrices that write to the residual stream have it
    /// divided by the square root of the number of such matrices, so that the stream's variance does not grow with
    /// depth (GPT-2's rule).
    pub fn new(config: &ModelConfig, layout: &ModelLayout, seed: u64) -> Self {
        let normal = |deviation: f64| {
            Normal::new(0.0, deviation as f32).expect("a finite deviation makes a distribution")
        };
        let deviation =
            if config.initializer_range.is_finite() { config.initializer_range.abs() } else { 0.02 };
        let mut next = 0;
        let first_stream = layout.units().iter().map(|unit| {
            let first = next;
            next += unit.parameters.len() as u64;
            first
        });
        Self {
            seed,
            matrix: normal(deviation),
            output: normal(deviation / (2.0 * config.layers as f64).sqrt()),
            first_stream: first_stream.collect(),
            layout: layout.clone(),
        }
    }

    /// Fills a unit's weights (`UnitLayout::padded` elements); padding is left as it is.
    pub fn fill(&self, unit: &UnitLayout, weights: &mut [f32]) {
        let first = self.first_stream[self.layout.index(unit.unit)];
        for (stream, parameter) in (first..).zip(&unit.parameters) {
            let values = &mut weights[parameter.range.clone()];
            let normal = match parameter.role {
                Role::Gain => {
                    values.fill(1.0);
                    continue;
                }
                Role::Matrix => self.matrix,
                Role::Output => self.output,
            };
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(stream);
            values.fill_with(|| normal.sample(&mut random));
        }
    }
}
