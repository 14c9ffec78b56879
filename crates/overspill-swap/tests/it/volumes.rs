//! A store over several volumes: who is concerned when one fails, and what is left of them.

use std::path::{Path, PathBuf};

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, IoError, Pool};
use overspill_swap::{Durability, Manifest, Store, StoreError, Survey, Swapped, Volume, Worth, measure};
use serde_json::Value;
use tempfile::TempDir;

const MIB: usize = 1 << 20;
/// Two tensors of this length fit into a stripe.
const HALF: usize = MIB / 2;

/// Folders for two volumes; fields are dropped from top to bottom.
struct Rig {
    volumes: Vec<Volume>,
    pool: Pool,
    folder: TempDir,
}

impl Rig {
    /// Volumes of these weights, with as many engines each as there are backends.
    fn new(weights: [u32; 2], backends: &[BackendChoice]) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 3 * MIB, count: 2 }]).unwrap();
        let volume = |(index, weight)| {
            let parent = folder.path().join(format!("disk {index}"));
            std::fs::create_dir(&parent).unwrap();
            let engine = |&backend| {
                let config = EngineConfig { backend, threads: 2, ..EngineConfig::default() };
                Engine::start(config, &pool).unwrap()
            };
            let engines = backends.iter().map(engine).collect();
            Volume { directory: parent.join("store"), engines, weight }
        };
        let volumes = weights.into_iter().enumerate().map(volume).collect();
        Self { volumes, pool, folder }
    }

    fn create(&self, capacity: usize) -> Result<Store, StoreError> {
        Store::create_over(&self.volumes, Durability::None, capacity as u64)
    }

    fn directory(&self, volume: usize) -> &Path {
        &self.volumes[volume].directory
    }

    fn data(&self, volume: usize) -> PathBuf {
        self.directory(volume).join("data")
    }

    fn block(&self, bytes: usize, byte: u8) -> Block {
        let mut block = self.pool.lease(bytes).unwrap();
        block.fill(byte);
        block
    }

    fn tensor(&self, store: &Store, name: &str, bytes: usize, byte: u8) -> Swapped {
        let vacant = store.reserve(name, bytes, Worth::State).unwrap();
        vacant.fill(self.block(bytes, byte)).unwrap().store().wait().unwrap()
    }

    /// Everything in the folders of the disks.
    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for disk in std::fs::read_dir(self.folder.path()).unwrap() {
            for entry in std::fs::read_dir(disk.unwrap().path()).unwrap() {
                names.push(entry.unwrap().path().to_str().unwrap().to_owned());
            }
        }
        names
    }
}

const TWO: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Threads];

#[test]
fn what_is_stored_over_volumes_with_several_engines_comes_back() {
    let rig = Rig::new([2, 1], &TWO);
    let store = rig.create(12 * MIB).unwrap();
    let tensors: Vec<_> = (1..5_u8)
        .map(|byte| (byte, rig.tensor(&store, &byte.to_string(), 2 * MIB + 4096 * usize::from(byte), byte)))
        .collect();
    for (byte, tensor) in tensors {
        let length = tensor.bytes();
        let resident = tensor.load(rig.pool.lease(length).unwrap()).unwrap().wait().unwrap();
        assert!(resident.bytes().iter().all(|&found| found == byte));
    }
    for (volume, share) in [(0, 4 * MIB as u64), (1, 2 * MIB as u64)] {
        for name in ["data", "data.1"] {
            let length = std::fs::metadata(rig.directory(volume).join(name)).unwrap().len();
            assert_eq!(length, share, "{name} of volume {volume}");
        }
    }
    assert_eq!(rig.pool.leased_blocks(), 0);
}

