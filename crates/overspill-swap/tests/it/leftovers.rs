//! What ended processes leave is found by what it holds, and removed by name.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use overspill_io::{BlockClass, Engine, EngineConfig, Pool};
use overspill_swap::{
    Durability, Leftover, Owner, Remains, Removal, Removed, Store, StoreError, Volume, Worth, leftovers,
    remove_leftover,
};
use serde_json::json;
use tempfile::TempDir;

use crate::apart::apart;

const BLOCK: usize = 4096;
/// A process that no system has.
const NOBODY: u32 = u32::MAX;

/// Fields are dropped from top to bottom.
struct Place {
    engine: Engine,
    pool: Pool,
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: BLOCK, count: 2 }]).unwrap();
        let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
        Self { engine, pool, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn volumes(&self, names: &[&str]) -> Vec<Volume> {
        let volume = |name: &&str| Volume {
            directory: self.path(name),
            engines: vec![self.engine.clone()],
            weight: 1,
        };
        names.iter().map(volume).collect()
    }

    /// A store over these directories, with a tensor, that will be left.
    fn store(&self, names: &[&str]) -> Store {
        let store = Store::create_over(&self.volumes(names), Durability::Step, 2 * BLOCK as u64).unwrap();
        let vacant = store.reserve("a", BLOCK, Worth::State).unwrap();
        drop(vacant.fill(self.pool.lease(BLOCK).unwrap()).unwrap().store().wait().unwrap());
        store.keep();
        store
    }

    fn committed(&self, names: &[&str]) -> Store {
        let store = self.store(names);
        store.commit(json!({ "step": 12 })).unwrap();
        store
    }

    fn found(&self) -> Vec<Leftover> {
        leftovers(&[self.folder.path().to_owned()]).unwrap()
    }

    fn one(&self, name: &str) -> Leftover {
        let path = self.path(name);
        self.found().into_iter().find(|leftover| leftover.path == path).unwrap_or_else(|| panic!("no {name}"))
    }
}

fn half_made(path: &Path, files: &[(&str, &str)]) {
    fs::create_dir(path).unwrap();
    for (name, text) in files {
        fs::write(path.join(name), text).unwrap();
    }
}

#[test]
fn stores_are_recognized_by_what_they_hold_and_never_by_their_names() {
    let place = Place::new();
    let living = place.committed(&["living"]);
    let store = place.committed(&["whatever it is called"]);
    store.snapshot("best").unwrap();
    drop(store);
    drop(place.store(&["bare"]));
    half_made(&place.path(&format!("x.new-{NOBODY}-0")), &[("lock", "77"), ("volume", "")]);
    half_made(&place.path(&format!("y.new-{NOBODY}-0")), &[]);
    half_made(&place.path(&format!("z.new-{}-0", std::process::id())), &[("lock", "")]);
    // What others made.
    half_made(&place.path("overspill-store"), &[("data", "x")]);
    half_made(&place.path("database"), &[("lock", "12"), ("data", "x"), ("manifest", "{}")]);
    half_made(&place.path(&format!("w.new-{NOBODY}-0")), &[("lock", "77"), ("thesis.txt", "")]);
    symlink(place.path("bare"), place.path("link")).unwrap();

    let found: Vec<_> = place
        .found()
        .into_iter()
        .map(|found| {
            (found.path.file_name().unwrap().to_str().unwrap().to_owned(), found.owner, found.remains)
        })
        .collect();
    let me = Owner::Process { pid: Some(std::process::id()) };
    let state = |snapshots: &[&str]| Remains::Committed {
        step: Some(12),
        snapshots: snapshots.iter().map(|&name| name.to_owned()).collect(),
    };
    let expected = [
        ("bare".to_owned(), Owner::Nobody, Remains::Uncommitted),
        ("living".to_owned(), me, state(&[])),
        ("whatever it is called".to_owned(), Owner::Nobody, state(&["best"])),
        (format!("x.new-{NOBODY}-0"), Owner::Nobody, Remains::HalfMade),
        (format!("y.new-{NOBODY}-0"), Owner::Nobody, Remains::HalfMade),
        (format!("z.new-{}-0", std::process::id()), me, Remains::HalfMade),
    ];
    assert_eq!(found, expected);
    let bare = place.one("bare");
    assert!(bare.bytes_on_disk > 0 && bare.last_used.is_some());
    let itself = leftovers(&[place.path("bare")]).unwrap();
    assert_eq!(itself.len(), 1, "a store can be named itself");
    assert!(matches!(leftovers(&[place.path("no")]), Err(StoreError::Directory { action: "list", .. })));
    drop(living);
}

