//! Several files as one space: where bytes are, and whom a lane that fails concerns.

use std::path::{Path, PathBuf};

use overspill_io::{
    BLOCK_ALIGNMENT, BackendChoice, Block, BlockClass, Direction, Engine, EngineConfig, Failed, IoError,
    Lane, Pool, Priority, Space, Stripes,
};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::alone::apart;
use crate::rig::{BOUND, KIB, MIB, assert_pattern, eventually, fill, finish};
use crate::space::mount;

const STRIPE: usize = 2 * BLOCK_ALIGNMENT;
const MIXED: [BackendChoice; 3] = [BackendChoice::Uring, BackendChoice::Threads, BackendChoice::Auto];

/// A space over files of one folder, each with an engine of its own; fields are dropped from top to bottom.
struct Rig {
    space: Space,
    pool: Pool,
    folder: TempDir,
}

impl Rig {
    /// One lane for each weight, on backends of all kinds.
    fn new(weights: &[u32]) -> Rig {
        Rig::opening(weights, |engine, path| engine.create(path))
    }

    fn opening(weights: &[u32], open: impl Fn(&Engine, &Path) -> Result<overspill_io::File, IoError>) -> Rig {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool =
            Pool::with_patience(&[BlockClass { name: "test", block_bytes: MIB, count: 2 }], BOUND).unwrap();
        let lane = |(index, &weight): (usize, &u32)| {
            let backend = MIXED[index % MIXED.len()];
            let config =
                EngineConfig { backend, chunk_bytes: BLOCK_ALIGNMENT, threads: 2, ..EngineConfig::default() };
            let engine = Engine::start(config, &pool).unwrap();
            let file = open(&engine, &folder.path().join(format!("lane {index}"))).unwrap();
            Lane { engine, file, weight }
        };
        let lanes = weights.iter().enumerate().map(lane).collect();
        Rig { space: Space::new(lanes, STRIPE).unwrap(), pool, folder }
    }

    fn patterned(&self, bytes: usize, seed: u64) -> Block {
        let mut block = self.pool.lease(bytes).unwrap();
        fill(&mut block, seed);
        block
    }

    fn write(&self, offset: usize, block: Block) -> Result<Block, Failed> {
        finish(self.space.write(offset as u64, block, Priority::Background))
    }

    fn read(&self, offset: usize, bytes: usize) -> Result<Block, Failed> {
        finish(self.space.read(offset as u64, self.pool.lease(bytes).unwrap(), Priority::Urgent))
    }

    fn path(&self, lane: usize) -> PathBuf {
        self.space.lanes()[lane].file.path().to_owned()
    }

    fn all_blocks_are_home(&self) {
        eventually("all blocks are home", || self.pool.leased_blocks() == 0);
    }

    /// Reads stripe after stripe: those of `lane` fail with an error that says this, all others have their pattern.
    #[track_caller]
    fn only_this_lane_fails(&self, lane: usize, stripes: usize, is_right: impl Fn(&IoError) -> bool) {
        for stripe in 0..stripes {
            let offset = stripe * STRIPE;
            let concerned =
                self.space.stripes().pieces(offset as u64, STRIPE).any(|piece| piece.lane == lane);
            match self.read(offset, STRIPE) {
                Ok(block) => {
                    assert!(!concerned, "stripe {stripe} lies on the lane that fails");
                    assert_pattern(&block, stripe as u64);
                }
                Err(Failed { error, block }) => {
                    assert!(concerned, "stripe {stripe} does not concern the lane that fails: {error}");
                    let path = self.path(lane);
                    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
                    assert!(is_right(&error), "{error}");
                    assert_eq!(block.unwrap().len(), STRIPE);
                }
            }
        }
    }

    /// Writes the pattern of its number into each of the first stripes.
    fn fill_stripes(&self, stripes: usize) {
        for stripe in 0..stripes {
            drop(self.write(stripe * STRIPE, self.patterned(STRIPE, stripe as u64)).unwrap());
        }
    }
}

#[derive(Clone, Debug)]
struct Step {
    is_write: bool,
    unit: usize,
    units: usize,
}

fn steps(units: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = (any::<bool>(), 0..units, 0_usize..20).prop_map(move |(is_write, unit, length)| {
        let units = length.min(units - unit);
        Step { is_write, unit, units }
    });
    prop::collection::vec(step, 1..40)
}

const UNITS: usize = 60;

fn reads_what_was_written(weights: &[u32]) {
    let rig = Rig::new(weights);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(40));
    rig.space.allocate((UNITS * BLOCK_ALIGNMENT) as u64).unwrap();
    let outcome = runner.run(&(steps(UNITS), any::<u32>()), |(steps, seed)| {
        let mut model = rig.read(0, UNITS * BLOCK_ALIGNMENT).unwrap().to_vec();
        for (index, Step { is_write, unit, units }) in steps.into_iter().enumerate() {
            let (start, bytes) = (unit * BLOCK_ALIGNMENT, units * BLOCK_ALIGNMENT);
            let part = &mut model[start..start + bytes];
            if is_write {
                let block = rig.patterned(bytes, u64::from(seed) + index as u64);
                part.copy_from_slice(&block);
                let block = rig.write(start, block).unwrap();
                prop_assert_eq!(&block[..], &*part, "the block comes back whole");
            } else {
                prop_assert_eq!(&rig.read(start, bytes).unwrap()[..], &*part);
            }
        }
        prop_assert_eq!(&rig.read(0, UNITS * BLOCK_ALIGNMENT).unwrap()[..], &model[..]);
        Ok(())
    });
    outcome.unwrap();
    rig.space.sync().unwrap();
    rig.all_blocks_are_home();
}