#[test]
fn a_volume_that_fails_fails_the_tensors_that_touch_it_and_no_others() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    let store = rig.create(6 * MIB).unwrap();
    // The first two on the first volume, the next two on the second, and so on; the last one on both.
    let halves: Vec<_> =
        (0..8_u8).map(|byte| rig.tensor(&store, &format!("half {byte}"), HALF, byte)).collect();
    let both = rig.tensor(&store, "both", 2 * MIB, 9);
    let second = std::fs::File::options().write(true).open(rig.data(1)).unwrap();
    second.set_len(0).unwrap();
    for (index, tensor) in halves.into_iter().chain([both]).enumerate() {
        let length = tensor.bytes();
        match tensor.load(rig.pool.lease(length).unwrap()).unwrap().wait() {
            Ok(resident) => {
                assert!([0, 1, 4, 5].contains(&index), "tensor {index} lies on the volume that failed");
                assert!(resident.bytes().iter().all(|&byte| usize::from(byte) == index));
            }
            Err(failed) => {
                assert!([2, 3, 6, 7, 8].contains(&index), "tensor {index}: {failed}");
                assert!(
                    matches!(&failed.error, StoreError::Transfer { source: IoError::EndOfFile { path, .. }, .. }
                        if *path == rig.data(1)),
                    "{failed}"
                );
            }
        }
    }
    assert_eq!(rig.pool.leased_blocks(), 0);
    drop(store);
    assert_eq!(rig.names(), [""; 0]);
}

#[test]
fn a_write_that_one_volume_fails_hands_the_whole_tensor_back() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    let store = rig.create(4 * MIB).unwrap();
    let vacant = store.reserve("both", 2 * MIB, Worth::State).unwrap();
    rig.volumes[1].engines[0].shutdown().unwrap();
    let failed = vacant.fill(rig.block(2 * MIB, 7)).unwrap().store().wait().unwrap_err();
    assert!(
        matches!(&failed.error, StoreError::Transfer { tensor, source: IoError::LaneStopped { path } }
            if tensor == "both" && *path == rig.data(1)),
        "{failed}"
    );
    let dirty = failed.tensor.unwrap();
    assert_eq!(dirty.bytes(), vec![7; 2 * MIB]);
    drop(dirty);
    assert!(matches!(store.commit(Value::Null), Err(StoreError::Unfinished { .. })));
}

#[test]
fn damage_is_reported_where_it_lies() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    let store = rig.create(4 * MIB).unwrap();
    let _first = rig.tensor(&store, "first", MIB + HALF, 1);
    let second = rig.tensor(&store, "second", HALF, 2);
    std::fs::write(rig.data(1), vec![0; 2 * MIB]).unwrap();
    let failed = second.load(rig.pool.lease(HALF).unwrap()).unwrap().wait().unwrap_err();
    let StoreError::Corrupt { tensor, path, offset, .. } = &failed.error else { panic!("{failed}") };
    assert_eq!((tensor.as_str(), path, *offset), ("second", &rig.data(1), HALF as u64));
}

#[test]
fn the_volumes_go_with_the_store_and_leave_what_is_not_theirs() {
    let rig = Rig::new([1, 2], &TWO);
    let store = rig.create(6 * MIB).unwrap();
    let tensor = rig.tensor(&store, "a", HALF, 1);
    std::fs::write(rig.directory(1).join("thesis"), "dear to somebody").unwrap();
    drop(store);
    assert_eq!(rig.names().len(), 2, "a tensor still needs them");
    drop(tensor);
    assert!(!rig.directory(0).exists());
    let left: Vec<_> =
        std::fs::read_dir(rig.directory(1)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["thesis"]);
}

