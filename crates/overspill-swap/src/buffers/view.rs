//! Tensors seen in buffers: the elements alone, or with what is swapped along.

use std::path::Path;

use super::dtype::{Dtype, Element};
use super::error::SwapError;
use super::layout::Entry;

/// A tensor in a buffer, to look at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    path: &'a Path,
    dtype: Dtype,
    offset: usize,
    numel: usize,
    /// The swap view.
    bytes: &'a [u8],
}

/// A tensor in a buffer, to fill. What is behind its elements is zero and stays so.
#[derive(Debug)]
pub struct ViewMut<'a> {
    path: &'a Path,
    dtype: Dtype,
    offset: usize,
    numel: usize,
    /// The swap view.
    bytes: &'a mut [u8],
}

impl<'a> View<'a> {
    /// The tensor of `entry`, whose region begins where `region` does.
    pub(super) fn new(entry: &'a Entry, dtype: Dtype, region: &'a [u8]) -> View<'a> {
        let &Entry { ref path, offset, numel, lengths } = entry;
        View { path, dtype, offset, numel, bytes: &region[..lengths.swap] }
    }

    /// The tensor's file.
    #[must_use]
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// What its elements are.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where it begins in its buffer, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Number of its elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Number of elements of the swap view.
    #[must_use]
    pub fn aligned_numel(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// The swap view: the elements, and zeros up to the alignment.
    #[must_use]
    pub fn swap(&self) -> &'a [u8] {
        self.bytes
    }

    /// The compute view: the elements and nothing else.
    #[must_use]
    pub fn compute(&self) -> &'a [u8] {
        &self.bytes[..self.numel * self.dtype.bytes()]
    }

    /// The compute view as elements of `T`.
    ///
    /// # Errors
    ///
    /// [`SwapError::WrongDtype`] if the tensor's elements are something else.
    pub fn elements<T: Element>(&self) -> Result<&'a [T], SwapError> {
        check_dtype::<T>(self.path, self.dtype)?;
        Ok(bytemuck::cast_slice(self.compute()))
    }
}

impl<'a> ViewMut<'a> {
    /// The tensor of `entry`, whose region begins where `region` does.
    pub(super) fn new(entry: &'a Entry, dtype: Dtype, region: &'a mut [u8]) -> ViewMut<'a> {
        let &Entry { ref path, offset, numel, lengths } = entry;
        ViewMut { path, dtype, offset, numel, bytes: &mut region[..lengths.swap] }
    }

    /// The same tensor, to look at.
    #[must_use]
    pub fn as_view(&self) -> View<'_> {
        let &ViewMut { path, dtype, offset, numel, ref bytes } = self;
        View { path, dtype, offset, numel, bytes }
    }

    /// The compute view: the elements and nothing else. After [`allocate`](super::SwapBuffer::allocate) they are
    /// whatever the buffer held there before.
    #[must_use]
    pub fn compute(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.numel * self.dtype.bytes()]
    }

    /// The compute view as elements of `T`.
    ///
    /// # Errors
    ///
    /// [`SwapError::WrongDtype`] if the tensor's elements are something else.
    pub fn elements<T: Element>(&mut self) -> Result<&mut [T], SwapError> {
        check_dtype::<T>(self.path, self.dtype)?;
        Ok(bytemuck::cast_slice_mut(self.compute()))
    }
}

fn check_dtype<T: Element>(path: &Path, found: Dtype) -> Result<(), SwapError> {
    if T::DTYPE == found {
        Ok(())
    } else {
        Err(SwapError::WrongDtype { path: path.to_owned(), expected: T::DTYPE, found })
    }
}

/// The first `numel` elements of `buffer`, in bytes.
///
/// # Errors
///
/// [`SwapError::LongView`] if the buffer is shorter.
pub fn sized_view(buffer: &[u8], numel: usize, dtype: Dtype) -> Result<&[u8], SwapError> {
    let length = view_length(buffer.len(), numel, dtype)?;
    Ok(&buffer[..length])
}

/// The first `numel` elements of `buffer`, in bytes, to change them.
///
/// # Errors
///
/// [`SwapError::LongView`] if the buffer is shorter.
pub fn sized_view_mut(buffer: &mut [u8], numel: usize, dtype: Dtype) -> Result<&mut [u8], SwapError> {
    let length = view_length(buffer.len(), numel, dtype)?;
    Ok(&mut buffer[..length])
}

/// The first elements of each of `buffers`, as many as `numels` says.
///
/// # Errors
///
/// [`SwapError::Lists`] if there are not as many numbers as buffers, [`SwapError::LongView`] if a buffer is shorter.
pub fn sized_views<'a, B: AsRef<[u8]>>(
    buffers: &'a [B],
    numels: &[usize],
    dtype: Dtype,
) -> Result<Vec<&'a [u8]>, SwapError> {
    if buffers.len() != numels.len() {
        return Err(SwapError::Lists { tensors: buffers.len(), paths: numels.len() });
    }
    buffers.iter().zip(numels).map(|(buffer, &numel)| sized_view(buffer.as_ref(), numel, dtype)).collect()
}

fn view_length(bytes: usize, numel: usize, dtype: Dtype) -> Result<usize, SwapError> {
    let length = numel.checked_mul(dtype.bytes()).filter(|&length| length <= bytes);
    length.ok_or(SwapError::LongView { numel, dtype, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_larger_than_its_buffer_is_refused() {
        let mut buffer = [7_u8; 10];
        for numel in [3, usize::MAX] {
            let refusal = SwapError::LongView { numel, dtype: Dtype::F32, bytes: 10 };
            assert_eq!(sized_view(&buffer, numel, Dtype::F32), Err(refusal.clone()));
            assert_eq!(sized_view_mut(&mut buffer, numel, Dtype::F32), Err(refusal.clone()));
            assert_eq!(sized_views(&[buffer, buffer], &[1, numel], Dtype::F32), Err(refusal));
        }
        assert_eq!(sized_view(&buffer, 2, Dtype::F32).unwrap().len(), 8);
        sized_view_mut(&mut buffer, 2, Dtype::F32).unwrap().fill(0);
        assert_eq!(buffer[7..], [0, 7, 7]);
        let buffers = [buffer, buffer];
        let views = sized_views(&buffers, &[0, 10], Dtype::U8).unwrap();
        assert_eq!((views[0].len(), views[1].len()), (0, 10));
        let refused = sized_views(&buffers[1..], &[], Dtype::U8);
        assert_eq!(refused, Err(SwapError::Lists { tensors: 1, paths: 0 }));
    }
}