#[test]
fn what_is_written_through_one_lane_is_read_back() {
    reads_what_was_written(&[5]);
}

#[test]
fn what_is_written_through_two_lanes_is_read_back() {
    reads_what_was_written(&[1, 2]);
}

#[test]
fn what_is_written_through_three_lanes_of_different_backends_is_read_back() {
    reads_what_was_written(&[3, 1, 2]);
}

#[test]
fn a_space_of_one_lane_is_its_file() {
    let rig = Rig::new(&[3]);
    rig.fill_stripes(5);
    let bytes = std::fs::read(rig.path(0)).unwrap();
    assert_eq!(bytes.len(), 5 * STRIPE);
    for (stripe, part) in (0..).zip(bytes.chunks(STRIPE)) {
        assert_pattern(part, stripe);
    }
    assert_eq!(rig.space.stats(), rig.space.lanes()[0].engine.stats());
}

#[test]
fn each_file_holds_its_share_within_a_stripe() {
    for weights in [&[1, 1][..], &[2, 1], &[5, 3, 1]] {
        let rig = Rig::new(weights);
        let total: u32 = weights.iter().sum();
        for stripes in [1, 7, 40] {
            let capacity = stripes * STRIPE;
            rig.space.allocate(capacity as u64).unwrap();
            let mut sum = 0;
            for (index, lane) in rig.space.lanes().iter().enumerate() {
                let length = lane.file.len().unwrap() as usize;
                let fair = capacity * lane.weight as usize / total as usize;
                assert!(length.abs_diff(fair) <= STRIPE, "{weights:?}: {length} of {fair} bytes");
                assert_eq!(length as u64, rig.space.stripes().lane_bytes(index, capacity as u64));
                sum += length;
            }
            assert_eq!(sum, capacity, "no byte twice, none nowhere");
        }
    }
}

#[test]
fn a_lane_whose_engine_has_stopped_fails_what_touches_it_and_nothing_else() {
    let rig = Rig::new(&[2, 1, 1]);
    rig.fill_stripes(12);
    rig.space.lanes()[1].engine.shutdown().unwrap();
    rig.only_this_lane_fails(1, 12, |error| matches!(error, IoError::LaneStopped { .. }));
    let Failed { error, block } = rig.write(0, rig.patterned(8 * STRIPE, 7)).unwrap_err();
    assert_eq!(error, IoError::LaneStopped { path: rig.path(1) });
    assert_pattern(&block.unwrap(), 7);
    rig.all_blocks_are_home();
}

#[test]
fn a_lane_cut_short_by_somebody_else_fails_what_lay_there_and_nothing_else() {
    let rig = Rig::new(&[1, 1]);
    rig.fill_stripes(8);
    std::fs::OpenOptions::new().write(true).open(rig.path(0)).unwrap().set_len(0).unwrap();
    rig.only_this_lane_fails(0, 8, |error| matches!(error, IoError::EndOfFile { done: 0, .. }));
    // What is written again is there again.
    rig.fill_stripes(8);
    assert_pattern(&rig.read(6 * STRIPE, STRIPE).unwrap(), 6);
}

#[test]
fn a_write_that_one_lane_fails_brings_every_byte_back() {
    let rig = Rig::opening(&[1, 1], |engine, path| {
        if path.ends_with("lane 1") { engine.open("/dev/full".as_ref()) } else { engine.create(path) }
    });
    assert!(rig.space.note().unwrap().contains("/dev/full: "));
    let block = rig.patterned(5 * STRIPE, 3);
    let start = block.as_ptr();
    let Failed { error, block } = rig.write(STRIPE, block).unwrap_err();
    // The space's second stripe is the first of the second lane.
    let (direction, path, errno) = (Direction::Write, "/dev/full".into(), libc::ENOSPC);
    assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length: STRIPE, done: 0, errno });
    let block = block.unwrap();
    assert_eq!(block.as_ptr(), start);
    assert_pattern(&block, 3);

    // Also what the healthy lane has written behind the caller's back.
    let ticket = rig.space.write_behind(0, block, Priority::Background);
    eventually("the operation is over", || ticket.is_done());
    let Failed { error, block } = ticket.wait().unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOSPC));
    assert_pattern(&block.unwrap(), 3);
    rig.all_blocks_are_home();

    drop(rig.write(0, rig.patterned(STRIPE, 1)).expect("the healthy lane goes on"));
    let error = rig.space.sync().unwrap_err();
    assert!(matches!(&error, IoError::File { path, .. } if path == Path::new("/dev/full")), "{error}");
}

