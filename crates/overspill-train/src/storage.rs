//! What a state takes on storage, by what a crash may cost: known, and said, before any of it is taken.

use std::fmt;

use overspill_swap::Durability;

use crate::size::ByteSize;

/// Bytes that a state takes with either durability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageNeed {
    /// What was chosen.
    pub durability: Durability,
    /// What it takes if a crash may cost the step that is under way.
    pub step_bytes: u64,
    /// What it takes if a crash may cost everything.
    pub none_bytes: u64,
}

impl StorageNeed {
    /// By what it takes with each durability.
    pub fn new(durability: Durability, bytes: impl Fn(Durability) -> u64) -> Self {
        Self { durability, step_bytes: bytes(Durability::Step), none_bytes: bytes(Durability::None) }
    }

    /// What will be taken.
    pub fn bytes(&self) -> u64 {
        match self.durability {
            Durability::Step => self.step_bytes,
            Durability::None => self.none_bytes,
        }
    }
}

impl fmt::Display for StorageNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (other, other_bytes) = match self.durability {
            Durability::Step => ("none", self.none_bytes),
            Durability::None => ("step", self.step_bytes),
        };
        let (bytes, other_bytes) = (ByteSize(self.bytes()), ByteSize(other_bytes));
        write!(f, "{bytes} of storage (--durability {other} would take {other_bytes})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_that_of_the_choice_and_the_other_is_named_as_the_other() {
        let bytes = |durability| if durability == Durability::Step { 2 << 20 } else { 1 << 20 };
        let step = StorageNeed::new(Durability::Step, bytes);
        assert_eq!(step.to_string(), "2 MiB of storage (--durability none would take 1 MiB)");
        let none = StorageNeed::new(Durability::None, bytes);
        assert_eq!((step.bytes(), none.bytes()), (2 << 20, 1 << 20));
        assert_eq!(none.to_string(), "1 MiB of storage (--durability step would take 2 MiB)");
    }
}
