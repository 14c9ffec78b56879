//! Runs the binary in a folder of its own and looks at everything it did.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::Value;
use tempfile::TempDir;

/// A model that trains in a blink, and whose state would fit into the memory and is kept out of it.
pub(crate) const SMALL: [&str; 16] = [
    "--resident",
    "0",
    "--layers",
    "2",
    "--hidden",
    "32",
    "--heads",
    "4",
    "--ffn",
    "48",
    "--batch",
    "2",
    "--seq",
    "16",
    "--steps",
    "3",
];

/// A folder to run in.
pub(crate) struct Place {
    folder: TempDir,
}

/// How a run ended.
pub(crate) struct Ended {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// No run of a test takes longer than this.
const BOUND: Duration = Duration::from_secs(300);

/// What has nothing to do takes less than this.
const HANGS: Duration = Duration::from_secs(60);

impl Place {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, contents).unwrap();
        path
    }

    /// Everything in the folder, by name.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_overspill"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env_remove("OVERSPILL_BACKEND")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(&self.command(arguments).output().unwrap())
    }

    /// As [`Place::run`], for what may hang: it fails when that takes too long.
    #[track_caller]
    pub(crate) fn run_in_time(&self, command: &mut Command) -> Ended {
        let mut child = command.spawn().unwrap();
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if began.elapsed() >= HANGS {
                child.kill().unwrap();
                panic!("it does not end: {command:?}");
            }
            std::thread::yield_now();
        }
        Ended::of(&child.wait_with_output().unwrap())
    }

    /// Makes a pipe that nobody writes to.
    pub(crate) fn pipe(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        path
    }

    /// `overspill train` of the small model, and more arguments.
    pub(crate) fn train(&self, arguments: &[&str]) -> Ended {
        self.run(&[&["train"], SMALL.as_slice(), arguments].concat())
    }

    /// As [`Place::train`], and what `--json` says.
    pub(crate) fn trained(&self, arguments: &[&str]) -> Value {
        let json = self.path("numbers.json");
        let ended = self.train(&[arguments, &["--json", "numbers.json", "--quiet"]].concat());
        assert_eq!(ended.status, Some(0), "{}", ended.stderr);
        let numbers = read_json(&json);
        fs::remove_file(json).unwrap();
        numbers
    }

    /// Starts a run and waits until the folder has an entry that begins with `name`.
    pub(crate) fn until_there_is(&self, name: &str, command: &mut Command) -> std::process::Child {
        let mut child = command.spawn().unwrap();
        let began = Instant::now();
        while !self.names().iter().any(|found| found.starts_with(name)) {
            assert!(child.try_wait().unwrap().is_none(), "the run ended before there was {name}");
            assert!(began.elapsed() < BOUND, "no {name} in time");
            std::thread::yield_now();
        }
        child
    }
}

impl Ended {
    pub(crate) fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Self { status: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// Ends unhappily, with one line on standard error that says all of this.
    #[track_caller]
    pub(crate) fn refused(&self, says: &[&str]) {
        assert_eq!(self.status, Some(1), "{}", self.stderr);
        let errors: Vec<_> = self.stderr.lines().filter(|line| line.starts_with("overspill: ")).collect();
        let [line] = errors[..] else { panic!("not one line: {}", self.stderr) };
        for part in says {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}
