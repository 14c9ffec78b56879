//! What every backend must do, tested on each.

use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use overspill_io::{
    BLOCK_ALIGNMENT, BackendChoice, Block, BlockClass, Direction, Engine, EngineConfig, Failed, IoError,
    Pool, Priority,
};

use crate::rig::{KIB, MIB, Rig, assert_pattern, eventually, fill, finish};

laws! {
    what_was_written_is_read_back_at_every_length
    offsets_beyond_four_gib_are_kept
    direct_io_works_where_the_build_does
    operations_of_many_threads_do_not_mix
    ten_thousand_operations_share_eight_blocks
    priorities_share_the_queue
    parts_of_a_block_are_written_apart_and_joined_again
    blocks_of_another_pool_work_too
    the_smallest_queue_works
    an_operation_without_bytes_succeeds
    reading_past_the_end_is_an_error_that_says_what_was_there
    a_file_cut_short_while_open_is_an_error
    a_file_that_ends_between_aligned_bytes_is_an_error
    an_offset_beyond_what_files_can_be_is_refused
    files_that_cannot_be_opened_say_why
    what_has_no_offsets_is_refused_and_not_waited_for
    a_failed_write_returns_identical_data
    a_dropped_ticket_sends_the_block_home_after_the_write
    a_dropped_engine_finishes_what_it_accepted
    a_stopped_engine_hands_blocks_back
    a_file_dropped_by_everyone_is_closed
    statistics_count_what_moved
}

fn what_was_written_is_read_back_at_every_length(backend: BackendChoice) {
    let lengths = [4096, MIB - 4096, MIB, MIB + 4096, 5 * MIB + 8192];
    let rig = Rig::blocks(backend, 5 * MIB + 8192, 1);
    let file = rig.create("file");
    for (seed, length) in (1..).zip(lengths) {
        for offset in [0, 4096, 3 * MIB as u64] {
            let mut block = rig.write(&file, offset, rig.patterned(length, seed)).unwrap();
            assert_pattern(&block, seed);
            block.fill(0);
            assert_pattern(&rig.read(&file, offset, block).unwrap(), seed);
        }
    }
    assert_eq!(file.len().unwrap(), (8 * MIB + 8192) as u64);
    file.sync().unwrap();
}

fn offsets_beyond_four_gib_are_kept(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 64 * KIB, 1);
    let file = rig.create("sparse");
    let offset = (5_u64 << 30) + 4096;
    let mut block = rig.write(&file, offset, rig.patterned(64 * KIB, 1)).unwrap();
    block.fill(0);
    assert_pattern(&rig.read(&file, offset, block).unwrap(), 1);
    assert_eq!(file.len().unwrap(), offset + 64 * KIB as u64);
}

fn direct_io_works_where_the_build_does(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 64 * KIB, 1);
    let file = rig.create("file");
    assert_eq!(file.direct(), file.note().is_none());
    assert!(file.alignment().is_power_of_two() && file.alignment() <= BLOCK_ALIGNMENT);
    let mode = std::fs::metadata(file.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    file.allocate(MIB as u64).unwrap();
    assert_eq!(file.len().unwrap(), MIB as u64);
    // Allocated and never written: zeros.
    let mut block = rig.patterned(64 * KIB, 1);
    block = rig.read(&file, 0, block).unwrap();
    assert!(block.iter().all(|&byte| byte == 0));
}

fn operations_of_many_threads_do_not_mix(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: 64 * KIB, queue_depth: 8, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: MIB, count: 8 }]);
    let file = rig.create("shared");
    thread::scope(|scope| {
        for worker in 0..4_u64 {
            let (rig, file) = (&rig, &file);
            scope.spawn(move || {
                for round in 0..10_u64 {
                    let seed = worker * 100 + round;
                    let length = MIB - 4096 * (seed as usize % 50);
                    let offset = (worker * 10 + round) * MIB as u64;
                    let mut block = rig.write(file, offset, rig.patterned(length, seed)).unwrap();
                    block.fill(0);
                    assert_pattern(&rig.read(file, offset, block).unwrap(), seed);
                }
            });
        }
    });
    rig.all_blocks_are_home();
}

