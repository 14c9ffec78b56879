//! The ledger against a model: a data file that knows, of each unit, which write it was filled by.

use proptest::prelude::*;

use super::*;

const UNIT: usize = EXTENT_ALIGNMENT as usize;

#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    WriteInVain(usize),
    Commit,
    RollBack,
    Pin(u8),
    Unpin(u8),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => any::<usize>().prop_map(Step::Write),
        2 => any::<usize>().prop_map(Step::WriteInVain),
        3 => Just(Step::Commit),
        2 => Just(Step::RollBack),
        1 => (0u8..3).prop_map(Step::Pin),
        1 => (0u8..3).prop_map(Step::Unpin),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..150)
}

/// A data file that knows, of each unit, which write it was filled by.
struct Disk(HashMap<u64, u64>);

impl Disk {
    fn write(&mut self, extent: Extent, token: u64) {
        for offset in (extent.offset..extent.end()).step_by(UNIT) {
            self.0.insert(offset, token);
        }
    }

    /// Whether every tensor of a manifest has the bytes that its checksum stands for.
    fn holds(&self, records: &[TensorRecord]) -> bool {
        records.iter().all(|record| {
            let extent = record.extent().unwrap();
            let mut units = (extent.offset..extent.end()).step_by(UNIT);
            units.all(|offset| self.0.get(&offset) == Some(&record.checksum))
        })
    }
}

fn sorted(mut records: Vec<TensorRecord>) -> Vec<TensorRecord> {
    records.sort_by(|a, b| a.name.cmp(&b.name));
    records
}

proptest! {
    /// Whatever happens, the bytes of the committed state and of every snapshot are those that were written for
    /// them; what is free is what nobody has; and two states' room is enough but for snapshots.
    #[test]
    fn committed_and_pinned_versions_are_never_written_to(
        lengths in prop::collection::vec(1usize..4 * UNIT, 1..8),
        steps in steps(),
    ) {
        let durability = Durability::Step;
        let mut ledger = Ledger::new(durability, 0);
        let mut keys: Vec<Key> = (0..lengths.len())
            .map(|i| ledger.reserve(&format!("t{i}"), lengths[i], if i == 3 { Worth::Scratch } else { Worth::State }).unwrap())
            .collect();
        ledger.grow(ledger.needed_bytes());
        let mut disk = Disk(HashMap::new());
        let mut manifest: Vec<TensorRecord> = Vec::new();
        let mut snapshots: BTreeMap<String, Vec<TensorRecord>> = BTreeMap::new();
        for (token, step) in (1u64..).zip(steps) {
            match step {
                Step::Write(pick) | Step::WriteInVain(pick) => {
                    let key = keys[pick % keys.len()];
                    let begun = match ledger.begin_write(key) {
                        Ok(begun) => begun,
                        Err(full) => {
                            ledger.grow(ledger.extents().capacity() + full.requested);
                            ledger.begin_write(key).unwrap()
                        }
                    };
                    prop_assert!(!begun.committed_version_lost);
                    prop_assert_eq!(ledger.roll_back(), Err(key), "with a write under way");
                    disk.write(begun.extent, token);
                    match step {
                        Step::Write(_) => ledger.end_write(key, token),
                        _ => ledger.fail_write(key),
                    }
                }
                Step::Commit => match ledger.records() {
                    Ok(records) => {
                        ledger.commit();
                        manifest = records;
                    }
                    Err(key) => prop_assert!(matches!(ledger.working(key), Working::Lost(_))),
                },
                Step::RollBack => {
                    prop_assert_eq!(ledger.roll_back(), Ok(()));
                    prop_assert_eq!(sorted(ledger.records().unwrap()), sorted(manifest.clone()));
                }
                Step::Pin(name) => {
                    let known = snapshots.contains_key(&name.to_string());
                    prop_assert_eq!(ledger.pin(&name.to_string(), &manifest).is_err(), known);
                    snapshots.entry(name.to_string()).or_insert_with(|| manifest.clone());
                }
                Step::Unpin(name) => {
                    let known = snapshots.remove(&name.to_string()).is_some();
                    prop_assert_eq!(ledger.unpin(&name.to_string()), known);
                }
                Step::Reopen => {
                    let capacity = ledger.extents().capacity();
                    ledger = Ledger::restore(durability, capacity, &manifest).unwrap();
                    for (name, records) in &snapshots {
                        ledger.pin(name, records).unwrap();
                    }
                    keys = (0..lengths.len())
                        .map(|i| {
                            let name = format!("t{i}");
                            let worth = if i == 3 { Worth::Scratch } else { Worth::State };
                            ledger.find(&name).unwrap_or_else(|| ledger.reserve(&name, lengths[i], worth).unwrap())
                        })
                        .collect();
                }
            }
            prop_assert!(disk.holds(&manifest), "a committed version was written to");
            prop_assert!(snapshots.values().all(|records| disk.holds(records)), "a snapshot was written to");
            let held: u64 = ledger.held.values().map(|held| held.length).sum();
            prop_assert_eq!(ledger.extents().free_bytes() + held, ledger.extents().capacity());
        }
        let names: Vec<String> = snapshots.keys().cloned().collect();
        for name in names {
            ledger.unpin(&name);
        }
        prop_assert_eq!(ledger.roll_back(), Ok(()));
        let state: u64 = manifest.iter().map(|record| record.extent().unwrap().length).sum();
        let scratch = ledger.tensors.iter().filter(|t| t.worth == Worth::Scratch && t.working != Working::Nothing);
        let scratch: u64 = scratch.map(|t| needed_bytes(durability, t.worth, t.bytes)).sum();
        let held: u64 = ledger.held.values().map(|held| held.length).sum();
        prop_assert_eq!(held, state + scratch, "nothing else is held");
    }
}

