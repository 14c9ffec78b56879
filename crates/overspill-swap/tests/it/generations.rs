//! Commits, roll-back, snapshots, and what is found when a store is opened.

use std::ops::ControlFlow;
use std::os::unix::fs::symlink;

use overspill_io::{BackendChoice, Engine, EngineConfig, SimConfig};
use overspill_swap::{Blocks, Compared, Durability, Links, Store, StoreError, Swapped, Worth, endanger};
use serde_json::{Value, json};

use crate::rig::{BACKENDS, BLOCK, Rig};

fn overwrite(rig: &Rig, tensor: Swapped, byte: u8) -> Swapped {
    tensor.overwrite(rig.block(byte)).unwrap().store().wait().unwrap()
}

/// Lets the store's process die, as far as the store can tell: nothing is committed or removed any more.
fn die(rig: Rig) -> Rig {
    let Rig { store, engine, pool, folder } = rig;
    store.keep();
    let path = store.path().to_owned();
    drop(store);
    let store = Store::open(&path, Durability::Step, &engine).unwrap();
    Rig { store, engine, pool, folder }
}

#[test]
fn what_was_committed_is_found_whatever_was_written_since() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 2, 3);
        let (a, b) = (rig.tensor("a", 1), rig.tensor("b", 2));
        let scratch = rig.store.reserve("scratch", BLOCK, Worth::Scratch).unwrap();
        let scratch = scratch.fill(rig.block(9)).unwrap().store().wait().unwrap();
        rig.store.commit(json!({ "step": 1 })).unwrap();
        let (a, b) = (overwrite(&rig, a, 3), overwrite(&rig, b, 4));
        rig.store.commit(json!({ "step": 2 })).unwrap();
        let a = overwrite(&rig, overwrite(&rig, a, 5), 6);
        let scratch = overwrite(&rig, scratch, 8);
        drop((a, b, scratch));
        let rig = die(rig);
        assert_eq!((rig.store.generation(), rig.store.meta()), (2, json!({ "step": 2 })));
        let a = rig.store.adopt("a", BLOCK).unwrap();
        assert_eq!(rig.read(a).1, vec![3; BLOCK]);
        assert_eq!(rig.read(rig.store.adopt("b", BLOCK).unwrap()).1, vec![4; BLOCK]);
        assert!(matches!(rig.store.adopt("scratch", BLOCK), Err(StoreError::Missing { .. })));
        // Its name and its room are free.
        drop(rig.store.reserve("scratch", BLOCK, Worth::Scratch).unwrap());
    }
}

#[test]
fn rolling_back_is_not_committing() {
    let rig = Rig::new(BackendChoice::Auto, 2, 2);
    let mut a = rig.tensor("a", 1);
    rig.store.roll_back().unwrap();
    let failed = a.load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap_err();
    assert!(matches!(failed.error, StoreError::Unfinished { .. }), "it was never committed: {failed}");
    a = overwrite(&rig, failed.tensor, 3);
    rig.store.commit(Value::Null).unwrap();
    for byte in 4..20 {
        a = overwrite(&rig, overwrite(&rig, a, byte), byte + 100);
        rig.store.roll_back().unwrap();
        let (again, bytes) = rig.read(a);
        assert_eq!(bytes, vec![3; BLOCK]);
        a = again;
    }
    assert_eq!(rig.store.usage().allocated_bytes, BLOCK as u64, "what was rolled back is free");
}

#[test]
fn a_tensor_has_one_handle_at_a_time() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let a = rig.tensor("a", 1);
    assert!(matches!(rig.store.adopt("a", BLOCK), Err(StoreError::InUse { tensor }) if tensor == "a"));
    let storing = a.overwrite(rig.block(2)).unwrap().store();
    // Where a write is under way nobody else may write: dropping it waits.
    drop(storing);
    assert!(matches!(
        rig.store.adopt("a", 1),
        Err(StoreError::WrongLength { expected: BLOCK, found: 1, .. })
    ));
    assert!(matches!(rig.store.adopt("b", BLOCK), Err(StoreError::Missing { tensor, .. }) if tensor == "b"));
    let (_a, bytes) = rig.read(rig.store.adopt("a", BLOCK).unwrap());
    assert_eq!(bytes, vec![2; BLOCK]);
    rig.store.commit(Value::Null).unwrap();
}

