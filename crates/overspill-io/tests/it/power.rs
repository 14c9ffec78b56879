//! What a loss of power leaves of a simulated device, and what it never takes.

use std::collections::BTreeSet;

use overspill_io::{BackendChoice, BlockClass, EngineConfig, File, Power, SimConfig};

use crate::rig::{KIB, Rig};

const BYTES: usize = 16 * KIB;
/// No sector is smaller, wherever the tests run.
const SECTOR: usize = 512;

fn rig(seed: u64, cache_bytes: usize) -> (Rig, Power) {
    let backend = BackendChoice::Sim(SimConfig { cache_bytes, ..SimConfig::calm(seed) });
    let config = EngineConfig { backend, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: BYTES, count: 1 }]);
    let power = rig.engine.power().unwrap();
    (rig, power)
}

fn write(rig: &Rig, file: &File, byte: u8) {
    let mut block = rig.pool.lease(BYTES).unwrap();
    block.fill(byte);
    drop(rig.write(file, 0, block).unwrap());
}

/// The byte that each sector is full of; nothing for one that the file does not reach.
fn sectors(rig: &Rig, name: &str) -> Vec<Option<u8>> {
    let bytes = std::fs::read(rig.path(name)).unwrap();
    let of = |sector: usize| {
        let sector = bytes.get(sector * SECTOR..(sector + 1) * SECTOR)?;
        assert!(sector.iter().all(|&byte| byte == sector[0]), "a sector is written as a whole or not at all");
        Some(sector[0])
    };
    (0..BYTES / SECTOR).map(of).collect()
}

#[test]
fn after_a_loss_of_power_a_sector_is_one_that_was_there_since_the_last_flush() {
    let (mut seen, mut mixed) = (BTreeSet::new(), 0);
    for seed in 0..64 {
        let (rig, power) = rig(seed, 1 << 20);
        let (file, flushed) = (rig.create("file"), rig.create("flushed"));
        for byte in 1..=4 {
            write(&rig, &file, byte);
            write(&rig, &flushed, byte);
            if byte == 2 {
                file.sync().unwrap();
            }
        }
        flushed.sync().unwrap();
        power.cut();
        assert_eq!(sectors(&rig, "flushed"), [Some(4); BYTES / SECTOR], "seed {seed}");
        let found = sectors(&rig, "file");
        assert!(found.iter().all(|byte| (Some(2)..=Some(4)).contains(byte)), "seed {seed}: {found:?}");
        mixed += usize::from(found.windows(2).any(|pair| pair[0] != pair[1]));
        seen.extend(found);
    }
    assert_eq!(seen, BTreeSet::from([Some(2), Some(3), Some(4)]));
    assert!(mixed > 30, "{mixed} of 64 were torn");
}

#[test]
fn growth_that_was_not_flushed_may_be_lost() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..32 {
        let (rig, power) = rig(seed, 1 << 20);
        let file = rig.create("file");
        file.allocate(BYTES as u64).unwrap();
        file.sync().unwrap();
        file.allocate(2 * BYTES as u64).unwrap();
        power.cut();
        match std::fs::metadata(rig.path("file")).unwrap().len() as usize {
            BYTES => lost += 1,
            length => kept += usize::from(length == 2 * BYTES),
        }
    }
    assert!(lost > 5 && kept > 5 && lost + kept == 32, "{lost} lost, {kept} kept");
}

#[test]
fn without_power_everything_fails_from_the_chosen_event_on() {
    let (rig, power) = rig(3, 1 << 20);
    let file = rig.create("file");
    write(&rig, &file, 1);
    file.sync().unwrap();
    let events = power.events();
    power.cut_after(1);
    write(&rig, &file, 2);
    assert!(!power.is_out());
    let mut block = rig.pool.lease(BYTES).unwrap();
    block.fill(3);
    let failed = rig.write(&file, 0, block).unwrap_err();
    assert_eq!((failed.error.errno(), power.is_out()), (Some(libc::EIO), true));
    let block = failed.block.unwrap();
    assert!(block.iter().all(|&byte| byte == 3), "the only copy comes home");
    assert_eq!(power.events(), events + 2);
    assert_eq!(rig.read(&file, 0, block).unwrap_err().error.errno(), Some(libc::EIO));
    for refused in [
        file.sync(),
        file.allocate(1 << 20),
        file.len().map(drop),
        rig.engine.open(&rig.path("file")).map(drop),
        rig.engine.create(&rig.path("other")).map(drop),
    ] {
        assert_eq!(refused.unwrap_err().errno(), Some(libc::EIO));
    }
    let found = sectors(&rig, "file");
    assert!(found.iter().all(|byte| (Some(1)..=Some(3)).contains(byte)), "{found:?}");
}

#[test]
fn what_the_cache_cannot_hold_was_written_by_the_device_itself() {
    for seed in 0..16 {
        // Room for the old and the new contents of a quarter of the file.
        let (rig, power) = rig(seed, BYTES / 2);
        let file = rig.create("file");
        write(&rig, &file, 1);
        file.sync().unwrap();
        write(&rig, &file, 2);
        power.cut();
        let written = BYTES / SECTOR / 4 * 3;
        assert!(sectors(&rig, "file")[..written].iter().all(|&byte| byte == Some(2)), "seed {seed}");
    }
}

#[test]
fn others_who_share_the_power_lose_it_once_and_at_the_same_event() {
    let (rig, power) = rig(5, 1 << 20);
    let (told, heard) = std::sync::mpsc::channel();
    power.share(move |seed| told.send(seed).unwrap());
    assert!(power.event());
    power.cut_after(0);
    assert!(!power.event() && power.is_out());
    power.cut();
    assert!(rig.engine.create(&rig.path("file")).is_err());
    assert_eq!(heard.into_iter().collect::<Vec<u64>>(), [5]);
}
