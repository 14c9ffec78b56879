//! What can only be seen in a process that does nothing else: its descriptors, threads, processor time and limits.
//!
//! Each law is an ignored test that a plain one runs by itself, in this very binary. Some need a name space of their
//! own; where the kernel gives none they fail, unless `OVERSPILL_SKIP_NAMESPACES=1` says that this is accepted.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use overspill_io::{BackendChoice, BackendKind, Engine, EngineConfig, Locking, Priority};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::rig::{KIB, Rig, assert_pattern, backends, eventually, finish};

/// Runs the ignored test `name` of this binary in a process of its own.
pub(crate) fn alone(name: &str) {
    let binary = std::env::current_exe().unwrap();
    passed(&Command::new(binary).args(["--ignored", "--exact", name]).output().unwrap());
}

/// Runs the ignored test `name` of this binary in a process whose user is nobody outside of its own name space, where
/// it may mount and where the superuser's exemptions from limits end.
pub(crate) fn apart(name: &str) {
    in_name_space(&["--user", "--map-root-user", "--mount", "--"], name);
}

/// Runs the ignored test `name` of this binary in a process that has the rights of its user and no more, even if that
/// is the superuser.
pub(crate) fn powerless(name: &str) {
    // Only the superuser has more.
    if rustix::process::geteuid().is_root() { in_name_space(&["--user", "--"], name) } else { alone(name) }
}

fn in_name_space(unshare: &[&str], name: &str) {
    let binary = std::env::current_exe().unwrap();
    let run = Command::new("unshare").args(unshare).arg(binary).args(["--ignored", "--exact", name]).output();
    match run {
        Ok(run) if String::from_utf8_lossy(&run.stdout).contains("running 1 test") => passed(&run),
        Ok(run) => not_tested(name, &String::from_utf8_lossy(&run.stderr)),
        Err(error) => not_tested(name, &format!("unshare: {error}")),
    }
}

/// Passes for a test that did not run only if somebody has said that it may.
#[track_caller]
fn not_tested(name: &str, because: &str) {
    let accepted = std::env::var_os("OVERSPILL_SKIP_NAMESPACES").is_some_and(|value| value == "1");
    assert!(accepted, "{name} needs a name space; OVERSPILL_SKIP_NAMESPACES=1 does without: {because}");
    eprintln!("not tested: {name}: {because}");
}

pub(crate) fn passed(run: &Output) {
    let said = String::from_utf8_lossy(&run.stdout);
    let complained = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && said.contains("1 passed"), "{said}\n{complained}");
}

#[test]
fn nothing_is_left_behind() {
    alone("alone::nothing_is_left_behind_here");
}

#[test]
fn an_idle_engine_uses_no_processor() {
    alone("alone::an_idle_engine_uses_no_processor_here");
}

#[test]
fn auto_falls_back_to_threads_and_says_why() {
    alone("alone::auto_falls_back_to_threads_and_says_why_here");
}

#[test]
fn without_locked_memory_the_work_goes_on_and_the_reason_is_told() {
    let law = "alone::without_locked_memory_the_work_goes_on_and_the_reason_is_told_here";
    // Only the superuser is exempt from the limit; everybody else needs no name space for it to hold.
    if rustix::process::geteuid().is_root() { apart(law) } else { alone(law) }
}

pub(crate) fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
#[ignore = "counts what the whole process has; run by nothing_is_left_behind"]
fn nothing_is_left_behind_here() {
    let open = || count("/proc/self/fd");
    let threads = || count("/proc/self/task");
    let before = (open(), threads());
    for _ in 0..4 {
        for backend in backends() {
            let rig = Rig::blocks(backend, 64 * KIB, 8);
            let with_engine = open();
            for file in 0..20_u64 {
                let file = rig.create(&file.to_string());
                drop(rig.engine.write(&file, 0, rig.patterned(64 * KIB, 1), Priority::Background));
                drop(rig.engine.read(&file, 1 << 20, rig.patterned(64 * KIB, 1), Priority::Urgent));
            }
            rig.all_blocks_are_home();
            eventually("files are closed", || open() == with_engine);
            let Rig { engine, pool, folder } = rig;
            drop(engine);
            assert_eq!(pool.leased_blocks(), 0);
            drop(folder);
        }
        // A thread that was joined stays visible for a moment.
        eventually("what was opened and started is gone", || (open(), threads()) == before);
    }
}

/// Processor time of all of the engine's threads.
fn processor_ns() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let of_engine =
        |task: &Path| std::fs::read_to_string(task.join("comm")).unwrap().starts_with("overspill-io");
    let used = |task: &Path| -> u64 {
        let stat = std::fs::read_to_string(task.join("schedstat")).unwrap();
        stat.split_whitespace().next().unwrap().parse().unwrap()
    };
    tasks.map(|task| task.unwrap().path()).filter(|task| of_engine(task)).map(|task| used(&task)).sum()
}