#[test]
fn volumes_that_are_kept_stay_and_the_manifest_says_what_lies_where() {
    let rig = Rig::new([1, 3], &[BackendChoice::Auto]);
    let store = rig.create(6 * MIB).unwrap();
    let tensor = rig.tensor(&store, "a", HALF, 1);
    store.commit(Value::Null).unwrap();
    store.keep();
    drop((store, tensor));
    assert!(rig.data(0).exists() && rig.data(1).exists());
    assert!(!rig.directory(1).join("manifest").exists(), "there is one manifest");
    let manifest = Manifest::decode(&std::fs::read(rig.directory(0).join("manifest")).unwrap()).unwrap();
    let lanes: Vec<_> = manifest.lanes.iter().map(|lane| (lane.file.clone(), lane.weight)).collect();
    let second = rig.data(1).to_str().unwrap().to_owned();
    assert_eq!((manifest.stripe_bytes, lanes), (MIB, vec![("data".to_owned(), 1), (second, 3)]));
    for volume in 0..2 {
        let refused = Store::check_over(&[(rig.directory(volume), 1)], 1).unwrap_err();
        assert!(matches!(refused, StoreError::Leftover { path, .. } if path == rig.directory(volume)));
    }
}

#[test]
fn a_volume_in_the_way_is_named_and_nothing_is_left_of_the_others() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    std::fs::create_dir(rig.directory(1)).unwrap();
    let refused = rig.create(MIB).unwrap_err();
    assert!(matches!(&refused, StoreError::Leftover { path, .. } if path == rig.directory(1)), "{refused}");
    assert!(!rig.directory(0).exists());
    // Found only when the first one has been made already.
    std::fs::remove_dir(rig.directory(1)).unwrap();
    let twice = Volume { directory: rig.directory(0).to_owned(), ..rig.volumes[1].clone() };
    let refused =
        Store::create_over(&[rig.volumes[0].clone(), twice], Durability::None, MIB as u64).unwrap_err();
    assert!(matches!(&refused, StoreError::Locked { path, .. } if path == rig.directory(0)), "{refused}");
    assert_eq!(rig.names(), [""; 0]);
}

#[test]
fn what_volumes_of_one_file_system_need_is_asked_for_together() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    let Err(StoreError::NoSpace { available, .. }) = Store::check(rig.directory(0), 1 << 60) else {
        panic!("no disk is that large")
    };
    // Each share would fit.
    let capacity = available / 2 * 3;
    let shares = [(rig.directory(0), 1), (rig.directory(1), 1)];
    let refused = Store::check_over(&shares, capacity).unwrap_err();
    let StoreError::NoSpace { path, needed, .. } = &refused else { panic!("{refused}") };
    assert_eq!(path, rig.directory(1).parent().unwrap());
    assert!(needed.abs_diff(capacity) < 8192, "{needed} of {capacity}");
    assert!(Store::check(rig.directory(0), capacity / 2).is_ok());
}

#[test]
fn no_volumes_and_volumes_without_engines_are_refused() {
    let rig = Rig::new([1, 1], &[]);
    for volumes in [&[][..], &rig.volumes] {
        let refused = Store::create_over(volumes, Durability::None, 1).unwrap_err();
        assert!(matches!(refused, StoreError::Io(IoError::Config { .. })), "{refused}");
    }
    assert_eq!(rig.names(), [""; 0]);
}

#[test]
fn a_measurement_leaves_nothing_behind() {
    let rig = Rig::new([1, 1], &TWO);
    let disk = rig.directory(0).parent().unwrap();
    let bandwidth = measure(disk, &rig.volumes[0].engines, &rig.pool).unwrap();
    assert!(bandwidth.read_gbps > 0.0 && bandwidth.write_gbps > 0.0, "{bandwidth:?}");
    assert!(bandwidth.mean_gbps() <= bandwidth.read_gbps.max(bandwidth.write_gbps));
    assert!(bandwidth.mean_gbps() >= bandwidth.read_gbps.min(bandwidth.write_gbps));
    let missing = disk.join("missing");
    let failed = measure(&missing, &rig.volumes[0].engines, &rig.pool).unwrap_err();
    assert!(failed.to_string().contains(missing.to_str().unwrap()), "{failed}");
    rig.volumes[0].engines[1].shutdown().unwrap();
    let failed = measure(disk, &rig.volumes[0].engines, &rig.pool).unwrap_err();
    assert!(failed.to_string().contains("overspill-measure"), "{failed}");
    assert_eq!(rig.names(), [""; 0]);
    let held = [rig.block(1, 0), rig.block(1, 0)];
    assert!(matches!(measure(disk, &rig.volumes[0].engines, &rig.pool), Err(StoreError::Pool(_))));
    drop(held);
    assert_eq!(rig.pool.leased_blocks(), 0);
}

