//! What Python gives by value, and the one line that refuses what cannot be meant.

use std::fmt::Display;
use std::ops::RangeInclusive;

use overspill_io::{BackendChoice, UnknownBackend};
use pyo3::prelude::*;

use crate::error::Error;

/// Characters of a wrong value that are quoted.
const QUOTE_MAX: usize = 40;

/// A whole number within `range`, for the argument `name`.
///
/// # Errors
/// [`Error::Argument`] for a number beyond it, and for anything else.
pub(crate) fn whole<T>(name: &str, value: &Bound<'_, PyAny>, range: RangeInclusive<T>) -> Result<T, Error>
where
    T: for<'a, 'py> FromPyObject<'a, 'py> + PartialOrd + Display,
{
    value.extract().ok().filter(|number| range.contains(number)).ok_or_else(|| {
        let (least, most) = range.into_inner();
        let found = shown(value);
        Error::Argument(format!("{name} is {found}, but must be a whole number from {least} to {most}"))
    })
}

/// The backend of this name.
///
/// # Errors
/// [`Error::Argument`] if there is none.
pub(crate) fn backend(name: &str) -> Result<BackendChoice, Error> {
    name.parse().map_err(|unknown: UnknownBackend| Error::Argument(unknown.to_string()))
}

/// A value as Python shows it, cut to what fits in a line.
pub(crate) fn shown(value: &Bound<'_, PyAny>) -> String {
    // Of numbers of many digits, and of odd classes, there is no text.
    let text = value.repr().map_or_else(|_| format!("{}", value.get_type()), |text| text.to_string());
    let line = text.lines().next().unwrap_or_default();
    let quoted: String = line.chars().take(QUOTE_MAX).collect();
    if quoted.len() < text.len() { quoted + "…" } else { quoted }
}
