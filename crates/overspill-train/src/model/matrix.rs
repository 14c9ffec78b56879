//! Matrices in memory that is ours to say: the border between plain slices and the tensor library.
//!
//! Everything that walks over elements works on slices; everything that multiplies matrices goes through
//! [`product`], which hands the same memory to burn and takes the result's memory back, both without a copy.
//! [`MatrixMut`] has one owner and may be written; [`MatrixMut::freeze`] makes it a [`Matrix`], which is shared,
//! read-only and cheap to clone, so that no operation can trigger burn's silent copy on write.

use std::ops::{Deref, DerefMut};

use burn::tensor::{DType, Device, Tensor, TensorData};
use cubecl_environment::bytes::{AllocationProperty, Bytes};
use rayon::prelude::*;

/// A row-major matrix of `f32`, shared and read-only.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    bytes: Bytes,
    columns: usize,
}

impl Matrix {
    /// The matrix whose memory is `bytes`, which stays where it is.
    ///
    /// # Panics
    /// When `bytes` is not a whole number of rows or does not start at a multiple of four.
    pub(super) fn borrow(bytes: bytes::Bytes, columns: usize) -> Self {
        let matrix = Self { bytes: Bytes::from_shared(bytes, AllocationProperty::Other), columns };
        assert!(matrix.len().is_multiple_of(columns), "{} elements in rows of {columns}", matrix.len());
        matrix
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The same memory as a tensor of `shape`.
    pub(super) fn tensor<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        let data = TensorData::from_bytes(self.bytes.clone(), shape, DType::F32);
        Tensor::from_data(data, (&Device::flex(), DType::F32))
    }

    /// The same memory as a two-dimensional tensor.
    pub(super) fn as_tensor(&self) -> Tensor<2> {
        self.tensor([self.len() / self.columns, self.columns])
    }

    /// The memory as bytes.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Deref for Matrix {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.bytes)
    }
}

/// A row-major matrix of `f32` with a single owner.
#[derive(Debug)]
pub(super) struct MatrixMut {
    bytes: Bytes,
    columns: usize,
}

impl MatrixMut {
    /// A matrix of zeros.
    pub(super) fn zeros(rows: usize, columns: usize) -> Self {
        Self { bytes: Bytes::from_elems(vec![0.0f32; rows * columns]), columns }
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Ends the writing.
    pub(super) fn freeze(self) -> Matrix {
        Matrix { bytes: self.bytes.shared(), columns: self.columns }
    }

    /// `self += other`.
    pub(super) fn add(&mut self, other: &[f32]) {
        let columns = self.columns;
        for_each_row(self, columns, |row, values| {
            for (value, more) in values.iter_mut().zip(&other[row * columns..]) {
                *value += more;
            }
        });
    }
}

impl Deref for MatrixMut {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.bytes)
    }
}

impl DerefMut for MatrixMut {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.bytes)
    }
}

/// The (batched) matrix product; the result's leading dimensions become rows.
pub(super) fn product<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> MatrixMut {
    let (bytes, shape, _) = left.matmul(right).into_data().into_parts();
    MatrixMut { bytes, columns: shape[D - 1] }
}

/// `input` times the transpose of `weight`: what a linear layer with a `[out, in]` weight computes.
pub(super) fn linear(input: &Matrix, weight: &Matrix) -> MatrixMut {
    product(input.as_tensor(), weight.as_tensor().transpose())
}

/// The gradient of [`linear`]'s input.
pub(super) fn linear_input_gradient(grad_output: &Matrix, weight: &Matrix) -> MatrixMut {
    product(grad_output.as_tensor(), weight.as_tensor())
}

/// The gradient of [`linear`]'s weight.
pub(super) fn linear_weight_gradient(grad_output: &Matrix, input: &Matrix) -> MatrixMut {
    product(grad_output.as_tensor().transpose(), input.as_tensor())
}

/// Calls `f` with each row's index and elements, on all cores.
pub(super) fn for_each_row(elements: &mut [f32], columns: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    elements
        .par_chunks_exact_mut(columns)
        .with_min_len(rows_per_task(columns))
        .enumerate()
        .for_each(|(row, values)| f(row, values));
}

/// Number of rows worth handing to another core.
pub(super) fn rows_per_task(columns: usize) -> usize {
    const ELEMENTS_PER_TASK: usize = 1 << 13;
    ELEMENTS_PER_TASK.div_ceil(columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_the_block_it_was_made_from() {
        let block = bytes::Bytes::from_owner(vec![0u8; 4096]);
        let slice = block.slice(64..64 + 6 * size_of::<f32>());
        let matrix = Matrix::borrow(slice.clone(), 3);
        assert_eq!(matrix.as_ptr().cast(), slice.as_ptr());
        // `into_data` hands out the memory itself when nobody else holds the tensor, as is the case here.
        let (bytes, ..) = matrix.tensor([2, 3]).into_data().into_parts();
        assert_eq!(bytes.as_ptr(), slice.as_ptr());
    }

    #[test]
    fn a_frozen_matrix_stays_where_it_was_written() {
        let mut matrix = MatrixMut::zeros(2, 3);
        matrix[4] = 1.0;
        let address = matrix.as_ptr();
        let matrix = matrix.freeze();
        let clone = matrix.clone();
        assert_eq!((matrix.as_ptr(), clone.as_ptr()), (address, address));
        assert_eq!(*matrix, [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
    }
}