#[test]
fn nothing_that_lives_or_can_be_gone_on_from_is_removed() {
    let place = Place::new();
    let living = place.store(&["living"]);
    let refused = remove_leftover(&place.one("living"), Removal::WithCommitted).unwrap_err();
    assert!(matches!(refused, StoreError::Locked { .. }), "{refused}");
    living.commit(json!({ "step": 1 })).unwrap();
    drop(living);
    let before = place.one("living");
    let refused = remove_leftover(&before, Removal::Worthless).unwrap_err();
    assert!(matches!(refused, StoreError::Stays { .. }), "{refused}");

    // What was seen before is not what is removed: it is looked at again.
    drop(place.store(&["bare"]));
    let bare = place.one("bare");
    assert_eq!(bare.remains, Remains::Uncommitted);
    fs::copy(before.path.join("manifest"), bare.path.join("manifest.previous")).unwrap();
    let refused = remove_leftover(&bare, Removal::Worthless).unwrap_err();
    assert!(matches!(refused, StoreError::Stays { .. }), "{refused}");
    fs::remove_file(bare.path.join("manifest.previous")).unwrap();

    // A manifest that is damaged is one that somebody may mend.
    fs::write(bare.path.join("manifest"), "overspill manifest 2 00").unwrap();
    assert!(place.one("bare").remains.may_hold_state());
    fs::remove_file(bare.path.join("manifest")).unwrap();
    assert!(remove_leftover(&bare, Removal::Worthless).unwrap().others.is_empty());
    assert!(!bare.path.exists() && before.path.join("data").exists());
    assert!(remove_leftover(&before, Removal::WithCommitted).unwrap().others.is_empty());
    assert!(!before.path.exists());
}

#[test]
fn removal_takes_what_the_store_made_and_names_what_keeps_the_directory() {
    let place = Place::new();
    let store = place.committed(&["store"]);
    store.snapshot("best").unwrap();
    drop(store);
    let path = place.path("store");
    fs::write(path.join("wish.granted"), "").unwrap();
    for name in ["thesis.txt", "snapshot.png", "wish.txt", "data.7"] {
        fs::write(path.join(name), "dear to somebody").unwrap();
    }
    let found = place.one("store");
    let Removed { bytes, others: stays } = remove_leftover(&found, Removal::WithCommitted).unwrap();
    let foreign: u64 = stays.iter().map(|name| fs::metadata(path.join(name)).unwrap().blocks() * 512).sum();
    assert!(foreign > 0 && bytes > 0 && bytes + foreign == found.bytes_on_disk, "{bytes} of the store's");
    assert_eq!(stays, ["data.7", "snapshot.png", "thesis.txt", "wish.txt"]);
    for name in &stays {
        assert_eq!(fs::read(path.join(name)).unwrap(), b"dear to somebody");
    }
    assert_eq!(fs::read_dir(&path).unwrap().count(), stays.len());
    assert!(place.found().is_empty(), "what is left is nobody's store");
}

#[test]
fn links_are_refused() {
    let place = Place::new();
    drop(place.store(&["store"]));
    let path = place.path("store");
    fs::rename(path.join("data"), place.path("elsewhere")).unwrap();
    symlink(place.path("elsewhere"), path.join("data")).unwrap();
    let refused = remove_leftover(&place.one("store"), Removal::Worthless).unwrap_err();
    assert!(matches!(refused, StoreError::Stays { .. }) && refused.to_string().contains("data"), "{refused}");
    assert!(path.join("data").is_symlink() && path.join("lock").exists());
}

#[test]
fn what_was_half_made_goes_unless_its_maker_lives() {
    let place = Place::new();
    for (maker, files) in [
        (NOBODY, &[("lock", "7"), ("volume", "00")][..]),
        (NOBODY - 1, &[]),
        (std::process::id(), &[("lock", "")]),
    ] {
        half_made(&place.path(&format!("x.new-{maker}-0")), files);
    }
    for maker in [NOBODY, NOBODY - 1] {
        let name = format!("x.new-{maker}-0");
        assert!(remove_leftover(&place.one(&name), Removal::Worthless).unwrap().others.is_empty());
        assert!(!place.path(&name).exists());
    }
    let name = format!("x.new-{}-0", std::process::id());
    assert!(matches!(
        remove_leftover(&place.one(&name), Removal::WithCommitted),
        Err(StoreError::Locked { .. })
    ));
    assert!(place.path(&name).join("lock").exists());
}

