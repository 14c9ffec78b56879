//! Batches drawn from a corpus: each a pure function of seed, step and micro-batch.
//!
//! The generator is a block cipher in counter mode: the seed is its key, the step its stream, the micro-batch its
//! position in the stream. Asking twice, in another order, or after a restart gives the same windows.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::{Corpus, DataError};
use crate::model::BatchShape;
use crate::trainer::BatchSource;

/// An endless supply of batches from a corpus.
#[derive(Debug)]
pub struct Batches {
    corpus: Corpus,
    shape: BatchShape,
    seed: u64,
}

impl Batches {
    /// Binds a corpus to a model that has `vocab` token ids.
    ///
    /// # Errors
    /// [`DataError::EmptyBatch`], [`DataError::TooShort`], [`DataError::TokenOutOfRange`].
    pub fn new(corpus: Corpus, vocab: usize, shape: BatchShape, seed: u64) -> Result<Self, DataError> {
        let BatchShape { batch, seq } = shape;
        if batch == 0 || seq == 0 {
            return Err(DataError::EmptyBatch { batch, seq });
        }
        let source_name = || corpus.source().to_owned();
        if corpus.len() <= seq {
            let needed = seq.saturating_add(1);
            return Err(DataError::TooShort { source_name: source_name(), found: corpus.len(), needed });
        }
        if let Some((position, token)) = corpus.first_outside(vocab) {
            return Err(DataError::TokenOutOfRange { source_name: source_name(), token, position, vocab });
        }
        Ok(Self { corpus, shape, seed })
    }

    /// The shape of a micro-batch.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// The corpus that the windows are cut from.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// Number of places at which a window with its last target fits.
    fn starts(&self) -> usize {
        self.corpus.len() - self.shape.seq
    }

    fn generator(&self, step: u64, micro: usize) -> ChaCha8Rng {
        /// Words of the stream that belong to one micro-batch; far more than its draws take.
        const MICRO_WORDS: u128 = 1 << 32;
        let mut generator = ChaCha8Rng::from_seed(key(self.seed));
        generator.set_stream(step);
        generator.set_word_pos(micro as u128 * MICRO_WORDS);
        generator
    }
}

impl BatchSource for Batches {
    fn fill(&self, step: u64, micro: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        inputs.clear();
        targets.clear();
        let mut generator = self.generator(step, micro);
        for _ in 0..self.shape.batch {
            let start = below(&mut generator, self.starts());
            self.corpus.extend_into(start, self.shape.seq, inputs);
            // A target is the token that follows its input.
            self.corpus.extend_into(start + 1, self.shape.seq, targets);
        }
    }
}

/// The key of this purpose: other draws of the same seed, as of first weights, must not repeat the batches' bits.
fn key(seed: u64) -> [u8; 32] {
    let mut key = *b"........ windows of the corpus..";
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key
}

/// A number below `bound`, each equally likely (Lemire's multiplication with rejection).
fn below(generator: &mut impl Rng, bound: usize) -> usize {
    let bound = bound as u64;
    // As many of the 2^64 products share the low bits of their kind as do not divide evenly.
    let uneven = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(generator.next_u64()) * u128::from(bound);
        if product as u64 >= uneven {
            return (product >> 64) as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ten rejections in a row, then the largest word.
    struct Edge(u32);

    impl rand_chacha::rand_core::TryRng for Edge {
        type Error = std::convert::Infallible;

        fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
            Ok(u32::MAX)
        }

        fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
            self.0 += 1;
            Ok(if self.0 <= 10 { 0 } else { u64::MAX })
        }

        fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
            bytes.fill(u8::MAX);
            Ok(())
        }
    }

    #[test]
    fn words_that_would_favor_small_numbers_are_drawn_again() {
        let mut edge = Edge(0);
        assert_eq!(below(&mut edge, 3), 2);
        assert_eq!(edge.0, 11);
    }

    proptest! {
        #[test]
        fn a_draw_is_below_its_bound(seed: u64, bound in 1..=usize::MAX) {
            let mut generator = ChaCha8Rng::from_seed(key(seed));
            prop_assert!(below(&mut generator, bound) < bound);
        }
    }
}
