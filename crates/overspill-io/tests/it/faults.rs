//! What can go wrong around a transfer, on every backend: each ends in a bounded time as a success or a typed error,
//! with the block and its data back, and leaves nothing behind.
//!
//! The disk, the limits and the rights are real; faults that no healthy machine shows on request are in `sim`.
//! What must not happen to other tests happens in a process of its own.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use overspill_io::{
    BackendChoice, BlockClass, Direction, Engine, EngineConfig, Failed, File, IoError, Priority, Ticket,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::alone::{alone, count, limit, passed, powerless};
use crate::rig::{KIB, MIB, Rig, assert_pattern, backends, eventually, fill, finish};

laws! {
    every_length_at_every_offset_moves_exactly_its_bytes
    a_file_is_as_long_as_its_last_written_byte
    writes_side_by_side_in_one_sector_keep_each_other
    a_device_that_fails_gives_errors_and_the_blocks_come_home
    a_read_that_fails_in_the_middle_says_how_much_was_there
    two_engines_work_on_one_file
    a_file_that_grows_behind_the_engine_is_read_to_its_new_end
    a_dropped_engine_ends_every_kind_of_operation
    a_hundred_thousand_operations_share_eight_blocks
}

/// Lengths around everything that anybody rounds to.
const BLOCK: usize = 64 * KIB;
const LENGTHS: [usize; 9] = [0, 1, 511, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1];

fn every_length_at_every_offset_moves_exactly_its_bytes(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: BLOCK, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: BLOCK + 1, count: 1 }]);
    let whole = 4 * BLOCK;
    for offset in [0, 1, 511, 4095, 4096, 4097, BLOCK - 1, BLOCK + 1] {
        for (seed, length) in (1..).zip(LENGTHS) {
            let path = rig.path("file");
            let mut expected = vec![0; whole];
            fill(&mut expected, 77);
            std::fs::write(&path, &expected).unwrap();
            let file = rig.engine.open(&path).unwrap();
            let mut block = rig.write(&file, offset as u64, rig.patterned(length, seed)).unwrap();
            assert_pattern(&block, seed);
            block.fill(0);
            assert_pattern(&rig.read(&file, offset as u64, block).unwrap(), seed);
            fill(&mut expected[offset..offset + length], seed);
            assert!(std::fs::read(&path).unwrap() == expected, "{length} bytes at {offset}");
        }
    }
    rig.all_blocks_are_home();
}

fn a_file_is_as_long_as_its_last_written_byte(backend: BackendChoice) {
    let rig = Rig::blocks(backend, BLOCK + 1, 1);
    for (number, length) in LENGTHS.into_iter().enumerate().filter(|&(_, length)| length > 0) {
        for offset in [0, 1, 5000] {
            let file = rig.create(&format!("{number} at {offset}"));
            let block = rig.write(&file, offset as u64, rig.patterned(length, 3)).unwrap();
            assert_eq!(file.len().unwrap(), (offset + length) as u64, "{length} bytes at {offset}");
            let bytes = std::fs::read(file.path()).unwrap();
            assert!(bytes[..offset].iter().all(|&byte| byte == 0));
            assert_pattern(&bytes[offset..], 3);
            // One byte further is none.
            let failed = rig.read(&file, offset as u64 + 1, block).unwrap_err();
            let (path, done) = (file.path().to_path_buf(), length - 1);
            assert_eq!(failed.error, IoError::EndOfFile { path, offset: offset as u64 + 1, length, done });
        }
    }
}

fn writes_side_by_side_in_one_sector_keep_each_other(backend: BackendChoice) {
    const PART: usize = 100;
    let rig = Rig::blocks(backend, PART, 16);
    let file = rig.create("file");
    for round in 0..20 {
        let tickets: Vec<Ticket> = (0..16)
            .map(|part| {
                let block = rig.patterned(PART, round * 16 + part);
                rig.engine.write(&file, part * PART as u64, block, Priority::Urgent)
            })
            .collect();
        for ticket in tickets {
            drop(finish(ticket).unwrap());
        }
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), 16 * PART);
        for (part, bytes) in (0..).zip(bytes.chunks(PART)) {
            assert_pattern(bytes, round * 16 + part);
        }
    }
}

/// This process's memory as a file: a device that has bytes where something is mapped, and fails elsewhere.
fn memory(rig: &Rig) -> File {
    rig.engine.open("/proc/self/mem".as_ref()).unwrap()
}

