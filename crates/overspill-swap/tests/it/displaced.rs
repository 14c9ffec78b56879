//! Directories that are moved, removed or replaced while a store has them open, or another's lock is put into.
//!
//! Every law holds for the home and for a further volume, whatever was done. What took a directory's place is compared
//! byte by byte: it may be the only copy of somebody's run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{Durability, Store, StoreError, Swapped, Volume, Worth, watch_steps};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::apart::alone;

/// A stripe on each of two volumes.
const BOTH: usize = 2 << 20;

/// Fields are dropped from top to bottom.
struct Rig {
    volumes: [Volume; 2],
    pool: Pool,
    folder: TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: BOTH, count: 2 }]).unwrap();
        let volumes = [0, 1].map(|index| {
            let config = EngineConfig { backend: BackendChoice::Threads, ..EngineConfig::default() };
            let engines = vec![Engine::start(config, &pool).unwrap()];
            Volume { directory: folder.path().join(format!("volume {index}")), engines, weight: 1 }
        });
        Self { volumes, pool, folder }
    }

    /// A store over both volumes, and its tensor, of which the first generation is committed.
    fn committed(&self, durability: Durability) -> (Store, Swapped) {
        let capacity = Store::capacity_for(durability, Worth::State, [BOTH]);
        let store = Store::create_over(&self.volumes, durability, capacity).unwrap();
        let tensor = self.tensor(&store, 1);
        store.commit(json!(1)).unwrap();
        (store, tensor)
    }

    fn tensor(&self, store: &Store, byte: u8) -> Swapped {
        let vacant = store.reserve("both", BOTH, Worth::State).unwrap();
        vacant.fill(self.block(byte)).unwrap().store().wait().unwrap()
    }

    fn block(&self, byte: u8) -> Block {
        let mut block = self.pool.lease(BOTH).unwrap();
        block.fill(byte);
        block
    }

    fn overwrite(&self, tensor: Swapped, byte: u8) -> Swapped {
        tensor.overwrite(self.block(byte)).unwrap().store().wait().unwrap()
    }

    #[track_caller]
    fn assert_bytes(&self, tensor: Swapped, byte: u8) -> Swapped {
        let resident = tensor.load(self.pool.lease(BOTH).unwrap()).unwrap().wait().unwrap();
        assert_eq!(resident.bytes(), vec![byte; BOTH]);
        resident.release()
    }

    /// What is committed to the volumes, once the store is closed.
    #[track_caller]
    fn reopened(&self) -> (Value, u8) {
        let store = Store::open_over(&self.volumes, Durability::Step).unwrap();
        let tensor = store.adopt("both", BOTH).unwrap();
        let resident = tensor.load(self.pool.lease(BOTH).unwrap()).unwrap().wait().unwrap();
        let byte = resident.bytes()[0];
        assert_eq!(resident.bytes(), vec![byte; BOTH]);
        (store.meta(), byte)
    }

    fn directory(&self, volume: usize) -> &Path {
        &self.volumes[volume].directory
    }

    /// Where a directory is moved to.
    fn aside(&self) -> PathBuf {
        self.folder.path().join("aside")
    }

    /// A store of somebody else that nobody has open, in a directory of this name.
    fn stranger(&self, path: &Path) -> BTreeMap<String, Vec<u8>> {
        let capacity = Store::capacity_for(Durability::Step, Worth::State, [BOTH]);
        let engine = &self.volumes[0].engines[0];
        let store = Store::create(path, Durability::Step, capacity, engine).unwrap();
        drop(self.tensor(&store, 99));
        store.commit(json!("of somebody else")).unwrap();
        store.keep();
        drop(store);
        // It was killed in a commit.
        for name in ["manifest.new", "manifest.old"] {
            std::fs::write(path.join(name), "torn").unwrap();
        }
        contents(path)
    }
}

/// What is done to the directory of a store that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Displacement {
    Moved,
    MovedForAnEmptyOne,
    MovedForAStore,
    Removed,
    RemovedForAnEmptyOne,
    RemovedForAStore,
    Locked,
}

