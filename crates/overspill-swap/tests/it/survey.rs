//! What is seen of a store from outside, whole or damaged, and what is found when every byte of it is read.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use overspill_io::{BackendChoice, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{
    Blocks, Damage, Durability, Examination, Findings, Generation, Owner, Remedy, Removal, Scope, Store,
    StoreError, Survey, Swapped, Volume, Worth, leftovers, remove_leftover,
};
use serde_json::json;
use tempfile::TempDir;

use crate::rig::{BLOCK, Rig};

fn overwrite(rig: &Rig, tensor: Swapped, byte: u8) -> Swapped {
    tensor.overwrite(rig.block(byte)).unwrap().store().wait().unwrap()
}

/// A store that nobody has open. Fields are dropped from top to bottom.
struct Closed {
    path: PathBuf,
    engine: Engine,
    pool: Pool,
    _folder: TempDir,
}

impl Closed {
    /// Tensors `a` and `b`. `a` is 3 in the committed generation, 2 in the previous one, 1 in the snapshot `first`;
    /// `b` is the same in all.
    fn new() -> Self {
        let rig = Rig::new(BackendChoice::Auto, 4, 3);
        let (mut a, b) = (rig.tensor("a", 1), rig.tensor("b", 9));
        rig.store.commit(json!({ "step": 1 })).unwrap();
        rig.store.snapshot("first").unwrap();
        for (step, byte) in [(2, 2), (3, 3)] {
            a = overwrite(&rig, a, byte);
            rig.store.commit(json!({ "step": step })).unwrap();
        }
        drop((a, b));
        rig.store.keep();
        let Rig { store, engine, pool, folder } = rig;
        let path = store.path().to_owned();
        drop(store);
        Self { path, engine, pool, _folder: folder }
    }

    fn survey(&self) -> Survey {
        Survey::of(std::slice::from_ref(&self.path)).unwrap()
    }

    fn open(&self) -> Result<Store, StoreError> {
        Store::open(&self.path, Durability::Step, &self.engine)
    }

    fn volumes(&self) -> [Volume; 1] {
        [Volume { directory: self.path.clone(), engines: vec![self.engine.clone()], weight: 1 }]
    }

    fn findings(&self, scope: Scope<'_>, block_bytes: usize) -> Findings {
        let examination = Examination::begin(&self.volumes()).unwrap();
        let blocks = Blocks { pool: &self.pool, block_bytes, count: 3 };
        examination.verify(scope, blocks, |_, _| ControlFlow::Continue(())).unwrap().unwrap()
    }

    fn offset(&self, generation: &Generation, tensor: &str) -> u64 {
        let survey = self.survey();
        let manifest = survey.generation(generation).unwrap().manifest.as_ref().unwrap();
        manifest.tensors.iter().find(|record| record.name == tensor).unwrap().offset
    }

    fn snapshot_file(&self) -> PathBuf {
        self.path.join("snapshot.first")
    }
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
}

fn first() -> Generation {
    Generation::Snapshot("first".to_owned())
}

#[test]
fn a_store_is_surveyed_whoever_has_it_open() {
    let rig = Rig::new(BackendChoice::Auto, 2, 3);
    let (a, b) = (rig.tensor("a", 1), rig.tensor("b", 2));
    let path = rig.store.path().to_owned();
    let survey = || Survey::of(std::slice::from_ref(&path)).unwrap();
    assert!(survey().generations.is_empty() && survey().committed().is_none());
    rig.store.commit(json!({ "step": 7 })).unwrap();
    rig.store.snapshot("s").unwrap();
    let a = overwrite(&rig, a, 3);
    rig.store.commit(json!({ "step": 8 })).unwrap();

    let seen = survey();
    assert_eq!(seen.owner, Owner::Process { pid: Some(std::process::id()) });
    let steps: Vec<_> = seen
        .generations
        .iter()
        .map(|state| {
            (state.generation.clone(), state.manifest.as_ref().and_then(|m| m.step()), state.is_whole())
        })
        .collect();
    let snapshot = Generation::Snapshot("s".to_owned());
    let expected = [
        (Generation::Committed, Some(8), true),
        (Generation::Previous, Some(7), true),
        (snapshot, Some(7), true),
    ];
    assert_eq!(steps, expected);
    let (usage, free) = (rig.store.usage(), seen.fragmentation);
    assert_eq!(free.capacity_bytes, usage.capacity_bytes);
    assert_eq!(free.free_bytes, usage.capacity_bytes - usage.allocated_bytes);
    assert_eq!((free.free_ranges, free.longest_free_bytes), (usage.free_ranges, usage.longest_free_bytes));
    let manifest = seen.committed().unwrap();
    assert_eq!((manifest.bytes_written, manifest.tensors.len()), (rig.store.bytes_written(), 2));
    assert_eq!(manifest.tensor_bytes(), 2 * BLOCK as u64);
    let [file] = &seen.files[..] else { panic!("{:?}", seen.files) };
    assert_eq!((&file.path, file.length), (&rig.data(), usage.capacity_bytes));
    assert!(seen.bytes_on_disk >= file.allocated_bytes && file.allocated_bytes > 0);

    drop((a, b));
    rig.store.keep();
    drop(rig.store);
    let seen = survey();
    assert_eq!((seen.owner, seen.generations.len()), (Owner::Nobody, 3));
    let elsewhere = Survey::of(&[rig.folder.path().to_owned()]).unwrap_err();
    assert!(matches!(elsewhere, StoreError::NotAStore { .. }), "{elsewhere}");
}