fn ten_thousand_operations_share_eight_blocks(backend: BackendChoice) {
    const BLOCK: usize = 8 * KIB;
    let config = EngineConfig { backend, chunk_bytes: 4 * KIB, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: BLOCK, count: 8 }]);
    let file = rig.create("file");
    thread::scope(|scope| {
        for worker in 0..2_u64 {
            let (rig, file) = (&rig, &file);
            scope.spawn(move || {
                for round in 0..2500_u64 {
                    let place = worker * 16 + round % 16;
                    let offset = place * BLOCK as u64;
                    let block = rig.write(file, offset, rig.patterned(BLOCK, round)).unwrap();
                    drop(block);
                    let block = rig.read(file, offset, rig.pool.lease(BLOCK).unwrap()).unwrap();
                    assert_pattern(&block, round);
                }
            });
        }
    });
    let stats = rig.engine.stats();
    assert_eq!((stats.read_ops, stats.write_ops), (5000, 5000));
    assert_eq!((stats.bytes_read, stats.bytes_written), (5000 * BLOCK as u64, 5000 * BLOCK as u64));
    rig.all_blocks_are_home();
}

fn priorities_share_the_queue(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: 4 * KIB, queue_depth: 2, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: 256 * KIB, count: 8 }]);
    let file = rig.create("file");
    let tickets: Vec<_> = (0..8_u64)
        .map(|seed| {
            let priority = if seed % 2 == 0 { Priority::Urgent } else { Priority::Background };
            let block = rig.patterned(256 * KIB, seed);
            rig.engine.write(&file, seed * 256 * KIB as u64, block, priority)
        })
        .collect();
    for (seed, ticket) in (0..).zip(tickets) {
        assert_pattern(&finish(ticket).unwrap(), seed);
    }
    let mut whole = Vec::new();
    std::fs::File::open(file.path()).unwrap().read_to_end(&mut whole).unwrap();
    for (seed, part) in (0..).zip(whole.chunks(256 * KIB)) {
        assert_pattern(part, seed);
    }
}

fn parts_of_a_block_are_written_apart_and_joined_again(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    let mut head = rig.patterned(MIB, 7);
    let tail = head.split_off(700 * KIB);
    let middle = head.split_off(4 * KIB);
    // Each part goes to its own place, in an order that is not theirs.
    let tickets = [(tail, 0), (head, 512 * KIB), (middle, 600 * KIB)]
        .map(|(part, offset)| rig.engine.write(&file, offset as u64, part, Priority::Urgent));
    let [tail, head, middle] = tickets.map(|ticket| finish(ticket).unwrap());
    let whole = head.join(middle).unwrap().join(tail).unwrap();
    assert_pattern(&whole, 7);

    let mut head = whole;
    head.fill(0);
    let tail = head.split_off(700 * KIB);
    let middle = head.split_off(4 * KIB);
    let tickets = [(tail, 0), (head, 512 * KIB), (middle, 600 * KIB)]
        .map(|(part, offset)| rig.engine.read(&file, offset as u64, part, Priority::Urgent));
    let [tail, head, middle] = tickets.map(|ticket| finish(ticket).unwrap());
    assert_pattern(&head.join(middle).unwrap().join(tail).unwrap(), 7);
    rig.all_blocks_are_home();
}

fn blocks_of_another_pool_work_too(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    let other = Pool::new(&[BlockClass { name: "other", block_bytes: MIB, count: 1 }]).unwrap();
    let file = rig.create("file");
    let mut block = other.lease(MIB).unwrap();
    fill(&mut block, 3);
    let mut block = rig.write(&file, 0, block).unwrap();
    block.fill(0);
    assert_pattern(&rig.read(&file, 0, block).unwrap(), 3);
}

fn the_smallest_queue_works(backend: BackendChoice) {
    let config =
        EngineConfig { backend, chunk_bytes: 4096, queue_depth: 1, threads: 1, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: 64 * KIB, count: 2 }]);
    let file = rig.create("file");
    let (first, second) = (rig.patterned(64 * KIB, 1), rig.patterned(64 * KIB, 2));
    let first = rig.engine.write(&file, 0, first, Priority::Urgent);
    let second = rig.engine.write(&file, 64 * KIB as u64, second, Priority::Background);
    let mut block = finish(first).unwrap();
    finish(second).unwrap();
    block.fill(0);
    assert_pattern(&rig.read(&file, 64 * KIB as u64, block).unwrap(), 2);
}

fn an_operation_without_bytes_succeeds(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    let file = rig.create("file");
    assert!(rig.write(&file, 4096, rig.pool.lease(0).unwrap()).unwrap().is_empty());
    assert!(rig.read(&file, 4096, rig.pool.lease(0).unwrap()).unwrap().is_empty());
    assert!(file.is_empty().unwrap());
}

