//! SwiGLU: `down(silu(gate(x)) · up(x))`, here the part between the matrices.

use rayon::prelude::*;

use super::arithmetic::sigmoid;
use super::matrix::MatrixMut;

/// Elements handed to another core at a time.
const CHUNK: usize = 1 << 13;

/// `gate ← silu(gate) · up`
pub(super) fn swiglu(gate: &mut MatrixMut, up: &MatrixMut) {
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(gate, up)| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate *= sigmoid(*gate) * up;
        }
    });
}

/// From `gate`, `up` and the gradient of [`swiglu`]'s result, in place: `gate` and `up` become their gradients, and
/// `gradient` becomes the result itself, which the next matrix's gradient needs.
pub(super) fn swiglu_backward(gate: &mut MatrixMut, up: &mut MatrixMut, gradient: &mut MatrixMut) {
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(gradient.par_chunks_mut(CHUNK)).for_each(
        |((gate, up), gradient)| {
            for ((gate, up), gradient) in gate.iter_mut().zip(up).zip(gradient) {
                let open = sigmoid(*gate);
                let silu = *gate * open;
                let d_result = *gradient;
                *gradient = silu * *up;
                *gate = d_result * *up * (open + silu * (1.0 - open));
                *up = d_result * silu;
            }
        },
    );
}
