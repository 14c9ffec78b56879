//! Snapshots that other processes ask the owner of a store for, and take away from under it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use overspill_io::BackendChoice;
use overspill_swap::{Answer, Asked, Deleted, Durability, Store, StoreError, Swapped, Wish};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::rig::{BLOCK, Rig};

fn overwrite(rig: &Rig, tensor: Swapped, byte: u8) -> Swapped {
    tensor.overwrite(rig.block(byte)).unwrap().store().wait().unwrap()
}

/// A store with the committed tensor `a`, and where it is.
fn rig() -> (Rig, Swapped, PathBuf) {
    let rig = Rig::new(BackendChoice::Threads, 2, 2);
    let a = rig.tensor("a", 1);
    rig.store.commit(json!({ "step": 1 })).unwrap();
    let path = rig.store.path().to_owned();
    (rig, a, path)
}

fn wish(path: &Path, name: &str) -> Wish {
    match Store::ask_for_snapshot(path, name) {
        Ok(Asked::Wished(wish)) => wish,
        other => panic!("{other:?}"),
    }
}

fn step_of(path: &Path, snapshot: &str) -> Value {
    let text = std::fs::read_to_string(path.join(format!("snapshot.{snapshot}"))).unwrap();
    let body: Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    body["meta"]["step"].clone()
}