fn stored(ledger: &mut Ledger, key: Key, checksum: u64) -> Begun {
    let begun = ledger.begin_write(key).unwrap();
    ledger.end_write(key, checksum);
    begun
}

#[test]
fn without_durability_the_committed_version_is_overwritten_and_that_is_said_once() {
    let mut ledger = Ledger::new(Durability::None, 3 * EXTENT_ALIGNMENT);
    let key = ledger.reserve("a", 10, Worth::State).unwrap();
    assert_eq!(ledger.needed_bytes(), EXTENT_ALIGNMENT);
    let first = stored(&mut ledger, key, 1);
    ledger.commit();
    let second = stored(&mut ledger, key, 2);
    assert_eq!((second.extent, second.committed_version_lost), (first.extent, true));
    assert!(!stored(&mut ledger, key, 3).committed_version_lost);
    // A snapshot is kept all the same.
    let records = ledger.records().unwrap();
    ledger.commit();
    ledger.pin("best", &records).unwrap();
    let third = stored(&mut ledger, key, 4);
    assert_ne!(third.extent, first.extent);
    assert!(!third.committed_version_lost);
}

#[test]
fn a_pin_that_contradicts_what_is_held_changes_nothing() {
    let mut ledger = Ledger::new(Durability::Step, 8 * EXTENT_ALIGNMENT);
    let key = ledger.reserve("a", 2 * UNIT, Worth::State).unwrap();
    let begun = stored(&mut ledger, key, 1);
    let free = ledger.extents().free_bytes();
    let record =
        |name: &str, offset, length| TensorRecord { name: name.to_owned(), offset, length, checksum: 0 };
    let inside = begun.extent.offset + EXTENT_ALIGNMENT;
    for wrong in [record("half", begun.extent.offset, 5), record("inside", inside, 5), record("odd", 1, 1)] {
        let name = wrong.name.clone();
        let records = [record("free", 4 * EXTENT_ALIGNMENT, 5), wrong];
        assert_eq!(ledger.pin("s", &records), Err(Conflict { tensor: name }));
        assert_eq!(ledger.extents().free_bytes(), free);
    }
    assert!(!ledger.unpin("s"));
}
