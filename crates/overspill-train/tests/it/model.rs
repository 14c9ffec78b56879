//! The decoder against an independent implementation in double precision, and its promises about memory and bits.

mod reference;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::reference::Reference;
use overspill_train::config::{Llama3Scaling, ModelConfig, Rope};
use overspill_train::layout::{ModelLayout, Role, Unit};
use overspill_train::model::{Activations, BatchShape, Model, Weights};

/// A small decoder in which no two sizes are equal by accident, and heads do not fill the residual stream.
fn small() -> ModelConfig {
    ModelConfig {
        vocab: 13,
        hidden: 8,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 10,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: None },
        tied: false,
        max_positions: 2048,
        initializer_range: 0.02,
    }
}

/// One configuration per thing that can differ.
fn variants() -> Vec<ModelConfig> {
    let scaling = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    let stretched = Rope { theta: 500.0, scaling: Some(scaling) };
    vec![
        small(),
        ModelConfig { tied: true, ..small() },
        ModelConfig { kv_heads: 1, ..small() },
        ModelConfig { kv_heads: 4, ..small() },
        ModelConfig { head_dim: 2, ..small() },
        ModelConfig { head_dim: 10, rope: stretched, tied: true, ..small() },
        ModelConfig { layers: 1, heads: 1, kv_heads: 1, vocab: 1, hidden: 1, ffn: 1, ..small() },
    ]
}

/// Numbers without a pattern, in `-1..1`.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn ids(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| ((self.next() + 1.0) / 2.0 * vocab as f32) as u32).collect()
    }
}

/// A model with drawn parameters and a micro-batch.
struct Subject {
    config: ModelConfig,
    layout: ModelLayout,
    shape: BatchShape,
    units: Vec<Vec<f32>>,
    ids: Vec<u32>,
    targets: Vec<u32>,
}

/// What training needs of a micro-batch.
#[derive(Debug, PartialEq)]
struct Outcome {
    loss: f64,
    grads: Vec<Vec<f32>>,
}

impl Subject {
    fn new(config: ModelConfig, shape: BatchShape) -> Self {
        let layout = ModelLayout::new(&config);
        let mut numbers = Numbers(7);
        let mut units: Vec<Vec<f32>> = layout.units().iter().map(|unit| vec![0.0; unit.padded]).collect();
        for (unit, values) in layout.units().iter().zip(&mut units) {
            for parameter in &unit.parameters {
                let spread = (3.0 / *parameter.shape.last().unwrap() as f32).sqrt();
                for value in &mut values[parameter.range.clone()] {
                    *value = match parameter.role {
                        Role::Gain => 1.0 + 0.3 * numbers.next(),
                        Role::Matrix | Role::Output => spread * numbers.next(),
                    };
                }
            }
        }
        let ids = numbers.ids(shape.tokens(), config.vocab);
        let targets = numbers.ids(shape.tokens(), config.vocab);
        Self { config, layout, shape, units, ids, targets }
    }

