//! What is peculiar to Linux AIO: it stands in where io_uring is forbidden, and leaves files that go through the page
//! cache to workers.

use std::path::Path;
use std::time::Duration;

use overspill_io::{
    BackendChoice, BackendKind, BlockClass, Direction, Engine, EngineConfig, Failed, IoError, Priority,
};

use crate::alone::alone;
use crate::rig::{KIB, MIB, Rig, assert_pattern, finish};
use crate::seccomp::forbid;

#[test]
fn where_io_uring_is_forbidden_linux_aio_is_used() {
    alone("aio::where_io_uring_is_forbidden_linux_aio_is_used_here");
}

#[test]
fn where_linux_aio_is_forbidden_too_threads_are_used_and_both_reasons_told() {
    alone("aio::where_linux_aio_is_forbidden_too_threads_are_used_and_both_reasons_told_here");
}

#[test]
fn a_machine_out_of_asynchronous_requests_is_told_which_limit_to_raise() {
    alone("aio::a_machine_out_of_asynchronous_requests_is_told_which_limit_to_raise_here");
}

#[test]
fn a_context_that_forbids_transfers_is_not_used() {
    alone("aio::a_context_that_forbids_transfers_is_not_used_here");
}

#[test]
fn workers_are_hired_for_files_that_go_through_the_page_cache_only() {
    alone("aio::workers_are_hired_for_files_that_go_through_the_page_cache_only_here");
}

#[test]
fn without_workers_the_page_cache_is_out_of_reach_and_direct_files_go_on() {
    alone("aio::without_workers_the_page_cache_is_out_of_reach_and_direct_files_go_on_here");
}

#[test]
fn what_is_with_the_kernel_when_patience_ends_stays_leased() {
    let patience = Duration::ZERO;
    let config = EngineConfig {
        backend: BackendChoice::Aio,
        chunk_bytes: 64 * KIB,
        drain_patience: patience,
        ..EngineConfig::default()
    };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: MIB, count: 8 }]);
    let file = rig.create("file");
    file.allocate(8 * MIB as u64).unwrap();
    let write = |seed| rig.engine.write(&file, seed * MIB as u64, rig.patterned(MIB, seed), Priority::Urgent);
    let tickets: Vec<_> = (0..8).map(write).collect();
    let ended = rig.engine.shutdown();
    let lost = tickets.into_iter().map(finish).filter(|answer| match answer {
        Ok(_) => false,
        Err(Failed { error, block }) => {
            assert_eq!(*error, IoError::EngineStopped);
            block.is_none()
        }
    });
    let lost = lost.count();
    assert_eq!(rig.pool.leased_blocks(), lost, "the kernel may still read from them");
    // How many of them there are depends on the disk; a fast one may have finished them all.
    match ended {
        Ok(()) => assert_eq!(lost, 0),
        Err(error) => assert_eq!(error, IoError::DrainTimeout { patience, leaked_blocks: lost }),
    }
}

/// Starts an engine as a user does who chooses nothing, and moves bytes with it.
fn automatic() -> (BackendKind, Option<String>) {
    let rig = Rig::blocks(BackendChoice::Auto, MIB, 1);
    let file = rig.create("file");
    let mut block = rig.write(&file, 0, rig.patterned(MIB, 1)).unwrap();
    block.fill(0);
    assert_pattern(&rig.read(&file, 0, block).unwrap(), 1);
    let report = rig.engine.report();
    assert_eq!(report.notes, Vec::<String>::new(), "about a backend that is not in use");
    (report.backend, report.degraded)
}

#[test]
#[ignore = "forbids system calls; run by where_io_uring_is_forbidden_linux_aio_is_used"]
fn where_io_uring_is_forbidden_linux_aio_is_used_here() {
    forbid(&[(libc::SYS_io_uring_setup, libc::EPERM)]);
    let because = "io_uring is not available: cannot start: Operation not permitted (os error 1)";
    assert_eq!(automatic(), (BackendKind::Aio, Some(because.to_owned())));
}

#[test]
#[ignore = "forbids system calls; run by where_linux_aio_is_forbidden_too_threads_are_used_and_both_reasons_told"]
fn where_linux_aio_is_forbidden_too_threads_are_used_and_both_reasons_told_here() {
    forbid(&[(libc::SYS_io_uring_setup, libc::EPERM), (libc::SYS_io_setup, libc::ENOSYS)]);
    let because = "io_uring is not available: cannot start: Operation not permitted (os error 1); \
                   Linux AIO is not available: cannot start: Function not implemented (os error 38)";
    assert_eq!(automatic(), (BackendKind::Threads, Some(because.to_owned())));
}

