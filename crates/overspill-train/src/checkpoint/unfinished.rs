//! What dead processes left of folders in the making: finding it, and removing it by name.
//!
//! Such a folder is recognized by its hidden name, which says whose it is, and by what it holds: plain files under names
//! that a writer gives, and nothing else. It belongs to its process as long as that lives, or as long as somebody has it
//! locked, who may be in another container or on another machine. What is recognized is looked at once more when it is
//! removed, under its lock.
//!
//! A folder that was whole, and whose final name was lost with the power, looks the same.

use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Action, CheckpointError, folder, staging};

/// Bytes that the system counts allocated space in.
const SECTOR_BYTES: u64 = 512;

/// A folder that a process began, and that has not got its final name.
#[derive(Clone, Debug)]
pub struct Unfinished {
    /// Where it is.
    pub path: PathBuf,
    /// Who writes to it.
    pub writer: Writer,
    /// What its files take, in bytes.
    pub bytes_on_disk: u64,
    /// When a file in it was written last, if the system says so.
    pub last_used: Option<SystemTime>,
}

/// Who writes to a folder in the making.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// Nobody any more.
    Dead,
    /// A process that lives.
    Process {
        /// The process, if it is one of this machine and container.
        pid: Option<u32>,
    },
}

/// The folders in the making among these directories and the folders in them, by path. Links are not followed.
///
/// # Errors
/// [`CheckpointError::Io`] for a directory that cannot be listed.
pub fn unfinished(directories: &[PathBuf]) -> Result<Vec<Unfinished>, CheckpointError> {
    let mut paths = Vec::new();
    for directory in directories {
        if contents(directory).is_some() {
            paths.push(directory.clone());
            continue;
        }
        for entry in fs::read_dir(directory).map_err(Action::List.failed(directory))? {
            let path = entry.map_err(Action::List.failed(directory))?.path();
            paths.extend(contents(&path).is_some().then_some(path));
        }
    }
    paths.sort_unstable();
    paths.dedup();
    let look = |path: PathBuf| {
        // One that got its final name meanwhile is finished.
        let files = contents(&path)?;
        let writer = match lock(&path) {
            Ok(_) => Writer::Dead,
            Err(writer) => writer,
        };
        let bytes_on_disk = files.iter().map(|(_, file)| file.blocks().saturating_mul(SECTOR_BYTES)).sum();
        let last_used = last_used(&files);
        Some(Unfinished { path, writer, bytes_on_disk, last_used })
    };
    Ok(paths.into_iter().filter_map(look).collect())
}

impl Unfinished {
    /// Removes the folder with the files that were made in it.
    ///
    /// # Errors
    /// [`CheckpointError::InUse`] when it is being written, [`CheckpointError::Io`] for what the system does not let go,
    /// or when it is not what it was.
    pub fn remove(&self) -> Result<(), CheckpointError> {
        let path = &self.path;
        let in_use = |writer: Writer| CheckpointError::InUse { folder: path.clone(), writer };
        let _locked = lock(path).map_err(in_use)?;
        let changed = || Action::Remove.failed(path)(io::Error::other("it is not what it was"));
        for (file, _) in contents(path).ok_or_else(changed)? {
            fs::remove_file(&file).map_err(Action::Remove.failed(&file))?;
        }
        fs::remove_dir(path).map_err(Action::Remove.failed(path))
    }
}

/// The files of a folder in the making; `None` if it is none, or holds anything that its writer does not make.
fn contents(path: &Path) -> Option<Vec<(PathBuf, Metadata)>> {
    staging::maker(path)?;
    if !fs::symlink_metadata(path).ok()?.is_dir() {
        return None;
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).ok()? {
        let entry = entry.ok()?;
        let metadata = fs::symlink_metadata(entry.path()).ok()?;
        if !metadata.is_file() || !folder::is_made_name(entry.file_name().to_str()?) {
            return None;
        }
        files.push((entry.path(), metadata));
    }
    Some(files)
}

/// Takes the lock of a folder that nobody writes to. Where a file system has no locks, the process in the name decides.
fn lock(path: &Path) -> Result<Option<File>, Writer> {
    let alive = staging::maker(path).filter(|pid| Path::new(&format!("/proc/{pid}")).exists());
    // Between making the folder and locking it there is a moment.
    if alive.is_some() {
        return Err(Writer::Process { pid: alive });
    }
    match File::open(path) {
        Ok(folder) => match folder.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Writer::Process { pid: None }),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(folder)),
        },
        Err(_) => Ok(None),
    }
}

