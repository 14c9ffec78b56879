//! A store that was carried about: of an older version, of another time, copied while it changed.

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use overspill_io::BackendChoice;
use overspill_swap::{Durability, Manifest, Profile, Store, StoreError, Swapped};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use crate::rig::{BLOCK, Rig};

/// Ends the store's owner; what it left is at the path.
fn ended(Rig { store, engine, pool, folder }: Rig) -> (PathBuf, Rig) {
    store.keep();
    let path = store.path().to_owned();
    drop(store);
    let other = Store::create(&folder.path().join("other"), Durability::Step, 4096, &engine).unwrap();
    (path, Rig { store: other, engine, pool, folder })
}

fn open(path: &Path, rig: &Rig) -> Store {
    Store::open(path, Durability::Step, &rig.engine).unwrap()
}

fn overwrite(rig: &Rig, tensor: Swapped, byte: u8) -> Swapped {
    tensor.overwrite(rig.block(byte)).unwrap().store().wait().unwrap()
}

fn copy(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

#[test]
fn a_store_of_the_first_format_is_opened_and_goes_on_in_the_newest() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    drop(rig.tensor("a", 7));
    rig.store.commit(Value::Null).unwrap();
    let (path, rig) = ended(rig);
    let current = Manifest::decode(&fs::read(path.join("manifest")).unwrap()).unwrap();
    let body = serde_json::to_vec(&json!({ "tensors": current.tensors })).unwrap();
    let old = [format!("overspill manifest 1 {:016x}\n", xxh3_64(&body)).into_bytes(), body].concat();
    fs::write(path.join("manifest"), &old).unwrap();
    // Stores had no such file then.
    fs::remove_file(path.join("volume")).unwrap();

    let store = open(&path, &rig);
    assert_eq!((store.generation(), store.meta()), (0, Value::Null));
    let (a, bytes) = rig.read(store.adopt("a", BLOCK).unwrap());
    assert_eq!(bytes, vec![7; BLOCK]);
    drop(overwrite(&rig, a, 8));
    assert_eq!(fs::read(path.join("manifest")).unwrap(), old, "nothing is written before a commit");
    store.commit(json!("new")).unwrap();
    drop(store);
    let store = open(&path, &rig);
    assert_eq!((store.generation(), store.meta()), (1, json!("new")));
    assert_eq!(rig.read(store.adopt("a", BLOCK).unwrap()).1, vec![8; BLOCK]);
}

#[test]
fn a_store_does_not_ask_what_time_it_is() {
    let rig = Rig::new(BackendChoice::Auto, 2, 1);
    let a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    rig.store.snapshot("first").unwrap();
    drop(overwrite(&rig, a, 2));
    rig.store.commit(json!(2)).unwrap();
    let (path, rig) = ended(rig);
    let profile = Profile { chunk_bytes: 1 << 20, queue_depth: 8, rings: 1, read_gbps: 1.0, write_gbps: 2.0 };
    profile.save(&path).unwrap();
    let (dawn, future) =
        (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000));
    let mut generation = 2;
    // The older a file is, the newer it looks, and the other way round.
    for (manifest, others) in [(dawn, future), (future, dawn)] {
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            let time = if entry.file_name() == "manifest" { manifest } else { others };
            let times = FileTimes::new().set_accessed(time).set_modified(time);
            File::options().write(true).open(entry.path()).unwrap().set_times(times).unwrap();
        }
        assert_eq!(Profile::load(&path).unwrap().as_ref(), Some(&profile));
        let store = open(&path, &rig);
        assert_eq!((store.generation(), store.snapshots()), (generation, vec!["first".to_owned()]));
        let (a, bytes) = rig.read(store.adopt("a", BLOCK).unwrap());
        assert_eq!(bytes, vec![generation as u8; BLOCK]);
        generation += 1;
        drop(overwrite(&rig, a, generation as u8));
        store.commit(json!(generation)).unwrap();
    }
    Store::restore(&path, "first").unwrap();
    let store = open(&path, &rig);
    assert_eq!(rig.read(store.adopt("a", BLOCK).unwrap()).1, vec![1; BLOCK]);
}

#[test]
fn a_copy_of_an_open_store_is_whole_or_says_what_is_not() {
    let rig = Rig::new(BackendChoice::Auto, 2, 2);
    let (mut a, b) = (rig.tensor("a", 1), rig.tensor("b", 1));
    rig.store.commit(json!(1)).unwrap();
    let path = rig.store.path().to_owned();
    let copies = ["between", "across"].map(|name| rig.folder.path().join(name));
    for to in &copies {
        fs::create_dir(to).unwrap();
        copy(&path, to, &["data", "lock", "volume", "manifest"]);
    }
    // The data is of one time, the manifest of another.
    for byte in 2..4 {
        a = overwrite(&rig, a, byte);
        rig.store.commit(json!(byte)).unwrap();
    }
    copy(&path, &copies[1], &["manifest"]);

    let [between, across] = copies.map(|path| open(&path, &rig));
    for name in ["a", "b"] {
        assert_eq!(rig.read(between.adopt(name, BLOCK).unwrap()).1, vec![1; BLOCK], "{name}");
    }
    assert_eq!(across.meta(), json!(3));
    assert_eq!(rig.read(across.adopt("b", BLOCK).unwrap()).1, vec![1; BLOCK]);
    let torn = across.adopt("a", BLOCK).unwrap().load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait();
    let error = torn.unwrap_err().error;
    assert!(matches!(&error, StoreError::Corrupt { tensor, .. } if tensor == "a"), "{error}");
    // The copies are stores of their own.
    between.commit(json!("copy")).unwrap();
    assert_eq!(Store::committed(&path).unwrap().meta, json!(3));
    assert_eq!(rig.read(a).1, vec![3; BLOCK]);
    drop(b);
}