    fn weights(&self, unit: Unit) -> Weights<'_> {
        let values = &self.units[self.layout.index(unit)];
        let block = bytes::Bytes::from_owner(bytemuck::cast_slice::<f32, u8>(values).to_vec());
        Weights::new(self.layout.unit(unit), block)
    }

    fn tied(&self) -> Option<Weights<'_>> {
        self.config.tied.then(|| self.weights(Unit::Embedding))
    }

    /// The residual stream in front of every layer and behind the last.
    fn stream(&self, model: &Model) -> Vec<Activations> {
        let mut stream = vec![model.embed(&self.weights(Unit::Embedding), &self.ids)];
        for layer in 0..self.config.layers {
            stream.push(model.layer_forward(&self.weights(Unit::Layer(layer)), &stream[layer]));
        }
        stream
    }

    fn logits(&self) -> Vec<f32> {
        let model = Model::new(&self.config, self.shape);
        let stream = self.stream(&model);
        model.logits(&self.weights(Unit::Head), self.tied().as_ref(), stream.last().unwrap())
    }

    fn train(&self, scale: f32) -> Outcome {
        let model = Model::new(&self.config, self.shape);
        let mut grads: Vec<Vec<f32>> =
            self.layout.units().iter().map(|unit| vec![0.0; unit.padded]).collect();
        let mut sink = |unit: Unit, range: std::ops::Range<usize>, values: &[f32]| {
            assert_eq!(range.len(), values.len());
            for (sum, value) in grads[self.layout.index(unit)][range].iter_mut().zip(values) {
                *sum += value;
            }
        };
        let mut stream = self.stream(&model);
        let (head, tied, input) = (self.weights(Unit::Head), self.tied(), stream.pop().unwrap());
        let (loss, mut gradient) =
            model.head_backward(&head, tied.as_ref(), &input, &self.targets, scale, &mut sink);
        for layer in (0..self.config.layers).rev() {
            let weights = self.weights(Unit::Layer(layer));
            gradient = model.layer_backward(&weights, &stream.pop().unwrap(), gradient, &mut sink);
        }
        model.embed_backward(&self.ids, &gradient, &mut grads[0]);
        Outcome { loss, grads }
    }

    fn reference(&self) -> Reference<'_> {
        let units = self.units.iter().map(|unit| unit.iter().map(|v| f64::from(*v)).collect()).collect();
        Reference { config: &self.config, layout: &self.layout, units }
    }
}

fn shape(batch: usize, seq: usize) -> BatchShape {
    BatchShape { batch, seq }
}

#[test]
fn logits_and_loss_are_those_of_the_reference() {
    for config in variants() {
        for shape in [shape(2, 7), shape(1, 1), shape(3, 70)] {
            let subject = Subject::new(config.clone(), shape);
            let reference = subject.reference();
            let expected = reference.logits(&subject.ids, shape.seq).concat();
            for (actual, expected) in subject.logits().iter().zip(&expected) {
                assert!((f64::from(*actual) - expected).abs() < 2e-5, "{actual} {expected} {config:?}");
            }
            let expected = reference.loss(&subject.ids, &subject.targets, shape.seq);
            let actual = subject.train(1.0).loss;
            assert!(
                (actual - expected).abs() < 1e-6 * shape.tokens() as f64,
                "{actual} {expected} {config:?}"
            );
        }
    }
}

#[test]
fn the_gradient_of_every_element_is_the_slope_of_the_reference() {
    const STEP: f64 = 1e-4;
    const SCALE: f32 = 0.25;
    for config in variants() {
        let subject = Subject::new(config, shape(2, 5));
        let outcome = subject.train(SCALE);
        let mut reference = subject.reference();
        let mut loss_with = |unit: usize, element: usize, delta: f64| {
            let value = reference.units[unit][element];
            reference.units[unit][element] = value + delta;
            let loss = reference.loss(&subject.ids, &subject.targets, subject.shape.seq);
            reference.units[unit][element] = value;
            loss
        };
        for (unit, layout) in subject.layout.units().iter().enumerate() {
            for element in layout.parameters.iter().flat_map(|parameter| parameter.range.clone()) {
                let rise = loss_with(unit, element, STEP) - loss_with(unit, element, -STEP);
                let slope = rise / (2.0 * STEP) * f64::from(SCALE);
                let actual = f64::from(outcome.grads[unit][element]);
                let error = (actual - slope).abs();
                assert!(error < 1e-5 + 1e-4 * slope.abs(), "{} {element}: {actual} {slope}", layout.unit);
            }
        }
    }
}

