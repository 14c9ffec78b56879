use std::os::unix::fs::PermissionsExt;

use overspill_io::{BackendChoice, IoError};
use overspill_swap::{Durability, Manifest, Store, StoreError, Worth};
use serde_json::Value;

use crate::rig::{BACKENDS, BLOCK, Rig, room};

#[test]
fn what_is_stored_comes_back_changed_or_not() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 2, 4);
        let tensor = rig.tensor("a", 1);
        let mut dirty = tensor.load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap().edit();
        dirty.bytes_mut()[17] = 99;
        let (tensor, bytes) = rig.read(dirty.store().wait().unwrap());
        assert_eq!((bytes[16], bytes[17], bytes[BLOCK - 1]), (1, 99, 1));
        let overwritten = tensor.overwrite(rig.block(5)).unwrap().store().wait().unwrap();
        assert_eq!(rig.read(overwritten).1, vec![5; BLOCK]);
        assert_eq!(rig.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_clean_tensor_is_released_without_a_write() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let tensor = rig.tensor("a", 1);
    let written = rig.engine.stats().bytes_written;
    let (tensor, _) = rig.read(tensor);
    let (_tensor, block) = tensor.load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap().take();
    assert_eq!(block[0], 1);
    assert_eq!(rig.engine.stats().bytes_written, written);
}

#[test]
fn a_flipped_bit_is_named_and_refused() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 2, 2);
        let (first, second) = (rig.tensor("first", 1), rig.tensor("second", 2));
        rig.flip_bit(BLOCK as u64 + 1000);
        let failed = second.load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap_err();
        match &failed.error {
            StoreError::Corrupt { tensor, path, offset, length, expected, found } => {
                assert_eq!((tensor.as_str(), path), ("second", &rig.data()));
                assert_eq!((*offset, *length), (BLOCK as u64, BLOCK));
                assert_ne!(expected, found);
            }
            other => panic!("{other:?}"),
        }
        rig.flip_bit(BLOCK as u64 + 1000);
        assert_eq!(rig.read(failed.tensor).1, vec![2; BLOCK], "mended, the tensor is usable again");
        assert_eq!(rig.read(first).1, vec![1; BLOCK]);
        assert_eq!(rig.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_failed_write_hands_the_tensor_and_its_data_back() {
    let rig = Rig::new(BackendChoice::Auto, 2, 2);
    let mut dirty = rig.tensor("a", 1).overwrite(rig.block(7)).unwrap();
    rig.engine.shutdown().unwrap();
    for _ in 0..2 {
        let failed = dirty.store().wait().unwrap_err();
        assert!(
            matches!(failed.error, StoreError::Transfer { ref tensor, source: IoError::EngineStopped } if tensor == "a")
        );
        dirty = failed.tensor.expect("the engine had not given it to the kernel");
        assert_eq!(dirty.bytes(), vec![7; BLOCK]);
    }
    drop(dirty);
    assert!(matches!(rig.store.commit(Value::Null), Err(StoreError::Unfinished { tensor }) if tensor == "a"));
}

#[test]
fn a_data_file_cut_short_by_somebody_else_is_an_error_at_the_tensor() {
    let rig = Rig::new(BackendChoice::Auto, 2, 2);
    let tensor = rig.tensor("a", 1);
    std::fs::File::options().write(true).open(rig.data()).unwrap().set_len(4096).unwrap();
    let failed = tensor.load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap_err();
    let message = failed.to_string();
    assert!(matches!(failed.error, StoreError::Transfer { .. }), "{message}");
    assert!(message.contains("tensor a"), "{message}");
}

#[test]
fn a_commit_writes_a_manifest_that_finds_every_tensor() {
    let rig = Rig::new(BackendChoice::Auto, 3, 3);
    let names = ["a", "weights/layer 3/0"];
    let tensors = names.map(|name| rig.tensor(name, 3));
    let vacant = rig.store.reserve("vacant", BLOCK, Worth::State).unwrap();
    rig.store.commit(Value::Null).unwrap();
    let path = rig.store.path().join("manifest");
    let manifest = Manifest::decode(&std::fs::read(&path).unwrap()).unwrap();
    let found: Vec<_> = manifest.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(found, names, "a tensor without contents is not in it");
    assert!(!rig.store.path().join("manifest.new").exists());

    let storing = vacant.fill(rig.block(4)).unwrap().store();
    assert!(matches!(rig.store.commit(Value::Null), Err(StoreError::Unfinished { .. })));
    assert_eq!(Manifest::decode(&std::fs::read(&path).unwrap()).unwrap(), manifest, "the last commit stays");
    drop((storing.wait().unwrap(), tensors));
    rig.store.commit(Value::Null).unwrap();
}

#[test]
fn the_store_leaves_nothing_behind_unless_it_is_kept() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    let path = rig.store.path().to_owned();
    let mode = std::fs::metadata(rig.data()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let tensor = rig.tensor("a", 1);
    drop(rig.store);
    assert!(path.exists(), "a tensor still needs it");
    drop(tensor);
    assert!(!path.exists());

    let kept = Store::create(&path, Durability::Step, room(1), &rig.engine).unwrap();
    kept.keep();
    kept.commit(Value::Null).unwrap();
    drop(kept);
    assert!(path.join("data").exists() && path.join("manifest").exists());
    assert!(matches!(
        Store::create(&path, Durability::Step, room(1), &rig.engine),
        Err(StoreError::Leftover { .. })
    ));
}

#[test]
fn two_stores_never_share_a_directory() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    let error = Store::create(rig.store.path(), Durability::Step, room(1), &rig.engine).unwrap_err();
    assert!(
        matches!(error, StoreError::Locked { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    assert!(rig.data().exists());
}

#[test]
fn a_full_disk_is_found_at_creation_and_nothing_is_left() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    let path = rig.folder.path().join("huge");
    assert!(matches!(Store::check(&path, 1 << 60), Err(StoreError::NoSpace { .. })));
    let error = Store::create(&path, Durability::Step, 1 << 60, &rig.engine).unwrap_err();
    assert!(
        matches!(error, StoreError::NoSpace { needed, available, .. } if needed == 1 << 60 && available < needed)
    );
    assert!(!path.exists());
}

#[test]
fn a_full_store_a_used_name_and_a_wrong_length_are_typed_errors() {
    let rig = Rig::new(BackendChoice::Auto, 1, 1);
    let vacant = rig.store.reserve("a", BLOCK, Worth::State).unwrap();
    assert!(matches!(rig.store.reserve("a", 1, Worth::State), Err(StoreError::DuplicateName { .. })));
    assert!(
        matches!(rig.store.reserve("b", 1, Worth::State), Err(StoreError::Full { tensor, .. }) if tensor == "b")
    );
    let mut short = rig.pool.lease(BLOCK).unwrap();
    drop(short.split_off(4096));
    let refused = vacant.fill(short).unwrap_err();
    match &refused.error {
        StoreError::WrongLength { tensor, expected, found } => {
            assert_eq!((tensor.as_str(), *expected, *found), ("a", BLOCK, 4096));
        }
        other => panic!("{other:?}"),
    }
    drop(refused.block);
    drop(refused.tensor.fill(rig.block(1)).unwrap().store().wait().unwrap());
    assert_eq!(rig.store.usage().allocated_bytes, BLOCK as u64);
}
