//! Profiles that are found, those that are refused, and any bytes at all.

use std::os::unix::fs::symlink;

use overspill_io::{BackendChoice, BlockClass, Engine, EngineConfig, IoError, Pool};
use proptest::prelude::*;

use super::*;

fn profile() -> Profile {
    Profile { chunk_bytes: 1 << 20, queue_depth: 32, rings: 2, read_gbps: 3.5, write_gbps: 6.25 }
}

fn decode(text: &str) -> Result<Profile, ProfileError> {
    Profile::decode(Path::new("some/profile"), text.as_bytes())
}

/// A profile's text with one field changed.
fn changed(field: &str, value: Value) -> String {
    let mut fields: Value = serde_json::from_slice(&profile().encode()).unwrap();
    fields[field] = value;
    fields.to_string()
}

#[test]
fn what_is_saved_is_loaded_there_and_below_also_where_nothing_is_yet() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Profile::load(folder.path()).unwrap(), None);
    let path = profile().save(folder.path()).unwrap();
    assert_eq!(path, folder.path().join(Profile::FILE));
    for below in ["", "runs", "runs/17/swap"] {
        assert_eq!(Profile::load(&folder.path().join(below)).unwrap(), Some(profile()), "{below:?}");
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [Profile::FILE], "nothing is left beside it");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o644);
}

#[test]
fn the_nearest_profile_counts_and_a_later_one_replaces_it() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    profile().save(folder.path()).unwrap();
    for rings in [4, 8] {
        let own = Profile { rings, ..profile() };
        own.save(&inner).unwrap();
        assert_eq!(Profile::load(&inner).unwrap(), Some(own));
    }
    assert_eq!(Profile::load(folder.path()).unwrap(), Some(profile()));
}

#[test]
fn a_profile_of_another_file_system_does_not_count() {
    // The processes are on a file system of their own, and so is everything above them.
    assert_eq!(Profile::load(Path::new("/proc/self")).unwrap(), None);
    let deep = format!("/proc/self/{}", "no/".repeat(DIRECTORIES_MAX));
    assert_eq!(Profile::load(Path::new(&deep)).unwrap(), None);
}

#[test]
fn a_directory_that_cannot_be_has_no_profile() {
    let folder = tempfile::tempdir().unwrap();
    profile().save(folder.path()).unwrap();
    symlink("loop", folder.path().join("loop")).unwrap();
    for impossible in ["n".repeat(300), "loop/swap".to_owned(), "zero\0".to_owned()] {
        assert_eq!(Profile::load(&folder.path().join(&impossible)).unwrap(), None, "{impossible:?}");
    }
    assert_eq!(Profile::load(Path::new("")).unwrap(), None);
}