#[test]
fn a_snapshot_keeps_its_generation_until_it_is_deleted() {
    let rig = Rig::new(BackendChoice::Auto, 2, 2);
    let (mut a, b) = (rig.tensor("a", 1), rig.tensor("b", 2));
    assert!(matches!(rig.store.snapshot("early"), Err(StoreError::NothingCommitted { .. })));
    rig.store.commit(json!(1)).unwrap();
    let written = rig.engine.stats().bytes_written;
    rig.store.snapshot("best-1.0").unwrap();
    assert_eq!(rig.engine.stats().bytes_written, written, "no byte of the state is copied");
    assert!(matches!(rig.store.snapshot("best-1.0"), Err(StoreError::SnapshotExists { .. })));
    for name in ["", ".", "..", ".a", "-a", "a/b", "..\u{0}", "a b", "ü", &"x".repeat(65)] {
        assert!(matches!(rig.store.snapshot(name), Err(StoreError::SnapshotName { .. })), "{name:?}");
    }
    // More commits than there is room for without growing: the snapshot's extents are not reused.
    for byte in 10..15 {
        a = overwrite(&rig, a, byte);
        rig.store.commit(json!(byte)).unwrap();
    }
    drop((a, b));
    let rig = die(rig);
    assert_eq!(rig.store.snapshots(), ["best-1.0"]);
    let mut a = rig.store.adopt("a", BLOCK).unwrap();
    for byte in 20..25 {
        a = overwrite(&rig, a, byte);
        rig.store.commit(json!(byte)).unwrap();
    }
    drop(a);
    let path = rig.store.path().to_owned();
    rig.store.keep();
    let Rig { store, engine, pool, folder } = rig;
    drop(store);
    Store::restore(&path, "best-1.0").unwrap();
    let store = Store::open(&path, Durability::Step, &engine).unwrap();
    let rig = Rig { store, engine, pool, folder };
    assert_eq!((rig.store.generation(), rig.store.meta()), (12, json!(1)));
    assert_eq!(rig.read(rig.store.adopt("a", BLOCK).unwrap()).1, vec![1; BLOCK]);
    assert_eq!(rig.read(rig.store.adopt("b", BLOCK).unwrap()).1, vec![2; BLOCK]);

    let before = rig.store.usage().allocated_bytes;
    let refused = rig.store.delete_snapshot("worst").unwrap_err();
    assert!(matches!(&refused, StoreError::NoSnapshot { known, .. } if known == &["best-1.0"]), "{refused}");
    rig.store.delete_snapshot("best-1.0").unwrap();
    assert_eq!(rig.store.usage().allocated_bytes, before, "the current generation has the same bytes");
    assert!(rig.store.snapshots().is_empty());
}

#[test]
fn damage_to_a_manifest_is_named_and_the_generation_before_can_be_restored() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    let a = overwrite(&rig, a, 2);
    rig.store.commit(json!(2)).unwrap();
    drop(a);
    rig.store.keep();
    let Rig { store, engine, pool, folder } = rig;
    let path = store.path().to_owned();
    drop(store);
    let manifest = path.join("manifest");
    let whole = std::fs::read(&manifest).unwrap();
    for (what, bytes) in [
        ("flipped", whole.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == 60)).collect()),
        ("cut", whole[..whole.len() - 1].to_vec()),
        ("empty", Vec::new()),
        ("of the future", b"overspill manifest 3 0000000000000000\n{}".to_vec()),
    ] {
        std::fs::write(&manifest, bytes).unwrap();
        let error = Store::open(&path, Durability::Step, &engine).unwrap_err();
        assert!(matches!(&error, StoreError::Manifest { path, .. } if path == &manifest), "{what}: {error}");
    }
    // Whoever restores knows what he gives up; nothing was written since, so the previous generation is whole.
    Store::restore_previous(&path).unwrap();
    let store = Store::open(&path, Durability::Step, &engine).unwrap();
    let rig = Rig { store, engine, pool, folder };
    assert_eq!(rig.store.meta(), json!(1));
    assert_eq!(rig.read(rig.store.adopt("a", BLOCK).unwrap()).1, vec![1; BLOCK]);
}

