//! Checksums (XXH3-64) of tensors that come piece by piece, those of several in turns.

use std::collections::HashMap;
use std::fmt;

use xxhash_rust::xxh3::Xxh3;

/// The checksums that are under way.
#[derive(Default)]
pub(super) struct Checksums(HashMap<String, Begun>);

/// A tensor of which some bytes were seen.
#[derive(Default)]
struct Begun {
    hasher: Xxh3,
    bytes: u64,
}

impl Checksums {
    /// Adds the bytes of a tensor from `start` on; tells its checksum once all its `length` bytes were there.
    ///
    /// # Panics
    /// When the pieces of a tensor do not come in their order.
    pub(super) fn add(&mut self, tensor: &str, start: u64, bytes: &[u8], length: u64) -> Option<u64> {
        if start == 0 {
            self.0.insert(tensor.to_owned(), Begun::default());
        }
        let begun = self.0.get_mut(tensor).filter(|begun| begun.bytes == start);
        let begun = begun.expect("the pieces of a tensor come in their order");
        begun.hasher.update(bytes);
        begun.bytes += bytes.len() as u64;
        if begun.bytes < length { None } else { Some(self.0.remove(tensor)?.hasher.digest()) }
    }
}

impl fmt::Debug for Checksums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// As it is written down.
pub(super) fn text(checksum: u64) -> String {
    format!("{checksum:016x}")
}

/// What was written down.
pub(super) fn parse(text: &str) -> Option<u64> {
    let checksum = u64::from_str_radix(text, 16).ok()?;
    (self::text(checksum) == text).then_some(checksum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    proptest! {
        #[test]
        fn pieces_in_turns_have_the_checksums_of_the_wholes(
            first in prop::collection::vec(any::<u8>(), 1..3000),
            second in prop::collection::vec(any::<u8>(), 1..3000),
            piece in 1usize..700,
        ) {
            let mut checksums = Checksums::default();
            let mut found = [None; 2];
            for start in (0..3000).step_by(piece) {
                for (found, bytes) in found.iter_mut().zip([&first, &second]) {
                    if start < bytes.len() {
                        let name = format!("{}", std::ptr::from_ref(bytes).addr());
                        let part = &bytes[start..bytes.len().min(start + piece)];
                        *found = checksums.add(&name, start as u64, part, bytes.len() as u64);
                        prop_assert_eq!(found.is_some(), start + part.len() == bytes.len());
                    }
                }
            }
            prop_assert_eq!(found, [&first, &second].map(|bytes| Some(xxh3_64(bytes))));
            prop_assert!(checksums.0.is_empty());
        }

        #[test]
        fn a_checksum_that_is_written_is_read_again(checksum in any::<u64>()) {
            prop_assert_eq!(parse(&text(checksum)), Some(checksum));
        }
    }

    #[test]
    fn what_is_no_checksum_is_not_read_as_one() {
        for text in ["", "0", "+000000000000000", "000000000000000g", "00000000000000000", "000000000000000A"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