#[test]
fn who_looks_at_a_store_keeps_nobody_from_opening_it() {
    let closed = Closed::new();
    let lock = File::open(closed.path.join("lock")).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // As surveys do it, half of the time.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if lock.try_lock_shared().is_ok() {
                    (0..200).for_each(|_| std::hint::spin_loop());
                    lock.unlock().unwrap();
                }
                (0..200).for_each(|_| std::hint::spin_loop());
            }
        });
        let opened: Vec<_> = (0..50).map(|_| closed.open().map(drop)).collect();
        stop.store(true, Ordering::Relaxed);
        let refused = opened.into_iter().filter_map(Result::err).next();
        assert!(refused.is_none(), "{refused:?}");
    });
}

#[test]
fn damage_is_what_a_survey_reports_and_never_why_it_fails() {
    let closed = Closed::new();
    let flaw = |generation: &Generation| {
        let survey = closed.survey();
        let state = survey.generations.into_iter().find(|state| state.generation == *generation).unwrap();
        state.flaw
    };
    assert!(flaw(&Generation::Committed).is_none());
    let data = File::options().write(true).open(closed.path.join("data")).unwrap();
    let length = data.metadata().unwrap().len();
    // The file has grown for the snapshot, which is of the time before.
    data.set_len(4096).unwrap();
    for generation in [Generation::Committed, Generation::Previous, first()] {
        let survey = closed.survey();
        let capacity = survey.generation(&generation).unwrap().manifest.as_ref().unwrap().capacity_bytes;
        assert_eq!(capacity < length, generation == first());
        let flaw = flaw(&generation);
        assert!(
            matches!(&flaw, Some(StoreError::Truncated { needed, .. }) if *needed == capacity),
            "{generation}: {flaw:?}"
        );
    }
    data.set_len(length).unwrap();
    std::fs::rename(closed.path.join("data"), closed.path.join("away")).unwrap();
    let missing = flaw(&Generation::Committed);
    assert!(matches!(missing, Some(StoreError::Directory { action: "find", .. })), "{missing:?}");
    std::fs::rename(closed.path.join("away"), closed.path.join("data")).unwrap();

    flip(&closed.snapshot_file(), 70);
    assert!(matches!(flaw(&first()), Some(StoreError::Manifest { .. })));
    flip(&closed.path.join("manifest.previous"), 70);
    assert!(matches!(flaw(&Generation::Previous), Some(StoreError::Manifest { .. })));
    flip(&closed.path.join("manifest"), 70);
    assert!(matches!(flaw(&Generation::Committed), Some(StoreError::Manifest { .. })));
    let survey = closed.survey();
    assert_eq!((survey.generations.len(), survey.files.len()), (3, 1));
    std::fs::remove_file(closed.path.join("lock")).unwrap();
    assert_eq!(closed.survey().owner, Owner::Nobody);
}

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
fn a_damaged_manifest_is_refused_with_the_way_back_if_there_is_one() {
    let closed = Closed::new();
    flip(&closed.path.join("manifest"), 70);
    let error = closed.open().unwrap_err();
    assert!(
        matches!(&error, StoreError::Manifest { remedy: Remedy::RestorePrevious { path }, .. } if *path == closed.path)
    );
    let text = error.to_string();
    assert!(text.contains(&format!("`overspill restore {} --previous`", closed.path.display())), "{text}");
    flip(&closed.path.join("manifest.previous"), 70);
    let error = closed.open().unwrap_err();
    assert!(matches!(error, StoreError::Manifest { remedy: Remedy::None, .. }), "{error}");
}

