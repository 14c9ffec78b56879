//! Generations that are read beside their owner, or after it.

use overspill_io::{BackendChoice, Block};
use overspill_swap::{Durability, Store, StoreError, View, Volume};
use serde_json::json;

use crate::rig::{BACKENDS, BLOCK, Rig};

impl Rig {
    fn volumes(&self) -> [Volume; 1] {
        let engines = vec![self.engine.clone()];
        [Volume { directory: self.folder.path().join("store"), engines, weight: 1 }]
    }

    fn seen(&self, view: &View, tensor: &str) -> Result<Block, StoreError> {
        view.load(tensor, self.pool.lease(BLOCK).unwrap())?.wait()
    }
}

#[test]
fn a_snapshot_is_read_while_the_owner_commits_on() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 3, 4);
        let mut a = rig.tensor("a", 1);
        let _b = rig.tensor("b", 2);
        rig.store.commit(json!({ "step": 1 })).unwrap();
        rig.store.snapshot("first").unwrap();
        let view = View::of_snapshot(&rig.volumes(), "first").unwrap();
        assert_eq!((view.meta(), view.generation()), (&json!({ "step": 1 }), 1));
        for byte in 3..20 {
            a = a.overwrite(rig.block(byte)).unwrap().store().wait().unwrap();
            rig.store.commit(json!({ "step": byte })).unwrap();
            assert_eq!(&*rig.seen(&view, "a").unwrap(), [1; BLOCK]);
        }
        assert_eq!(&*rig.seen(&view, "b").unwrap(), [2; BLOCK]);
        assert!(matches!(view.bytes("c"), Err(StoreError::Missing { .. })));
        let short = view.load("a", rig.pool.lease(BLOCK).unwrap().split_off(4096)).unwrap_err();
        assert!(matches!(short, StoreError::WrongLength { .. }), "{short}");
    }
}

#[test]
fn a_snapshot_that_goes_away_under_its_reader_is_missed_not_misread() {
    let rig = Rig::new(BackendChoice::Auto, 3, 1);
    let mut a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    rig.store.snapshot("s").unwrap();
    let view = View::of_snapshot(&rig.volumes(), "s").unwrap();
    rig.store.delete_snapshot("s").unwrap();
    for byte in 3..40 {
        a = a.overwrite(rig.block(byte)).unwrap().store().wait().unwrap();
        rig.store.commit(json!(byte)).unwrap();
    }
    let error = rig.seen(&view, "a").unwrap_err();
    assert!(matches!(&error, StoreError::NoSnapshot { name, .. } if name == "s"), "{error}");
    let error = View::of_snapshot(&rig.volumes(), "s").unwrap_err();
    assert!(matches!(error, StoreError::NoSnapshot { .. }), "{error}");
}

#[test]
fn damage_is_named_with_tensor_and_place() {
    let rig = Rig::new(BackendChoice::Auto, 3, 2);
    let (_a, _b) = (rig.tensor("a", 1), rig.tensor("b", 2));
    rig.store.commit(json!(1)).unwrap();
    rig.store.snapshot("s").unwrap();
    let mut bytes = std::fs::read(rig.data()).unwrap();
    let at = bytes.iter().position(|&byte| byte == 2).unwrap();
    bytes[at + 77] ^= 1;
    std::fs::write(rig.data(), &bytes).unwrap();
    let view = View::of_snapshot(&rig.volumes(), "s").unwrap();
    assert_eq!(&*rig.seen(&view, "a").unwrap(), [1; BLOCK]);
    let error = rig.seen(&view, "b").unwrap_err();
    let named =
        matches!(&error, StoreError::Corrupt { tensor, offset, .. } if tensor == "b" && *offset == at as u64);
    assert!(named, "{error}");
    std::fs::File::options().write(true).open(rig.data()).unwrap().set_len(4096).unwrap();
    let error = View::of_snapshot(&rig.volumes(), "s").unwrap_err();
    assert!(matches!(error, StoreError::Truncated { .. }), "{error}");
}

#[test]
fn the_committed_generation_is_shown_to_one_who_holds_the_lock() {
    let rig = Rig::new(BackendChoice::Auto, 3, 2);
    let a = rig.tensor("a", 1);
    let volumes = rig.volumes();
    assert!(matches!(View::open(&volumes), Err(StoreError::Locked { .. })));
    rig.store.commit(json!({ "step": 9 })).unwrap();
    rig.store.keep();
    let Rig { store, engine, pool, folder } = rig;
    drop((a, store));
    let view = View::open(&volumes).unwrap();
    let block = view.load("a", pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
    assert_eq!((&*block, view.meta()), (&[1; BLOCK][..], &json!({ "step": 9 })));
    let path = folder.path().join("store");
    assert!(matches!(Store::open(&path, Durability::Step, &engine), Err(StoreError::Locked { .. })));
    drop(view);
    assert!(path.join("manifest").exists(), "looking at it removes nothing");
    Store::open(&path, Durability::Step, &engine).unwrap();
    let none = Volume { directory: folder.path().join("none"), ..volumes[0].clone() };
    assert!(matches!(View::open(&[none]), Err(StoreError::Directory { .. })));
    assert!(View::open(&[]).is_err());
}

#[test]
fn a_snapshot_that_is_made_anew_under_its_reader_is_no_damage() {
    let rig = Rig::new(BackendChoice::Auto, 3, 1);
    let mut a = rig.tensor("a", 1);
    rig.store.commit(json!(1)).unwrap();
    rig.store.snapshot("s").unwrap();
    let view = View::of_snapshot(&rig.volumes(), "s").unwrap();
    rig.store.delete_snapshot("s").unwrap();
    for byte in 3..40 {
        a = a.overwrite(rig.block(byte)).unwrap().store().wait().unwrap();
        rig.store.commit(json!(byte)).unwrap();
    }
    rig.store.snapshot("s").unwrap();
    let error = rig.seen(&view, "a").unwrap_err();
    assert!(matches!(&error, StoreError::SnapshotReplaced { name, .. } if name == "s"), "{error}");
}
