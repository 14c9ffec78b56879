//! The token embedding: a row per token id.

use super::matrix::{Matrix, MatrixMut, for_each_row};

/// Copies the row of every id.
pub(super) fn embed(table: &Matrix, ids: &[u32]) -> MatrixMut {
    let columns = table.columns();
    let mut output = MatrixMut::zeros(ids.len(), columns);
    for_each_row(&mut output, columns, |token, row| {
        row.copy_from_slice(&table[ids[token] as usize * columns..][..columns]);
    });
    output
}

/// Adds every token's gradient to the row of its id, in token order.
pub(super) fn embed_backward(ids: &[u32], gradient: &Matrix, grad_table: &mut [f32]) {
    let columns = gradient.columns();
    for (id, gradient) in ids.iter().zip(gradient.chunks_exact(columns)) {
        let row = &mut grad_table[*id as usize * columns..][..columns];
        for (sum, value) in row.iter_mut().zip(gradient) {
            *sum += value;
        }
    }
}
