//! Products of matrices for Muon, the same bits on every machine.
//!
//! Each element of a product is a sum over `k` in rising order, one multiplication and one addition at a time; only which
//! elements are computed together differs between instruction sets and numbers of threads. The right factor is packed into
//! panels of 32 columns once; threads take stripes of 64 rows; inside a stripe a part of 256 rows of a panel stays in the
//! first-level cache while four rows of the left factor pass by, and their 128 sums stay in registers.

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::isa::{Isa, Kernel, Load};

/// Rows and columns of the sums that are kept in registers.
const ROWS: usize = 4;
const COLUMNS: usize = 32;
/// Terms of a sum before the next element's turn: 32 KiB of a panel.
const TERMS: usize = 256;
/// Rows of a thread's stripe.
const STRIPE_ROWS: usize = 64;

/// A matrix in row-major order.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) values: Vec<f32>,
}

impl Matrix {
    pub(crate) fn transposed(&self) -> Self {
        let (rows, columns) = (self.columns, self.rows);
        let mut values = vec![0.0; self.values.len()];
        let chunk_rows = CHUNK_ELEMENTS.div_ceil(columns.max(1));
        values.par_chunks_mut(columns.max(1)).enumerate().with_min_len(chunk_rows).for_each(
            |(column, row)| {
                let source = self.values.iter().skip(column).step_by(rows.max(1));
                row.iter_mut().zip(source).for_each(|(to, from)| *to = *from);
            },
        );
        Self { rows, columns, values }
    }

    /// `scale * self * right + addend_scale * addend`; the addend has the shape of the product.
    pub(crate) fn multiplied(
        &self,
        isa: Isa,
        right: &Self,
        scale: f32,
        addend: &Self,
        addend_scale: f32,
    ) -> Self {
        let mut product = self.product(isa, right);
        let elements = product.values.par_iter_mut().zip(&addend.values);
        elements.with_min_len(CHUNK_ELEMENTS).for_each(|(x, addend)| {
            *x = *x * scale + *addend * addend_scale;
        });
        product
    }

    /// `self * right`.
    pub(crate) fn product(&self, isa: Isa, right: &Self) -> Self {
        debug_assert_eq!(self.columns, right.rows);
        let (rows, columns, terms) = (self.rows, right.columns, self.columns);
        let mut values = vec![0.0; rows * columns];
        if values.is_empty() || terms == 0 {
            return Self { rows, columns, values };
        }
        let panels = right.panels();
        values
            .par_chunks_mut(STRIPE_ROWS * columns)
            .zip(self.values.par_chunks(STRIPE_ROWS * terms))
            .for_each(|(out, left)| isa.run(Stripe { out, left, panels: &panels, columns, terms }));
        Self { rows, columns, values }
    }

    /// The columns in groups of [`COLUMNS`], each group row by row, the last one padded with zeros.
    fn panels(&self) -> Vec<[f32; COLUMNS]> {
        let mut panels = vec![[0.0; COLUMNS]; self.columns.div_ceil(COLUMNS) * self.rows];
        let chunk_panels = CHUNK_ELEMENTS.div_ceil(COLUMNS * self.rows);
        panels.par_chunks_mut(self.rows).enumerate().with_min_len(chunk_panels).for_each(|(panel, rows)| {
            let first = panel * COLUMNS;
            let width = COLUMNS.min(self.columns - first);
            for (packed, row) in rows.iter_mut().zip(self.values.chunks(self.columns)) {
                packed[..width].copy_from_slice(&row[first..first + width]);
            }
        });
        panels
    }
}

/// Some rows of a product, which begin as zeros.
struct Stripe<'a> {
    out: &'a mut [f32],
    left: &'a [f32],
    panels: &'a [[f32; COLUMNS]],
    columns: usize,
    terms: usize,
}

impl Kernel for Stripe<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Load>(self) {
        let Self { out, left, panels, columns, terms } = self;
        for start in (0..terms).step_by(TERMS) {
            let count = TERMS.min(terms - start);
            for (panel, packed) in panels.chunks(terms).enumerate() {
                let first = panel * COLUMNS;
                let width = COLUMNS.min(columns - first);
                let packed = &packed[start..start + count];
                for (out, left) in out.chunks_mut(ROWS * columns).zip(left.chunks(ROWS * terms)) {
                    let mut terms_of_rows = [[0.0; ROWS]; TERMS];
                    let mut sums = [[0.0; COLUMNS]; ROWS];
                    for (row, (left, out)) in left.chunks(terms).zip(out.chunks(columns)).enumerate() {
                        for (terms, x) in terms_of_rows.iter_mut().zip(&left[start..start + count]) {
                            terms[row] = *x;
                        }
                        sums[row][..width].copy_from_slice(&out[first..first + width]);
                    }
                    add::<L>(&mut sums, &terms_of_rows[..count], packed);
                    for (sums, out) in sums.iter().zip(out.chunks_mut(columns)) {
                        out[first..first + width].copy_from_slice(&sums[..width]);
                    }
                }
            }
        }
    }
}

/// Adds the products of a column of `left` and a row of `right`, term after term. Each row has sums of its own name: of an
/// array of arrays the compiler would make shuffles of wide registers, at a tenth of the speed.
#[inline(always)]
fn add<L: Load>(sums: &mut [[f32; COLUMNS]; ROWS], left: &[[f32; ROWS]], right: &[[f32; COLUMNS]]) {
    let [mut first, mut second, mut third, mut fourth] = *sums;
    for (left, right) in left.iter().zip(right) {
        let [a, b, c, d] = *left;
        for column in 0..COLUMNS {
            let y = L::load(right[column]);
            first[column] += a * y;
            second[column] += b * y;
            third[column] += c * y;
            fourth[column] += d * y;
        }
    }
    *sums = [first, second, third, fourth];
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize, seed: u32) -> Matrix {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        Matrix { rows, columns, values: (0..rows * columns).map(|_| next()).collect() }
    }

    #[test]
    fn every_instruction_set_adds_the_terms_of_a_product_in_rising_order() {
        for (rows, terms, columns) in
            [(1, 1, 1), (3, 5, 7), (4, 256, 32), (65, 300, 33), (130, 513, 64), (0, 3, 2), (2, 0, 3)]
        {
            let (left, right) = (matrix(rows, terms, 1), matrix(terms, columns, 2));
            let mut expected = vec![0.0_f32; rows * columns];
            for i in 0..rows {
                for j in 0..columns {
                    for k in 0..terms {
                        expected[i * columns + j] +=
                            left.values[i * terms + k] * right.values[k * columns + j];
                    }
                }
            }
            for isa in Isa::available() {
                assert!(left.product(isa, &right).values == expected, "{isa}: {rows} × {terms} × {columns}");
            }
        }
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let matrix = matrix(5, 9, 3);
        let transposed = matrix.transposed();
        assert_eq!((transposed.rows, transposed.columns), (9, 5));
        assert_eq!(transposed.values[1], matrix.values[9]);
        assert_eq!(transposed.transposed().values, matrix.values);
    }
}