fn reading_past_the_end_is_an_error_that_says_what_was_there(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: 64 * KIB, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: MIB, count: 1 }]);
    let file = rig.create("file");
    drop(rig.write(&file, 0, rig.patterned(300 * KIB, 5)).unwrap());
    for (offset, done) in [(0, 300 * KIB), (256 * KIB as u64, 44 * KIB), (MIB as u64, 0)] {
        let Failed { error, block } = rig.read(&file, offset, rig.pool.lease(MIB).unwrap()).unwrap_err();
        let path = file.path().to_path_buf();
        assert_eq!(error, IoError::EndOfFile { path, offset, length: MIB, done });
        assert_eq!(block.unwrap().len(), MIB);
    }
    rig.all_blocks_are_home();
}

fn a_file_cut_short_while_open_is_an_error(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    let block = rig.write(&file, 0, rig.patterned(MIB, 5)).unwrap();
    std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(8192).unwrap();
    let failed = rig.read(&file, 0, block).unwrap_err();
    assert!(matches!(failed.error, IoError::EndOfFile { done: 8192, .. }), "{failed}");
}

fn a_file_that_ends_between_aligned_bytes_is_an_error(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    std::fs::write(rig.path("odd"), vec![9; 5000]).unwrap();
    let file = rig.engine.open(&rig.path("odd")).unwrap();
    let failed = rig.read(&file, 0, rig.pool.lease(64 * KIB).unwrap()).unwrap_err();
    assert!(matches!(failed.error, IoError::EndOfFile { done: 5000, .. }), "{failed}");
}

fn an_offset_beyond_what_files_can_be_is_refused(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 8192, 1);
    let file = rig.create("file");
    for offset in [u64::MAX - 4095, i64::MAX as u64 - 4095] {
        let Failed { error, block } = rig.write(&file, offset, rig.patterned(8192, 4)).unwrap_err();
        assert!(matches!(error, IoError::Transfer { done: 0, .. }), "{error}");
        assert_pattern(&block.unwrap(), 4);
    }
}

fn files_that_cannot_be_opened_say_why(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    std::fs::write(rig.path("there"), b"").unwrap();
    symlink(rig.path("there"), rig.path("link")).unwrap();
    std::fs::create_dir(rig.path("folder")).unwrap();
    let open = |path: &str| rig.engine.open(&rig.path(path)).unwrap_err().errno().unwrap();
    assert_eq!(open("missing"), libc::ENOENT);
    assert_eq!(open("link"), libc::ELOOP);
    assert_eq!(open("folder"), libc::EISDIR);
    assert_eq!(open("there/below"), libc::ENOTDIR);
    // A file and a folder that even the superuser cannot write to.
    assert_eq!(open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"), libc::EACCES);
    let create = |path: &str| rig.engine.create(&rig.path(path)).unwrap_err();
    assert_eq!(create("there").errno(), Some(libc::EEXIST));
    assert_eq!(create("link").errno(), Some(libc::EEXIST));
    assert!(matches!(create("/sys/kernel/file").errno(), Some(libc::EACCES | libc::EPERM)));
    let missing = rig.path("no/where");
    let error = rig.engine.create(&missing).unwrap_err();
    assert_eq!(error, IoError::File { action: "create", path: missing.clone(), errno: libc::ENOENT });
    let said = format!("cannot create {}: No such file or directory (os error 2)", missing.display());
    assert_eq!(error.to_string(), said);
}

fn what_has_no_offsets_is_refused_and_not_waited_for(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    rustix::fs::mkfifoat(rustix::fs::CWD, rig.path("pipe"), rustix::fs::Mode::RUSR).unwrap();
    let _listener = UnixListener::bind(rig.path("socket")).unwrap();
    std::fs::create_dir(rig.path("folder")).unwrap();
    let (engine, paths) = (rig.engine.clone(), ["pipe", "socket", "folder"].map(|name| rig.path(name)));
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for path in paths {
            let result = engine.open_to_read(&path).map(drop);
            tell.send((result, path)).unwrap();
        }
    });
    for _ in 0..3 {
        let (result, path) = told.recv_timeout(Duration::from_secs(60)).expect("nobody waits for a pipe");
        assert_eq!(result, Err(IoError::NotAFile { path }));
    }
    // What is opened without waiting is not left so: transfers wait.
    let path = rig.create("file").path().to_owned();
    let file = rig.engine.open_to_read(&path).unwrap();
    assert!(!rustix::fs::fcntl_getfl(&file).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
}

