//! What can go wrong between tensors, buffers and files: variants for programs, fields for people.

use std::path::{Path, PathBuf};

use overspill_io::{IoError, PoolError};

use super::dtype::Dtype;

/// Why tensors were not taken, or did not arrive. `numel` counts elements.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// Two lists that belong together have different lengths.
    #[error("{tensors} tensors and {paths} paths: each tensor needs one path")]
    Lists {
        /// Tensors, buffers or lengths that were given.
        tensors: usize,
        /// Paths, or other partners, that were given.
        paths: usize,
    },
    /// Two tensors of one call are for the same file.
    #[error("{} and {} are the same file: each tensor needs its own", path.display(), other.display())]
    SameFile {
        /// The later path.
        path: PathBuf,
        /// The earlier one.
        other: PathBuf,
    },
    /// The file cannot fill the memory.
    #[error("{} has {found} bytes, and {expected} are to be read", path.display())]
    ShortFile {
        /// The file.
        path: PathBuf,
        /// Bytes that were to be read.
        expected: u64,
        /// Bytes that the file has.
        found: u64,
    },
    /// A file could not be opened, made or cut, or a transfer failed.
    #[error("{}", with_path(path, source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the engine said.
        source: IoError,
    },
    /// No buffer could hold the tensor, even if it were empty.
    #[error("the tensor for {} has {numel} elements of {dtype}, and buffers hold {numel_max} at most", path.display())]
    TooLarge {
        /// The tensor's file.
        path: PathBuf,
        /// Its length.
        numel: usize,
        /// Its elements.
        dtype: Dtype,
        /// The longest tensor that an empty buffer holds.
        numel_max: usize,
    },
    /// There is no room left for the tensor.
    #[error("no room for the {numel} elements of {dtype} for {}: {bytes_free} bytes are free", path.display())]
    NoRoom {
        /// The tensor's file.
        path: PathBuf,
        /// Its length.
        numel: usize,
        /// Its elements.
        dtype: Dtype,
        /// What is free in the buffer with the most room, in bytes; a tensor takes a multiple of 4096.
        bytes_free: usize,
    },
    /// Something held is for this file already.
    #[error("a tensor for {} is already held", path.display())]
    Held {
        /// The file.
        path: PathBuf,
    },
    /// The tensor's elements are not of the buffers' type.
    #[error("the tensor for {} is of {found}, the buffers of {expected}", path.display())]
    WrongDtype {
        /// The tensor's file.
        path: PathBuf,
        /// What the buffers hold.
        expected: Dtype,
        /// What the tensor holds.
        found: Dtype,
    },
    /// Buffers of different types cannot work together.
    #[error("buffers of {given} cannot join buffers of {held}")]
    MixedDtypes {
        /// The type of the buffers that are there.
        held: Dtype,
        /// The type of the new ones.
        given: Dtype,
    },
    /// The bytes are not a whole number of elements.
    #[error("{bytes} bytes are not a whole number of elements of {dtype}")]
    Ragged {
        /// Length of the bytes.
        bytes: usize,
        /// The elements.
        dtype: Dtype,
    },
    /// A view is longer than what it is of.
    #[error("a view of {numel} elements of {dtype} does not fit in a buffer of {bytes} bytes")]
    LongView {
        /// Elements of the view.
        numel: usize,
        /// What they are.
        dtype: Dtype,
        /// Length of the buffer.
        bytes: usize,
    },
    /// A buffer that could not hold the smallest tensor.
    #[error("a buffer of {bytes} bytes holds no tensor: regions have multiples of 4096 bytes")]
    TinyBuffer {
        /// Its length.
        bytes: usize,
    },
    /// More memory than there are addresses.
    #[error("{count} buffers of {numel} elements of {dtype} are more memory than there can be")]
    TooManyBytes {
        /// Number of buffers.
        count: usize,
        /// Elements of each.
        numel: usize,
        /// What they are.
        dtype: Dtype,
    },
    /// Something that cannot be an alignment.
    #[error("an alignment of {bytes} bytes: it must be a power of two, at most 4096")]
    Alignment {
        /// The value.
        bytes: usize,
    },
    /// There are no buffers to work with.
    #[error("there are no buffers")]
    NoBuffers,
    /// An earlier write failed, and what is to become of its tensors was not said.
    #[error("{buffers} buffers hold tensors that could not be written, the first for {}: retry or discard them", path.display())]
    Unwritten {
        /// The file that failed first.
        path: PathBuf,
        /// Buffers that hold such tensors.
        buffers: usize,
    },
    /// The pool refused blocks.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

impl SwapError {
    /// The file that the error is about, if it is about one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            SwapError::SameFile { path, .. }
            | SwapError::ShortFile { path, .. }
            | SwapError::Io { path, .. }
            | SwapError::TooLarge { path, .. }
            | SwapError::NoRoom { path, .. }
            | SwapError::Held { path }
            | SwapError::WrongDtype { path, .. }
            | SwapError::Unwritten { path, .. } => Some(path),
            _ => None,
        }
    }

    /// The kernel's answer, where there was one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            SwapError::Io { source, .. } => source.errno(),
            _ => None,
        }
    }
}

/// The engine's words, and the path if they do not tell it.
fn with_path(path: &Path, source: &IoError) -> String {
    let (path, said) = (path.display().to_string(), source.to_string());
    if said.contains(&path) { said } else { format!("{path}: {said}") }
}
