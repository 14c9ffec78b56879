//! What only io_uring makes possible to see: requests that stay with the kernel for as long as the test wants.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use overspill_io::{
    BackendChoice, BackendKind, BlockClass, Engine, EngineConfig, Failed, File, IoError, Pool, Priority,
};

use crate::rig::{Rig, assert_pattern, finish};

/// Opens a new pipe by path; a read from it stays with the kernel until somebody writes.
fn pipe(engine: &Engine, path: &Path) -> (File, std::fs::File) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let file = engine.open(path).unwrap();
    (file, std::fs::OpenOptions::new().write(true).open(path).unwrap())
}

#[test]
fn a_dropped_ticket_keeps_the_block_until_the_completion() {
    let rig = Rig::blocks(BackendChoice::Uring, 8192, 2);
    let (file, mut writer) = pipe(&rig.engine, &rig.path("pipe"));
    drop(rig.engine.read(&file, 0, rig.pool.lease(8192).unwrap(), Priority::Urgent));
    // Another operation passes through, so the first one has reached the kernel.
    let passed = rig.engine.write(&rig.create("file"), 0, rig.patterned(8192, 1), Priority::Background);
    drop(finish(passed).unwrap());
    assert_eq!(rig.pool.leased_blocks(), 1, "the kernel still has the block");
    writer.write_all(&[1; 8192]).unwrap();
    rig.all_blocks_are_home();
}

#[test]
fn short_answers_go_on_until_every_byte_is_there() {
    let config = EngineConfig { backend: BackendChoice::Uring, chunk_bytes: 4096, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: 8192, count: 1 }]);
    let (file, mut writer) = pipe(&rig.engine, &rig.path("pipe"));
    let ticket = rig.engine.read(&file, 0, rig.patterned(8192, 2), Priority::Urgent);
    for bytes in [100, 4000, 4091] {
        writer.write_all(&vec![7; bytes]).unwrap();
        assert!(!ticket.is_done(), "one byte is missing, at least");
    }
    writer.write_all(&[7]).unwrap();
    assert!(finish(ticket).unwrap().iter().all(|&byte| byte == 7));
}

#[test]
fn a_read_that_never_ends_is_given_up_with_its_block() {
    let patience = Duration::from_millis(50);
    let config =
        EngineConfig { backend: BackendChoice::Uring, drain_patience: patience, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: 4096, count: 2 }]);
    let (file, mut writer) = pipe(&rig.engine, &rig.path("pipe"));
    let stuck = rig.engine.read(&file, 0, rig.pool.lease(4096).unwrap(), Priority::Urgent);
    let written = rig.engine.write(&rig.create("file"), 0, rig.patterned(4096, 3), Priority::Background);
    let ended = rig.engine.shutdown().unwrap_err();
    assert_eq!(ended, IoError::DrainTimeout { patience, leaked_blocks: 1 });
    assert_pattern(&finish(written).unwrap(), 3);
    let Failed { error, block } = finish(stuck).unwrap_err();
    assert_eq!(error, IoError::EngineStopped);
    assert!(block.is_none());
    assert_eq!(rig.engine.stats().leaked_blocks, 1);
    assert_eq!(rig.pool.leased_blocks(), 1, "what the kernel may touch is leased to nobody else");
    writer.write_all(&[1; 4096]).unwrap();
}

#[test]
fn auto_takes_io_uring_where_it_works() {
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 4096, count: 1 }]).unwrap();
    let auto = Engine::start(EngineConfig::default(), &pool).unwrap().report();
    assert_eq!(auto.backend, BackendKind::Uring);
    assert_eq!(auto.degraded, None);
    for (backend, kind) in
        [(BackendChoice::Aio, BackendKind::Aio), (BackendChoice::Threads, BackendKind::Threads)]
    {
        let asked = EngineConfig { backend, ..EngineConfig::default() };
        let report = Engine::start(asked, &pool).unwrap().report();
        assert_eq!(report.backend, kind);
        assert_eq!((report.degraded, report.notes), (None, Vec::new()));
    }
}

#[test]
fn more_files_than_can_be_registered_work() {
    let rig = Rig::blocks(BackendChoice::Uring, 4096, 1);
    let files: Vec<File> = (0..300).map(|number| rig.create(&number.to_string())).collect();
    for (seed, file) in (0..).zip(&files) {
        drop(rig.write(file, 0, rig.patterned(4096, seed)).unwrap());
    }
    for (seed, file) in (0..).zip(&files) {
        assert_pattern(&rig.read(file, 0, rig.pool.lease(4096).unwrap()).unwrap(), seed);
    }
    drop(files);
    rig.all_blocks_are_home();
}
