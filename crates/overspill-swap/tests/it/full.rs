//! A disk that gets full, and a limit that is met, while a store is at work: real ones.
//!
//! The disk is a small file system in memory, mounted in a name space of its own; the limit is the one on the size of
//! files, which stands for a quota.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use overspill_io::{BackendChoice, IoError};
use overspill_swap::{Durability, Store, StoreError, Swapped, Worth};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::apart::{apart, mount, unstopped};
use crate::rig::{BACKENDS, BLOCK, Rig, room};

/// Takes all the room that is left on the file system of `folder`.
fn fill(folder: &Path) -> PathBuf {
    let path = folder.join("of somebody else");
    let mut file = File::create(&path).unwrap();
    for bytes in [vec![1; 64 << 10], vec![1; 4096]] {
        while file.write_all(&bytes).is_ok() {}
    }
    path
}

fn first(rig: &Rig, store: &Store, name: &str, byte: u8) -> Swapped {
    let vacant = store.reserve(name, BLOCK, Worth::State).unwrap();
    vacant.fill(rig.block(byte)).unwrap().store().wait().unwrap()
}

fn overwrite(rig: &Rig, tensor: Swapped, byte: u8) -> Swapped {
    tensor.overwrite(rig.block(byte)).unwrap().store().wait().unwrap()
}

/// Opens what a process that has ended left, and compares it.
fn holds(rig: &Rig, path: &Path, generation: u64, bytes: &[(&str, u8)]) {
    let store = Store::open(path, Durability::Step, &rig.engine).unwrap();
    assert_eq!(store.generation(), generation);
    for &(name, byte) in bytes {
        assert_eq!(rig.read(store.adopt(name, BLOCK).unwrap()).1, vec![byte; BLOCK], "{name}");
    }
}

#[test]
fn a_commit_that_a_full_disk_refuses_costs_nothing_and_is_made_when_there_is_room() {
    apart("full::a_commit_that_a_full_disk_refuses_costs_nothing_and_is_made_when_there_is_room_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn a_commit_that_a_full_disk_refuses_costs_nothing_and_is_made_when_there_is_room_here() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 2, 1);
        let disk = rig.folder.path().join("disk");
        std::fs::create_dir(&disk).unwrap();
        mount(&disk, "size=4m");
        let path = disk.join("store");
        let store = Store::create(&path, Durability::Step, room(2), &rig.engine).unwrap();
        let a = first(&rig, &store, "a", 1);
        store.commit(json!(1)).unwrap();
        let taken = fill(&disk);

        // What was preallocated takes writes on a full disk, first ones too.
        let (a, b) = (overwrite(&rig, a, 2), first(&rig, &store, "b", 3));
        for _ in 0..3 {
            let refused = store.commit(json!(2)).unwrap_err();
            let StoreError::DiskFull { path: named, needed, available, errno } = &refused else {
                panic!("{refused}")
            };
            assert_eq!((named, *errno), (&path.join("manifest.new"), Errno::NOSPC.raw_os_error()));
            assert!((100..4096).contains(needed) && *available < 4096, "{refused}");
            assert!(!path.join("manifest.new").exists(), "a part of a manifest only takes room");
            assert_eq!((store.generation(), store.meta()), (1, json!(1)), "the last commit is known");
        }
        let a = overwrite(&rig, a, 4);
        std::fs::remove_file(taken).unwrap();
        store.commit(json!(2)).unwrap();
        drop(overwrite(&rig, a, 5));
        let taken = fill(&disk);
        assert!(matches!(store.commit(json!(3)), Err(StoreError::DiskFull { .. })));
        store.keep();
        drop((b, store));
        holds(&rig, &path, 2, &[("a", 4), ("b", 3)]);
        std::fs::remove_file(taken).unwrap();
    }
}