fn a_failed_write_returns_identical_data(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: 16 * KIB, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: MIB, count: 1 }]);
    let full = rig.engine.open("/dev/full".as_ref()).unwrap();
    assert!(!full.direct() && full.note().is_some());
    let block = rig.patterned(MIB, 6);
    let start = block.as_ptr();
    let Failed { error, block } = rig.write(&full, 0, block).unwrap_err();
    let (direction, path) = (Direction::Write, "/dev/full".into());
    let errno = libc::ENOSPC;
    assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length: MIB, done: 0, errno });
    let block = block.unwrap();
    assert_eq!(block.as_ptr(), start);
    assert_pattern(&block, 6);
    // The engine goes on after a failure.
    assert_pattern(&rig.write(&rig.create("file"), 0, block).unwrap(), 6);
}

fn a_dropped_ticket_sends_the_block_home_after_the_write(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 2);
    let file = rig.create("file");
    for seed in 0..20 {
        drop(rig.engine.write(&file, seed * MIB as u64, rig.patterned(MIB, seed), Priority::Background));
    }
    rig.all_blocks_are_home();
    for seed in 0..20 {
        let block = rig.pool.lease(MIB).unwrap();
        assert_pattern(&rig.read(&file, seed * MIB as u64, block).unwrap(), seed);
    }
}

fn a_dropped_engine_finishes_what_it_accepted(backend: BackendChoice) {
    let Rig { engine, pool, folder } = Rig::blocks(backend, 4 * MIB, 4);
    let file = engine.create(&folder.path().join("file")).unwrap();
    let tickets: Vec<_> = (0..4)
        .map(|seed| {
            let mut block = pool.lease(4 * MIB).unwrap();
            fill(&mut block, seed);
            engine.write(&file, seed * 4 * MIB as u64, block, Priority::Background)
        })
        .collect();
    drop(engine);
    for (seed, ticket) in (0..).zip(tickets) {
        assert!(ticket.is_done());
        assert_pattern(&ticket.wait().unwrap(), seed);
    }
    let whole = std::fs::read(file.path()).unwrap();
    for (seed, part) in (0..).zip(whole.chunks(4 * MIB)) {
        assert_pattern(part, seed);
    }
    assert_eq!(pool.leased_blocks(), 0);
}

fn a_stopped_engine_hands_blocks_back(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    let engine: Engine = rig.engine.clone();
    engine.shutdown().unwrap();
    engine.shutdown().unwrap();
    let block = rig.patterned(MIB, 8);
    let Failed { error, block } = rig.write(&file, 0, block).unwrap_err();
    assert_eq!(error, IoError::EngineStopped);
    let block: Block = block.unwrap();
    assert_pattern(&block, 8);
    assert_eq!(rig.read(&file, 0, block).unwrap_err().error, IoError::EngineStopped);
}

fn a_file_dropped_by_everyone_is_closed(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    let path = rig.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut reader = std::fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(&path).unwrap();
    let file = rig.engine.open(&path).unwrap();
    // The engine has used the file, whether positioned writes to a pipe work with this backend or not.
    match rig.write(&file, 0, rig.patterned(4096, 1)) {
        Ok(_) => assert_eq!(reader.read(&mut [0; 8192]).unwrap(), 4096),
        Err(failed) => assert_eq!(failed.error.errno(), Some(libc::ESPIPE)),
    }
    let writer_is_gone = |mut reader: &std::fs::File| matches!(reader.read(&mut [0; 8]), Ok(0));
    assert!(!writer_is_gone(&reader));
    drop(file);
    eventually("nobody holds the pipe open for writing", || writer_is_gone(&reader));
}

fn statistics_count_what_moved(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    let before = rig.engine.stats();
    let block = rig.engine.write(&file, 0, rig.patterned(MIB, 1), Priority::Urgent).wait().unwrap();
    let failed = rig.engine.read(&file, 512 * KIB as u64, block, Priority::Urgent).wait().unwrap_err();
    let stats = rig.engine.stats();
    assert_eq!((before.bytes_written, before.write_ops), (0, 0));
    assert_eq!((stats.bytes_written, stats.write_ops), (MIB as u64, 1));
    assert_eq!((stats.bytes_read, stats.read_ops), (512 * KIB as u64, 1));
    assert!(stats.write_busy > before.write_busy && stats.read_busy > before.read_busy);
    assert!(stats.busy >= stats.write_busy && stats.busy <= stats.write_busy + stats.read_busy);
    assert!(stats.waited > before.waited);
    drop(failed);
    assert_eq!(rig.engine.stats().busy, stats.busy, "idle time is not busy time");
    assert_eq!(stats.leaked_blocks, 0);
}