#[test]
fn a_write_behind_through_several_lanes_sends_its_block_home() {
    let rig = Rig::new(&[2, 1]);
    for round in 0..20 {
        // The pool has two blocks, so it is what paces this.
        let ticket = rig.space.write_behind(round * MIB as u64, rig.patterned(MIB, round), Priority::Urgent);
        if round % 2 == 0 { drop(ticket) } else { ticket.wait().unwrap() }
    }
    rig.all_blocks_are_home();
    for round in 0..20 {
        assert_pattern(&rig.read(round * MIB, MIB).unwrap(), round as u64);
    }
}

#[test]
fn a_dropped_ticket_of_several_parts_sends_the_block_home_after_all_of_them() {
    let rig = Rig::new(&[1, 1, 1]);
    for seed in 0..10 {
        drop(rig.space.write(seed * MIB as u64, rig.patterned(MIB, seed), Priority::Background));
        drop(rig.space.read(0, rig.pool.lease(MIB).unwrap(), Priority::Urgent));
    }
    rig.all_blocks_are_home();
    for seed in 0..10 {
        assert_pattern(&rig.read(seed * MIB, MIB).unwrap(), seed as u64);
    }
}

#[test]
fn an_operation_counts_once_however_many_lanes_it_has() {
    let rig = Rig::new(&[1, 1]);
    drop(rig.write(0, rig.patterned(MIB, 1)).unwrap());
    let failed = rig.read(512 * KIB, MIB).unwrap_err();
    assert!(matches!(failed.error, IoError::EndOfFile { .. }), "{failed}");
    let stats = rig.space.stats();
    assert_eq!((stats.write_ops, stats.bytes_written), (1, MIB as u64));
    assert_eq!((stats.read_ops, stats.bytes_read), (1, 512 * KIB as u64));
    assert!(stats.busy >= stats.write_busy && stats.busy >= stats.read_busy);
    assert_eq!(stats.leaked_blocks, 0);
}

#[test]
fn an_offset_that_no_block_could_be_cut_at_is_refused_with_the_block() {
    for weights in [&[1][..], &[1, 1]] {
        let rig = Rig::new(weights);
        for offset in [1, 513, STRIPE + 100] {
            let Failed { error, block } = rig.write(offset, rig.patterned(STRIPE, 2)).unwrap_err();
            let direction = Direction::Write;
            assert_eq!(error, IoError::SpaceOffset { direction, offset: offset as u64, length: STRIPE });
            assert_pattern(&block.unwrap(), 2);
        }
        let beyond = (u64::MAX - 4095) as usize;
        let Failed { error, block } = rig.write(beyond, rig.patterned(STRIPE, 2)).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EOVERFLOW), "{error}");
        assert_pattern(&block.unwrap(), 2);
        assert!(rig.write(0, rig.pool.lease(0).unwrap()).unwrap().is_empty());
    }
}

#[test]
fn a_space_without_lanes_is_refused() {
    let refused = Space::new(Vec::new(), Stripes::BYTES_DEFAULT).unwrap_err();
    assert!(matches!(refused, IoError::Config { field: "lanes", .. }), "{refused}");
}

#[test]
fn a_lane_on_a_full_disk_is_named_and_the_others_go_on() {
    apart("space_lanes::a_lane_on_a_full_disk_is_named_and_the_others_go_on_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by a_lane_on_a_full_disk_is_named_and_the_others_go_on"]
fn a_lane_on_a_full_disk_is_named_and_the_others_go_on_here() {
    let rig = Rig::opening(&[1, 1], |engine, path| {
        if !path.ends_with("lane 1") {
            return engine.create(path);
        }
        let small = path.with_file_name("small");
        std::fs::create_dir(&small).unwrap();
        mount(&small, "size=64k");
        engine.create(&small.join("file"))
    });
    assert!(rig.folder.path().join("small/file").exists());
    let error = rig.space.allocate(8 * MIB as u64).unwrap_err();
    assert!(matches!(&error, IoError::NoSpace { path, .. } if *path == rig.path(1)), "{error}");

    let Failed { error, block } = rig.write(0, rig.patterned(MIB, 9)).unwrap_err();
    assert!(matches!(&error, IoError::Transfer { path, .. } if *path == rig.path(1)), "{error}");
    assert_eq!(error.errno(), Some(libc::ENOSPC));
    assert_pattern(&block.unwrap(), 9);
    let stripes = MIB / STRIPE;
    for stripe in (0..stripes).step_by(2) {
        drop(rig.write(stripe * STRIPE, rig.patterned(STRIPE, stripe as u64)).unwrap());
    }
    // There is no room for what is behind the small disk's end.
    let last = (stripes - 1) * STRIPE;
    assert!(rig.write(last, rig.patterned(STRIPE, 1)).is_err());
    assert_pattern(&rig.read(last - STRIPE, STRIPE).unwrap(), stripes as u64 - 2);
    rig.all_blocks_are_home();
}