#[test]
fn volumes_are_opened_in_their_own_places_only() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    let store = rig.create(8 * MIB).unwrap();
    drop(rig.tensor(&store, "both", 2 * MIB, 7));
    store.commit(Value::Null).unwrap();
    store.keep();
    drop(store);
    let other = Rig::new([1, 1], &[BackendChoice::Auto]);
    let foreign = other.create(8 * MIB).unwrap();
    foreign.commit(Value::Null).unwrap();
    foreign.keep();
    drop(foreign);

    let open = |volumes: &[Volume]| Store::open_over(volumes, Durability::Step);
    let [home, second] = [0, 1].map(|volume| rig.volumes[volume].clone());
    let stranger = other.volumes[1].clone();
    let refused = open(&[home.clone(), stranger.clone()]).unwrap_err();
    assert!(
        matches!(&refused, StoreError::ForeignVolume { path, .. } if path == &stranger.directory),
        "{refused}"
    );
    let swapped = open(&[second.clone(), home.clone()]).unwrap_err();
    assert!(matches!(&swapped, StoreError::Misplaced { path, number: 2 } if path == &second.directory));
    assert!(!swapped.to_string().contains("gc"), "nothing is to be removed: {swapped}");
    let twice = open(&[home.clone(), home.clone()]).unwrap_err();
    assert!(matches!(&twice, StoreError::GivenTwice { path } if path == &home.directory), "{twice}");
    assert!(matches!(open(std::slice::from_ref(&home)), Err(StoreError::Volumes { found: 1, .. })));
    // Weights are those that the state was made with.
    let store = open(&[home, Volume { weight: 9, ..second }]).unwrap();
    let both = store.adopt("both", 2 * MIB).unwrap();
    let resident = both.load(rig.pool.lease(2 * MIB).unwrap()).unwrap().wait().unwrap();
    assert_eq!(resident.bytes(), vec![7; 2 * MIB]);
}

#[test]
fn a_label_that_cannot_be_read_is_written_anew_in_the_home_and_named_in_the_others() {
    let rig = Rig::new([1, 1], &[BackendChoice::Auto]);
    let store = rig.create(8 * MIB).unwrap();
    drop(rig.tensor(&store, "both", 2 * MIB, 7));
    store.commit(Value::Null).unwrap();
    store.keep();
    drop(store);
    let open = || Store::open_over(&rig.volumes, Durability::Step);
    let [first, second] = [0, 1].map(|volume| rig.directory(volume).join("volume"));
    let text = std::fs::read_to_string(&first).unwrap();
    for damage in [None, Some(""), Some("0000 0"), Some("zero")] {
        match damage {
            None => std::fs::remove_file(&first).unwrap(),
            Some(damage) => std::fs::write(&first, damage).unwrap(),
        }
        let survey = Survey::of(&[rig.directory(0).to_owned()]).unwrap();
        assert_eq!(survey.directories.len(), 2, "the others are found from it");
        let note = open().unwrap().note().unwrap_or_default();
        assert!(note.contains("volume: missing or damaged"), "{note}");
        assert_eq!(std::fs::read_to_string(&first).unwrap(), text);
        assert!(!open().unwrap().note().unwrap_or_default().contains("volume: missing"));
    }
    let text = std::fs::read_to_string(&second).unwrap();
    std::fs::remove_file(&second).unwrap();
    let refused = open().unwrap_err();
    assert!(matches!(&refused, StoreError::Label { path, number: 2, .. } if *path == second), "{refused}");
    assert!(refused.to_string().contains(&format!("`{text}`")), "{refused}");
    std::fs::write(&second, text).unwrap();
    drop(open().unwrap());
}