fn a_device_that_fails_gives_errors_and_the_blocks_come_home(backend: BackendChoice) {
    let rig = Rig::blocks(backend, BLOCK, 1);
    let (file, errno) = (memory(&rig), libc::EIO);
    let (length, done, path) = (BLOCK, 0, file.path().to_path_buf());
    for seed in 1..4 {
        // Nothing is mapped at address 0.
        let Failed { error, block } = rig.write(&file, 0, rig.patterned(BLOCK, seed)).unwrap_err();
        let (direction, path) = (Direction::Write, path.clone());
        assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length, done, errno });
        assert_pattern(block.as_ref().unwrap(), seed);
        let Failed { error, block } = rig.read(&file, 0, block.unwrap()).unwrap_err();
        let (direction, path) = (Direction::Read, file.path().to_path_buf());
        assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length, done, errno });
        assert_eq!(block.unwrap().len(), BLOCK);
    }
    // The engine goes on.
    drop(rig.write(&rig.create("file"), 0, rig.patterned(BLOCK, 1)).unwrap());
    rig.all_blocks_are_home();
}

fn a_read_that_fails_in_the_middle_says_how_much_was_there(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 8 * KIB, 1);
    let (file, errno) = (memory(&rig), libc::EIO);
    // Behind the first thread's stack there is a gap.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let stack = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
    let end = stack.split_once('-').unwrap().1.split_once(' ').unwrap().0;
    let offset = u64::from_str_radix(end, 16).unwrap() - 4096;
    let Failed { error, block } = rig.read(&file, offset, rig.pool.lease(8 * KIB).unwrap()).unwrap_err();
    let (direction, path, length) = (Direction::Read, file.path().to_path_buf(), 8 * KIB);
    assert_eq!(error, IoError::Transfer { direction, path, offset, length, done: 4096, errno });
    assert_eq!(block.unwrap().len(), 8 * KIB);
}

fn two_engines_work_on_one_file(backend: BackendChoice) {
    let (rig, other) = (Rig::blocks(backend, MIB, 4), Rig::blocks(backend, MIB, 4));
    let file = rig.create("file");
    let same = other.engine.open(file.path()).unwrap();
    let write = |rig: &Rig, file: &File, place: u64| {
        rig.engine.write(file, place * MIB as u64, rig.patterned(MIB, place), Priority::Background)
    };
    let tickets: Vec<Ticket> =
        (0..4).flat_map(|pair| [write(&rig, &file, 2 * pair), write(&other, &same, 2 * pair + 1)]).collect();
    for ticket in tickets {
        drop(finish(ticket).unwrap());
    }
    for place in 0..8 {
        // What the one wrote, the other reads.
        let (reader, file) = if place % 2 == 0 { (&other, &same) } else { (&rig, &file) };
        let block = reader.pool.lease(MIB).unwrap();
        assert_pattern(&reader.read(file, place * MIB as u64, block).unwrap(), place);
    }
    other.engine.shutdown().unwrap();
    assert_pattern(&rig.read(&file, 0, rig.pool.lease(MIB).unwrap()).unwrap(), 0);
}

fn a_file_that_grows_behind_the_engine_is_read_to_its_new_end(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 16 * KIB, 1);
    let file = rig.create("file");
    let block = rig.write(&file, 0, rig.patterned(8 * KIB, 1)).unwrap();
    drop(block);
    let failed = rig.read(&file, 0, rig.pool.lease(16 * KIB).unwrap()).unwrap_err();
    assert!(matches!(failed.error, IoError::EndOfFile { done: 8192, .. }), "{failed}");
    drop(failed);
    std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(16 * KIB as u64).unwrap();
    let block = rig.read(&file, 0, rig.pool.lease(16 * KIB).unwrap()).unwrap();
    assert_pattern(&block[..8 * KIB], 1);
    assert!(block[8 * KIB..].iter().all(|&byte| byte == 0));
}

