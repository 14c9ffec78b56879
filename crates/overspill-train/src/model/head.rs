//! The head: last norm, projection onto the vocabulary, cross entropy.
//!
//! The logits of a micro-batch can be larger than everything else together, so they never exist as a whole: a chunk
//! of tokens is projected, its logits become their own gradient in place, and that gradient is used up before the
//! next chunk. The projection's gradient leaves in slices of rows, once per chunk, to be added up by the receiver.

use std::ops::Range;

use rayon::prelude::*;

use super::GradientSink;
use super::arithmetic::{exponentials, max};
use super::matrix::{Matrix, MatrixMut, linear, product};
use super::norm::{rms_norm, rms_norm_backward};
use super::weights::Weights;

// Positions in the layouts of the head and of the embedding.
const NORM: usize = 0;
const PROJECTION: usize = 1;
const TABLE: usize = 0;

/// A chunk of logits takes at most this, unless [`TOKENS_MIN`] tokens need more.
const LOGIT_BYTES_MAX: usize = 16 << 20;

/// Fewer tokens than this make the products slow.
const TOKENS_MIN: usize = 64;

/// A slice of the projection's gradient takes about this: small enough to be added up from the cache.
const SLICE_BYTES: usize = 1 << 20;

/// The head with its weights at hand.
pub(super) struct Head<'a> {
    norm: &'a Weights<'a>,
    projection: (&'a Weights<'a>, usize),
    norm_eps: f32,
}

impl<'a> Head<'a> {
    /// A head that projects with the embedding's weights if they are given, else with its own.
    pub(super) fn new(head: &'a Weights<'a>, tied_embedding: Option<&'a Weights<'a>>, norm_eps: f32) -> Self {
        let projection = tied_embedding.map_or((head, PROJECTION), |embedding| (embedding, TABLE));
        Self { norm: head, projection, norm_eps }
    }

    /// The logits of every token, `[tokens, vocab]`.
    pub(super) fn logits(&self, input: &Matrix) -> MatrixMut {
        let normed = rms_norm(input, &self.norm.matrix(NORM), self.norm_eps).freeze();
        linear(&normed, &self.weight())
    }

    /// The sum of the tokens' losses and the input's gradient; `scale` is the loss's weight.
    pub(super) fn backward(
        &self,
        input: &Matrix,
        targets: &[u32],
        scale: f32,
        sink: &mut GradientSink<'_>,
    ) -> (f64, MatrixMut) {
        let gain = self.norm.matrix(NORM);
        let weight = self.weight();
        let (tokens, hidden) = (targets.len(), input.columns());
        let vocab = weight.len() / hidden;
        let normed = rms_norm(input, &gain, self.norm_eps).freeze();
        let mut gradient = MatrixMut::zeros(tokens, hidden);
        let mut loss = 0.0;
        for start in (0..tokens).step_by(chunk_tokens(vocab, tokens)) {
            let chunk = start..tokens.min(start + chunk_tokens(vocab, tokens));
            let normed = normed.as_tensor().narrow(0, chunk.start, chunk.len());
            let mut logits = product(normed.clone(), weight.as_tensor().transpose());
            loss += cross_entropy_backward(&mut logits, &targets[chunk.clone()], scale);
            let d_logits = logits.freeze().as_tensor();
            let part = product(d_logits.clone(), weight.as_tensor());
            gradient[chunk.start * hidden..chunk.end * hidden].copy_from_slice(&part);
            drop(part);
            for rows in slices(vocab, hidden) {
                let d_logits = d_logits.clone().narrow(1, rows.start, rows.len());
                let part = product(d_logits.transpose(), normed.clone());
                self.emit(sink, self.projection, rows.start * hidden..rows.end * hidden, &part);
            }
        }
        let d_gain = rms_norm_backward(input, &gain, self.norm_eps, &mut gradient, None);
        self.emit(sink, (self.norm, NORM), 0..hidden, &d_gain);
        (loss, gradient)
    }

    fn weight(&self) -> Matrix {
        let (weights, parameter) = self.projection;
        weights.matrix(parameter)
    }

    /// Hands out the gradient of the elements `within` a parameter.
    fn emit(
        &self,
        sink: &mut GradientSink<'_>,
        (weights, parameter): (&Weights<'_>, usize),
        within: Range<usize>,
        gradient: &[f32],
    ) {
        let layout = weights.layout();
        let start = layout.parameters[parameter].range.start;
        sink(layout.unit, start + within.start..start + within.end, gradient);
    }
}

/// Replaces logits by the gradient of `scale · loss` and returns the sum of the tokens' losses.
fn cross_entropy_backward(logits: &mut MatrixMut, targets: &[u32], scale: f32) -> f64 {
    let vocab = logits.columns();
    let mut losses = vec![0.0f64; targets.len()];
    logits.par_chunks_exact_mut(vocab).zip(targets).zip(&mut losses).for_each(|((logits, target), loss)| {
        let target = *target as usize;
        let (largest, of_target) = (max(logits), logits[target]);
        let total = exponentials(logits, largest);
        *loss = f64::from(total).ln() + f64::from(largest) - f64::from(of_target);
        let factor = scale / total;
        for logit in logits.iter_mut() {
            *logit *= factor;
        }
        logits[target] -= scale;
    });
    losses.iter().sum()
}

/// Number of tokens whose logits are in memory at a time.
pub(super) fn chunk_tokens(vocab: usize, tokens: usize) -> usize {
    (LOGIT_BYTES_MAX / (vocab * size_of::<f32>())).max(TOKENS_MIN).min(tokens)
}

/// Rows of the projection whose gradient is in memory at a time.
pub(super) fn slice_rows(vocab: usize, hidden: usize) -> usize {
    (SLICE_BYTES / (hidden * size_of::<f32>())).clamp(1, vocab)
}

fn slices(vocab: usize, hidden: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = slice_rows(vocab, hidden);
    (0..vocab).step_by(rows).map(move |start| start..vocab.min(start + rows))
}