#[test]
fn a_link_or_a_pipe_or_a_folder_in_its_place_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(Profile::FILE);
    let elsewhere = folder.path().join("elsewhere");
    std::fs::write(&elsewhere, profile().encode()).unwrap();
    let refused = || {
        let error = Profile::load(folder.path()).unwrap_err();
        assert!(
            matches!(&error, ProfileError::NotAFile { path: found } if found.ends_with(Profile::FILE)),
            "{error}"
        );
    };
    symlink(&elsewhere, &path).unwrap();
    refused();
    profile().save(folder.path()).unwrap();
    assert!(path.symlink_metadata().unwrap().is_file(), "saving replaces the link, not what it leads to");
    std::fs::remove_file(&path).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
    refused();
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    refused();
    assert!(matches!(profile().save(folder.path()), Err(ProfileError::File { action: "replace", .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "what was written aside is gone");
}

#[test]
fn a_value_that_cannot_work_is_refused_by_file_and_field() {
    let wrong: [(&str, Value); 15] = [
        ("version", "1".into()),
        ("chunk_bytes", 0.into()),
        ("chunk_bytes", 5000.into()),
        ("chunk_bytes", (2_u64 << 30).into()),
        ("chunk_bytes", u64::MAX.into()),
        ("chunk_bytes", 4096.5.into()),
        ("queue_depth", 0.into()),
        ("queue_depth", (-1).into()),
        ("queue_depth", 4097.into()),
        ("rings", 0.into()),
        ("rings", 17.into()),
        ("rings", "two".into()),
        ("read_gbps", 0.into()),
        ("write_gbps", 1e300.into()),
        ("write_gbps", Value::Null),
    ];
    for (name, value) in wrong {
        let error = decode(&changed(name, value.clone())).unwrap_err();
        assert!(
            matches!(error, ProfileError::Field { field, .. } if field == name),
            "{name} {value}: {error}"
        );
        assert!(error.to_string().starts_with(&format!("some/profile: {name} is ")), "{error}");
    }
    let error = decode(r#"{"version": 1}"#).unwrap_err();
    assert!(error.to_string().contains("chunk_bytes is missing"), "{error}");
    let unsaved = Profile { read_gbps: f64::NAN, ..profile() }.save(Path::new("nowhere")).unwrap_err();
    assert!(matches!(unsaved, ProfileError::Field { field: "read_gbps", .. }), "{unsaved}");
}

#[test]
fn another_version_an_unknown_field_and_a_huge_file_are_refused_briefly() {
    let newer = decode(&changed("version", 2.into())).unwrap_err();
    assert!(matches!(newer, ProfileError::UnknownVersion { found: 2, .. }), "{newer}");
    let unknown = decode(&changed(&"n".repeat(3000), 1.into())).unwrap_err();
    assert!(matches!(unknown, ProfileError::Malformed { .. }), "{unknown}");
    let wrong = decode(&changed("rings", "\n".repeat(1500).into())).unwrap_err();
    for error in [&unknown, &wrong] {
        let line = error.to_string();
        assert!(line.len() < 300 && !line.contains('\n'), "{line:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let huge = File::create(folder.path().join(Profile::FILE)).unwrap();
    huge.set_len(1 << 40).unwrap();
    let error = Profile::load(folder.path()).unwrap_err();
    assert!(error.to_string().contains("larger than 4096 bytes"), "{error}");
}

#[test]
fn the_bounds_are_those_of_the_engine() {
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 4096, count: 1 }]).unwrap();
    let start = |chunk_bytes, queue_depth| {
        let threads = EngineConfig { backend: BackendChoice::Threads, threads: 1, ..EngineConfig::default() };
        Engine::start(EngineConfig { chunk_bytes, queue_depth, ..threads }, &pool).map(drop)
    };
    assert_eq!(start(CHUNK_BYTES_MAX, QUEUE_DEPTH_MAX), Ok(()));
    assert_eq!(start(BLOCK_ALIGNMENT, 1), Ok(()));
    let refused = |started, name| matches!(started, Err(IoError::Config { field, .. }) if field == name);
    assert!(refused(start(CHUNK_BYTES_MAX + BLOCK_ALIGNMENT, 1), "chunk_bytes"));
    assert!(refused(start(BLOCK_ALIGNMENT, QUEUE_DEPTH_MAX + 1), "queue_depth"));
    assert!(RINGS.ends_with(&format!(" {}", Profile::RINGS_MAX)));
}

/// JSON of any shape, more often than not with the names of a profile.
fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u64..5000).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,60}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 6, |inner| {
        let name =
            prop_oneof![4 => prop::sample::select(NAMES.to_vec()).prop_map(str::to_owned), 1 => ".{0,9}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name, inner, 0..7)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(text in prop::collection::vec(any::<u8>(), 0..300), value in json()) {
        for text in [text, value.to_string().into_bytes()] {
            if let Err(error) = Profile::decode(Path::new("p"), &text) {
                prop_assert!(error.to_string().len() < 400);
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back(
        chunk in 1_usize..=CHUNK_BYTES_MAX / BLOCK_ALIGNMENT,
        queue_depth in 1_usize..=QUEUE_DEPTH_MAX,
        rings in 1_usize..=Profile::RINGS_MAX,
        read_gbps in 1e-3..1e3,
        write_gbps in 1e-3..1e3,
    ) {
        let profile = Profile { chunk_bytes: chunk * BLOCK_ALIGNMENT, queue_depth, rings, read_gbps, write_gbps };
        let read = Profile::decode(Path::new("p"), &profile.encode()).unwrap();
        // The last bit of a fraction may differ.
        let same = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
        prop_assert!(same(read.read_gbps, read_gbps) && same(read.write_gbps, write_gbps), "{:?}", read);
        prop_assert_eq!(Profile { read_gbps, write_gbps, ..read }, profile);
    }
}
