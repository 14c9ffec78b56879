//! Who owns a directory, and what becomes of it.

use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn a_living_owner_is_named_and_a_dead_one_is_not_taken_over() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("store");
    let owner = Directory::create(&path, 1, "label").unwrap();
    match Directory::create(&path, 1, "label") {
        Err(StoreError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    owner.keep();
    drop(owner);
    assert!(matches!(Directory::create(&path, 1, "label"), Err(StoreError::Leftover { .. })));
    assert!(path.join(LOCK).exists());
}

#[test]
fn the_lock_ends_with_its_owner_whoever_has_inherited_the_descriptor() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("store");
    let owner = Directory::create(&path, 1, "label").unwrap();
    owner.keep();
    let _inherited = owner.lock.try_clone().unwrap();
    drop(owner);
    drop(Directory::open(&path, 1).unwrap());
    let again = Directory::open(&path, 1).unwrap();
    assert!(matches!(Directory::open(&path, 1), Err(StoreError::Locked { .. })));
    drop(again);
}

#[test]
fn what_a_process_of_the_same_number_left_half_made_is_not_in_the_way() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("store");
    let left = make_aside(&path).unwrap();
    std::fs::write(left.join(LOCK), "1").unwrap();
    drop(Directory::create(&path, 1, "label").unwrap());
    assert!(!path.exists() && left.join(LOCK).exists());
    assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
}

#[test]
fn removal_takes_its_own_files_and_leaves_a_foreign_one() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("store");
    drop(Directory::create(&path, 1, "label").unwrap());
    assert!(!path.exists());

    let directory = Directory::create(&path, 2, "label").unwrap();
    std::fs::write(path.join(DATA), "x").unwrap();
    std::fs::write(path.join("data.1"), "x").unwrap();
    std::fs::write(path.join("data.2"), "of somebody else").unwrap();
    std::fs::write(path.join("thesis.txt"), "dear to somebody").unwrap();
    drop(directory);
    assert!(path.join("thesis.txt").exists());
    assert!(path.join("data.2").exists());
    assert!(!path.join(DATA).exists() && !path.join("data.1").exists());
}

#[test]
fn the_directory_and_the_lock_are_private() {
    let parent = tempfile::tempdir().unwrap();
    let directory = Directory::create(&parent.path().join("store"), 1, "label").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(directory.path()), 0o700);
    assert_eq!(mode(&directory.path().join(LOCK)), 0o600);
}

#[test]
fn a_missing_parent_and_a_symbolic_link_are_typed_errors() {
    let parent = tempfile::tempdir().unwrap();
    let missing = parent.path().join("no/store");
    match Directory::create(&missing, 1, "label") {
        Err(StoreError::Directory { path, source, .. }) => {
            assert_eq!(path, missing);
            assert_eq!(source.kind(), io::ErrorKind::NotFound);
        }
        other => panic!("{other:?}"),
    }
    let link = parent.path().join("link");
    std::os::unix::fs::symlink(parent.path().join("elsewhere"), &link).unwrap();
    assert!(matches!(Directory::create(&link, 1, "label"), Err(StoreError::Leftover { .. })));
}