impl Displacement {
    const ALL: [Self; 7] = [
        Self::Moved,
        Self::MovedForAnEmptyOne,
        Self::MovedForAStore,
        Self::Removed,
        Self::RemovedForAnEmptyOne,
        Self::RemovedForAStore,
        Self::Locked,
    ];

    fn is_undoable(self) -> bool {
        !matches!(self, Self::Removed | Self::RemovedForAnEmptyOne | Self::RemovedForAStore)
    }

    fn happen(self, rig: &Rig, path: &Path) {
        match self {
            Self::Moved | Self::MovedForAnEmptyOne | Self::MovedForAStore => {
                std::fs::rename(path, rig.aside()).unwrap();
            }
            Self::Removed | Self::RemovedForAnEmptyOne | Self::RemovedForAStore => {
                remove(path);
            }
            Self::Locked => {
                std::fs::rename(path.join("lock"), rig.aside()).unwrap();
                std::fs::write(path.join("lock"), "1").unwrap();
            }
        }
        match self {
            Self::MovedForAStore | Self::RemovedForAStore => drop(rig.stranger(path)),
            Self::MovedForAnEmptyOne | Self::RemovedForAnEmptyOne => std::fs::create_dir(path).unwrap(),
            Self::Moved | Self::Removed | Self::Locked => {}
        }
    }

    fn be_undone(self, rig: &Rig, path: &Path) {
        match self {
            Self::Locked => std::fs::rename(rig.aside(), path.join("lock")).unwrap(),
            Self::Moved => std::fs::rename(rig.aside(), path).unwrap(),
            _ => {
                remove(path);
                std::fs::rename(rig.aside(), path).unwrap();
            }
        }
    }
}

/// Every file below a path, with its bytes.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(path) else { return BTreeMap::new() };
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    entries.map(entry).collect()
}

/// As somebody removes a directory of files by hand.
fn remove(path: &Path) {
    for name in contents(path).keys() {
        std::fs::remove_file(path.join(name)).unwrap();
    }
    std::fs::remove_dir(path).unwrap();
}

#[track_caller]
fn assert_displaced(result: Result<(), StoreError>, path: &Path) {
    let refused = result.unwrap_err();
    let StoreError::Displaced { path: named } = &refused else { panic!("{refused}") };
    assert!(named.starts_with(path), "{} is not in {}", named.display(), path.display());
    assert!(refused.to_string().contains(path.to_str().unwrap()), "{refused}");
}

#[test]
fn nothing_is_committed_while_a_directory_is_not_the_stores_own_and_everything_once_it_is_again() {
    for displacement in Displacement::ALL {
        for volume in [0, 1] {
            let rig = Rig::new();
            let path = rig.directory(volume);
            let (store, tensor) = rig.committed(Durability::Step);
            let tensor = rig.overwrite(tensor, 2);
            displacement.happen(&rig, path);
            let found = contents(path);
            for _ in 0..2 {
                assert_displaced(store.commit(json!(2)), path);
                assert_displaced(store.snapshot("one"), path);
                assert_displaced(store.delete_snapshot("one"), path);
                assert_displaced(store.provide(1 << 30), path);
            }
            if displacement != Displacement::Locked {
                assert_eq!(contents(path), found, "{displacement:?} of volume {volume}");
            }
            assert_eq!((store.generation(), store.meta()), (1, json!(1)));
            let tensor = rig.overwrite(rig.assert_bytes(tensor, 2), 3);
            let tensor = rig.assert_bytes(tensor, 3);
            store.roll_back().unwrap();
            let tensor = rig.overwrite(rig.assert_bytes(tensor, 1), 4);
            if displacement.is_undoable() {
                displacement.be_undone(&rig, path);
                store.commit(json!(4)).unwrap();
                store.snapshot("one").unwrap();
                store.delete_snapshot("one").unwrap();
                store.keep();
                drop((store, tensor));
                assert_eq!(rig.reopened(), (json!(4), 4));
            }
        }
    }
}

