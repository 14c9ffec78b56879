//! A disk that gets full, and a limit that is met, while a store is at work: real ones.
//!
//! The disk is a small file system in memory, mounted in a name space of its own; the limit is the one on the size of
//! files, which stands for a quota.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use overspill_io::{BackendChoice, IoError};
use overspill_swap::{Asked, Durability, Fallback, Store, StoreError, Swapped, Worth};
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
            let StoreError::DiskFull { path: named, needed, available, errno, fallback } = &refused else {
                panic!("{refused}")
            };
            assert_eq!((named, *errno), (&path.join("manifest.new"), Errno::NOSPC.raw_os_error()));
            assert_eq!(*fallback, Fallback::LastCommit);
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
        // A snapshot that no owner of the store made room for.
        store.keep();
        drop((a, store));
        assert!(matches!(Store::ask_for_snapshot(&path, "first"), Ok(Asked::Made)));
        let store = Store::open(&path, Durability::Step, &rig.engine).unwrap();
        let a = overwrite(&rig, store.adopt("a", BLOCK).unwrap(), 2);
        store.commit(json!(2)).unwrap();
        let taken = fill(&disk);

        // The snapshot has one extent, the last commit the other.
        assert_eq!(store.usage().capacity_bytes, room(1));
        let failed = a.overwrite(rig.block(3)).unwrap().store().wait().unwrap_err();
        let StoreError::KeptRoom { path: home, snapshots, source } = &failed.error else {
            panic!("{failed}")
        };
        let IoError::NoSpace { path: named, needed, free } = source else { panic!("{failed}") };
        assert_eq!((home, named, &**snapshots), (&path, &path.join("data"), &["first".to_owned()][..]));
        assert!(*needed >= BLOCK as u64 && free < needed, "{failed}");
        let refused = store.provide(room(1)).unwrap_err();
        assert!(
            refused.to_string().contains("NAME --delete` gives one up"),
            "before a step starts: {refused}"
        );
        assert_eq!(store.usage().capacity_bytes, room(1));
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
fn a_snapshot_for_which_there_is_no_room_is_refused_and_fails_no_step() {
    apart("full::a_snapshot_for_which_there_is_no_room_is_refused_and_fails_no_step_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn a_snapshot_for_which_there_is_no_room_is_refused_and_fails_no_step_here() {
    let rig = Rig::new(BackendChoice::Threads, 2, 1);
    let disk = rig.folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    mount(&disk, "size=4m");
    let path = disk.join("store");
    let store = Store::create(&path, Durability::Step, room(2), &rig.engine).unwrap();
    let (mut a, mut b) = (first(&rig, &store, "a", 1), first(&rig, &store, "b", 2));
    store.commit(json!(1)).unwrap();
    let ballast = disk.join("ballast");
    std::fs::write(&ballast, vec![1; 512 << 10]).unwrap();
    // All but what the directory itself needs for the manifests.
    let taken = fill(&disk);
    File::options().write(true).open(&taken).unwrap().set_len(0).unwrap();
    let manifests = 64 << 10;
    let free = rustix::fs::statvfs(&disk).map(|space| space.f_bavail * space.f_frsize).unwrap();
    std::fs::write(&taken, vec![1; free as usize - manifests]).unwrap();

    let refused = store.snapshot("best").unwrap_err();
    let StoreError::SnapshotRoom { name, needed, available, .. } = &refused else { panic!("{refused}") };
    assert!(name == "best" && needed > available, "{refused}");
    assert!(store.snapshots().is_empty() && !path.join("snapshot.best").exists());
    let Ok(Asked::Wished(wish)) = Store::ask_for_snapshot(&path, "wished") else { panic!() };
    for byte in 3..8 {
        (a, b) = (overwrite(&rig, a, byte), overwrite(&rig, b, byte));
        store.commit(json!(byte)).unwrap();
    }
    let refused = wish.answer().unwrap_err();
    assert!(refused.to_string().contains("no room for snapshot wished"), "{refused}");

    // Where it is granted, the disk may get full: the steps after it have their room.
    std::fs::remove_file(&ballast).unwrap();
    store.snapshot("best").unwrap();
    let full = disk.join("filled");
    std::fs::write(&full, vec![1; 16 << 10]).unwrap();
    for byte in 8..20 {
        let capacity = store.usage().capacity_bytes;
        (a, b) = (overwrite(&rig, a, byte), overwrite(&rig, b, byte));
        store.commit(json!(byte)).unwrap();
        assert_eq!(store.usage().capacity_bytes, capacity);
    }
    drop((a, b));
}

#[test]
fn a_first_commit_for_which_there_is_no_room_promises_nothing_to_resume() {
    apart("full::a_first_commit_for_which_there_is_no_room_promises_nothing_to_resume_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn a_first_commit_for_which_there_is_no_room_promises_nothing_to_resume_here() {
    let rig = Rig::new(BackendChoice::Threads, 2, 1);
    let disk = rig.folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    mount(&disk, "size=4m");
    let path = disk.join("store");
    let store = Store::create(&path, Durability::None, BLOCK as u64, &rig.engine).unwrap();
    let mut a = first(&rig, &store, "a", 1);
    for fallback in [Fallback::Nothing, Fallback::LastCommit, Fallback::Nothing] {
        let taken = fill(&disk);
        let refused = store.commit(json!(1)).unwrap_err();
        assert!(matches!(&refused, StoreError::DiskFull { fallback: said, .. } if *said == fallback));
        let promises = refused.to_string().contains("the last commit is whole");
        assert_eq!(promises, fallback == Fallback::LastCommit, "{refused}");
        std::fs::remove_file(taken).unwrap();
        if fallback == Fallback::LastCommit {
            // What was committed is overwritten in place.
            a = overwrite(&rig, a, 2);
        } else {
            store.commit(json!(1)).unwrap();
        }
    }
    drop(a);
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
