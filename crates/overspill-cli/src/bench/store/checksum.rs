//! XXH3-64 beside the sum of the same words: what a checksum costs, and what reading the memory alone would.
//!
//! Every tile gets a checksum of its own, as it does in a store. Warm are tiles that fit into a core's cache and are gone
//! through again and again, as those that were just computed; cold are more tiles than any cache holds, as those that a
//! disk has just brought.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;
use overspill_io::Pool;
use rayon::prelude::*;
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use super::super::pairs::Pairs;
use crate::motion::marks;

/// Bytes that each thread goes through again and again.
const WARM_BYTES: usize = 256 << 10;

/// Bytes of a tile.
const TILE_BYTES: usize = 1 << 20;

/// What was found for one place and number of threads. Rates are 10⁹ bytes per second; medians over the pairs.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    pub(super) memory: Memory,
    pub(super) threads: usize,
    pub(super) checksum_gbps: f64,
    pub(super) sum_gbps: f64,
    /// Median of the ratios of neighbors.
    pub(super) ratio_to_sum: f64,
    pub(super) checksum_ms_per_gb: f64,
}

/// Where the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Memory {
    /// In the caches of the cores that read them.
    Warm,
    /// In memory.
    Cold,
}

/// One place and number of threads, while it is measured.
struct Scene<'a> {
    bytes: &'a [u8],
    tile_bytes: usize,
    /// How often each tile is gone through.
    rounds: usize,
    /// The one result that each function must have, whenever it is asked.
    expected: [u64; 2],
    is_parallel: bool,
}

/// Measures all places and numbers of threads on `bytes` bytes.
pub(super) fn measure(
    pool: &Pool,
    bytes: usize,
    pairs: usize,
    check_stop: &impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Found>> {
    let mut block = pool.lease(bytes)?;
    marks::fill(&mut block);
    let all = rayon::current_num_threads();
    let mut found = Vec::new();
    for (memory, threads) in [(Memory::Warm, 1), (Memory::Warm, all), (Memory::Cold, 1), (Memory::Cold, all)]
    {
        let (length, tile_bytes) = match memory {
            Memory::Warm => ((threads * WARM_BYTES).min(bytes), WARM_BYTES),
            Memory::Cold => (bytes, TILE_BYTES),
        };
        let part = &block[..length];
        let mut scene = Scene {
            bytes: part,
            tile_bytes,
            rounds: bytes.div_ceil(length),
            expected: [0; 2],
            is_parallel: threads > 1,
        };
        scene.expected = [scene.pass(xxh3_64), scene.pass(sum)];
        let measured = Pairs::measure(
            pairs,
            &mut scene,
            |scene| check_stop().and_then(|()| scene.gbps(xxh3_64, scene.expected[0])),
            |scene| check_stop().and_then(|()| scene.gbps(sum, scene.expected[1])),
        )?;
        found.push(Found {
            memory,
            threads,
            checksum_gbps: measured.ours(),
            sum_gbps: measured.theirs(),
            ratio_to_sum: measured.ratio(),
            checksum_ms_per_gb: 1e3 / measured.ours(),
        });
    }
    Ok(found)
}

impl Scene<'_> {
    /// Goes through all tiles, and adds up what the function says of each.
    fn pass(&self, function: fn(&[u8]) -> u64) -> u64 {
        // A thread stays with a tile for all rounds; that these are the same is not the compiler's to know.
        let tile =
            |tile: &[u8]| (0..self.rounds).map(|_| function(black_box(tile))).fold(0, u64::wrapping_add);
        match self.is_parallel {
            true => self.bytes.par_chunks(self.tile_bytes).map(tile).reduce(|| 0, u64::wrapping_add),
            false => self.bytes.chunks(self.tile_bytes).map(tile).fold(0, u64::wrapping_add),
        }
    }

    fn gbps(&self, function: fn(&[u8]) -> u64, expected: u64) -> anyhow::Result<f64> {
        let started = Instant::now();
        let result = self.pass(function);
        let seconds = started.elapsed().as_secs_f64();
        ensure!(result == expected, "the same bytes gave different results");
        Ok((self.rounds * self.bytes.len()) as f64 / seconds / 1e9)
    }
}

/// Words added side by side, so that what is measured is the memory.
const LANES: usize = 16;

/// The sum of all words: the least that can be done with every byte.
fn sum(bytes: &[u8]) -> u64 {
    let words: &[u64] = bytemuck::cast_slice(bytes);
    let (rows, rest) = words.as_chunks::<LANES>();
    let mut sums = [0_u64; LANES];
    for row in rows {
        for (sum, word) in sums.iter_mut().zip(row) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_all_words() {
        let words: Vec<u64> = (0..1000).map(|word: u64| word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        for length in [0, 1, LANES - 1, LANES, 3 * LANES + 5, 1000] {
            let expected = words[..length].iter().fold(0, |sum: u64, word| sum.wrapping_add(*word));
            assert_eq!(sum(bytemuck::cast_slice(&words[..length])), expected, "{length}");
        }
    }
}
