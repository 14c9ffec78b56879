//! The bytes of a record: which field is where.
//!
//! A record holds what the optimizer keeps of a tile of `elements` elements: one column per field, each a plain array of
//! numbers in the machine's byte order that begins at a multiple of 64 bytes. Whoever moves records needs to know their
//! length and nothing else; whoever looks into one finds names, places and sizes here.

use std::ops::Range;

use bytemuck::Pod;

use crate::error::ApplyError;

/// Every field of a record, and every record, begins at a multiple of this: a cache line, and a register of AVX-512.
pub const FIELD_ALIGNMENT_BYTES: usize = 64;

/// One column of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// What it holds, as PyTorch calls it; `remainder` and `master` belong to the weight.
    pub name: &'static str,
    /// Bytes of a cell.
    pub cell_bytes: usize,
    /// Elements of a cell: 1, or those that share a scale.
    pub cell_elements: usize,
    /// Number of cells.
    pub cells: usize,
    /// Where the column begins in the record, in bytes.
    pub start: usize,
}

impl Field {
    /// Where the column is in the record.
    #[must_use]
    pub const fn bytes(&self) -> Range<usize> {
        self.start..self.start + self.cells * self.cell_bytes
    }
}

/// Where everything is in the record of a tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    elements: usize,
    fields: Vec<Field>,
    bytes: usize,
}

/// A column before it has a place.
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) cell_bytes: usize,
    pub(crate) cell_elements: usize,
    pub(crate) cells: usize,
}

impl RecordLayout {
    /// Places `columns` one behind the other; `None` when their bytes cannot be counted.
    pub(crate) fn place(elements: usize, columns: impl IntoIterator<Item = Column>) -> Option<Self> {
        let mut bytes = 0_usize;
        let mut fields = Vec::new();
        for Column { name, cell_bytes, cell_elements, cells } in columns {
            fields.push(Field { name, cell_bytes, cell_elements, cells, start: bytes });
            let end = bytes.checked_add(cells.checked_mul(cell_bytes)?)?;
            bytes = end.checked_next_multiple_of(FIELD_ALIGNMENT_BYTES)?;
        }
        isize::try_from(bytes).ok()?;
        Some(Self { elements, fields, bytes })
    }

    /// Elements of the tile.
    #[must_use]
    pub const fn elements(&self) -> usize {
        self.elements
    }

    /// Bytes of the record, a multiple of [`FIELD_ALIGNMENT_BYTES`].
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The columns, in the order of their places.
    #[must_use]
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The column of that name.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

/// Cuts the columns of a record out of its bytes, in the order of their places.
pub(crate) struct Cutter<'a> {
    fields: std::slice::Iter<'a, Field>,
    rest: &'a mut [u8],
    at: usize,
}

impl<'a> Cutter<'a> {
    /// # Errors
    ///
    /// [`ApplyError::Length`] when `record` is not of the layout's length.
    pub(crate) fn new(layout: &'a RecordLayout, record: &'a mut [u8]) -> Result<Self, ApplyError> {
        ApplyError::check("record", record.len(), layout.bytes)?;
        Ok(Self { fields: layout.fields.iter(), rest: record, at: 0 })
    }

    /// The cells `range` of the next column, whose cells are `T`.
    pub(crate) fn next<T: Pod>(&mut self, range: Range<usize>) -> Result<&'a mut [T], ApplyError> {
        let field = self.fields.next().expect("a recipe has as many columns as its loops use");
        let start = field.start + range.start * field.cell_bytes;
        let end = field.start + range.end * field.cell_bytes;
        let rest = std::mem::take(&mut self.rest);
        let (_, rest) = rest.split_at_mut(start - self.at);
        let (cells, rest) = rest.split_at_mut(end - start);
        (self.rest, self.at) = (rest, end);
        bytemuck::try_cast_slice_mut(cells).map_err(|_| ApplyError::Misaligned { field: field.name })
    }
}
