//! Causal grouped-query attention between the projections.
//!
//! One sequence at a time, and in it one block of queries at a time: the scores in memory are
//! `heads · block · positions`, never `heads · positions²`, and keys after the block's last query are not multiplied
//! at all. Queries, keys and values are laid out head by head on the way in (the rotary embedding turns them there),
//! so that all query heads of a key head are the rows of one matrix. Backward computes the probabilities again and
//! keeps two such blocks of scores.

use std::ops::Range;

use burn::tensor::Tensor;

use super::arithmetic::{dot, exponentials, max};
use super::matrix::{Matrix, MatrixMut, for_each_row, product};
use super::rotary::Rotary;
use crate::config::ModelConfig;

/// A block of scores takes at most this, unless [`QUERIES_MIN`] queries need more.
const SCORE_BYTES_MAX: usize = 4 << 20;

/// Fewer queries than this make the products slow.
const QUERIES_MIN: usize = 64;

/// Attention of one model over sequences of one length.
#[derive(Debug)]
pub(super) struct Attention {
    rotary: Rotary,
    /// Key and value heads.
    groups: usize,
    head_dim: usize,
    positions: usize,
    /// Queries handled at a time.
    block: usize,
}

/// The operands of attention, or their gradients: a row per token, heads side by side.
pub(super) struct Projections<M> {
    pub(super) query: M,
    pub(super) key: M,
    pub(super) value: M,
}

impl Attention {
    pub(super) fn new(config: &ModelConfig, positions: usize) -> Self {
        Self {
            rotary: Rotary::new(config, positions),
            groups: config.kv_heads,
            head_dim: config.head_dim,
            positions,
            block: block_queries(config, positions),
        }
    }

    /// The attended values, `[tokens, heads · head_dim]`.
    pub(super) fn forward(&self, x: &Projections<Matrix>) -> MatrixMut {
        let mut output = MatrixMut::zeros(x.query.len() / x.query.columns(), x.query.columns());
        for sequence in 0..self.sequences(&x.query) {
            let key = self.turned(&x.key, sequence, 0..self.positions, 1.0);
            let value = self.by_head(&x.value, sequence, 0..self.positions);
            for queries in self.blocks() {
                let query = self.turned(&x.query, sequence, queries.clone(), self.scale());
                let probabilities = self.probabilities(&query, &key, &queries);
                let attended =
                    product(self.grouped(&probabilities), self.keys(&value).narrow(1, 0, queries.end));
                self.merge(&attended, sequence, queries, &mut output, |_, from, to| to.copy_from_slice(from));
            }
        }
        output
    }

    /// The gradients of the operands, given that of the attended values.
    pub(super) fn backward(&self, x: &Projections<Matrix>, gradient: &Matrix) -> Projections<MatrixMut> {
        let zeros = |like: &Matrix| MatrixMut::zeros(like.len() / like.columns(), like.columns());
        let mut result = Projections { query: zeros(&x.query), key: zeros(&x.key), value: zeros(&x.value) };
        for sequence in 0..self.sequences(&x.query) {
            let key = self.turned(&x.key, sequence, 0..self.positions, 1.0);
            let value = self.by_head(&x.value, sequence, 0..self.positions);
            let mut d_key = MatrixMut::zeros(self.groups * self.positions, self.head_dim);
            let mut d_value = MatrixMut::zeros(self.groups * self.positions, self.head_dim);
            for queries in self.blocks() {
                let query = self.turned(&x.query, sequence, queries.clone(), self.scale());
                let d_attended = self.by_head(gradient, sequence, queries.clone());
                let probabilities = self.probabilities(&query, &key, &queries);

                let part = product(self.grouped(&probabilities).swap_dims(1, 2), self.grouped(&d_attended));
                self.accumulate(&part, queries.end, &mut d_value);
                let values = self.keys(&value).narrow(1, 0, queries.end);
                let mut d_scores = product(self.grouped(&d_attended), values.swap_dims(1, 2));
                drop(d_attended);
                softmax_backward(&probabilities, &mut d_scores);
                drop(probabilities);
                let d_scores = d_scores.freeze();

                let part = product(self.grouped(&d_scores).swap_dims(1, 2), self.grouped(&query));
                self.accumulate(&part, queries.end, &mut d_key);
                let d_query = product(self.grouped(&d_scores), self.keys(&key).narrow(1, 0, queries.end));
                self.merge(&d_query, sequence, queries, &mut result.query, |position, from, to| {
                    self.rotary.turn_back(position, self.scale(), from, to);
                });
            }
            self.merge(&d_key, sequence, 0..self.positions, &mut result.key, |position, from, to| {
                self.rotary.turn_back(position, 1.0, from, to);
            });
            self.merge(&d_value, sequence, 0..self.positions, &mut result.value, |_, from, to| {
                to.copy_from_slice(from);
            });
        }
        result
    }

