//! The one thing that can be wrong with slices: their lengths do not belong together.

/// A slice whose length does not fit the others of the same call. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operand} has length {length}, expected {expected}")]
pub struct LengthMismatch {
    /// The parameter of the call that does not fit.
    pub operand: &'static str,
    /// The length it has, in its own elements (bytes for a byte slice).
    pub length: usize,
    /// The length that the other slices ask for.
    pub expected: usize,
}

impl LengthMismatch {
    /// Succeeds when `length` is what is `expected`.
    pub(crate) fn check(operand: &'static str, length: usize, expected: usize) -> Result<(), Self> {
        if length == expected { Ok(()) } else { Err(Self { operand, length, expected }) }
    }
}