#[test]
#[ignore = "forbids system calls; run by a_machine_out_of_asynchronous_requests_is_told_which_limit_to_raise"]
fn a_machine_out_of_asynchronous_requests_is_told_which_limit_to_raise_here() {
    // The kernel's answer when all processes together would have more requests than the limit.
    forbid(&[(libc::SYS_io_setup, libc::EAGAIN)]);
    let rig = Rig::blocks(BackendChoice::Threads, 4096, 1);
    let asked = EngineConfig { backend: BackendChoice::Aio, ..EngineConfig::default() };
    let refusal = Engine::start(asked, &rig.pool).unwrap_err();
    assert_eq!(refusal.errno(), Some(libc::EAGAIN));
    assert!(refusal.to_string().contains("`sysctl fs.aio-max-nr`, must be raised"), "{refusal}");
}

#[test]
#[ignore = "forbids system calls; run by a_context_that_forbids_transfers_is_not_used"]
fn a_context_that_forbids_transfers_is_not_used_here() {
    forbid(&[(libc::SYS_io_uring_setup, libc::EPERM), (libc::SYS_io_submit, libc::EPERM)]);
    let (backend, degraded) = automatic();
    let (_, aio) = degraded.as_deref().unwrap().split_once("; ").unwrap();
    let because =
        "Linux AIO is not available: cannot move the first bytes: Operation not permitted (os error 1)";
    assert_eq!((backend, aio), (BackendKind::Threads, because));
}

/// The engine's threads beside its driver.
fn workers() -> usize {
    let name = |task: &Path| std::fs::read_to_string(task.join("comm")).unwrap_or_default();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter(|task| name(&task.as_ref().unwrap().path()).starts_with("overspill-io-")).count()
}

#[test]
#[ignore = "counts threads; run by workers_are_hired_for_files_that_go_through_the_page_cache_only"]
fn workers_are_hired_for_files_that_go_through_the_page_cache_only_here() {
    let rig = Rig::blocks(BackendChoice::Aio, 64 * KIB, 4);
    let file = rig.create("file");
    assert!(file.direct(), "the folder of the build takes direct I/O: {:?}", file.note());
    drop(rig.write(&file, 0, rig.patterned(64 * KIB, 1)).unwrap());
    assert_eq!(workers(), 0, "the kernel moves direct files without help");
    // Not a file on a disk, so as good as one that goes through the page cache.
    let zeros = rig.engine.open("/dev/zero".as_ref()).unwrap();
    for round in 0..50 {
        let direct = rig.engine.read(&file, 0, rig.pool.lease(64 * KIB).unwrap(), Priority::Urgent);
        let buffered = rig.engine.read(&zeros, 0, rig.patterned(64 * KIB, 2 + round), Priority::Urgent);
        assert_pattern(&finish(direct).unwrap(), 1);
        assert!(finish(buffered).unwrap().iter().all(|&byte| byte == 0));
    }
    assert_eq!(workers(), EngineConfig::default().threads);
    rig.all_blocks_are_home();
}

#[test]
#[ignore = "forbids system calls; run by without_workers_the_page_cache_is_out_of_reach_and_direct_files_go_on"]
fn without_workers_the_page_cache_is_out_of_reach_and_direct_files_go_on_here() {
    let rig = Rig::blocks(BackendChoice::Aio, 64 * KIB, 1);
    let file = rig.create("file");
    assert!(file.direct(), "the folder of the build takes direct I/O: {:?}", file.note());
    let zeros = rig.engine.open("/dev/zero".as_ref()).unwrap();
    // The answer of a machine that has as many threads as it may.
    forbid(&[(libc::SYS_clone3, libc::EAGAIN), (libc::SYS_clone, libc::EAGAIN)]);
    let Failed { error, block } = rig.write(&zeros, 0, rig.patterned(64 * KIB, 1)).unwrap_err();
    let (direction, path) = (Direction::Write, "/dev/zero".into());
    let (length, errno) = (64 * KIB, libc::EAGAIN);
    assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length, done: 0, errno });
    let block = block.unwrap();
    assert_pattern(&block, 1);
    let mut block = rig.write(&file, 0, block).unwrap();
    block.fill(0);
    assert_pattern(&rig.read(&file, 0, block).unwrap(), 1);
}
