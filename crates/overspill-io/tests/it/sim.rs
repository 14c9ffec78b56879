//! What only a simulated kernel does whenever it is asked to: one fault at a time, on every transfer.

use std::time::Duration;

use overspill_io::{
    BackendChoice, BackendKind, BlockClass, Direction, EngineConfig, Failed, IoError, Priority, SimConfig,
};

use crate::rig::{KIB, MIB, Rig, assert_pattern, fill, finish};

const ALWAYS: u16 = 1000;

/// A rig whose chunks are smaller than its two blocks of 1 MiB.
fn rig(sim: SimConfig, drain_patience: Duration) -> Rig {
    let backend = BackendChoice::Sim(sim);
    let config = EngineConfig { backend, chunk_bytes: 64 * KIB, drain_patience, ..EngineConfig::default() };
    Rig::with(config, &[BlockClass { name: "test", block_bytes: MIB, count: 2 }])
}

fn weather(sim: SimConfig) -> Rig {
    rig(sim, Duration::from_secs(60))
}

#[test]
fn the_simulated_kernel_is_proven_before_its_faults_begin() {
    let sim = SimConfig { write_error_per_mille: ALWAYS, read_error_per_mille: ALWAYS, ..SimConfig::calm(1) };
    let rig = weather(sim);
    let report = rig.engine.report();
    assert_eq!((report.backend, report.degraded), (BackendKind::Sim, None));
    assert_eq!(
        (report.backend.to_string(), BackendChoice::Sim(sim).to_string()),
        ("sim".into(), "sim".into())
    );
    assert!("sim".parse::<BackendChoice>().is_err(), "nobody gets it by name");
}

#[test]
fn a_failing_disk_gives_eio_and_the_blocks_come_home() {
    let sim = SimConfig { write_error_per_mille: ALWAYS, read_error_per_mille: ALWAYS, ..SimConfig::calm(2) };
    let rig = weather(sim);
    let file = rig.create("file");
    let (path, length, errno) = (file.path().to_path_buf(), MIB, libc::EIO);
    let Failed { error, block } = rig.write(&file, 0, rig.patterned(MIB, 1)).unwrap_err();
    let direction = Direction::Write;
    let expected = IoError::Transfer { direction, path: path.clone(), offset: 0, length, done: 0, errno };
    assert_eq!(error, expected);
    assert_pattern(block.as_ref().unwrap(), 1);
    assert!(file.is_empty().unwrap());
    let Failed { error, block } = rig.read(&file, 4096, block.unwrap()).unwrap_err();
    let direction = Direction::Read;
    assert_eq!(error, IoError::Transfer { direction, path, offset: 4096, length, done: 0, errno });
    assert_eq!(block.unwrap().len(), MIB);
    let ticket = rig.engine.write_behind(&file, 0, rig.patterned(MIB, 2), Priority::Urgent);
    assert_pattern(&ticket.wait().unwrap_err().block.unwrap(), 2);
    rig.all_blocks_are_home();
}

#[test]
fn short_and_interrupted_transfers_add_up_to_every_byte() {
    for seed in 0..8 {
        let sim = SimConfig {
            short_per_mille: 700,
            interrupted_per_mille: 400,
            again_per_mille: 400,
            ..SimConfig::calm(seed)
        };
        let rig = weather(sim);
        let file = rig.create("file");
        let mut block = rig.write(&file, 0, rig.patterned(MIB, seed)).unwrap();
        block.fill(0);
        assert_pattern(&rig.read(&file, 0, block).unwrap(), seed);
        assert_pattern(&std::fs::read(file.path()).unwrap(), seed);
        let stats = rig.engine.stats();
        assert_eq!((stats.bytes_written, stats.bytes_read), (MIB as u64, MIB as u64));
    }
}