#[test]
fn a_volume_is_worth_what_its_home_is_and_without_it_a_state() {
    let place = Place::new();
    drop(place.committed(&["home", "part"]));
    drop(place.store(&["bare home", "bare part"]));
    let remains = |name: &str| place.one(name).remains;
    let part = |home: Option<&str>, committed| Remains::Volume {
        index: 1,
        homes: home.iter().map(|home| place.path(home)).collect(),
        committed,
    };
    assert_eq!(remains("part"), part(Some("home"), true));
    assert_eq!(remains("bare part"), part(Some("bare home"), false));
    let refused = remove_leftover(&place.one("part"), Removal::Worthless).unwrap_err();
    assert!(matches!(refused, StoreError::Stays { .. }), "{refused}");
    assert!(remove_leftover(&place.one("bare part"), Removal::Worthless).unwrap().others.is_empty());

    fs::create_dir(place.path("away")).unwrap();
    fs::rename(place.path("home"), place.path("away/home")).unwrap();
    assert_eq!(remains("part"), part(None, true));
    assert!(remove_leftover(&place.one("part"), Removal::Worthless).is_err());
    assert!(place.path("part/data").exists());
}

#[test]
fn the_parts_of_a_store_without_a_commit_go_all_in_the_order_in_which_they_are_listed() {
    let place = Place::new();
    drop(place.store(&["a home", "b part", "c part"]));
    drop(place.committed(&["kept home", "kept part"]));
    let found = place.found();
    for leftover in found.iter().filter(|leftover| !leftover.remains.may_hold_state()) {
        let removed = remove_leftover(leftover, Removal::Worthless).unwrap();
        assert!(removed.others.is_empty() && removed.bytes > 0);
    }
    let left: Vec<_> = place.found().into_iter().map(|leftover| leftover.path).collect();
    assert_eq!(left, [place.path("kept part"), place.path("kept home")], "and nothing is stranded");
}

#[test]
fn a_copy_of_a_home_without_its_manifests_makes_no_volume_worthless() {
    let place = Place::new();
    drop(place.committed(&["home", "part"]));
    fs::create_dir(place.path("a copy")).unwrap();
    for name in ["volume", "lock"] {
        fs::copy(place.path("home").join(name), place.path("a copy").join(name)).unwrap();
    }
    assert!(place.one("part").remains.may_hold_state());
    let refused = remove_leftover(&place.one("part"), Removal::Worthless).unwrap_err();
    assert!(matches!(refused, StoreError::Stays { .. }), "{refused}");
}

#[test]
fn what_the_system_does_not_let_go_is_said_to_stay() {
    apart("leftovers::what_the_system_does_not_let_go_is_said_to_stay_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by the test without _here"]
fn what_the_system_does_not_let_go_is_said_to_stay_here() {
    let place = Place::new();
    drop(place.store(&["store"]));
    let found = place.one("store");
    // What something is mounted over cannot be removed, whoever tries it.
    let data = found.path.join("data");
    run(Command::new("mount").arg("--bind").args([&data, &data]));
    let refused = remove_leftover(&found, Removal::Worthless).unwrap_err();
    assert!(matches!(refused, StoreError::Stays { .. }), "{refused}");
    assert!(refused.to_string().contains("cannot remove"), "{refused}");
    assert_eq!(place.one("store").remains, Remains::Uncommitted, "it can be found, and removed, again");
    run(Command::new("umount").arg(&data));
    assert!(remove_leftover(&found, Removal::Worthless).unwrap().others.is_empty());
    assert!(!found.path.exists());
}

#[track_caller]
fn run(command: &mut Command) {
    let run = command.output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

#[test]
fn foreign_files_that_are_named_like_snapshots_are_never_removed() {
    let place = Place::new();
    drop(place.committed(&["store"]));
    let path = place.path("store");
    let private = |name: &str, bytes: &[u8]| {
        fs::write(path.join(name), bytes).unwrap();
        fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    private("snapshot.txt", b"of somebody else, who likes privacy");
    private("snapshot.tar", b"thesis/");
    // Longer than any manifest.
    let tar = fs::File::options().write(true).open(path.join("snapshot.tar")).unwrap();
    tar.set_len(2 << 30).unwrap();
    let store = Store::open(&path, Durability::Step, &place.engine).unwrap();
    assert!(store.snapshots().is_empty(), "they keep nobody out");
    drop(store);
    for name in ["tar", "txt"] {
        let missing = Store::delete_snapshot_in(&path, name).unwrap_err();
        assert!(matches!(&missing, StoreError::NoSnapshot { known, .. } if known.is_empty()), "{missing}");
    }
    let stays = remove_leftover(&place.one("store"), Removal::WithCommitted).unwrap().others;
    assert_eq!(stays, ["snapshot.tar", "snapshot.txt"]);
}