#[test]
fn long_sequences_and_large_vocabularies_in_pieces_have_the_slope_of_the_reference() {
    const STEP: f64 = 1e-5;
    // More scores than one block holds, more logits than one chunk, more rows than one slice.
    let config = ModelConfig { vocab: 34_000, layers: 1, heads: 2, kv_heads: 1, tied: true, ..small() };
    let subject = Subject::new(config, shape(1, 1500));
    let outcome = subject.train(1.0);
    let mut reference = subject.reference();
    let loss = reference.loss(&subject.ids, &subject.targets, subject.shape.seq);
    assert!((outcome.loss - loss).abs() < 1e-6 * loss, "{} {loss}", outcome.loss);

    let mut numbers = Numbers(3);
    let direction: Vec<Vec<f64>> =
        outcome.grads.iter().map(|unit| unit.iter().map(|_| f64::from(numbers.next())).collect()).collect();
    let mut loss_at = |delta: f64| {
        for (unit, direction) in reference.units.iter_mut().zip(&direction) {
            for (value, direction) in unit.iter_mut().zip(direction) {
                *value += delta * direction;
            }
        }
        reference.loss(&subject.ids, &subject.targets, subject.shape.seq)
    };
    let slope = (loss_at(STEP) - loss_at(-2.0 * STEP)) / (2.0 * STEP);
    let along = outcome.grads.concat().into_iter().zip(direction.concat()).map(|(g, d)| f64::from(g) * d);
    let actual: f64 = along.sum();
    assert!((actual - slope).abs() < 1e-4 * slope.abs(), "{actual} {slope}");
}

#[test]
fn padding_gets_no_gradient() {
    let subject = Subject::new(small(), shape(2, 5));
    let outcome = subject.train(1.0);
    for (layout, grads) in subject.layout.units().iter().zip(&outcome.grads) {
        let mut padding = vec![true; layout.padded];
        for parameter in &layout.parameters {
            padding[parameter.range.clone()].fill(false);
        }
        assert!(grads.iter().zip(padding).all(|(grad, padding)| !padding || *grad == 0.0), "{}", layout.unit);
    }
}

#[test]
fn the_same_bits_on_every_run_and_number_of_threads() {
    // Large enough for products, rows and columns to be shared among threads.
    let config = ModelConfig { vocab: 1000, hidden: 160, heads: 6, head_dim: 32, ffn: 416, ..small() };
    let subject = Subject::new(config, shape(2, 150));
    let train = |threads: usize| {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        threads.install(|| subject.train(0.5))
    };
    let one = train(1);
    assert!(one.loss.is_finite());
    for threads in [1, 2, 3, 5] {
        assert!(train(threads) == one, "{threads} threads");
    }
}

#[test]
fn a_not_a_number_reaches_the_loss_and_the_gradients() {
    let mut subject = Subject::new(small(), shape(2, 5));
    let up = subject.layout.unit(Unit::Layer(1)).parameters[7].range.start;
    subject.units[2][up] = f32::NAN;
    let outcome = subject.train(1.0);
    assert!(outcome.loss.is_nan());
    assert!(outcome.grads[1].iter().any(|grad| grad.is_nan()));
}

/// A block that tells when it is released.
struct Watched(Vec<f32>, Arc<AtomicBool>);

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_block_is_unchanged_by_compute_and_released_with_its_weights() {
    let subject = Subject::new(small(), shape(2, 5));
    let model = Model::new(&subject.config, subject.shape);
    let released = Arc::new(AtomicBool::new(false));
    let block = bytes::Bytes::from_owner(Watched(subject.units[1].clone(), Arc::clone(&released)));
    let weights = Weights::new(subject.layout.unit(Unit::Layer(0)), block.clone());
    let input = model.embed(&subject.weights(Unit::Embedding), &subject.ids);
    let output = model.layer_forward(&weights, &input);
    let gradient = model.layer_backward(&weights, &input, output.clone(), &mut |_, _, _| {});
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&block), subject.units[1]);

    drop(block);
    assert!(!released.load(Ordering::SeqCst), "released while weights were at hand");
    drop(weights);
    assert!(released.load(Ordering::SeqCst), "something beside the weights kept the block");
    assert_eq!(output.tokens(), gradient.tokens());
}

#[test]
fn activations_stay_where_they_are() {
    let block = bytes::Bytes::from_owner(Watched(vec![1.5; 24], Arc::default()));
    let activations = Activations::from_bytes(block.clone(), 8);
    assert_eq!((activations.tokens(), activations.hidden()), (3, 8));
    assert_eq!(activations.as_bytes().as_ptr(), block.as_ptr());
    let shared = activations.clone();
    drop(activations);
    assert_eq!(shared.as_slice(), [1.5; 24]);
    assert_eq!(shared.as_bytes().as_ptr(), block.as_ptr());
}
