//! One decoder layer, forward and backward.
//!
//! ```text
//! input ─┬─ norm ─ query,key,value ─ attention ─ output ─(+)─┬─ norm ─ gate,up ─ swiglu ─ down ─(+)─
//!        └────────────────────────────────────────────────────┘└───────────────────────────────────┘
//!                                                          middle
//! ```
//! Backward starts from the input alone: it computes forward again as far as it needs operands, then walks back by
//! hand-derived gradients. A parameter's gradient leaves as soon as it is known, and a matrix is dropped after its
//! last use.

use super::GradientSink;
use super::attention::{Attention, Projections};
use super::feed_forward::{swiglu, swiglu_backward};
use super::matrix::{
    Matrix, MatrixMut, linear, linear_input_gradient as input_gradient,
    linear_weight_gradient as weight_gradient,
};
use super::norm::{rms_norm, rms_norm_backward};
use super::weights::Weights;

// Positions in a layer's layout.
const INPUT_NORM: usize = 0;
const QUERY: usize = 1;
const KEY: usize = 2;
const VALUE: usize = 3;
const OUTPUT: usize = 4;
const MIDDLE_NORM: usize = 5;
const GATE: usize = 6;
const UP: usize = 7;
const DOWN: usize = 8;

/// A decoder layer with its weights at hand.
pub(super) struct Layer<'a> {
    pub(super) attention: &'a Attention,
    pub(super) weights: &'a Weights<'a>,
    pub(super) norm_eps: f32,
}

impl Layer<'_> {
    /// The layer's output, `[tokens, hidden]`.
    pub(super) fn forward(&self, input: &Matrix) -> MatrixMut {
        let projections = self.projections(&self.norm(input, INPUT_NORM));
        let attended = self.attention.forward(&projections).freeze();
        drop(projections);
        let middle = self.middle(input, &attended);
        drop(attended);
        let activated = self.activated(&self.norm(&middle, MIDDLE_NORM));
        let mut output = linear(&activated, &self.weight(DOWN));
        output.add(&middle);
        output
    }

    /// The gradient of the layer's input, given that of its output.
    pub(super) fn backward(
        &self,
        input: &Matrix,
        grad_output: Matrix,
        sink: &mut GradientSink<'_>,
    ) -> MatrixMut {
        let normed = self.norm(input, INPUT_NORM);
        let projections = self.projections(&normed);
        let attended = self.attention.forward(&projections).freeze();
        let d_middle = self.feed_forward_backward(&self.middle(input, &attended), &grad_output, sink);
        drop(grad_output);

        self.emit(sink, OUTPUT, &weight_gradient(&d_middle, &attended));
        drop(attended);
        let d_attended = input_gradient(&d_middle, &self.weight(OUTPUT)).freeze();
        let d_projections = self.attention.backward(&projections, &d_attended);
        drop((projections, d_attended));

        let mut d_normed = self.linear_backward(QUERY, &normed, d_projections.query, sink);
        d_normed.add(&self.linear_backward(KEY, &normed, d_projections.key, sink));
        d_normed.add(&self.linear_backward(VALUE, &normed, d_projections.value, sink));
        drop(normed);
        self.norm_backward(INPUT_NORM, input, &mut d_normed, &d_middle, sink);
        d_normed
    }

    /// The gradient of the feed-forward part's input, that around it included.
    fn feed_forward_backward(
        &self,
        middle: &Matrix,
        grad_output: &Matrix,
        sink: &mut GradientSink<'_>,
    ) -> Matrix {
        let normed = self.norm(middle, MIDDLE_NORM);
        let mut gate = linear(&normed, &self.weight(GATE));
        let mut up = linear(&normed, &self.weight(UP));
        let mut activated = input_gradient(grad_output, &self.weight(DOWN));
        swiglu_backward(&mut gate, &mut up, &mut activated);
        self.emit(sink, DOWN, &weight_gradient(grad_output, &activated.freeze()));

        let mut d_normed = self.linear_backward(GATE, &normed, gate, sink);
        d_normed.add(&self.linear_backward(UP, &normed, up, sink));
        drop(normed);
        self.norm_backward(MIDDLE_NORM, middle, &mut d_normed, grad_output, sink);
        d_normed.freeze()
    }

    fn projections(&self, normed: &Matrix) -> Projections<Matrix> {
        let project = |parameter| linear(normed, &self.weight(parameter)).freeze();
        Projections { query: project(QUERY), key: project(KEY), value: project(VALUE) }
    }

    fn middle(&self, input: &Matrix, attended: &Matrix) -> Matrix {
        let mut middle = linear(attended, &self.weight(OUTPUT));
        middle.add(input);
        middle.freeze()
    }

    fn activated(&self, normed: &Matrix) -> Matrix {
        let mut gate = linear(normed, &self.weight(GATE));
        swiglu(&mut gate, &linear(normed, &self.weight(UP)));
        gate.freeze()
    }

    /// Emits a matrix's gradient and returns that of its input.
    fn linear_backward(
        &self,
        parameter: usize,
        input: &Matrix,
        gradient: MatrixMut,
        sink: &mut GradientSink<'_>,
    ) -> MatrixMut {
        let gradient = gradient.freeze();
        self.emit(sink, parameter, &weight_gradient(&gradient, input));
        input_gradient(&gradient, &self.weight(parameter))
    }

    fn norm(&self, input: &Matrix, parameter: usize) -> Matrix {
        rms_norm(input, &self.weight(parameter), self.norm_eps).freeze()
    }

    /// Turns the gradient of a norm's output into that of its input, `residual` included, and emits the gain's.
    fn norm_backward(
        &self,
        parameter: usize,
        input: &Matrix,
        gradient: &mut MatrixMut,
        residual: &Matrix,
        sink: &mut GradientSink<'_>,
    ) {
        let gain = self.weight(parameter);
        self.emit(sink, parameter, &rms_norm_backward(input, &gain, self.norm_eps, gradient, Some(residual)));
    }

    fn weight(&self, parameter: usize) -> Matrix {
        self.weights.matrix(parameter)
    }

    fn emit(&self, sink: &mut GradientSink<'_>, parameter: usize, gradient: &[f32]) {
        let layout = self.weights.layout();
        sink(layout.unit, layout.parameters[parameter].range.clone(), gradient);
    }
}
