//! What the file system asks of lengths, and what is worth swapping at all.

use std::path::{Path, PathBuf};

use overspill_io::{BLOCK_ALIGNMENT, Engine, File};

use super::dtype::Dtype;
use super::error::SwapError;

/// Tensors of fewer bytes stay in memory, unless somebody says otherwise: moving them costs more than keeping them.
pub const MIN_SWAPPABLE_BYTES: usize = 1 << 20;

/// Names that are tried for a file on which to probe.
const PROBES_MAX: usize = 1000;

/// Which tensors are worth swapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swappable {
    /// Size of the smallest tensor that is swapped, in bytes.
    pub bytes_min: usize,
}

impl Default for Swappable {
    fn default() -> Swappable {
        Swappable { bytes_min: MIN_SWAPPABLE_BYTES }
    }
}

impl Swappable {
    /// Whether a tensor of `numel` elements is swapped.
    #[must_use]
    pub fn is_swappable(&self, numel: usize, dtype: Dtype) -> bool {
        numel.saturating_mul(dtype.bytes()) >= self.bytes_min
    }
}

/// What the bytes of a swap view are a multiple of: a power of two from 1 to [`BLOCK_ALIGNMENT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment(usize);

impl Alignment {
    /// What suits every file.
    pub const MAX: Alignment = Alignment(BLOCK_ALIGNMENT);

    /// An alignment of `bytes`.
    ///
    /// # Errors
    ///
    /// [`SwapError::Alignment`] if that is no power of two, or more than blocks have.
    pub fn new(bytes: usize) -> Result<Alignment, SwapError> {
        if bytes.is_power_of_two() && bytes <= BLOCK_ALIGNMENT {
            Ok(Alignment(bytes))
        } else {
            Err(SwapError::Alignment { bytes })
        }
    }

    /// What was probed for an open file: 1 if it is used through the page cache.
    ///
    /// # Errors
    ///
    /// As [`Alignment::new`].
    pub fn of(file: &File) -> Result<Alignment, SwapError> {
        Alignment::new(file.alignment())
    }

    /// Probes the file system of `folder` with a file that is made there and removed again.
    ///
    /// # Errors
    ///
    /// [`SwapError::Io`] if the file can't be made.
    pub fn probe(engine: &Engine, folder: &Path) -> Result<Alignment, SwapError> {
        let (file, path) = make_probe(engine, folder)?;
        let alignment = Alignment::of(&file);
        // It was made a moment ago, so it is ours; one that is gone already is no loss.
        drop(std::fs::remove_file(path));
        alignment
    }

    /// The alignment, in bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.0
    }

    /// Elements that aligned lengths are a multiple of; at least one.
    #[must_use]
    pub fn numel(self, dtype: Dtype) -> usize {
        (self.0 / dtype.bytes()).max(1)
    }

    /// `numel` rounded up to a multiple of [`Alignment::numel`]. `None`: there is no such number.
    #[must_use]
    pub fn aligned_numel(self, numel: usize, dtype: Dtype) -> Option<usize> {
        numel.checked_next_multiple_of(self.numel(dtype))
    }
}

/// Makes a file under a name that nobody else has, be they threads or runs that did not come to their end.
fn make_probe(engine: &Engine, folder: &Path) -> Result<(File, PathBuf), SwapError> {
    let mut number = 0;
    loop {
        let path = folder.join(format!(".overspill-alignment-{}-{number}", std::process::id()));
        match engine.create(&path) {
            Ok(file) => return Ok((file, path)),
            Err(source) => {
                let is_taken = source.errno() == Some(rustix::io::Errno::EXIST.raw_os_error());
                if !is_taken || number == PROBES_MAX {
                    return Err(SwapError::Io { path, source });
                }
            }
        }
        number += 1;
    }
}

impl Default for Alignment {
    fn default() -> Alignment {
        Alignment::MAX
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_least_swappable_size_is_one_mib_unless_it_is_set() {
        let default = Swappable::default();
        assert!(default.is_swappable(1 << 18, Dtype::F32));
        assert!(!default.is_swappable((1 << 18) - 1, Dtype::F32));
        assert!(!default.is_swappable(1 << 18, Dtype::Bf16));
        assert!(default.is_swappable(usize::MAX, Dtype::F64));
        let set = Swappable { bytes_min: 100 };
        assert!(set.is_swappable(50, Dtype::Bf16) && !set.is_swappable(49, Dtype::Bf16));
    }

    #[test]
    fn only_powers_of_two_that_blocks_have_are_alignments() {
        for bytes in [0, 3, 513, 2 * BLOCK_ALIGNMENT, usize::MAX] {
            assert_eq!(Alignment::new(bytes), Err(SwapError::Alignment { bytes }));
        }
        assert_eq!(Alignment::new(BLOCK_ALIGNMENT), Ok(Alignment::MAX));
        assert_eq!(Alignment::new(1).map(|alignment| alignment.numel(Dtype::F64)), Ok(1));
        assert_eq!(Alignment::MAX.aligned_numel(usize::MAX, Dtype::U8), None);
    }

    proptest! {
        #[test]
        fn aligned_lengths_are_the_next_multiple(numel in 0_usize..100_000, power in 0_u32..=12, dtype in 0..9_usize) {
            let (alignment, dtype) = (Alignment::new(1 << power).unwrap(), Dtype::ALL[dtype]);
            let aligned = alignment.aligned_numel(numel, dtype).unwrap();
            prop_assert!((aligned * dtype.bytes()).is_multiple_of(alignment.bytes()));
            prop_assert!(aligned >= numel && aligned - numel < alignment.numel(dtype));
        }
    }
}
