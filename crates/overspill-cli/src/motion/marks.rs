//! Contents by which a block is known again.
//!
//! Both ends of a block tell which block it is and which write it was for; they are set before a block is written and
//! compared when it was read, also while time is taken. All bytes between them are a pattern that tells their place in
//! any block and looks random, as a state does to a disk. It stays in memory from one write to the next, and is compared
//! only when no time is taken: to look at every byte of what just came from a disk takes longer than to bring it.

/// Bytes of a mark, and of a word of the pattern.
const MARK_BYTES: usize = 8;

/// Fills a block with the pattern.
pub(crate) fn fill(bytes: &mut [u8]) {
    for (index, word) in bytes.chunks_exact_mut(MARK_BYTES).enumerate() {
        word.copy_from_slice(&word_at(index));
    }
}

/// Whether all bytes but those of the marks are the pattern's.
pub(crate) fn is_filled(bytes: &[u8]) -> bool {
    let words = bytes.chunks_exact(MARK_BYTES).enumerate();
    let mut between = words.skip(1).take((bytes.len() / MARK_BYTES).saturating_sub(2));
    between.all(|(index, word)| word == word_at(index))
}

/// Marks both ends of a block that the `version`th write of all is for.
pub(crate) fn stamp(bytes: &mut [u8], block: usize, version: u64) {
    let (mark, end) = (mark(block, version), bytes.len() - MARK_BYTES);
    bytes[..MARK_BYTES].copy_from_slice(&mark);
    bytes[end..].copy_from_slice(&mark);
}

/// Whether both ends are those of the `version`th write.
pub(crate) fn is_stamped(bytes: &[u8], block: usize, version: u64) -> bool {
    let mark = mark(block, version);
    bytes.starts_with(&mark) && bytes.ends_with(&mark)
}

/// A permutation of `0..length` that depends on `seed` alone, with a random bit for each entry.
pub(crate) fn shuffled(length: usize, seed: u64) -> Vec<(usize, bool)> {
    let mut state = seed;
    let mut random = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(state)
    };
    let mut order: Vec<_> = (0..length).map(|index| (index, random() & 1 == 0)).collect();
    for last in (1..length).rev() {
        order.swap(last, (random() % (last as u64 + 1)) as usize);
    }
    order
}

fn word_at(index: usize) -> [u8; MARK_BYTES] {
    mix(!(index as u64)).to_le_bytes()
}

fn mark(block: usize, version: u64) -> [u8; MARK_BYTES] {
    mix(mix(version).wrapping_add(block as u64)).to_le_bytes()
}

/// Spreads a number over all bits; different numbers stay different.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_block_or_write_and_a_byte_in_the_wrong_place_are_found() {
        let mut bytes = vec![0; 3 * 4096];
        fill(&mut bytes);
        stamp(&mut bytes, 3, 2);
        assert!(is_stamped(&bytes, 3, 2) && is_filled(&bytes));
        assert!(!is_stamped(&bytes, 4, 2) && !is_stamped(&bytes, 3, 1));
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            let at_an_end = at < MARK_BYTES || at >= bytes.len() - MARK_BYTES;
            assert_eq!((is_stamped(&wrong, 3, 2), is_filled(&wrong)), (!at_an_end, at_an_end), "byte {at}");
        }
        let mut moved = bytes.clone();
        moved.rotate_left(4096);
        assert!(!is_filled(&moved));
    }

    #[test]
    fn a_shuffle_has_every_index_once_and_both_bits() {
        let order = shuffled(1000, 7);
        let mut indices: Vec<_> = order.iter().map(|&(index, _)| index).collect();
        assert_ne!(indices, (0..1000).collect::<Vec<_>>());
        indices.sort_unstable();
        assert_eq!(indices, (0..1000).collect::<Vec<_>>());
        assert!((400..600).contains(&order.iter().filter(|(_, bit)| *bit).count()));
        assert_ne!(order, shuffled(1000, 8));
        assert!(shuffled(0, 1).is_empty());
    }
}