#[test]
fn what_only_looks_like_a_snapshot_keeps_nobody_out_and_a_damaged_snapshot_does() {
    let closed = Closed::new();
    std::fs::write(closed.path.join("snapshot.png"), "a picture").unwrap();
    std::fs::create_dir(closed.path.join("snapshot.d")).unwrap();
    symlink(closed.snapshot_file(), closed.path.join("snapshot.link")).unwrap();
    // Of another store, as it would be after a copy.
    let other = Closed::new();
    std::fs::copy(other.snapshot_file(), closed.path.join("snapshot.other")).unwrap();
    let store = closed.open().unwrap();
    assert_eq!(store.snapshots(), ["first"]);
    let note = store.note().unwrap();
    for name in ["snapshot.png", "snapshot.d", "snapshot.link", "snapshot.other"] {
        assert!(note.contains(name), "{note}");
    }
    assert!(
        matches!(store.delete_snapshot("png"), Err(StoreError::NoSnapshot { known, .. }) if known == ["first"])
    );
    drop(store);
    let foreign = closed.survey().foreign;
    assert_eq!(foreign, ["snapshot.d", "snapshot.link", "snapshot.other", "snapshot.png"]);
    assert!(matches!(Store::restore(&closed.path, "other"), Err(StoreError::NoSnapshot { .. })));

    flip(&closed.snapshot_file(), 70);
    let error = closed.open().unwrap_err();
    assert!(
        matches!(&error, StoreError::Manifest { remedy: Remedy::DeleteSnapshot { name, .. }, .. } if name == "first")
    );
    assert!(error.to_string().contains("first --delete` gives this snapshot up"), "{error}");
    Store::delete_snapshot_in(&closed.path, "first").unwrap();
    assert!(closed.open().unwrap().snapshots().is_empty());
    assert!(closed.path.join("snapshot.png").exists());
}

#[test]
fn a_snapshot_keeps_its_bytes_however_its_first_line_is_damaged_or_how_little_is_left_of_it() {
    let closed = Closed::new();
    let file = closed.snapshot_file();
    let whole = std::fs::read(&file).unwrap();
    let line = whole.iter().position(|&byte| byte == b'\n').unwrap();
    let flipped = (0..=line).map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        bytes
    });
    let cut = [0, 1, 5, 17, 18, 30, line, line + 1, whole.len() - 1].map(|length| whole[..length].to_vec());
    let zeros = [1, 100, whole.len()].map(|length| vec![0; length]);
    for bytes in flipped.chain(cut).chain(zeros) {
        std::fs::write(&file, &bytes).unwrap();
        let said = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
        let error = closed.open().map(|_| said.clone()).unwrap_err();
        assert!(matches!(&error, StoreError::Manifest { path, .. } if *path == file), "{said}: {error}");
        let survey = closed.survey();
        assert!(survey.foreign.is_empty() && !survey.generation(&first()).unwrap().is_whole(), "{said}");
    }
    Store::delete_snapshot_in(&closed.path, "first").unwrap();
    assert!(closed.open().unwrap().snapshots().is_empty());
}

#[test]
fn what_a_newer_version_wrote_is_not_advised_to_be_given_up() {
    let closed = Closed::new();
    let newer = "overspill manifest 3 0000000000000000\nwho knows";
    for file in [closed.snapshot_file(), closed.path.join("manifest")] {
        std::fs::write(&file, newer).unwrap();
        let error = closed.open().unwrap_err();
        assert!(
            matches!(&error, StoreError::Manifest { path, remedy: Remedy::NewerVersion, .. } if *path == file)
        );
        let text = error.to_string();
        assert!(text.contains("newer overspill") && !text.contains("--delete"), "{text}");
        assert!(!text.contains("restore"), "{text}");
    }
}

