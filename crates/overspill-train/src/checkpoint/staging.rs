//! A folder that has its final name only when it is whole.
//!
//! Files are made in a hidden sibling of the final folder. [`Staging::publish`] makes them safe on storage and
//! renames the sibling; every other end removes the files that were made here, by name, and then the sibling. What
//! has its final name is never removed.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Action, CheckpointError};

/// A folder in the making.
#[derive(Debug)]
pub(super) struct Staging {
    /// The final folder.
    target: PathBuf,
    /// `None` once the folder has its final name.
    made: Option<Made>,
}

/// What is on storage so far.
#[derive(Debug)]
struct Made {
    folder: PathBuf,
    files: Vec<PathBuf>,
    /// Held as long as the folder is in the making, where the file system has locks: for whoever asks whether it is dead.
    _lock: Option<File>,
}

/// Between the name of the folder in the making and the process that makes it.
const PARTIAL: &str = ".partial-";

/// Names that are tried for the hidden sibling: what a killed process left may have the first ones.
const NAMES_MAX: u32 = 100;

impl Staging {
    /// Begins a folder. `target` must not be there, or be an empty folder; its parent must be there.
    pub(super) fn begin(target: &Path) -> Result<Self, CheckpointError> {
        let target = resolve(target)?;
        let folder = make_sibling(&target)?;
        let lock = File::open(&folder).ok().filter(|folder| folder.try_lock().is_ok());
        Ok(Self { target, made: Some(Made { folder, files: Vec::new(), _lock: lock }) })
    }

    /// Creates a file in the folder and returns it with its present path.
    pub(super) fn create(&mut self, name: &str) -> Result<(File, PathBuf), CheckpointError> {
        let path = self.path(name);
        let made = self.made.as_mut().expect("only publishing takes the folder away");
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Action::Create.failed(&path))?;
        made.files.push(path.clone());
        Ok((file, path))
    }

    /// Where a file of the folder is at present.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.made.as_ref().expect("only publishing takes the folder away").folder.join(name)
    }

    /// Makes the files safe on storage, gives the folder its final name, and makes the name safe, too.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] before the folder has its name: it will not get it, and what was made is removed.
    /// [`CheckpointError::NameNotSynced`] afterwards: the folder is there, whole and safe, but after a loss of power
    /// it may have its hidden name again. It stays, because it is a model that somebody may already have opened.
    pub(super) fn publish(self) -> Result<(), CheckpointError> {
        self.publish_through(sync)
    }

    fn publish_through(mut self, sync: impl Fn(&Path) -> io::Result<()>) -> Result<(), CheckpointError> {
        let made = self.made.as_ref().expect("only publishing takes the folder away");
        for path in made.files.iter().chain([&made.folder]) {
            sync(path).map_err(Action::Sync.failed(path))?;
        }
        // Onto an empty folder this is allowed, and still one step.
        fs::rename(&made.folder, &self.target).map_err(Action::Rename.failed(&self.target))?;
        self.made = None;
        sync(parent(&self.target))
            .map_err(|source| CheckpointError::NameNotSynced { folder: self.target.clone(), source })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let Some(Made { folder, files, .. }) = self.made.take() else { return };
        // What cannot be removed stays under a name that nobody takes for a model; there is nobody to tell.
        for file in files {
            drop(fs::remove_file(file));
        }
        drop(fs::remove_dir(folder));
    }
}

/// The final folder as an absolute path without links, after a look at what is there.
pub(super) fn resolve(target: &Path) -> Result<PathBuf, CheckpointError> {
    let not_empty = || CheckpointError::NotEmpty { folder: target.to_owned() };
    match fs::read_dir(target) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(not_empty());
            }
            let resolved = fs::canonicalize(target).map_err(Action::Open.failed(target))?;
            let device = |path: &Path| fs::metadata(path).map(|m| m.dev()).map_err(Action::Open.failed(path));
            if device(&resolved)? != device(parent(&resolved))? {
                return Err(CheckpointError::MountPoint { folder: target.to_owned() });
            }
            Ok(resolved)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // A link that leads nowhere is something, too.
            if target.is_symlink() {
                return Err(not_empty());
            }
            let parent = parent(target);
            let resolved = match fs::canonicalize(parent) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(CheckpointError::NoParent { parent: parent.to_owned() });
                }
                resolved => resolved.map_err(Action::Open.failed(parent))?,
            };
            let name =
                target.file_name().ok_or_else(|| CheckpointError::NoParent { parent: target.to_owned() })?;
            Ok(resolved.join(name))
        }
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Err(not_empty()),
        Err(e) => Err(Action::Open.failed(target)(e)),
    }
}

/// Creates the hidden sibling.
fn make_sibling(target: &Path) -> Result<PathBuf, CheckpointError> {
    let mut base = OsString::from(".");
    base.push(target.file_name().unwrap_or_default());
    base.push(format!("{PARTIAL}{}", std::process::id()));
    let mut attempt = 0;
    loop {
        let mut name = base.clone();
        if attempt > 0 {
            name.push(format!("-{attempt}"));
        }
        let folder = parent(target).join(name);
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && attempt < NAMES_MAX => attempt += 1,
            Err(e) => return Err(Action::Create.failed(&folder)(e)),
        }
    }
}

/// The process that began a folder, if it has the name of a hidden sibling.
pub(super) fn maker(folder: &Path) -> Option<u32> {
    let (target, process) = folder.file_name()?.to_str()?.strip_prefix('.')?.rsplit_once(PARTIAL)?;
    let (pid, attempt) = process.split_once('-').unwrap_or((process, "1"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_one = !target.is_empty() && is_number(pid) && is_number(attempt);
    if is_one { pid.parse().ok() } else { None }
}

/// The folder that holds `path`; the working directory when the path does not say.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Publishes a folder of one file with a failure to sync the file called `failing`.
    fn publish(root: &Path, failing: &str) -> Result<(), CheckpointError> {
        let mut staging = Staging::begin(&root.join("m")).unwrap();
        staging.create("f").unwrap();
        staging.publish_through(|path| match path.ends_with(failing) {
            true => Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())),
            false => sync(path),
        })
    }

    #[test]
    fn a_name_that_may_be_lost_is_told_and_the_folder_stays_whole() {
        let root = tempfile::tempdir().unwrap();
        let parent = root.path().file_name().unwrap().to_str().unwrap();
        let error = publish(root.path(), parent).unwrap_err();
        let told = matches!(&error, CheckpointError::NameNotSynced { folder, .. } if folder.ends_with("m"));
        assert!(told, "{error}");
        assert!(root.path().join("m/f").is_file());
    }

    #[test]
    fn a_file_that_cannot_be_made_safe_leaves_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let error = publish(root.path(), "f").unwrap_err();
        assert!(matches!(error, CheckpointError::Io { action: Action::Sync, .. }), "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
