//! Values in slots, addressed by handles that outlive them harmlessly.
//!
//! A [`Slot`] carries the generation of its value. A slot is free only after its value was taken out, and then its
//! generation changes, so a late or forged handle finds nothing instead of somebody else's value.

/// The address of a value in a [`Table`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    index: u32,
    generation: u32,
}

impl Slot {
    /// The handle as one number, to travel through the kernel.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The handle that [`Slot::to_bits`] made `bits` of.
    pub(crate) fn from_bits(bits: u64) -> Slot {
        Slot { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// Values in slots; grows to the largest number of values held at once.
pub(crate) struct Table<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Table<T> {
    pub(crate) fn new() -> Table<T> {
        Table { entries: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn insert(&mut self, value: T) -> Slot {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { generation: 0, value: None });
            u32::try_from(self.entries.len() - 1).expect("fewer values than addresses of blocks")
        });
        let entry = &mut self.entries[index as usize];
        entry.value = Some(value);
        Slot { index, generation: entry.generation }
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut T> {
        self.entry(slot)?.value.as_mut()
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Option<T> {
        let entry = self.entry(slot)?;
        let value = entry.value.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(slot.index);
        Some(value)
    }

    /// Every value that is left.
    pub(crate) fn into_values(self) -> impl Iterator<Item = T> {
        self.entries.into_iter().filter_map(|entry| entry.value)
    }

    fn entry(&mut self, slot: Slot) -> Option<&mut Entry<T>> {
        self.entries.get_mut(slot.index as usize).filter(|entry| entry.generation == slot.generation)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_handle_finds_its_own_value_or_nothing(steps in prop::collection::vec((any::<bool>(), any::<usize>()), 0..200)) {
            let mut table = Table::new();
            let mut live: Vec<Slot> = Vec::new();
            let mut model: HashMap<Slot, usize> = HashMap::new();
            let mut dead: Vec<Slot> = Vec::new();
            for (number, (insert, pick)) in steps.into_iter().enumerate() {
                if insert || live.is_empty() {
                    let slot = table.insert(number);
                    prop_assert!(model.insert(slot, number).is_none(), "a slot in use was given out");
                    prop_assert!(!dead.contains(&slot));
                    live.push(slot);
                } else {
                    let slot = live.swap_remove(pick % live.len());
                    prop_assert_eq!(table.remove(slot), model.remove(&slot));
                    dead.push(slot);
                }
                prop_assert_eq!(table.len(), live.len());
                for &slot in &dead {
                    prop_assert_eq!(table.get_mut(slot), None);
                    prop_assert_eq!(table.remove(slot), None);
                }
            }
            for slot in live {
                prop_assert_eq!(table.get_mut(slot).copied(), model.get(&slot).copied());
            }
        }

        #[test]
        fn a_handle_survives_its_way_through_the_kernel(index: u32, generation: u32) {
            let slot = Slot { index, generation };
            prop_assert_eq!(Slot::from_bits(slot.to_bits()), slot);
        }
    }
}