#[test]
fn what_cannot_be_opened_is_refused_and_left_as_it_is() {
    let rig = Rig::new(BackendChoice::Auto, 1, 2);
    let tensor = rig.tensor("a", 1);
    rig.store.commit(Value::Null).unwrap();
    let path = rig.store.path().to_owned();
    let open = |path| Store::open(path, Durability::Step, &rig.engine).unwrap_err();
    assert!(matches!(open(&path), StoreError::Locked { pid: Some(pid), .. } if pid == std::process::id()));
    let elsewhere = rig.folder.path().join("link");
    symlink(&path, &elsewhere).unwrap();
    assert!(matches!(open(&elsewhere), StoreError::Directory { action: "open", .. }));
    assert!(matches!(open(rig.folder.path()), StoreError::Directory { .. }));

    drop(tensor);
    let Rig { store, engine, folder: _folder, .. } = rig;
    store.keep();
    drop(store);
    let open = || Store::open(&path, Durability::Step, &engine);
    std::fs::File::options().write(true).open(path.join("data")).unwrap().set_len(4096).unwrap();
    assert!(matches!(open(), Err(StoreError::Truncated { length: 4096, .. })));
    std::fs::remove_file(path.join("data")).unwrap();
    assert!(matches!(open(), Err(StoreError::Io(_))));
    std::fs::remove_file(path.join("manifest")).unwrap();
    symlink("/etc/hostname", path.join("manifest")).unwrap();
    assert!(matches!(open(), Err(StoreError::Directory { action: "read", .. })));
}

#[test]
fn a_store_can_be_moved_and_copied() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    drop(rig.tensor("a", 7));
    rig.store.commit(Value::Null).unwrap();
    let Rig { store, engine, pool, folder } = rig;
    store.keep();
    let (from, to) = (store.path().to_owned(), folder.path().join("moved"));
    drop(store);
    std::fs::rename(&from, &to).unwrap();
    std::fs::create_dir(&from).unwrap();
    for entry in std::fs::read_dir(&to).unwrap() {
        let file = entry.unwrap().file_name();
        std::fs::copy(to.join(&file), from.join(&file)).unwrap();
    }
    for path in [from, to] {
        let store = Store::open(&path, Durability::Step, &engine).unwrap();
        let a = store.adopt("a", BLOCK).unwrap();
        let resident = a.load(pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
        assert_eq!(resident.bytes(), vec![7; BLOCK]);
    }
}

#[test]
fn without_durability_the_manifest_goes_before_the_first_byte_it_names() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let path = rig.folder.path().join("bare");
    let store = Store::create(&path, Durability::None, BLOCK as u64, &rig.engine).unwrap();
    let fill = |byte| rig.block(byte);
    let a = store.reserve("a", BLOCK, Worth::State).unwrap().fill(fill(1)).unwrap().store().wait().unwrap();
    store.commit(Value::Null).unwrap();
    assert!(path.join("manifest").exists());
    let a = a.overwrite(fill(2)).unwrap().store().wait().unwrap();
    assert!(!path.join("manifest").exists(), "nobody vouches for what is half overwritten");
    store.commit(Value::Null).unwrap();
    assert!(path.join("manifest").exists());
    assert_eq!(store.usage().allocated_bytes, BLOCK as u64);
    drop(a);
}

#[test]
fn after_a_failed_commit_nothing_that_may_be_found_is_written_to() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let a = rig.tensor("a", 1);
    rig.store.commit(Value::Null).unwrap();
    let a = overwrite(&rig, a, 2);
    // Where the manifest before goes there is something that no file can take the place of.
    std::fs::create_dir(rig.store.path().join("manifest.previous")).unwrap();
    let refused = rig.store.commit(Value::Null).unwrap_err();
    assert!(matches!(refused, StoreError::Directory { action: "replace", .. }), "{refused}");
    let failed = a.overwrite(rig.block(3)).unwrap().store().wait().unwrap_err();
    assert!(matches!(failed.error, StoreError::Poisoned { .. }), "{failed}");
    assert_eq!(failed.tensor.unwrap().bytes(), vec![3; BLOCK]);
    assert!(matches!(rig.store.commit(Value::Null), Err(StoreError::Poisoned { .. })));
    assert!(matches!(rig.store.roll_back(), Err(StoreError::Poisoned { .. })));
    assert!(matches!(rig.store.snapshot("s"), Err(StoreError::Poisoned { .. })));
    std::fs::remove_dir(rig.store.path().join("manifest.previous")).unwrap();
    let rig = die(rig);
    // The manifest had taken its place by then; that nobody knew whether it will stay is another matter.
    assert_eq!(rig.store.generation(), 2);
    assert_eq!(rig.read(rig.store.adopt("a", BLOCK).unwrap()).1, vec![2; BLOCK]);
}