#[test]
fn a_wish_is_granted_with_the_next_commit_and_kept_from_then_on() {
    let (rig, a, path) = rig();
    let wished = wish(&path, "best");
    assert_eq!(wished.pid, Some(std::process::id()));
    assert_eq!(wished.answer().unwrap(), Answer::Pending);
    assert!(rig.store.snapshots().is_empty());
    let mut a = overwrite(&rig, a, 2);
    rig.store.commit(json!({ "step": 2 })).unwrap();
    assert_eq!(wished.answer().unwrap(), Answer::Granted);
    assert_eq!(wished.take_back().unwrap(), Answer::Granted, "it is too late for that");
    assert!(!path.join("wish.best").exists());
    assert_eq!((rig.store.snapshots(), step_of(&path, "best")), (vec!["best".to_owned()], json!(2)));
    for byte in 3..8 {
        a = overwrite(&rig, a, byte);
        rig.store.commit(json!({ "step": byte })).unwrap();
    }
    drop(a);
    let exists = Store::ask_for_snapshot(&path, "best").unwrap_err();
    assert!(matches!(exists, StoreError::SnapshotExists { .. }), "{exists}");
    rig.store.keep();
    drop(rig.store);
    Store::restore(&path, "best").unwrap();
    let store = Store::open(&path, Durability::Step, &rig.engine).unwrap();
    let a = store.adopt("a", BLOCK).unwrap().load(rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
    assert_eq!(a.bytes(), vec![2; BLOCK]);
}

#[test]
fn a_wish_that_cannot_be_granted_is_told_why_and_fails_no_commit() {
    let (rig, a, path) = rig();
    std::fs::write(path.join("snapshot.mine"), "of somebody else").unwrap();
    let wished = wish(&path, "mine");
    rig.store.commit(json!({ "step": 2 })).unwrap();
    match wished.answer() {
        Err(StoreError::WishRefused { name, reason, .. }) => {
            assert_eq!(name, "mine");
            assert!(reason.contains("already has a snapshot mine"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!path.join("wish.mine").exists());
    assert_eq!(std::fs::read(path.join("snapshot.mine")).unwrap(), b"of somebody else");
    assert!(rig.store.snapshots().is_empty());
    rig.store.commit(json!({ "step": 3 })).unwrap();
    assert!(matches!(Store::ask_for_snapshot(&path, "a/b"), Err(StoreError::SnapshotName { .. })));
    drop(a);
}

#[test]
fn what_looks_like_a_wish_and_is_none_is_left_alone() {
    let (rig, a, path) = rig();
    std::fs::write(path.join("wish.txt"), "for a birthday").unwrap();
    std::os::unix::fs::symlink(path.join("wish.txt"), path.join("wish.link")).unwrap();
    std::fs::create_dir(path.join("wish.d")).unwrap();
    rig.store.commit(json!({ "step": 2 })).unwrap();
    assert!(rig.store.snapshots().is_empty());
    drop((a, rig.store));
    assert_eq!(std::fs::read(path.join("wish.txt")).unwrap(), b"for a birthday");
    assert!(path.join("wish.link").is_symlink() && path.join("wish.d").exists());
}

#[test]
fn a_private_file_that_is_named_like_a_wish_is_no_answer_to_one() {
    let (_rig, a, path) = rig();
    let file = path.join("wish.list");
    std::fs::write(&file, "for a birthday").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let refused = Store::ask_for_snapshot(&path, "list").unwrap_err();
    assert!(matches!(refused, StoreError::WishExists { .. }), "{refused}");
    assert_eq!(std::fs::read(&file).unwrap(), b"for a birthday");
    drop(a);
}

#[test]
fn a_wish_that_was_taken_back_is_never_granted() {
    let (rig, a, path) = rig();
    let wished = wish(&path, "late");
    assert_eq!(wished.take_back().unwrap(), Answer::Pending);
    rig.store.commit(json!({ "step": 2 })).unwrap();
    assert!(rig.store.snapshots().is_empty() && !path.join("snapshot.late").exists());
    drop(a);
}

#[test]
fn whoever_wishes_makes_the_snapshot_when_the_owner_has_ended() {
    let (rig, a, path) = rig();
    let wished = wish(&path, "last");
    drop(a);
    rig.store.keep();
    drop(rig.store);
    assert_eq!(wished.answer().unwrap(), Answer::Granted);
    assert!(!path.join("wish.last").exists());
    assert_eq!(step_of(&path, "last"), json!(1));
    assert!(matches!(Store::ask_for_snapshot(&path, "another"), Ok(Asked::Made)));
    let store = Store::open(&path, Durability::Step, &rig.engine).unwrap();
    assert_eq!(store.snapshots(), ["another", "last"]);
}

#[test]
fn an_owner_that_died_in_the_middle_of_an_answer_has_granted_or_not_and_it_is_known_which() {
    let (rig, a, path) = rig();
    // It came as far as the name, and not to the end of the wish.
    let wished = wish(&path, "half");
    std::fs::hard_link(path.join("manifest"), path.join("snapshot.half")).unwrap();
    drop(a);
    rig.store.keep();
    drop(rig.store);
    // The next owner comes first: it has pinned the name, and takes the wish for granted.
    let store = Store::open(&path, Durability::Step, &rig.engine).unwrap();
    assert_eq!(wished.answer().unwrap(), Answer::Pending);
    store.commit(json!({ "step": 2 })).unwrap();
    assert_eq!(wished.answer().unwrap(), Answer::Granted);
    assert_eq!(step_of(&path, "half"), json!(1));
    // Or nobody comes.
    let wished = wish(&path, "again");
    std::fs::hard_link(path.join("manifest"), path.join("snapshot.again")).unwrap();
    drop(store);
    assert_eq!(wished.answer().unwrap(), Answer::Granted);
    assert!(!path.join("wish.again").exists());
}

#[test]
fn a_store_that_goes_takes_the_wishes_with_it() {
    let (rig, a, path) = rig();
    let (wished, other) = (wish(&path, "gone"), wish(&path, "answered"));
    std::fs::write(path.join("snapshot.answered"), "in the way").unwrap();
    rig.store.commit(json!({ "step": 2 })).unwrap();
    std::fs::remove_file(path.join("snapshot.answered")).unwrap();
    assert!(path.join("wish.answered").exists() && wished.answer().unwrap() == Answer::Granted);
    let late = wish(&path, "late");
    drop((a, rig.store));
    assert!(!path.exists(), "nothing of it is left");
    let gone = late.answer().unwrap_err();
    assert!(matches!(gone, StoreError::WishGone { .. }), "{gone}");
    let refused = other.answer().unwrap_err();
    assert!(matches!(refused, StoreError::WishRefused { .. }), "the answer is still had: {refused}");
}

#[test]
fn a_wish_that_came_too_late_for_its_store_leaves_no_directory() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (rig, a, path) = rig();
    let wished = wish(&path, "late");
    std::fs::rename(path.join("wish.late"), folder.path().join("aside")).unwrap();
    drop((a, rig.store));
    assert!(!path.exists());
    // As if it had been made after the owner looked for wishes.
    std::fs::create_dir(&path).unwrap();
    std::fs::rename(folder.path().join("aside"), path.join("wish.late")).unwrap();
    assert!(matches!(wished.answer(), Err(StoreError::WishGone { .. })));
    assert!(!path.exists());
}

#[test]
fn two_commands_do_not_wish_for_one_name_and_an_old_answer_is_in_nobodys_way() {
    let (rig, a, path) = rig();
    let first = wish(&path, "x");
    let second = Store::ask_for_snapshot(&path, "x").unwrap_err();
    assert!(matches!(second, StoreError::WishExists { .. }), "{second}");
    std::fs::write(path.join("snapshot.x"), "in the way").unwrap();
    rig.store.commit(json!({ "step": 2 })).unwrap();
    std::fs::remove_file(path.join("snapshot.x")).unwrap();
    // The first command has not looked yet, and gets its answer all the same.
    let third = wish(&path, "x");
    assert!(matches!(first.answer(), Err(StoreError::WishRefused { .. })));
    assert_eq!(third.answer().unwrap(), Answer::Pending, "the first command left this wish alone");
    rig.store.commit(json!({ "step": 3 })).unwrap();
    assert_eq!(third.answer().unwrap(), Answer::Granted);
    drop(a);
}

#[test]
fn what_another_process_deletes_is_kept_until_the_next_commit_and_free_then() {
    let (rig, a, path) = rig();
    rig.store.snapshot("s").unwrap();
    let a = overwrite(&rig, a, 2);
    rig.store.commit(json!({ "step": 2 })).unwrap();
    assert_eq!(rig.store.usage().allocated_bytes, 2 * BLOCK as u64);
    let deleted = Store::delete_snapshot_in(&path, "s").unwrap();
    assert_eq!(deleted, Deleted::AtNextCommit { pid: Some(std::process::id()) });
    assert!(!path.join("snapshot.s").exists());
    assert_eq!(rig.store.usage().allocated_bytes, 2 * BLOCK as u64, "a loss of power may bring it back");
    let pinned = || std::fs::read(path.join("data")).unwrap()[..BLOCK].to_vec();
    let a = overwrite(&rig, overwrite(&rig, a, 3), 4);
    assert_eq!(pinned(), vec![1; BLOCK]);
    rig.store.commit(json!({ "step": 3 })).unwrap();
    assert!(rig.store.snapshots().is_empty());
    assert_eq!(rig.store.usage().allocated_bytes, BLOCK as u64);
    let missing = Store::delete_snapshot_in(&path, "s").unwrap_err();
    assert!(matches!(missing, StoreError::NoSnapshot { .. }), "{missing}");

    // The name can be had again at once, by a wish and by the owner itself.
    rig.store.snapshot("s").unwrap();
    Store::delete_snapshot_in(&path, "s").unwrap();
    let wished = wish(&path, "s");
    rig.store.commit(json!({ "step": 4 })).unwrap();
    assert_eq!((wished.answer().unwrap(), step_of(&path, "s")), (Answer::Granted, json!(4)));
    Store::delete_snapshot_in(&path, "s").unwrap();
    rig.store.snapshot("s").unwrap();
    assert!(path.join("snapshot.s").exists());

    drop(a);
    rig.store.keep();
    drop(rig.store);
    assert_eq!(Store::delete_snapshot_in(&path, "s").unwrap(), Deleted::Now);
}

/// As many wishes as it takes until both have won; more than enough commits are raced with before that is checked.
const WISHES_MIN: usize = 50;
const WISHES_MAX: usize = 5000;

#[test]
fn a_wish_is_either_granted_or_taken_back_whoever_is_faster() {
    let (rig, a, path) = rig();
    let over = AtomicBool::new(false);
    let mut granted = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut random = ChaCha8Rng::seed_from_u64(5);
            let (mut granted, mut taken_back) = (Vec::new(), 0);
            for number in 0..WISHES_MAX {
                if number >= WISHES_MIN && !granted.is_empty() && taken_back > 0 {
                    break;
                }
                let name = format!("n{number}");
                let wished = wish(&path, &name);
                if random.next_u64().is_multiple_of(2) {
                    std::thread::park_timeout(Duration::from_micros(random.next_u64() % 3000));
                }
                let answers = [wished.answer().unwrap(), wished.take_back().unwrap()];
                match answers {
                    [_, Answer::Granted] => granted.push(name),
                    [Answer::Pending, Answer::Pending] => {
                        taken_back += 1;
                        assert!(!path.join(format!("snapshot.{name}")).exists(), "{name}");
                    }
                    [Answer::Granted, Answer::Pending] => panic!("{name} was granted, and taken back then"),
                }
            }
            over.store(true, Ordering::Relaxed);
            assert!(
                !granted.is_empty() && taken_back > 0,
                "{} granted, {taken_back} taken back",
                granted.len()
            );
            granted
        });
        while !over.load(Ordering::Relaxed) && !asking.is_finished() {
            rig.store.commit(json!({ "step": 1 })).unwrap();
        }
        asking.join().unwrap()
    });
    rig.store.commit(json!({ "step": 2 })).unwrap();
    granted.sort();
    assert_eq!(rig.store.snapshots(), granted, "what was taken back is not made later");
    drop(a);
}
