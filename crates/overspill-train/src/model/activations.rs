//! What flows between layers: the residual stream of one micro-batch, or its gradient.

use super::matrix::{Matrix, MatrixMut};

/// `[tokens, hidden]` elements of `f32`; a clone shares the memory.
#[derive(Clone, Debug)]
pub struct Activations(pub(super) Matrix);

impl Activations {
    /// Activations of width `hidden` whose memory is `bytes` (native-endian `f32`), which stays where it is.
    ///
    /// # Panics
    /// When `bytes` is not a whole number of tokens, or does not start at a multiple of four.
    pub fn from_bytes(bytes: bytes::Bytes, hidden: usize) -> Self {
        Self(Matrix::borrow(bytes, hidden))
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.0.len() / self.0.columns()
    }

    /// Number of elements of a token.
    pub fn hidden(&self) -> usize {
        self.0.columns()
    }

    /// All elements, token by token.
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }

    /// All elements as bytes in native order.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl From<MatrixMut> for Activations {
    fn from(matrix: MatrixMut) -> Self {
        Self(matrix.freeze())
    }
}