#[test]
fn without_a_generation_before_the_committed_one_that_is_what_is_said() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    drop(rig.tensor("a", 1));
    rig.store.commit(json!({ "step": 1 })).unwrap();
    rig.store.keep();
    let Rig { store, engine, pool, folder: _folder } = rig;
    let path = store.path().to_owned();
    drop(store);
    let none = Store::restore_previous(&path).unwrap_err();
    assert!(matches!(none, StoreError::NoPrevious { .. }), "{none}");
    let volumes = [Volume { directory: path, engines: vec![engine], weight: 1 }];
    let examination = Examination::begin(&volumes).unwrap();
    let blocks = Blocks { pool: &pool, block_bytes: BLOCK, count: 2 };
    let scope = Scope::Only(&Generation::Previous);
    let none = examination.verify(scope, blocks, |_, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(none, StoreError::NoPrevious { .. }), "{none}");
    let none = examination.restore(&Generation::Previous).unwrap_err();
    assert!(!none.to_string().contains("start anew"), "{none}");
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
fn a_lost_manifest_is_never_a_reason_to_remove_the_store() {
    let closed = Closed::new();
    let file = closed.path.join("manifest");
    let whole = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let home = closed.path.display();
    let previous = format!("`overspill restore {home} --previous`");
    let snapshot = format!("`overspill restore {home} first`");
    let in_the_way = || Store::create(&closed.path, Durability::Step, 4096, &closed.engine).unwrap_err();
    let says = |expected: &str| {
        for error in [closed.open().unwrap_err(), Store::committed(&closed.path).unwrap_err()] {
            assert!(matches!(&error, StoreError::ManifestLost { path, .. } if *path == file), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        let text = in_the_way().to_string();
        assert!(text.contains("already exists") && text.contains(expected), "{text}");
        assert!(!text.contains("remove"), "{text}");
    };
    says(&previous);
    std::fs::write(closed.path.join("manifest.previous"), "damaged").unwrap();
    says(&snapshot);
    std::fs::remove_file(closed.path.join("manifest.previous")).unwrap();
    says(&snapshot);
    Store::restore(&closed.path, "first").unwrap();
    assert_eq!(closed.open().unwrap().meta(), json!({ "step": 1 }));
    assert!(in_the_way().to_string().contains("it may hold an earlier run"));

    std::fs::write(&file, whole).unwrap();
    for name in ["manifest", "snapshot.first"] {
        std::fs::remove_file(closed.path.join(name)).unwrap();
    }
    let nothing = closed.open().unwrap_err();
    assert!(matches!(nothing, StoreError::NothingCommitted { .. }), "{nothing}");
    let gc = format!("`overspill gc {home} --remove`");
    for text in [nothing.to_string(), in_the_way().to_string()] {
        assert!(text.contains(&gc) && !text.contains("start anew"), "{text}");
    }
}

#[test]
fn a_store_without_its_lock_is_listed_and_stays_and_the_lock_is_named() {
    let closed = Closed::new();
    let lock = closed.path.join("lock");
    let ways: [&dyn Fn(); 3] =
        [&|| std::fs::remove_file(&lock).unwrap(), &|| symlink("/dev/null", &lock).unwrap(), &|| {
            std::fs::remove_file(&lock).and_then(|()| std::fs::create_dir(&lock)).unwrap();
        }];
    for way in ways {
        way();
        let error = closed.open().unwrap_err();
        assert!(matches!(&error, StoreError::NoLock { path, .. } if *path == lock), "{error}");
        let parent = closed.path.parent().unwrap().to_owned();
        let [found] = &leftovers(&[parent]).unwrap()[..] else { panic!("not listed") };
        let refused = remove_leftover(found, Removal::WithCommitted).unwrap_err();
        assert!(matches!(refused, StoreError::NoLock { .. }), "{refused}");
        assert!(closed.path.join("data").exists());
    }
    std::fs::remove_dir(&lock).unwrap();
    std::fs::write(&lock, "").unwrap();
    drop(closed.open().unwrap());
}

#[test]
fn what_is_in_the_place_of_the_previous_manifest_is_named() {
    let closed = Closed::new();
    let previous = closed.path.join("manifest.previous");
    std::fs::remove_file(&previous).unwrap();
    std::fs::create_dir(&previous).unwrap();
    let error = Store::restore(&closed.path, "first").unwrap_err();
    assert!(matches!(&error, StoreError::Directory { path, .. } if *path == previous), "{error}");
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
