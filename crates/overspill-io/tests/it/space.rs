//! A full disk, a real one: a small file system in memory, mounted in a name space of its own.
//!
//! Where the kernel lets nobody mount and that is accepted, the law about `/dev/full` in the conformance suite is what
//! is left.

use std::path::Path;
use std::process::Command;

use overspill_io::{BlockClass, Direction, EngineConfig, Failed, IoError};

use crate::alone::{alone, apart};
use crate::rig::{KIB, MIB, Rig, assert_pattern, backends};
use crate::seccomp::forbid;

#[test]
fn a_full_disk_is_an_error_and_the_data_comes_home() {
    apart("space::a_full_disk_is_an_error_and_the_data_comes_home_here");
}

#[test]
fn a_quota_that_is_used_up_is_told_before_anything_depends_on_the_room() {
    alone("space::a_quota_that_is_used_up_is_told_before_anything_depends_on_the_room_here");
}

#[test]
#[ignore = "forbids a call to the whole process; run by a_quota_that_is_used_up_is_told_before_anything_depends_on_the_room"]
fn a_quota_that_is_used_up_is_told_before_anything_depends_on_the_room_here() {
    let class = BlockClass { name: "test", block_bytes: MIB, count: 1 };
    let rig = Rig::with(EngineConfig::default(), &[class]);
    let file = rig.create("file");
    forbid(&[(libc::SYS_fallocate, libc::EDQUOT)]);
    let error = file.allocate(4096).unwrap_err();
    assert!(matches!(error, IoError::NoSpace { needed: 4096, .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("4096 more bytes needed, and a quota allows less than the "), "{said}");
    assert!(!said.contains('\n'), "{said}");
    assert_eq!(file.len().unwrap(), 0);
}

/// Mounts a file system in memory over `folder`.
pub(crate) fn mount(folder: &Path, options: &str) {
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder).output();
    let mounted = mounted.unwrap();
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
}

#[test]
#[ignore = "mounts; run in a name space of its own by a_full_disk_is_an_error_and_the_data_comes_home"]
fn a_full_disk_is_an_error_and_the_data_comes_home_here() {
    for backend in backends() {
        let config = EngineConfig { backend, chunk_bytes: 64 * KIB, ..EngineConfig::default() };
        let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: 2 * MIB, count: 1 }]);
        mount(rig.folder.path(), "size=1m");
        let file = rig.create("file");
        let block = rig.patterned(2 * MIB, 9);
        let Failed { error, block } = rig.write(&file, 0, block).unwrap_err();
        let IoError::Transfer { direction: Direction::Write, done, errno, .. } = error else {
            panic!("{error} is not about a full disk")
        };
        assert_eq!(errno, libc::ENOSPC);
        assert!((512 * KIB..=MIB).contains(&done), "{done} bytes of 1 MiB were written");
        assert_pattern(&block.unwrap(), 9);

        let used = file.len().unwrap();
        let error = file.allocate(8 * MIB as u64).unwrap_err();
        let IoError::NoSpace { needed, free, path } = error else { panic!("{error} is not about space") };
        assert_eq!(path, file.path());
        assert!(needed >= 7 * MIB as u64 && needed <= 8 * MIB as u64, "{needed}");
        assert!(free < 512 * KIB as u64, "{free}");
        assert_eq!(file.len().unwrap(), used);

        mount(rig.folder.path(), "size=1m,ro");
        let error = rig.engine.create(&rig.path("other")).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EROFS), "{error}");
    }
}