#[test]
fn a_commit_whose_manifest_cannot_be_written_can_be_tried_again() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    let a = overwrite(&rig, a, 2);
    for in_the_way in ["manifest.new", "manifest.old"] {
        std::fs::create_dir(rig.store.path().join(in_the_way)).unwrap();
        let refused = rig.store.commit(json!(2)).unwrap_err();
        assert!(matches!(refused, StoreError::Directory { action: "write", .. }), "{refused}");
        assert_eq!((rig.store.generation(), rig.store.meta()), (1, json!(1)));
        rig.store.snapshot(in_the_way).unwrap();
        std::fs::remove_dir(rig.store.path().join(in_the_way)).unwrap();
    }
    rig.store.commit(json!(2)).unwrap();
    drop(a);
    let rig = die(rig);
    assert_eq!(rig.store.meta(), json!(2));
    assert_eq!(rig.read(rig.store.adopt("a", BLOCK).unwrap()).1, vec![2; BLOCK]);
}

#[test]
fn what_cannot_be_withdrawn_is_not_overwritten_when_it_is_tried_again() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let path = rig.folder.path().join("bare");
    let store = Store::create(&path, Durability::None, BLOCK as u64, &rig.engine).unwrap();
    let vacant = store.reserve("a", BLOCK, Worth::State).unwrap();
    let a = vacant.fill(rig.block(1)).unwrap().store().wait().unwrap();
    store.commit(Value::Null).unwrap();
    std::fs::create_dir(path.join("manifest.previous")).unwrap();
    let failed = a.overwrite(rig.block(2)).unwrap().store().wait().unwrap_err();
    let again = failed.tensor.unwrap().store().wait().unwrap_err();
    assert!(matches!(again.error, StoreError::Poisoned { .. }), "{again}");
    assert_eq!(std::fs::read(path.join("data")).unwrap()[..BLOCK], vec![1; BLOCK]);
}

#[test]
fn a_snapshot_from_before_the_store_grew_can_be_restored() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let mut a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    let capacity = rig.store.usage().capacity_bytes;
    rig.store.snapshot("small").unwrap();
    for byte in 2..6 {
        a = overwrite(&rig, a, byte);
        rig.store.commit(json!(byte)).unwrap();
        rig.store.snapshot(&format!("at-{byte}")).unwrap();
    }
    assert!(rig.store.usage().capacity_bytes > capacity);
    drop(a);
    rig.store.keep();
    let Rig { store, engine, pool, folder } = rig;
    let path = store.path().to_owned();
    drop(store);
    for (snapshot, byte) in [("small", 1), ("at-5", 5), ("at-2", 2)] {
        Store::restore(&path, snapshot).unwrap();
        let store = Store::open(&path, Durability::Step, &engine).unwrap();
        assert_eq!((store.meta(), store.snapshots().len()), (json!(byte), 5));
        let a = store.adopt("a", BLOCK).unwrap();
        let resident = a.load(pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
        assert_eq!(resident.bytes(), vec![byte; BLOCK]);
    }
    drop(folder);
}

#[test]
fn what_looks_like_a_snapshot_and_is_none_of_ours_stays() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    drop(rig.tensor("a", 1));
    rig.store.commit(Value::Null).unwrap();
    rig.store.snapshot("ours").unwrap();
    let path = rig.store.path().to_owned();
    std::fs::write(path.join("snapshot.png"), "of somebody else").unwrap();
    drop(rig.store);
    assert!(path.join("snapshot.png").exists());
    assert!(!path.join("snapshot.ours").exists() && !path.join("data").exists());
}

#[test]
fn where_files_have_one_name_only_no_snapshot_replaces_what_is_there() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    drop(rig.tensor("a", 1));
    rig.store.commit(json!(1)).unwrap();
    let path = rig.store.path().to_owned();
    let backend = BackendChoice::Sim(SimConfig { cache_bytes: 1 << 20, ..SimConfig::calm(1) });
    let config = EngineConfig { backend, ..EngineConfig::default() };
    let power = Engine::start(config, &rig.pool).unwrap().power().unwrap();
    let _one_name = endanger(&path, Links::One, &power);
    std::fs::write(path.join("snapshot.png"), "of somebody else").unwrap();
    rig.store.snapshot("ours").unwrap();
    for name in ["png", "ours"] {
        let before = std::fs::read(path.join(format!("snapshot.{name}"))).unwrap();
        rig.store.commit(json!(2)).unwrap();
        let refused = rig.store.snapshot(name).unwrap_err();
        assert!(matches!(refused, StoreError::SnapshotExists { .. }), "{refused}");
        assert_eq!(std::fs::read(path.join(format!("snapshot.{name}"))).unwrap(), before);
    }
}

