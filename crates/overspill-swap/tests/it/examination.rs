//! What is found when every byte of a store is read, and what is restored then.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use overspill_io::{BackendChoice, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{
    Blocks, Damage, Durability, Examination, Generation, Scope, Store, StoreError, Survey, Volume, Worth,
};
use serde_json::json;

use crate::closed::{Closed, first, flip, overwrite};
use crate::rig::{BLOCK, Rig};

#[test]
fn a_flipped_bit_is_named_with_its_file_its_place_and_its_generations() {
    let closed = Closed::new();
    for block_bytes in [4096, 3 * 4096, BLOCK] {
        let findings = closed.findings(Scope::Everything, block_bytes);
        assert!(findings.damaged.is_empty(), "{:?}", findings.damaged);
        assert!(findings.verdicts.iter().all(|verdict| verdict.is_whole()));
        assert_eq!(findings.extents, 4, "`b` is read once for three generations");
        assert_eq!(findings.bytes, 4 * BLOCK as u64);
    }
    let (a, b) = (closed.offset(&Generation::Committed, "a"), closed.offset(&first(), "b"));
    let data = closed.path.join("data");
    flip(&data, a + 17);
    flip(&data, b + BLOCK as u64 - 1);
    for block_bytes in [4096, BLOCK] {
        let findings = closed.findings(Scope::Everything, block_bytes);
        let mut named = BTreeSet::new();
        for damaged in &findings.damaged {
            assert_eq!((&damaged.path, damaged.length), (&data, BLOCK as u64));
            let Damage::Checksum { expected, found } = damaged.damage else { panic!("{damaged}") };
            assert_ne!(expected, found);
            named.insert((damaged.tensor.as_str(), damaged.offset, damaged.generations.clone()));
        }
        let everywhere = vec![Generation::Committed, Generation::Previous, first()];
        assert_eq!(named, BTreeSet::from([("a", a, vec![Generation::Committed]), ("b", b, everywhere)]));
        let counts: Vec<_> = findings.verdicts.iter().map(|verdict| verdict.damaged).collect();
        assert_eq!(counts, [2, 1, 1]);
        assert!(findings.restorable().is_none());
    }
    flip(&data, b + BLOCK as u64 - 1);
    let findings = closed.findings(Scope::Everything, BLOCK);
    assert_eq!(findings.restorable(), Some(&Generation::Previous));
    assert_eq!(closed.findings(Scope::Only(&Generation::Previous), BLOCK).extents, 2);
}

#[test]
fn what_was_overwritten_since_is_missing_from_the_previous_generation_only() {
    let closed = Closed::new();
    let store = closed.open().unwrap();
    let mut block = closed.pool.lease(BLOCK).unwrap();
    block.fill(77);
    drop(store.adopt("a", BLOCK).unwrap().overwrite(block).unwrap().store().wait().unwrap());
    drop(store);
    let findings = closed.findings(Scope::Everything, BLOCK);
    let damaged: Vec<_> = findings.verdicts.iter().map(|verdict| verdict.damaged).collect();
    assert_eq!(damaged, [0, 1, 0], "its extent was free");
    assert!(findings.is_whole(&Generation::Committed) && findings.is_whole(&first()));
    assert!(!findings.is_whole(&Generation::Previous));
}

#[test]
fn a_file_that_was_cut_short_has_the_tensors_that_it_had_before_the_cut() {
    let closed = Closed::new();
    let a = closed.offset(&Generation::Committed, "a");
    let data = File::options().write(true).open(closed.path.join("data")).unwrap();
    data.set_len(a + 4096).unwrap();
    let findings = closed.findings(Scope::Only(&Generation::Committed), BLOCK);
    let [verdict] = &findings.verdicts[..] else { panic!("{:?}", findings.verdicts) };
    assert!(verdict.flaw.as_ref().unwrap().contains("cut short"), "{verdict:?}");
    assert!(
        findings
            .damaged
            .iter()
            .any(|damaged| damaged.tensor == "a" && matches!(damaged.damage, Damage::Unreadable(_)))
    );
}

#[test]
fn a_damaged_manifest_leaves_the_other_generations_to_be_found_whole_and_restored() {
    let closed = Closed::new();
    flip(&closed.path.join("manifest"), 70);
    let findings = closed.findings(Scope::Everything, BLOCK);
    assert!(findings.verdicts[0].flaw.is_some() && !findings.is_whole(&Generation::Committed));
    assert_eq!(findings.restorable(), Some(&Generation::Previous));
    let examination = Examination::begin(&closed.volumes()).unwrap();
    let missing = examination.restore(&Generation::Snapshot("none".to_owned())).unwrap_err();
    assert!(matches!(missing, StoreError::NoSnapshot { .. }), "{missing}");
    let held = closed.open().unwrap_err();
    assert!(matches!(held, StoreError::Locked { .. }), "{held}");
    examination.restore(&first()).unwrap();
    drop(examination);
    assert_eq!(closed.open().unwrap().meta(), json!({ "step": 1 }));
}

