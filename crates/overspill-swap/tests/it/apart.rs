//! Tests that run in a process or a name space of their own.
//!
//! Each law is an ignored test that a plain one runs by itself, in this very binary. Where the kernel gives no name
//! space they fail, unless `OVERSPILL_SKIP_NAMESPACES=1` says that this is accepted.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the ignored test `name` of this binary in a process of its own.
pub(crate) fn alone(name: &str) {
    let binary = std::env::current_exe().unwrap();
    passed(&Command::new(binary).args(["--ignored", "--exact", name]).output().unwrap());
}

/// Runs the ignored test `name` of this binary in a process of its own, which the limit on the size of files does not
/// kill.
pub(crate) fn unstopped(name: &str) {
    let ignoring = "trap '' XFSZ; exec \"$0\" --ignored --exact \"$1\"";
    let binary = std::env::current_exe().unwrap();
    passed(&Command::new("sh").args(["-c", ignoring]).arg(binary).arg(name).output().unwrap());
}

/// Runs the ignored test `name` of this binary in a name space of its own, where it may mount.
pub(crate) fn apart(name: &str) {
    let unshare = ["--user", "--map-root-user", "--mount", "--"];
    let binary = std::env::current_exe().unwrap();
    let run = Command::new("unshare").args(unshare).arg(binary).args(["--ignored", "--exact", name]).output();
    match run {
        Ok(run) if String::from_utf8_lossy(&run.stdout).contains("running 1 test") => passed(&run),
        Ok(run) => not_tested(name, &String::from_utf8_lossy(&run.stderr)),
        Err(error) => not_tested(name, &format!("unshare: {error}")),
    }
}

/// Mounts a file system in memory over `folder`.
pub(crate) fn mount(folder: &Path, options: &str) {
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder).output();
    let mounted = mounted.unwrap();
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
}

/// Passes for a test that did not run only if somebody has said that it may.
#[track_caller]
fn not_tested(name: &str, because: &str) {
    let accepted = std::env::var_os("OVERSPILL_SKIP_NAMESPACES").is_some_and(|value| value == "1");
    assert!(accepted, "{name} needs a name space; OVERSPILL_SKIP_NAMESPACES=1 does without: {because}");
    eprintln!("not tested: {name}: {because}");
}

fn passed(run: &Output) {
    let said = String::from_utf8_lossy(&run.stdout);
    let complained = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && said.contains("1 passed"), "{said}\n{complained}");
}