#[test]
fn a_transfer_that_is_put_off_for_ever_is_an_error() {
    for sim in [
        SimConfig { again_per_mille: ALWAYS, ..SimConfig::calm(3) },
        SimConfig { interrupted_per_mille: ALWAYS, ..SimConfig::calm(3) },
    ] {
        let rig = weather(sim);
        let Failed { error, block } = rig.write(&rig.create("file"), 0, rig.patterned(MIB, 3)).unwrap_err();
        assert!(matches!(error, IoError::Transfer { errno: libc::EAGAIN, done: 0, .. }), "{error}");
        assert_pattern(&block.unwrap(), 3);
    }
}

#[test]
fn a_torn_write_is_an_error_and_its_data_is_whole() {
    let rig = weather(SimConfig { torn_per_mille: ALWAYS, ..SimConfig::calm(4) });
    let path = rig.path("file");
    std::fs::write(&path, vec![0; 2 * MIB]).unwrap();
    let file = rig.engine.open(&path).unwrap();
    let Failed { error, block } = rig.write(&file, 0, rig.patterned(MIB, 4)).unwrap_err();
    assert!(matches!(error, IoError::Transfer { errno: libc::EIO, done: 0, .. }), "{error}");
    let block = block.unwrap();
    assert_pattern(&block, 4);
    let bytes = std::fs::read(&path).unwrap();
    let sectors = bytes.chunks(512).zip(block.chunks(512));
    let landed = sectors.clone().filter(|(found, written)| found == written).count();
    assert!(sectors.clone().all(|(found, written)| found == written || found.iter().all(|&byte| byte == 0)));
    assert!((256..2048).contains(&landed), "{landed} of 2048 sectors were written");
    assert!(bytes[MIB..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_disk_that_fills_up_in_the_middle_says_how_much_it_took() {
    const ROOM: usize = 300 * KIB;
    let rig = weather(SimConfig { no_space_from: ROOM as u64, ..SimConfig::calm(5) });
    let file = rig.create("file");
    let Failed { error, block } = rig.write(&file, 0, rig.patterned(MIB, 5)).unwrap_err();
    let (direction, path, errno) = (Direction::Write, file.path().to_path_buf(), libc::ENOSPC);
    assert_eq!(error, IoError::Transfer { direction, path, offset: 0, length: MIB, done: ROOM, errno });
    let block = block.unwrap();
    assert_pattern(&block, 5);
    let mut begun = vec![0; MIB];
    fill(&mut begun, 5);
    assert!(std::fs::read(file.path()).unwrap() == begun[..ROOM]);
}

#[test]
fn a_write_that_moves_nothing_for_no_reason_is_an_error() {
    let rig = weather(SimConfig { write_zero_per_mille: ALWAYS, ..SimConfig::calm(6) });
    let Failed { error, block } = rig.write(&rig.create("file"), 0, rig.patterned(MIB, 6)).unwrap_err();
    assert!(matches!(error, IoError::WriteZero { done: 0, length: MIB, .. }), "{error}");
    assert_pattern(&block.unwrap(), 6);
}

#[test]
fn what_is_stuck_is_given_up_after_the_drain_patience_and_counted() {
    let patience = Duration::from_millis(50);
    let rig = rig(SimConfig { stuck_per_mille: ALWAYS, ..SimConfig::calm(7) }, patience);
    let file = rig.create("file");
    let written = rig.engine.write(&file, 0, rig.patterned(MIB, 7), Priority::Urgent);
    drop(rig.engine.read(&file, 0, rig.pool.lease(4096).unwrap(), Priority::Urgent));
    let ended = rig.engine.shutdown().unwrap_err();
    assert_eq!(ended, IoError::DrainTimeout { patience, leaked_blocks: 2 });
    let Failed { error, block } = finish(written).unwrap_err();
    assert_eq!(error, IoError::EngineStopped);
    assert!(block.is_none());
    assert_eq!((rig.engine.stats().leaked_blocks, rig.pool.leased_blocks()), (2, 2));
    // The pool is empty for good, and says so at once.
    assert!(rig.pool.try_lease(4096).is_err());
}