#[test]
fn a_store_that_ends_removes_its_own_directories_and_no_others() {
    for displacement in Displacement::ALL {
        for volume in [0, 1] {
            let rig = Rig::new();
            let path = rig.directory(volume);
            let (store, tensor) = rig.committed(Durability::Step);
            store.snapshot("one").unwrap();
            displacement.happen(&rig, path);
            let (found, moved) = (contents(path), contents(&rig.aside()));
            let is_there = path.exists();
            drop((store, tensor));
            assert_eq!(contents(path), found, "{displacement:?} of volume {volume}");
            assert_eq!(contents(&rig.aside()), moved, "{displacement:?} of volume {volume}");
            assert_eq!(path.exists(), is_there);
            assert!(!rig.directory(1 - volume).exists(), "nobody has touched the other volume");
        }
    }
}

#[test]
fn a_snapshot_is_kept_while_its_directory_is_elsewhere() {
    let rig = Rig::new();
    let (store, tensor) = rig.committed(Durability::Step);
    store.snapshot("one").unwrap();
    let tensor = rig.overwrite(tensor, 2);
    for displacement in Displacement::ALL.into_iter().filter(|displacement| displacement.is_undoable()) {
        displacement.happen(&rig, rig.directory(0));
        assert_displaced(store.snapshot("two"), rig.directory(0));
        assert_displaced(store.delete_snapshot("one"), rig.directory(0));
        assert_displaced(store.commit(json!(2)), rig.directory(0));
        assert_eq!(store.snapshots(), ["one"]);
        displacement.be_undone(&rig, rig.directory(0));
    }
    let mut tensor = tensor;
    for byte in 3..6 {
        tensor = rig.overwrite(tensor, byte);
        store.commit(json!(byte)).unwrap();
    }
    store.keep();
    drop((store, tensor));
    Store::restore(rig.directory(0), "one").unwrap();
    assert_eq!(rig.reopened(), (json!(1), 1));
}

#[test]
fn what_is_overwritten_in_place_takes_no_manifest_of_another_store_away() {
    for volume in [0, 1] {
        for displacement in [Displacement::MovedForAStore, Displacement::Moved] {
            let rig = Rig::new();
            let path = rig.directory(volume);
            let (store, tensor) = rig.committed(Durability::None);
            displacement.happen(&rig, path);
            let found = contents(path);
            let mut dirty = tensor.overwrite(rig.block(2)).unwrap();
            for _ in 0..2 {
                let failed = dirty.store().wait().unwrap_err();
                assert_displaced(Err(failed.error), path);
                dirty = failed.tensor.expect("nothing was given to the kernel");
            }
            assert_eq!(contents(path), found);
            displacement.be_undone(&rig, path);
            let tensor = dirty.store().wait().unwrap();
            assert!(!rig.directory(0).join("manifest").exists(), "what it named is overwritten");
            store.commit(json!(2)).unwrap();
            store.keep();
            drop((store, tensor));
            assert_eq!(rig.reopened(), (json!(2), 2));
        }
    }
}

#[test]
fn no_manifest_names_a_data_file_that_is_not_there() {
    for volume in [0, 1] {
        let rig = Rig::new();
        let data = rig.directory(volume).join("data");
        let (store, tensor) = rig.committed(Durability::Step);
        let tensor = rig.overwrite(tensor, 2);
        std::fs::rename(&data, rig.aside()).unwrap();
        assert_displaced(store.commit(json!(2)), &data);
        std::fs::write(&data, "of somebody else").unwrap();
        assert_displaced(store.commit(json!(2)), &data);
        std::fs::rename(rig.aside(), &data).unwrap();
        store.commit(json!(2)).unwrap();
        store.keep();
        drop((store, tensor));
        assert_eq!(rig.reopened(), (json!(2), 2));
    }
}