    /// Softmax of the masked scores, `[heads · queries, keys]` with the keys up to the last query.
    fn probabilities(&self, query: &Matrix, key: &Matrix, queries: &Range<usize>) -> Matrix {
        let keys = self.keys(key).narrow(1, 0, queries.end);
        let mut scores = product(self.grouped(query), keys.swap_dims(1, 2));
        for_each_row(&mut scores, queries.end, |row, scores| {
            let query = queries.start + row % queries.len();
            let (visible, hidden) = scores.split_at_mut(query + 1);
            let share = 1.0 / exponentials(visible, max(visible));
            for score in visible {
                *score *= share;
            }
            hidden.fill(0.0);
        });
        scores.freeze()
    }

    /// The rows of `tokens` of one sequence, head by head: `[heads · tokens, head_dim]`.
    fn by_head(&self, x: &Matrix, sequence: usize, tokens: Range<usize>) -> Matrix {
        self.split(x, sequence, tokens, |_, from, to| to.copy_from_slice(from))
    }

    /// Like [`by_head`](Self::by_head), every head turned to its position and scaled.
    fn turned(&self, x: &Matrix, sequence: usize, tokens: Range<usize>, scale: f32) -> Matrix {
        self.split(x, sequence, tokens, |position, from, to| self.rotary.turn(position, scale, from, to))
    }

    fn split(
        &self,
        x: &Matrix,
        sequence: usize,
        tokens: Range<usize>,
        copy: impl Fn(usize, &[f32], &mut [f32]) + Sync,
    ) -> Matrix {
        let heads = x.columns() / self.head_dim;
        let mut y = MatrixMut::zeros(heads * tokens.len(), self.head_dim);
        for_each_row(&mut y, self.head_dim, |row, to| {
            let (head, position) = (row / tokens.len(), tokens.start + row % tokens.len());
            let from = (sequence * self.positions + position) * x.columns() + head * self.head_dim;
            copy(position, &x[from..][..self.head_dim], to);
        });
        y.freeze()
    }

    /// Puts heads that lie head by head back into the rows of `tokens` of one sequence.
    fn merge(
        &self,
        x: &[f32],
        sequence: usize,
        tokens: Range<usize>,
        y: &mut MatrixMut,
        copy: impl Fn(usize, &[f32], &mut [f32]) + Sync,
    ) {
        let columns = y.columns();
        let first = sequence * self.positions + tokens.start;
        for_each_row(&mut y[first * columns..][..tokens.len() * columns], columns, |row, to| {
            for (head, to) in to.chunks_exact_mut(self.head_dim).enumerate() {
                let from = (head * tokens.len() + row) * self.head_dim;
                copy(tokens.start + row, &x[from..][..self.head_dim], to);
            }
        });
    }

    /// Adds `part`, which covers the first `keys` positions of every group, to `sum`, which covers all.
    fn accumulate(&self, part: &[f32], keys: usize, sum: &mut MatrixMut) {
        let (part_len, sum_len) = (keys * self.head_dim, self.positions * self.head_dim);
        for_each_row(sum, sum_len, |group, sum| {
            for (sum, value) in sum.iter_mut().zip(&part[group * part_len..][..part_len]) {
                *sum += value;
            }
        });
    }

    /// `[groups, query heads of a group · queries, …]`
    fn grouped(&self, x: &Matrix) -> Tensor<3> {
        x.tensor([self.groups, x.len() / x.columns() / self.groups, x.columns()])
    }

    /// `[groups, positions, head_dim]`
    fn keys(&self, x: &Matrix) -> Tensor<3> {
        x.tensor([self.groups, self.positions, self.head_dim])
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.positions).step_by(self.block).map(|start| start..self.positions.min(start + self.block))
    }

    fn sequences(&self, query: &Matrix) -> usize {
        query.len() / query.columns() / self.positions
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// From the gradient of the probabilities, in place, that of the scores.
fn softmax_backward(probabilities: &Matrix, gradient: &mut MatrixMut) {
    let columns = gradient.columns();
    for_each_row(gradient, columns, |row, gradient| {
        let probabilities = &probabilities[row * columns..][..columns];
        let mean = dot(probabilities, gradient);
        for (gradient, probability) in gradient.iter_mut().zip(probabilities) {
            *gradient = (*gradient - mean) * probability;
        }
    });
}

/// Number of queries whose scores are in memory at a time.
pub(super) fn block_queries(config: &ModelConfig, positions: usize) -> usize {
    let query_bytes = config.heads * positions * size_of::<f32>();
    (SCORE_BYTES_MAX / query_bytes).max(QUERIES_MIN).min(positions)
}