#[test]
fn nobody_gets_the_lock_between_what_is_restored_and_what_is_opened() {
    let closed = Closed::new();
    let manifest = closed.path.join("manifest");
    for _ in 0..20 {
        let examination = Examination::begin(&closed.volumes()).unwrap();
        let lock = File::open(closed.path.join("lock")).unwrap();
        let (tried, over) = (Barrier::new(2), AtomicBool::new(false));
        let (had, opened) = thread::scope(|scope| {
            let contender = scope.spawn(|| {
                let mut had = lock.try_lock().is_ok();
                tried.wait();
                while !over.load(Ordering::Relaxed) {
                    had |= lock.try_lock().is_ok();
                }
                had
            });
            tried.wait();
            let opened = examination.restore_and_open(&first(), Durability::Step);
            over.store(true, Ordering::Relaxed);
            (contender.join().unwrap(), opened)
        });
        assert_eq!(opened.unwrap().meta(), json!({ "step": 1 }));
        assert!(!had);
    }
    let examination = Examination::begin(&closed.volumes()).unwrap();
    let before = std::fs::read(&manifest).unwrap();
    let none = Generation::Snapshot("none".to_owned());
    let missing = examination.restore_and_open(&none, Durability::Step).unwrap_err();
    assert!(matches!(missing, StoreError::NoSnapshot { .. }), "{missing}");
    assert_eq!(std::fs::read(&manifest).unwrap(), before);
    drop(closed.open().unwrap());
}

#[test]
fn reading_ends_when_it_is_told_to() {
    let closed = Closed::new();
    let examination = Examination::begin(&closed.volumes()).unwrap();
    let blocks = Blocks { pool: &closed.pool, block_bytes: 4096, count: 2 };
    let mut calls = 0;
    let found = examination.verify(Scope::Everything, blocks, |_, _| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(found.unwrap().is_none() && calls == 3);
}

#[test]
fn what_was_written_stays_counted_when_a_snapshot_is_restored() {
    let closed = Closed::new();
    let written = closed.open().unwrap().bytes_written();
    Store::restore(&closed.path, "first").unwrap();
    let store = closed.open().unwrap();
    assert_eq!((store.meta(), store.bytes_written()), (json!({ "step": 1 }), written));
}

#[test]
fn a_tensor_without_bytes_is_verified_like_the_others() {
    let closed = Closed::new();
    let file = closed.path.join("manifest");
    let mut manifest = Store::committed(&closed.path).unwrap();
    manifest.tensors.iter_mut().find(|record| record.name == "a").unwrap().length = 0;
    std::fs::write(&file, manifest.encode()).unwrap();
    let findings = closed.findings(Scope::Only(&Generation::Committed), 4096);
    let [damaged] = &findings.damaged[..] else { panic!("{:?}", findings.damaged) };
    assert!(matches!(damaged.damage, Damage::Checksum { .. }) && damaged.tensor == "a");
    assert_eq!((findings.extents, findings.bytes), (2, BLOCK as u64));
}

#[test]
fn what_could_not_be_read_again_is_not_committed() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    let mut deep = json!(2);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    let a = overwrite(&rig, a, 2);
    assert!(matches!(rig.store.commit(deep), Err(StoreError::MetaDepth { levels_max: 64, .. })));
    assert_eq!((rig.store.generation(), rig.store.meta()), (1, json!(1)));
    rig.store.commit(json!({ "step": [2] })).unwrap();
    assert_eq!(Store::committed(rig.store.path()).unwrap().meta, json!({ "step": [2] }));
    drop(a);
}

#[test]
fn the_volumes_of_a_store_are_found_from_its_home_and_read_together() {
    const MIB: usize = 1 << 20;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 3 * MIB, count: 4 }]).unwrap();
    let volume = |name: &str| {
        let directory = folder.path().join(name);
        let engine = || Engine::start(EngineConfig::default(), &pool).unwrap();
        Volume { directory, engines: vec![engine(), engine()], weight: 1 }
    };
    let volumes = [volume("one"), volume("two")];
    let store = Store::create_over(&volumes, Durability::Step, 8 * MIB as u64).unwrap();
    let mut block = pool.lease(3 * MIB).unwrap();
    block.fill(5);
    let vacant = store.reserve("a", 3 * MIB, Worth::State).unwrap();
    drop(vacant.fill(block).unwrap().store().wait().unwrap());
    store.commit(json!({ "step": 1 })).unwrap();
    store.keep();
    drop(store);

    let survey = Survey::of(&[folder.path().join("one")]).unwrap();
    assert_eq!(survey.directories, [folder.path().join("one"), folder.path().join("two")]);
    assert_eq!(survey.files.len(), 4);
    assert!(survey.generations.iter().all(|state| state.is_whole()));
    let found = || {
        let examination = Examination::begin(&volumes).unwrap();
        let blocks = Blocks { pool: &pool, block_bytes: MIB, count: 4 };
        examination.verify(Scope::Everything, blocks, |_, _| ControlFlow::Continue(())).unwrap().unwrap()
    };
    assert!(found().damaged.is_empty());
    flip(&folder.path().join("two/data"), 100);
    let findings = found();
    assert_eq!(findings.damaged.len(), 1, "{:?}", findings.damaged);
    assert_eq!(findings.damaged[0].tensor, "a");
    let alone = Examination::begin(&volumes[..1]).unwrap_err();
    assert!(matches!(alone, StoreError::Volumes { found: 2, .. }), "{alone}");
}

#[test]
fn of_much_damage_three_are_named() {
    let what = Generation::Previous.to_string();
    let damaged: Vec<String> = (0..8).map(|number| format!("tensor {number}")).collect();
    let few = StoreError::NotWhole { path: "x".into(), what: what.clone(), damaged: damaged[..3].to_vec() };
    let many = StoreError::NotWhole { path: "x".into(), what, damaged };
    assert!(few.to_string().contains(": tensor 0; tensor 1; tensor 2; `overspill verify x`"), "{few}");
    assert!(many.to_string().contains("tensor 2; and 5 more; `overspill verify x`"), "{many}");
}