#[test]
fn growth_that_a_full_disk_refuses_hands_the_data_back_and_is_made_when_there_is_room() {
    apart("full::growth_that_a_full_disk_refuses_hands_the_data_back_and_is_made_when_there_is_room_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn growth_that_a_full_disk_refuses_hands_the_data_back_and_is_made_when_there_is_room_here() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 2, 1);
        let disk = rig.folder.path().join("disk");
        std::fs::create_dir(&disk).unwrap();
        mount(&disk, "size=4m");
        let path = disk.join("store");
        let store = Store::create(&path, Durability::Step, room(1), &rig.engine).unwrap();
        let a = first(&rig, &store, "a", 1);
        store.commit(json!(1)).unwrap();
        store.snapshot("first").unwrap();
        let a = overwrite(&rig, a, 2);
        store.commit(json!(2)).unwrap();
        let taken = fill(&disk);

        // The snapshot has one extent, the last commit the other.
        let capacity = store.usage().capacity_bytes;
        let failed = a.overwrite(rig.block(3)).unwrap().store().wait().unwrap_err();
        let StoreError::Io(IoError::NoSpace { path: named, needed, free }) = &failed.error else {
            panic!("{failed}")
        };
        assert_eq!(named, &path.join("data"));
        assert!(*needed >= BLOCK as u64 && free < needed, "{failed}");
        assert!(matches!(store.provide(capacity + 1), Err(StoreError::Io(IoError::NoSpace { .. }))));
        assert_eq!(store.usage().capacity_bytes, capacity);
        let dirty = failed.tensor.unwrap();
        assert_eq!(dirty.bytes(), vec![3; BLOCK], "the data comes home");
        let failed = dirty.store().wait().unwrap_err();
        std::fs::remove_file(taken).unwrap();
        drop(failed.tensor.unwrap().store().wait().unwrap());
        store.commit(json!(3)).unwrap();
        store.keep();
        drop(store);
        holds(&rig, &path, 3, &[("a", 3)]);
        Store::restore(&path, "first").unwrap();
        holds(&rig, &path, 4, &[("a", 1)]);
    }
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error_that_costs_nothing() {
    unstopped("full::a_limit_on_the_size_of_files_is_an_error_that_costs_nothing_here");
}

#[test]
#[ignore = "lowers a limit of the process; run in one of its own, which ignores the signal, by the test without _here"]
fn a_limit_on_the_size_of_files_is_an_error_that_costs_nothing_here() {
    // With AIO or io_uring the kernel counts the same, so one way is enough.
    let rig = Rig::new(BackendChoice::Threads, 2, 2);
    let limit = |bytes| {
        let Rlimit { maximum, .. } = getrlimit(Resource::Fsize);
        setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum }).unwrap();
    };
    let (a, b) = (rig.tensor("a", 1), rig.tensor("b", 1));
    rig.store.commit(json!(1)).unwrap();
    let a = overwrite(&rig, a, 2);

    limit(Some(64));
    let refused = rig.store.commit(json!(2)).unwrap_err();
    let StoreError::Directory { action: "write", path, source } = &refused else { panic!("{refused}") };
    assert_eq!(source.raw_os_error(), Some(Errno::FBIG.raw_os_error()));
    assert_eq!(path, &rig.store.path().join("manifest.new"));
    assert_eq!(rig.store.meta(), json!(1));
    let failed = b.overwrite(rig.block(3)).unwrap().store().wait().unwrap_err();
    assert!(matches!(&failed.error, StoreError::Transfer { tensor, .. } if tensor == "b"), "{failed}");
    let dirty = failed.tensor.unwrap();
    assert_eq!(dirty.bytes(), vec![3; BLOCK], "the data comes home");
    assert!(matches!(rig.store.provide(room(4)), Err(StoreError::Io(IoError::File { .. }))));

    limit(None);
    let b = dirty.store().wait().unwrap();
    rig.store.commit(json!(2)).unwrap();
    let path = rig.store.path().to_owned();
    rig.store.keep();
    drop((a, b));
    let Rig { store, engine, pool, folder } = rig;
    drop(store);
    let store = Store::open(&path, Durability::Step, &engine).unwrap();
    let rig = Rig { store, engine, pool, folder };
    for (name, byte) in [("a", 2), ("b", 3)] {
        assert_eq!(rig.read(rig.store.adopt(name, BLOCK).unwrap()).1, vec![byte; BLOCK]);
    }
}