fn a_dropped_engine_ends_every_kind_of_operation(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: 4 * KIB, queue_depth: 4, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: BLOCK, count: 40 }]);
    let file = rig.create("file");
    drop(rig.write(&file, 0, rig.patterned(BLOCK, 1)).unwrap());
    let place = |number: u64| (1 + number) * BLOCK as u64;
    let writes: Vec<Ticket> = (0..10)
        .map(|seed| rig.engine.write(&file, place(seed), rig.patterned(BLOCK, seed), Priority::Background))
        .collect();
    let behind: Vec<Ticket<()>> = (10..20)
        .map(|seed| rig.engine.write_behind(&file, place(seed), rig.patterned(BLOCK, seed), Priority::Urgent))
        .collect();
    let reads: Vec<Ticket> = (0..10)
        .map(|_| rig.engine.read(&file, 0, rig.pool.lease(BLOCK).unwrap(), Priority::Urgent))
        .collect();
    for seed in 20..30 {
        drop(rig.engine.write(&file, place(seed), rig.patterned(BLOCK, seed), Priority::Background));
    }
    let Rig { engine, pool, folder } = rig;
    drop(engine);
    assert!(writes.iter().chain(&reads).all(Ticket::is_done) && behind.iter().all(Ticket::is_done));
    for (seed, ticket) in (0..).zip(writes) {
        assert_pattern(&ticket.wait().unwrap(), seed);
    }
    for ticket in reads {
        assert_pattern(&ticket.wait().unwrap(), 1);
    }
    for ticket in behind {
        ticket.wait().unwrap();
    }
    assert_eq!(pool.leased_blocks(), 0);
    let bytes = std::fs::read(file.path()).unwrap();
    for (seed, bytes) in (0..30).zip(bytes.chunks(BLOCK).skip(1)) {
        assert_pattern(bytes, seed);
    }
    drop(folder);
}

fn a_hundred_thousand_operations_share_eight_blocks(backend: BackendChoice) {
    const PLACES: usize = 64;
    const EACH: u64 = 100_000 / PLACES as u64 + 1;
    let rig = Rig::blocks(backend, 4 * KIB, 8);
    let file = rig.create("file");
    let mut last: [Option<Ticket<()>>; PLACES] = std::array::from_fn(|_| None);
    for round in 0..EACH {
        for (place, last) in (0..).zip(&mut last) {
            // Two writes to one place would race.
            last.take().map_or(Ok(()), Ticket::wait).unwrap();
            let block = rig.patterned(4 * KIB, round * PLACES as u64 + place);
            *last = Some(rig.engine.write_behind(&file, place * 4 * KIB as u64, block, Priority::Background));
        }
    }
    for last in last.into_iter().flatten() {
        eventually("the last writes are over", || last.is_done());
        last.wait().unwrap();
    }
    rig.all_blocks_are_home();
    let stats = rig.engine.stats();
    assert!(stats.write_ops >= 100_000);
    assert_eq!((stats.write_ops, stats.leaked_blocks), (EACH * PLACES as u64, 0));
    for (place, bytes) in (0..).zip(std::fs::read(file.path()).unwrap().chunks(4 * KIB)) {
        assert_pattern(bytes, (EACH - 1) * PLACES as u64 + place);
    }
}

#[test]
fn a_folder_that_may_not_be_written_to_is_an_error() {
    powerless("faults::a_folder_that_may_not_be_written_to_is_an_error_here");
}

