//! Passes that only move memory: adding one vector to another, and the triad that measures what memory can do.

use rayon::prelude::*;

use crate::CHUNK_ELEMENTS;
use crate::error::LengthMismatch;
use crate::isa::{Isa, Kernel, Load};

/// Adds `x` to `y`, element by element, on all cores.
///
/// # Errors
///
/// [`LengthMismatch`] when the slices are not of one length; nothing was added.
pub fn add_assign(isa: Isa, y: &mut [f32], x: &[f32]) -> Result<(), LengthMismatch> {
    LengthMismatch::check("x", x.len(), y.len())?;
    if y.len() <= CHUNK_ELEMENTS {
        isa.run(Add { y, x });
    } else {
        y.par_chunks_mut(CHUNK_ELEMENTS)
            .zip(x.par_chunks(CHUNK_ELEMENTS))
            .for_each(|(y, x)| isa.run(Add { y, x }));
    }
    Ok(())
}

/// The triad of the STREAM benchmark, `a = b + s * c`, on all cores and up to the end of the shortest slice.
///
/// It moves 16 bytes per element: two reads, one write, and the read of the cache line that is written.
pub fn triad(a: &mut [f32], b: &[f32], c: &[f32], s: f32) {
    let isa = Isa::detect();
    a.par_chunks_mut(CHUNK_ELEMENTS)
        .zip(b.par_chunks(CHUNK_ELEMENTS))
        .zip(c.par_chunks(CHUNK_ELEMENTS))
        .for_each(|((a, b), c)| isa.run(Triad { a, b, c, s }));
}

/// One chunk of [`add_assign`]; the slices are of one length.
struct Add<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Load>(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y += L::load(*x);
        }
    }
}

/// One chunk of [`triad`].
struct Triad<'a> {
    a: &'a mut [f32],
    b: &'a [f32],
    c: &'a [f32],
    s: f32,
}

impl Kernel for Triad<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Load>(self) {
        for ((a, b), c) in self.a.iter_mut().zip(self.b).zip(self.c) {
            *a = b + self.s * L::load(*c);
        }
    }
}
