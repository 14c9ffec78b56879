//! The arithmetic of a Llama-family decoder: one call per unit and direction.
//!
//! [`Model`] holds no parameters. Each call is handed the [`Weights`] of one unit, reads them where they lie, and
//! keeps nothing of them; what flows between the calls are [`Activations`]. The caller saves the input of every
//! layer on the way forward and hands it back on the way backward, where the layer is computed again:
//!
//! ```text
//! ids ── embed ──► layer_forward … layer_forward ──► head_backward ── targets
//!                                                          │ loss, gradient
//! embed_backward ◄── layer_backward … layer_backward ◄─────┘
//! ```
//! Gradients of parameters leave through a [`GradientSink`] while a backward call runs. Everything is `f32`, the
//! meaning is that of `LlamaForCausalLM` of the `transformers` library, and the same input gives the same bits on
//! every run: sums have a fixed order that no number of threads changes.
//!
//! Matrix products are burn's; norms, attention's softmax and the activation are loops over slices with hand-derived
//! gradients, which allocate less and run faster than a recorded graph would. [`Model::workspace_bytes`] says what
//! any call needs beside its arguments.

mod activations;
mod arithmetic;
mod attention;
mod embedding;
mod feed_forward;
mod head;
mod layer;
mod matrix;
mod norm;
mod rotary;
mod weights;
mod workspace;

use std::ops::Range;

pub use activations::Activations;
pub use weights::Weights;

use crate::config::ModelConfig;
use crate::layout::Unit;
use attention::Attention;
use head::Head;
use layer::Layer;

/// The size of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Number of sequences.
    pub batch: usize,
    /// Tokens of each sequence.
    pub seq: usize,
}

impl BatchShape {
    /// Number of tokens.
    pub fn tokens(self) -> usize {
        self.batch * self.seq
    }
}

/// Receives gradients of parameters: the unit, the elements of its layout, and one value for each of them.
///
/// The values are to be **added** to what is there. A layer names each of its elements exactly once per call; the
/// head names those of the projection once per chunk of tokens.
pub type GradientSink<'s> = dyn FnMut(Unit, Range<usize>, &[f32]) + 's;

/// A decoder for micro-batches of one shape.
#[derive(Debug)]
pub struct Model {
    attention: Attention,
    shape: BatchShape,
    norm_eps: f32,
}

impl Model {
    /// The decoder that `config` describes.
    ///
    /// # Panics
    /// When `shape` holds no token.
    pub fn new(config: &ModelConfig, shape: BatchShape) -> Self {
        assert!(shape.tokens() > 0, "{shape:?} holds no token");
        Self { attention: Attention::new(config, shape.seq), shape, norm_eps: config.norm_eps as f32 }
    }

    /// The embedding of a micro-batch of token ids, sequence by sequence.
    ///
    /// # Panics
    /// When there are not [`BatchShape::tokens`] ids, or one is not in the vocabulary.
    pub fn embed(&self, embedding: &Weights<'_>, ids: &[u32]) -> Activations {
        assert_eq!(ids.len(), self.shape.tokens(), "ids of one micro-batch");
        embedding::embed(&embedding.matrix(0), ids).into()
    }

    /// Adds the embedding's gradient to `grad_embedding`, the elements of its unit.
    ///
    /// # Panics
    /// When ids and gradient are not of the same micro-batch, or an id is not in the vocabulary.
    pub fn embed_backward(&self, ids: &[u32], grad: &Activations, grad_embedding: &mut [f32]) {
        assert_eq!(ids.len(), grad.tokens(), "ids of the gradient's micro-batch");
        embedding::embed_backward(ids, &grad.0, grad_embedding);
    }

    /// The output of a decoder layer.
    ///
    /// # Panics
    /// When `weights` are not those of a layer, or `input` is not of this model's shape.
    pub fn layer_forward(&self, weights: &Weights<'_>, input: &Activations) -> Activations {
        assert_eq!(input.tokens(), self.shape.tokens(), "tokens of one micro-batch");
        self.layer(weights).forward(&input.0).into()
    }

    /// The gradient of a decoder layer's input, from the input that was saved and the gradient of the output.
    ///
    /// # Panics
    /// When `weights` are not those of a layer, or `input` or `grad_output` is not of this model's shape.
    pub fn layer_backward(
        &self,
        weights: &Weights<'_>,
        input: &Activations,
        grad_output: Activations,
        sink: &mut GradientSink<'_>,
    ) -> Activations {
        assert_eq!(input.tokens(), self.shape.tokens(), "tokens of one micro-batch");
        assert_eq!(grad_output.as_slice().len(), input.as_slice().len(), "a gradient per element");
        self.layer(weights).backward(&input.0, grad_output.0, sink).into()
    }

    /// The sum of the tokens' cross-entropy losses, and the gradient of `scale` times that sum with respect to the
    /// input. The projection is `tied_embedding` if given, else the head's own.
    ///
    /// # Panics
    /// When there is not a target for each token, or one is not in the vocabulary.
    pub fn head_backward(
        &self,
        head: &Weights<'_>,
        tied_embedding: Option<&Weights<'_>>,
        input: &Activations,
        targets: &[u32],
        scale: f32,
        sink: &mut GradientSink<'_>,
    ) -> (f64, Activations) {
        assert_eq!(targets.len(), input.tokens(), "a target for each token");
        let head = Head::new(head, tied_embedding, self.norm_eps);
        let (loss, gradient) = head.backward(&input.0, targets, scale, sink);
        (loss, gradient.into())
    }

    /// The logits of the tokens in `input`, of which there may be any number: `[tokens, vocab]`.
    pub fn logits(
        &self,
        head: &Weights<'_>,
        tied_embedding: Option<&Weights<'_>>,
        input: &Activations,
    ) -> Vec<f32> {
        Head::new(head, tied_embedding, self.norm_eps).logits(&input.0).to_vec()
    }

    /// Upper bound of what one call allocates at a time, its result included and its arguments not, in bytes.
    ///
    /// [`logits`](Self::logits) is not covered. Beside this, each thread that multiplies matrices keeps one packing
    /// buffer of the size of the L2 cache for good.
    pub fn workspace_bytes(config: &ModelConfig, shape: BatchShape) -> usize {
        workspace::bytes(config, shape)
    }

    fn layer<'a>(&'a self, weights: &'a Weights<'a>) -> Layer<'a> {
        Layer { attention: &self.attention, weights, norm_eps: self.norm_eps }
    }
}
