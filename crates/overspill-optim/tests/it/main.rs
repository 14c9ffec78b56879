//! What the crate promises, seen from outside: the arithmetic against plain references, and the same bits on every
//! instruction set, for every slicing and every number of threads.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, its helpers too")]

mod adamw;
mod convert;
mod norm;
mod recipe;
mod stream;
mod torch;
mod whole;

/// The elements that one thread takes at a time; lengths around its multiples meet the edges of the chunks.
const CHUNK_ELEMENTS: usize = 64 * 1024;

/// Lengths around zero, the vector widths and the edges of one and two chunks.
fn edge_lengths() -> impl Iterator<Item = usize> {
    let around = |edge: usize| edge - 17..=edge + 17;
    (0..200).chain(around(CHUNK_ELEMENTS)).chain(around(2 * CHUNK_ELEMENTS).step_by(5))
}

/// `length` numbers between -1 and 1 that depend on `seed` alone.
fn noise(length: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..length).map(|_| next()).collect()
}

/// The bits of each element, so that equality means the same bits (and tells 0 from -0).
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Runs `work` on a pool of `threads` threads.
fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("threads can be started").install(work)
}
