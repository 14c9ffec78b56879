//! The parameters of one loaded unit, read where the unit's block lies.

use super::matrix::Matrix;
use crate::layout::UnitLayout;

/// One unit's parameters, for as long as compute needs them.
///
/// Nothing is copied: every tensor made from a parameter points into the block, and holds the block's owner until it
/// is dropped. When a call into [`Model`](super::Model) returns, only `Weights` itself still does.
#[derive(Clone, Debug)]
pub struct Weights<'a> {
    layout: &'a UnitLayout,
    bytes: bytes::Bytes,
}

impl<'a> Weights<'a> {
    /// The unit whose elements are `bytes`: little-endian `f32` in the order of `layout`, with or without padding
    /// (and whatever may follow it).
    ///
    /// # Panics
    /// When `bytes` is shorter than the parameters, or does not start at a multiple of four.
    pub fn new(layout: &'a UnitLayout, bytes: bytes::Bytes) -> Self {
        let elements = layout.parameters.last().map_or(0, |parameter| parameter.range.end);
        let needed = elements * size_of::<f32>();
        assert!(bytes.len() >= needed, "{}: {} bytes given, {needed} needed", layout.unit, bytes.len());
        assert!(bytes.as_ptr().cast::<f32>().is_aligned(), "{}: block is not aligned to f32", layout.unit);
        Self { layout, bytes }
    }

    /// The layout the elements follow.
    pub fn layout(&self) -> &'a UnitLayout {
        self.layout
    }

    /// The parameter at this position of the layout; a vector is a single row.
    pub(super) fn matrix(&self, parameter: usize) -> Matrix {
        let parameter = &self.layout.parameters[parameter];
        let bytes = parameter.range.start * size_of::<f32>()..parameter.range.end * size_of::<f32>();
        let columns = parameter.shape.last().copied().expect("every parameter has a dimension");
        Matrix::borrow(self.bytes.slice(bytes), columns)
    }
}
