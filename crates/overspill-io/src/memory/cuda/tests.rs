//! Registration with a driver that writes down what it was asked for, and with that of the machine.

use std::process::Command;
use std::thread;

use tempfile::TempDir;

use super::*;
use crate::memory::arena::Arena;
use crate::{BlockClass, Pool};

const BYTES: usize = 3 * 4096;

/// A driver made of a few lines of C, and what it was asked for.
struct Fake {
    folder: TempDir,
}

impl Fake {
    /// Compiles it. `INIT`, `DEVICES`, `REGISTER` and `UNREGISTER` are its answers: all is well, if `changes` does
    /// not say otherwise.
    fn compile(changes: &[&str]) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let log = format!("-DLOG=\"{}\"", folder.path().join("log").display());
        let answers = ["INIT=0", "DEVICES=2", "REGISTER=0", "UNREGISTER=0"].map(|well| {
            let name = well.split('=').next().unwrap();
            changes.iter().copied().find(|change| change.starts_with(name)).unwrap_or(well)
        });
        let extras = changes.iter().copied().filter(|change| !change.contains('='));
        let defined = answers.into_iter().chain(extras).map(|definition| format!("-D{definition}"));
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-Wall", "-Werror", &log])
            .args(defined)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda/driver.c"))
            .arg("-o")
            .arg(folder.path().join(DRIVER))
            .output()
            .expect("a C compiler, `cc`");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        Fake { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(DRIVER)
    }

    /// What was asked for so far, line by line.
    fn log(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}

fn is_mapped(start: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let spans = maps.lines().filter_map(|line| line.split_whitespace().next()?.split_once('-'));
    let number = |text| usize::from_str_radix(text, 16).unwrap();
    spans.into_iter().any(|(from, to)| (number(from)..number(to)).contains(&start))
}

#[test]
fn the_arena_is_registered_once_and_unregistered_before_it_is_unmapped() {
    let fake = Fake::compile(&[]);
    let arena = Arena::map(BYTES).unwrap();
    let (start, bytes) = arena.span();
    let start = start.as_ptr().addr();
    assert_eq!((bytes, arena.report().cuda), (BYTES, None));
    let report = CudaReport { registered_bytes: BYTES, devices: 2 };
    for _ in 0..2 {
        assert_eq!(arena.register_with_cuda(&fake.path()), Ok(report.clone()));
    }
    assert_eq!(arena.report().cuda, Some(report));
    let mut expected = vec![
        "init 0".to_owned(),
        "retain 40".to_owned(),
        "push to 1".to_owned(),
        format!("register {start:x} {BYTES} 1 mapped"),
        "pop to 0".to_owned(),
    ];
    assert_eq!(fake.log(), expected);
    // By another thread than the one that registered it, as the last lease may be dropped anywhere.
    thread::spawn(move || drop(arena)).join().unwrap();
    expected.extend([
        "push to 1".to_owned(),
        format!("unregister {start:x} mapped"),
        "pop to 0".to_owned(),
        "release 40".to_owned(),
    ]);
    assert_eq!(fake.log(), expected);
}

#[test]
fn without_a_driver_nothing_changes() {
    let arena = Arena::map(BYTES).unwrap();
    let before = arena.report();
    let library = PathBuf::from("/nowhere/libcuda.so.1");
    let error = arena.register_with_cuda(&library).unwrap_err();
    assert!(error.to_string().starts_with("no CUDA driver: /nowhere/libcuda.so.1: "), "{error}");
    assert!(matches!(error, CudaError::NoDriver { library: path, .. } if path == library));
    assert_eq!(arena.report(), before);
    assert_eq!(before.cuda, None);
}

#[test]
fn a_driver_that_lacks_a_function_is_too_old() {
    let fake = Fake::compile(&["OLD"]);
    let arena = Arena::map(BYTES).unwrap();
    let error = arena.register_with_cuda(&fake.path()).unwrap_err();
    assert_eq!(error, CudaError::TooOld { library: fake.path(), function: "cuMemHostUnregister" });
    assert_eq!((fake.log(), arena.report().cuda), (Vec::new(), None));
}

#[test]
fn a_refused_registration_gives_the_context_back_and_can_be_tried_again() {
    let arena = Arena::map(BYTES).unwrap();
    for (changes, name) in [
        (["REGISTER=712"].as_slice(), None),
        (["REGISTER=712", "NAMES"].as_slice(), Some("CUDA_ERROR_OF_TESTS".to_owned())),
    ] {
        let fake = Fake::compile(changes);
        let error = arena.register_with_cuda(&fake.path()).unwrap_err();
        assert_eq!(error, CudaError::Refused { function: "cuMemHostRegister", code: 712, name });
        let log = fake.log();
        assert_eq!((log.len(), &log[4..]), (6, ["pop to 0", "release 40"].map(str::to_owned).as_slice()));
        assert_eq!(arena.report().cuda, None);
    }
    let fake = Fake::compile(&[]);
    assert!(arena.register_with_cuda(&fake.path()).is_ok());
    // Before the folder in which the driver notes it.
    drop(arena);
}

#[test]
fn a_driver_without_a_device_is_asked_for_nothing_more() {
    let arena = Arena::map(BYTES).unwrap();
    let none = Fake::compile(&["DEVICES=0"]);
    assert_eq!(arena.register_with_cuda(&none.path()), Err(CudaError::NoDevice));
    let broken = Fake::compile(&["INIT=100"]);
    let refused = CudaError::Refused { function: "cuInit", code: 100, name: None };
    assert_eq!(refused.to_string(), "cuInit failed: CUDA error 100");
    assert_eq!(arena.register_with_cuda(&broken.path()), Err(refused));
    assert_eq!((none.log(), broken.log()), (vec!["init 0".to_owned()], vec!["init 0".to_owned()]));
}

#[test]
fn memory_that_the_driver_does_not_let_go_stays_mapped() {
    let freed = Arena::map(BYTES).unwrap();
    let keeping = Fake::compile(&["UNREGISTER=999"]);
    let kept = Arena::map(BYTES).unwrap();
    kept.register_with_cuda(&keeping.path()).unwrap();
    let start = kept.span().0.as_ptr().addr();
    drop(freed);
    drop(kept);
    assert!(is_mapped(start));
    assert_eq!(keeping.log().last().unwrap(), "release 40");
}

#[test]
fn a_pool_is_registered_with_the_driver_of_this_machine_or_says_why_not() {
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 4096, count: 2 }]).unwrap();
    match pool.register_with_cuda() {
        Ok(report) => {
            assert_eq!(report.registered_bytes, 2 * 4096);
            assert_eq!(pool.report().cuda, Some(report));
        }
        Err(error) => {
            assert_eq!(pool.report().cuda, None, "{error}");
            pool.lease(4096).unwrap().fill(1);
        }
    }
}