#[expect(clippy::disallowed_methods, reason = "it is shown to people, and nothing depends on it")]
fn last_used(files: &[(PathBuf, Metadata)]) -> Option<SystemTime> {
    files.iter().filter_map(|(_, file)| file.modified().ok()).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::staging::Staging;

    /// A folder that looks like one that `pid` was making; with these files, of 5000 bytes each.
    fn made(root: &Path, pid: u32, files: &[&str]) -> PathBuf {
        let folder = root.join(format!(".model.partial-{pid}"));
        fs::create_dir(&folder).unwrap();
        for name in files {
            fs::write(folder.join(name), [1; 5000]).unwrap();
        }
        folder
    }

    /// No process has such a number: the kernel's limit is lower.
    const DEAD: u32 = 1 << 30;

    fn found(root: &Path) -> Vec<Unfinished> {
        unfinished(&[root.to_owned()]).unwrap()
    }

    #[test]
    fn what_a_dead_process_began_is_found_and_removed_and_what_a_living_one_makes_stays() {
        let root = tempfile::tempdir().unwrap();
        let files = ["config.json", "state.json", "tokenizer.json", "state-00001-of-00002.safetensors"];
        let folder = made(root.path(), DEAD, &files);
        let mut staging = Staging::begin(&root.path().join("mine")).unwrap();
        staging.create("config.json").unwrap();
        let [mine, dead] = &found(root.path())[..] else { panic!("{:?}", found(root.path())) };
        assert_eq!(mine.writer, Writer::Process { pid: Some(std::process::id()) });
        assert!(matches!(mine.remove().unwrap_err(), CheckpointError::InUse { .. }));
        assert_eq!((&dead.path, dead.writer), (&folder, Writer::Dead));
        assert!(dead.bytes_on_disk >= 4 * 5000 && dead.last_used.is_some());
        assert_eq!(unfinished(std::slice::from_ref(&folder)).unwrap().len(), 1, "named itself");
        dead.remove().unwrap();
        assert!(!folder.exists());
        staging.publish().unwrap();
        assert!(found(root.path()).is_empty());
        assert!(dead.remove().is_err(), "it is gone");
    }

    #[test]
    fn whoever_has_the_folder_locked_writes_to_it_wherever_that_is() {
        let root = tempfile::tempdir().unwrap();
        let mut staging = Staging::begin(&root.path().join("mine")).unwrap();
        staging.create("config.json").unwrap();
        // As it looks from a container that does not see the process.
        let [mine] = &found(root.path())[..] else { panic!("{:?}", found(root.path())) };
        let elsewhere = root.path().join(format!(".mine.partial-{DEAD}"));
        fs::rename(&mine.path, &elsewhere).unwrap();
        let [seen] = &found(root.path())[..] else { panic!("{:?}", found(root.path())) };
        assert_eq!(seen.writer, Writer::Process { pid: None });
        assert!(matches!(seen.remove().unwrap_err(), CheckpointError::InUse { .. }));
        assert!(elsewhere.join("config.json").exists());
        drop(staging);
        let [left] = &found(root.path())[..] else { panic!("{:?}", found(root.path())) };
        assert_eq!(left.writer, Writer::Dead);
    }

    #[test]
    fn a_folder_with_anything_that_no_writer_makes_is_somebody_elses() {
        let root = tempfile::tempdir().unwrap();
        for (pid, stranger) in
            ["thesis.txt", "model.safetensors.bak", "model-1-of-2.safetensors"].iter().enumerate()
        {
            made(root.path(), DEAD + pid as u32, &["config.json", stranger]);
        }
        let linked = made(root.path(), DEAD + 10, &[]);
        std::os::unix::fs::symlink("/dev/null", linked.join("config.json")).unwrap();
        let real = made(root.path(), DEAD + 11, &["config.json"]);
        let elsewhere = root.path().join("elsewhere");
        fs::rename(&real, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &real).unwrap();
        for name in
            [".partial-1073741824", "a.partial-1073741824", ".a.partial-", ".a.partial-1x", ".a.partial-1-"]
        {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        assert!(found(root.path()).is_empty(), "{:?}", found(root.path()));
        // It was recognized, and is not what it was when it is removed.
        let folder = made(root.path(), DEAD + 20, &["config.json"]);
        let [left] = &found(root.path())[..] else { panic!("{:?}", found(root.path())) };
        fs::write(folder.join("thesis.txt"), "dear to somebody").unwrap();
        assert!(left.remove().unwrap_err().to_string().contains("not what it was"));
        assert!(folder.join("config.json").exists());
    }
}