#[test]
fn a_lock_that_was_swept_away_stops_nothing() {
    let rig = Rig::new();
    let (store, tensor) = rig.committed(Durability::Step);
    for volume in [0, 1] {
        std::fs::remove_file(rig.directory(volume).join("lock")).unwrap();
    }
    let tensor = rig.overwrite(tensor, 2);
    store.commit(json!(2)).unwrap();
    assert_eq!(store.generation(), 2);
    drop((store, tensor));
    assert_eq!(std::fs::read_dir(rig.folder.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_that_is_replaced_at_any_step_of_a_commit_or_of_the_end_costs_nobody_a_committed_state() {
    alone("displaced::replaced_at_every_step");
}

/// Puts one directory in the place of another before the step of this number.
#[derive(Debug)]
struct Replacement {
    steps_left: usize,
    path: PathBuf,
    aside: PathBuf,
    stranger: PathBuf,
}

impl Replacement {
    /// Nothing happens to a directory that is removed already.
    fn happen(&self) {
        if self.path.exists() {
            std::fs::rename(&self.path, &self.aside).unwrap();
            std::fs::rename(&self.stranger, &self.path).unwrap();
        }
    }

    fn be_undone(&self) {
        std::fs::rename(&self.path, &self.stranger).unwrap();
        std::fs::rename(&self.aside, &self.path).unwrap();
    }
}

/// What is to happen in this process.
struct Planned(Arc<Mutex<Option<Replacement>>>);

impl Planned {
    fn watched() -> Self {
        let planned = Arc::new(Mutex::new(None::<Replacement>));
        let watched = Arc::clone(&planned);
        watch_steps(move |_| {
            let mut planned = watched.lock().unwrap();
            match planned.as_mut() {
                Some(replacement) if replacement.steps_left > 0 => replacement.steps_left -= 1,
                Some(_) => planned.take().unwrap().happen(),
                None => {}
            }
        });
        Self(planned)
    }

    /// Does something meanwhile. Whether it happened.
    fn during(&self, rig: &Rig, volume: usize, step: usize, act: impl FnOnce()) -> (Replacement, bool) {
        let replacement = || Replacement {
            steps_left: step,
            path: rig.directory(volume).to_owned(),
            aside: rig.aside(),
            stranger: rig.folder.path().join("stranger"),
        };
        *self.0.lock().unwrap() = Some(replacement());
        act();
        (replacement(), self.0.lock().unwrap().take().is_none())
    }
}

#[test]
#[ignore = "watches every step of the process; run by the test above"]
fn replaced_at_every_step() {
    let planned = Planned::watched();
    for volume in [0, 1] {
        let steps = (0..).take_while(|&step| is_survived_in_a_commit(&planned, volume, step)).count();
        assert_eq!(steps, 10, "of a commit");
        let steps = (0..).take_while(|&step| is_survived_at_the_end(&planned, volume, step)).count();
        assert!(steps >= 6, "{steps} of the end");
    }
}

/// Whether a commit has so many steps.
fn is_survived_in_a_commit(planned: &Planned, volume: usize, step: usize) -> bool {
    let rig = Rig::new();
    let theirs = rig.stranger(&rig.folder.path().join("stranger"));
    let (store, tensor) = rig.committed(Durability::Step);
    let tensor = rig.overwrite(tensor, 2);
    let mut committed = Ok(());
    let (replacement, happened) = planned.during(&rig, volume, step, || committed = store.commit(json!(2)));
    if !happened {
        committed.unwrap();
        return false;
    }
    assert!(committed.is_err(), "a commit succeeded whose directory was replaced before step {step}");
    let found = contents(rig.directory(volume));
    for (name, bytes) in theirs {
        assert_eq!(found.get(&name), Some(&bytes), "{name} before step {step}");
    }
    replacement.be_undone();
    let tensor = rig.assert_bytes(tensor, 2);
    let again = store.commit(json!(3));
    store.keep();
    drop((store, tensor));
    match again {
        Ok(()) => assert_eq!(rig.reopened(), (json!(3), 2), "before step {step}"),
        Err(StoreError::Poisoned { .. }) => {
            assert!([(json!(1), 1), (json!(2), 2)].contains(&rig.reopened()), "before step {step}");
        }
        Err(error) => panic!("before step {step}: {error}"),
    }
    true
}

/// Whether the end has so many steps.
fn is_survived_at_the_end(planned: &Planned, volume: usize, step: usize) -> bool {
    let rig = Rig::new();
    let theirs = rig.stranger(&rig.folder.path().join("stranger"));
    let (store, tensor) = rig.committed(Durability::Step);
    let (_, happened) = planned.during(&rig, volume, step, || drop((store, tensor)));
    if rig.aside().exists() {
        assert_eq!(contents(rig.directory(volume)), theirs, "before step {step}");
        let left = contents(&rig.aside());
        assert!(left.is_empty() || left.contains_key("data"), "before step {step}: {:?}", left.keys());
    }
    happened
}