#[test]
#[ignore = "measures threads by name; run by an_idle_engine_uses_no_processor"]
fn an_idle_engine_uses_no_processor_here() {
    for backend in backends() {
        let rig = Rig::blocks(backend, 64 * KIB, 1);
        let file = rig.create("file");
        drop(rig.write(&file, 0, rig.patterned(64 * KIB, 1)).unwrap());
        let idle = Duration::from_millis(200);
        // What follows the last answer may take a moment; a spinning thread would never come to rest.
        eventually("the engine's threads rest", || {
            let before = processor_ns();
            assert!(before > 0, "the threads have worked, so they were found");
            let began = Instant::now();
            while began.elapsed() < idle {
                thread::park_timeout(idle);
            }
            processor_ns() == before
        });
    }
}

/// Lowers a limit of this process.
pub(crate) fn limit(resource: Resource, current: u64) {
    let maximum = getrlimit(resource).maximum;
    setrlimit(resource, Rlimit { current: Some(current), maximum }).unwrap();
}

#[test]
#[ignore = "limits the whole process; run by auto_falls_back_to_threads_and_says_why"]
fn auto_falls_back_to_threads_and_says_why_here() {
    let rig = Rig::blocks(BackendChoice::Threads, 64 * KIB, 1);
    let file = rig.create("file");
    // Descriptors are given out by rising number. One is left, for the file on which the threads prove themselves;
    // the others need more.
    let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    limit(Resource::Nofile, u64::try_from(next).unwrap() + 1);
    for backend in [BackendChoice::Uring, BackendChoice::Aio] {
        let forced = EngineConfig { backend, ..EngineConfig::default() };
        let refusal = Engine::start(forced, &rig.pool).unwrap_err();
        assert_eq!(refusal.errno(), Some(libc::EMFILE), "{refusal}");
    }
    let engine = Engine::start(EngineConfig::default(), &rig.pool).unwrap();
    let report = engine.report();
    assert_eq!(report.backend, BackendKind::Threads);
    let degraded = report.degraded.unwrap();
    let (uring, aio) = degraded.split_once("; ").unwrap();
    assert!(uring.starts_with("io_uring is not available: cannot "), "{degraded}");
    assert!(aio.starts_with("Linux AIO is not available: cannot "), "{degraded}");
    assert!(uring.ends_with("(os error 24)") && aio.ends_with("(os error 24)"), "{degraded}");
    let written = engine.write(&file, 0, rig.patterned(64 * KIB, 1), Priority::Urgent);
    assert_pattern(&finish(written).unwrap(), 1);
}

#[test]
#[ignore = "limits the whole process; run by without_locked_memory_the_work_goes_on_and_the_reason_is_told"]
fn without_locked_memory_the_work_goes_on_and_the_reason_is_told_here() {
    // Enough for the ring itself, which newer kernels count too.
    limit(Resource::Memlock, 256 * KIB as u64);
    for backend in backends() {
        let rig = Rig::blocks(backend, 64 * KIB, 64);
        let Locking::Unlocked { reason } = rig.pool.report().locked else { panic!("4 MiB were locked") };
        let needed_kib = 4 * 1024 + 1024;
        for part in ["mlock of 4096 KiB", "is 256 KiB", &format!("`ulimit -l {needed_kib}`"), "LimitMEMLOCK="]
        {
            assert!(reason.contains(part), "{part}: {reason}");
        }
        let notes = rig.engine.report().notes;
        assert_eq!(notes[0], format!("memory is not locked: {reason}"));
        assert_eq!(notes.iter().filter(|note| note.contains("ulimit")).count(), 1, "{notes:?}");
        if backend == BackendChoice::Uring {
            assert!(notes[1].starts_with("memory is not registered with io_uring: "), "{notes:?}");
        }
        assert_eq!(notes.len(), if backend == BackendChoice::Uring { 2 } else { 1 }, "{notes:?}");
        let file = rig.create("file");
        let mut block = rig.write(&file, 0, rig.patterned(64 * KIB, 1)).unwrap();
        block.fill(0);
        assert_pattern(&rig.read(&file, 0, block).unwrap(), 1);
    }
    // What the advice names is enough, where the system lets it be had. Of registered memory that is not for one
    // process to say: other rings of the same user count too.
    let needed = (4 * 1024 + 1024) * KIB as u64;
    if getrlimit(Resource::Memlock).maximum.is_some_and(|maximum| maximum < needed) {
        eprintln!("not tested: that {needed} bytes suffice, for the hard limit of locked memory is lower");
        return;
    }
    limit(Resource::Memlock, needed);
    let rig = Rig::blocks(BackendChoice::Uring, 64 * KIB, 64);
    assert_eq!(rig.pool.report().locked, Locking::Locked);
}