#[test]
#[ignore = "needs a user without exemptions; run by a_folder_that_may_not_be_written_to_is_an_error"]
fn a_folder_that_may_not_be_written_to_is_an_error_here() {
    for backend in backends() {
        let rig = Rig::blocks(backend, 4 * KIB, 1);
        let file = rig.create("file");
        let rights = |path: &str, mode| {
            std::fs::set_permissions(rig.path(path), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        rights("file", 0o400);
        rights("", 0o500);
        let path = rig.path("other");
        let error = rig.engine.create(&path).unwrap_err();
        assert_eq!(error, IoError::File { action: "create", path, errno: libc::EACCES });
        let path = rig.path("file");
        let error = rig.engine.open(&path).unwrap_err();
        assert_eq!(error, IoError::File { action: "open", path, errno: libc::EACCES });
        // What was open before is open still.
        drop(rig.write(&file, 0, rig.patterned(4 * KIB, 1)).unwrap());
        rights("", 0o700);
    }
}

#[test]
fn without_descriptors_nothing_opens_and_open_files_go_on() {
    alone("faults::without_descriptors_nothing_opens_and_open_files_go_on_here");
}

#[test]
#[ignore = "limits the whole process; run by without_descriptors_nothing_opens_and_open_files_go_on"]
fn without_descriptors_nothing_opens_and_open_files_go_on_here() {
    for backend in backends() {
        let rig = Rig::blocks(backend, BLOCK, 2);
        let file = rig.create("file");
        let before = (count("/proc/self/fd"), count("/proc/self/task"));
        let usual = getrlimit(Resource::Nofile);
        // Descriptors are given out by rising number.
        let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
        limit(Resource::Nofile, u64::try_from(next).unwrap());
        for _ in 0..100 {
            let path = rig.path("other");
            let error = rig.engine.create(&path).unwrap_err();
            assert_eq!(error, IoError::File { action: "create", path, errno: libc::EMFILE });
            let error = rig.engine.open(file.path()).unwrap_err();
            assert_eq!(error.errno(), Some(libc::EMFILE));
            let config = EngineConfig { backend, ..EngineConfig::default() };
            let error = Engine::start(config, &rig.pool).unwrap_err();
            assert!(matches!(error, IoError::Backend { errno: libc::EMFILE, .. }), "{error}");
        }
        let block = rig.write(&file, 0, rig.patterned(BLOCK, 1)).unwrap();
        assert_pattern(&rig.read(&file, 0, block).unwrap(), 1);
        setrlimit(Resource::Nofile, Rlimit { ..usual }).unwrap();
        assert!(!rig.path("other").exists());
        let now = || (count("/proc/self/fd"), count("/proc/self/task"));
        eventually("what was begun in vain is gone", || now() == before);
        rig.all_blocks_are_home();
    }
}

#[test]
fn a_write_across_the_largest_file_size_is_short_and_then_an_error() {
    let law = "faults::a_write_across_the_largest_file_size_is_short_and_then_an_error_here";
    // A signal comes with the error, and its ends the process unless the signal is ignored by whoever starts it.
    let ignoring = "trap '' XFSZ; exec \"$0\" --ignored --exact \"$1\"";
    let binary = std::env::current_exe().unwrap();
    passed(&Command::new("sh").args(["-c", ignoring]).arg(binary).arg(law).output().unwrap());
}

#[test]
#[ignore = "limits the whole process; run by a_write_across_the_largest_file_size_is_short_and_then_an_error"]
fn a_write_across_the_largest_file_size_is_short_and_then_an_error_here() {
    const FITS: usize = 300 * KIB;
    let usual = getrlimit(Resource::Fsize);
    for backend in backends() {
        let config = EngineConfig { backend, chunk_bytes: BLOCK, ..EngineConfig::default() };
        let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: MIB, count: 1 }]);
        let file = rig.create("file");
        let block = rig.patterned(MIB, 6);
        limit(Resource::Fsize, FITS as u64);
        let Failed { error, block } = rig.write(&file, 0, block).unwrap_err();
        setrlimit(Resource::Fsize, Rlimit { ..usual }).unwrap();
        let (direction, path, errno) = (Direction::Write, file.path().to_path_buf(), libc::EFBIG);
        assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length: MIB, done: FITS, errno });
        let block = block.unwrap();
        assert_pattern(&block, 6);
        let mut begun = vec![0; MIB];
        fill(&mut begun, 6);
        assert!(std::fs::read(file.path()).unwrap() == begun[..FITS]);
        // With the limit gone, the same block goes where it should have gone.
        assert_pattern(&rig.write(&file, 0, block).unwrap(), 6);
        assert_eq!(file.len().unwrap(), MIB as u64);
    }
}

#[test]
fn failures_leave_nothing_behind() {
    alone("faults::failures_leave_nothing_behind_here");
}

#[test]
#[ignore = "counts what the whole process has; run by failures_leave_nothing_behind"]
fn failures_leave_nothing_behind_here() {
    let own = || (count("/proc/self/fd"), count("/proc/self/task"));
    let before = own();
    for backend in backends() {
        let rig = Rig::blocks(backend, BLOCK, 8);
        let file = rig.create("file");
        let full = rig.engine.open("/dev/full".as_ref()).unwrap();
        let memory = memory(&rig);
        for round in 0..50_u64 {
            assert!(rig.engine.open(&rig.path("missing")).is_err());
            assert!(rig.engine.create(&rig.path("no/where")).is_err());
            let block = || rig.pool.lease(BLOCK).unwrap();
            drop(rig.engine.write(&full, 0, block(), Priority::Urgent));
            drop(rig.engine.write_behind(&memory, 0, block(), Priority::Background));
            drop(rig.engine.read(&memory, 0, block(), Priority::Urgent));
            let failed = rig.read(&file, round * BLOCK as u64, block()).unwrap_err();
            assert!(matches!(failed.error, IoError::EndOfFile { done: 0, .. }), "{failed}");
        }
        rig.all_blocks_are_home();
        assert_eq!(rig.engine.stats().leaked_blocks, 0);
        drop((file, full, memory, rig));
        // A thread that was joined stays visible for a moment.
        eventually("what was opened and started is gone", || own() == before);
    }
}
