//! What is seen of a store from outside, whole or damaged, and who may remove it.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use overspill_io::BackendChoice;
use overspill_swap::{
    Blocks, Durability, Examination, Generation, Owner, Remedy, Removal, Scope, Store, StoreError, Survey,
    Volume, leftovers, remove_leftover,
};
use serde_json::json;

use crate::closed::{Closed, first, flip, overwrite};
use crate::rig::{BLOCK, Rig};

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