#[test]
fn numbers_that_no_store_has_are_refused_not_computed_with() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    for bytes in [usize::MAX, usize::MAX - 5000] {
        assert!(matches!(rig.store.reserve("a", bytes, Worth::State), Err(StoreError::Full { .. })));
    }
    let path = rig.folder.path().join("immense");
    assert!(Store::create(&path, Durability::Step, u64::MAX, &rig.engine).is_err());
    assert!(!path.exists());
}

#[test]
fn the_owner_compares_what_it_committed_beside_what_it_writes() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 6, 3);
        let blocks = Blocks { pool: &rig.pool, block_bytes: BLOCK / 4, count: 2 };
        let check = |wanted: fn(&str) -> bool| {
            let all = || ControlFlow::Continue(());
            rig.store
                .check_committed(wanted, blocks, Compared::default(), all)
                .map(|left| assert_eq!(left, None))
        };
        let (a, b) = (rig.tensor("a", 1), rig.tensor("b", 2));
        assert!(matches!(check(|_| true), Err(StoreError::NothingCommitted { .. })));
        rig.store.commit(json!(1)).unwrap();
        let offset = |name: &str| {
            let tensors = Store::committed(rig.store.path()).unwrap().tensors;
            tensors.into_iter().find(|record| record.name == name).unwrap().offset
        };
        let a = overwrite(&rig, a, 3);
        let storing = b.overwrite(rig.block(4)).unwrap().store();
        check(|_| true).unwrap();
        let at = offset("b") + BLOCK as u64 - 1;
        rig.flip_bit(at);
        let told = check(|_| true).unwrap_err();
        assert!(matches!(&told, StoreError::Corrupt { tensor, .. } if tensor == "b"), "{told}");
        check(|name| name == "a").unwrap();
        let b = storing.wait().unwrap();
        assert_eq!((rig.read(a).1, rig.read(b).1), (vec![3; BLOCK], vec![4; BLOCK]));
        rig.flip_bit(at);
        check(|_| true).unwrap();
        std::fs::File::options().write(true).open(rig.data()).unwrap().set_len(at).unwrap();
        let told = check(|_| true).unwrap_err();
        assert!(matches!(&told, StoreError::Transfer { tensor, .. } if tensor == "b"), "{told}");
    }
}

#[test]
fn a_comparison_goes_on_where_it_was_broken_off_and_anew_with_another_generation() {
    let rig = Rig::new(BackendChoice::Auto, 4, 4);
    let blocks = Blocks { pool: &rig.pool, block_bytes: BLOCK / 4, count: 2 };
    let tensors: Vec<_> =
        ["a", "b", "c"].into_iter().zip(1..).map(|(name, byte)| rig.tensor(name, byte)).collect();
    rig.store.commit(json!(1)).unwrap();
    let one = |compared| rig.store.check_committed(|_| true, blocks, compared, || ControlFlow::Break(()));
    let first = one(Compared::default()).unwrap().unwrap();
    assert_eq!(first, Compared { generation: 1, tensors: 1 });
    let second = one(first).unwrap().unwrap();
    assert_eq!(second, Compared { generation: 1, tensors: 2 });
    // What was compared is not read again, and what was not, is.
    let offsets: Vec<_> =
        Store::committed(rig.store.path()).unwrap().tensors.iter().map(|x| x.offset).collect();
    let (least, greatest) = (*offsets.iter().min().unwrap(), *offsets.iter().max().unwrap());
    rig.flip_bit(least);
    let third = one(second).unwrap().unwrap();
    assert_eq!(one(third).unwrap(), None);
    rig.flip_bit(greatest);
    assert!(matches!(one(second), Err(StoreError::Corrupt { .. })));
    rig.flip_bit(greatest);
    rig.store.commit(json!(2)).unwrap();
    assert!(
        matches!(one(third), Err(StoreError::Corrupt { .. })),
        "it is the same extent in the next generation"
    );
    // Every block comes back from what was broken off.
    let blocks: Vec<_> = (0..4).map(|_| rig.block(0)).collect();
    drop((blocks, tensors));
}
