//! Objects shown field by field, for people.

use std::fmt;

/// One field of an object, as it is shown: its name and its value.
pub type Field<'a> = (&'static str, &'a dyn fmt::Debug);

/// Something that can be shown field by field.
pub trait Describe {
    /// What it is.
    fn title(&self) -> &'static str;

    /// Calls `show` with every field, in the order in which they are shown.
    fn describe(&self, show: &mut dyn FnMut(Field<'_>));
}

/// An object to be shown: a line with its title, then a line for each field.
#[derive(Clone, Copy)]
pub struct Dump<'a> {
    object: &'a dyn Describe,
    without: &'a [&'a str],
}

/// Shows `object` with all of its fields.
///
/// ```
/// use overspill_io::{BlockClass, Pool};
/// use overspill_swap::buffers::{Alignment, Dtype, SwapBuffer, dump};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = Pool::new(&[BlockClass { name: "example", block_bytes: 8192, count: 1 }])?;
/// let buffer = SwapBuffer::new(pool.lease(8192)?, Dtype::F32, Alignment::MAX);
/// let rank = 0;
/// if let Some(dump) = dump(&buffer).without(&["paths", "alignment"]).on_rank(rank) {
///     assert_eq!(dump.to_string(), "SwapBuffer\n  dtype: float32\n  bytes: 8192\n  bytes_used: 0\n  numel: 0");
/// }
/// # Ok(())
/// # }
/// ```
#[must_use]
pub fn dump(object: &dyn Describe) -> Dump<'_> {
    Dump { object, without: &[] }
}

impl<'a> Dump<'a> {
    /// Leaves out the fields of these names; other names are of no consequence.
    #[must_use]
    pub fn without(self, names: &'a [&'a str]) -> Dump<'a> {
        Dump { without: names, ..self }
    }

    /// On rank 0 what is to be shown, and nothing on all others, so that a run of many ranks says it once.
    #[must_use]
    pub fn on_rank(self, rank: usize) -> Option<Dump<'a>> {
        (rank == 0).then_some(self)
    }
}

impl fmt::Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.object.title())?;
        let mut written = Ok(());
        self.object.describe(&mut |(name, value)| {
            if !self.without.contains(&name) && written.is_ok() {
                written = write!(f, "\n  {name}: {value:?}");
            }
        });
        written
    }
}

impl fmt::Debug for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
