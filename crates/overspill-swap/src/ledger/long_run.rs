//! What is left of the room after ten thousand steps, with snapshots that come and go.

use proptest::prelude::*;

use super::*;

/// As the store does, the data file grows by at least this many bytes.
const GROWTH: u64 = 64 << 20;
/// Free ranges for each length that tensors have, whatever their number.
const RANGES_PER_LENGTH: usize = 8;
const KIB: usize = 1 << 10;

/// A run of units that are cut into tiles: weights and moments, which are the state, and gradients and layers' inputs.
struct Run {
    ledger: Ledger,
    state: Vec<Key>,
    scratch: Vec<Key>,
    /// Bytes of one version of the state.
    state_bytes: u64,
    /// How often a step found no room.
    growths: usize,
    random: u64,
}

impl Run {
    /// Units of these lengths, cut into tiles of `tile` bytes, after their first commit.
    fn new(units: &[usize], tile: usize, input: usize) -> Self {
        let mut ledger = Ledger::new(Durability::Step, 0);
        let (mut state, mut scratch, mut state_bytes) = (Vec::new(), Vec::new(), 0);
        for (unit, &bytes) in units.iter().enumerate() {
            let arrays =
                [("weights", 1, Worth::State), ("moments", 2, Worth::State), ("gradient", 1, Worth::Scratch)];
            for (array, times, worth) in arrays {
                for (index, length) in crate::tiles::tile_lengths(times * bytes, times * tile).enumerate() {
                    let key = ledger.reserve(&format!("{array}/{unit}/{index}"), length, worth).unwrap();
                    match worth {
                        Worth::State => state.push(key),
                        Worth::Scratch => scratch.push(key),
                    }
                    if worth == Worth::State {
                        state_bytes += length as u64;
                    }
                }
            }
            scratch.push(ledger.reserve(&format!("input/{unit}"), input, Worth::Scratch).unwrap());
        }
        ledger.grow(ledger.needed_bytes());
        let mut run = Self { ledger, state, scratch, state_bytes, growths: 0, random: 1 };
        run.step();
        run
    }

    /// Writes everything once and commits it.
    fn step(&mut self) {
        for keys in [self.scratch.clone(), self.state.clone()] {
            for key in keys {
                if let Err(full) = self.ledger.begin_write(key) {
                    self.ledger.grow(self.ledger.extents().capacity() + full.requested.max(GROWTH));
                    self.ledger.begin_write(key).unwrap();
                    self.growths += 1;
                }
                self.ledger.end_write(key, 0);
            }
        }
        assert!(self.ledger.records().is_ok());
        self.ledger.commit();
    }

    fn random(&mut self, bound: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }

    /// Takes a snapshot under one of so many names, or gives it up if there is one.
    fn snapshot(&mut self, names: u64) {
        let name = self.random(names).to_string();
        let records = self.ledger.committed_records();
        if self.ledger.pin(&name, &records).is_err() {
            assert!(self.ledger.unpin(&name));
        }
        // As the store does it, where there is no more room than that.
        self.ledger.grow(self.ledger.room_bytes(self.ledger.needed_bytes()));
    }

    /// What must fit when there are so many snapshots, with one growth that went too far.
    fn most(&self, snapshots: u64) -> u64 {
        self.ledger.needed_bytes() + snapshots * self.state_bytes + GROWTH
    }
}

#[test]
fn ten_thousand_steps_with_snapshots_neither_fill_the_disk_nor_shred_the_room() {
    const NAMES: u64 = 4;
    // The units of the model that `overspill train` makes when nobody says otherwise, in its tiles.
    let mut units = vec![5_808 * KIB; 16];
    units.extend([384 * KIB, 388 * KIB]);
    let mut run = Run::new(&units, 256 * KIB, 768 * KIB);
    let lengths: std::collections::BTreeSet<_> =
        run.ledger.tensors.iter().map(|tensor| tensor.bytes).collect();
    let (mut most_ranges, mut early, mut capacity) = (0, 0, 0);
    for step in 0..10_000 {
        if run.random(20) == 0 {
            run.snapshot(NAMES);
        }
        run.step();
        most_ranges = most_ranges.max(run.ledger.extents().fragments());
        capacity = run.ledger.extents().capacity();
        if step < 1_000 {
            early = capacity;
        }
    }
    assert!(capacity <= run.most(NAMES), "{capacity} bytes, and {} would do", run.most(NAMES));
    assert_eq!(capacity, early, "after a thousand steps nothing grows any more");
    let ranges = RANGES_PER_LENGTH * lengths.len();
    assert!(most_ranges <= ranges, "{most_ranges} free ranges of {} lengths", lengths.len());
    let names: Vec<String> = run.ledger.pins().map(str::to_owned).collect();
    names.iter().for_each(|name| assert!(run.ledger.unpin(name)));
    run.step();
    let free = run.ledger.extents().free_bytes();
    assert_eq!(free, run.ledger.extents().capacity() - (run.ledger.needed_bytes() - run.state_bytes));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn room_for_the_snapshots_there_are_is_enough_whatever_the_tiles(
        units in prop::collection::vec(1usize..400, 2..8), tile in 1usize..64, input in 1usize..40, names in 1u64..5
    ) {
        let units: Vec<_> = units.into_iter().map(|pages| pages * 4 * KIB).collect();
        let mut run = Run::new(&units, tile * 4 * KIB, input * 4 * KIB);
        for _ in 0..400 {
            if run.random(4) == 0 {
                run.snapshot(names);
            }
            run.step();
            prop_assert!(run.ledger.extents().capacity() <= run.most(names));
            prop_assert_eq!(run.growths, 0, "a step found no room after a snapshot was granted");
        }
    }
}
