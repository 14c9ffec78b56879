//! Wishes: how another process asks the owner of a store for a snapshot.
//!
//! Only the owner knows which generation is committed and may not be written to, so only the owner pins one. Whoever
//! wants a snapshot of a running job leaves an empty file `wish.NAME` in the store's directory; the owner looks for
//! such files after each commit, and answers each:
//!
//! ```text
//! asks:   creates wish.NAME ──────────────── looks again and again ──────────────► wish gone, snapshot there
//! owner:  commit: locks wish.NAME, pins ─► links snapshot.NAME ─► flushes the directory ─► removes wish.NAME
//!                                  └─ cannot: writes an answer with the reason into wish.NAME, removes nothing
//! ```
//!
//! An answer begins with a line that nothing else begins with; so it is told from somebody else's file.
//!
//! What may happen in between, and why it ends well:
//!
//! - *The owner dies, or power is lost.* The wish goes last, so a wish that is gone was granted, durably. One that is
//!   still there may have been granted too; whoever asked takes the lock that is free now, and makes the snapshot, or
//!   finds it made and flushes the directory. Without somebody who still asks, the next owner grants it.
//! - *Time is up.* Whoever asked takes the wish back with its file locked, and the owner answers with it locked; each
//!   looks, once it has the lock, whether the file still has its name. So either the wish was never granted, or it is
//!   known that it was. If the owner takes too long for its answer, the wish stays, and it is said that nobody knows yet.
//! - *Two commands wish for one name.* The file is created, never opened, so the second is refused. What an earlier
//!   command did not collect is recognized as an answer, and replaced; who still waits for that answer reads it
//!   from the file that it has open.
//! - *The name exists.* A command looks for the snapshot before it wishes; so one that the owner has pinned by then came
//!   between the two, and is what was wished for. The name of a foreign file is a reason for a refusal.
//! - *The store goes.* The owner removes empty wishes with it, and those that it answered. A wish that comes later keeps
//!   an empty directory, which whoever asked removes.
//!
//! Deleting needs no wish: the name is removed, and the directory flushed, by the command. The owner misses the name
//! after its next commit; before it gives the bytes away it flushes the directory itself, so that a loss of power
//! cannot bring back a snapshot whose bytes were reused.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::directory::{self, Directory, Owner};
use crate::error::StoreError;
use crate::names;
use crate::snapshot::{self, Found};
use crate::store::Store;

/// What the names of wishes' files begin with.
const PREFIX: &str = "wish.";

/// What answers begin with.
const ANSWER: &str = "overspill: this snapshot was not made\n";

/// Longest answer that is handed on, in bytes.
const ANSWER_BYTES_MAX: usize = 1024;

/// For how long, and how often, a wish that its owner is answering is waited for when it is taken back.
const PAUSE: Duration = Duration::from_millis(10);
const PAUSES_MAX: u32 = 500;

/// What became of asking for a snapshot.
#[derive(Debug)]
pub enum Asked {
    /// Nobody has the store open, and the snapshot was made.
    Made,
    /// Somebody has, and will make it after the next commit.
    Wished(Wish),
}

/// What became of a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing yet.
    Pending,
    /// The snapshot is there, durably.
    Granted,
}

/// What became of a snapshot that was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// What only it kept is free.
    Now,
    /// A process has the store open, and what only the snapshot kept is free after its next commit.
    AtNextCommit {
        /// The process, when it is known.
        pid: Option<u32>,
    },
}

/// A wish that was left in the directory of a store. It stays when this is dropped.
#[derive(Debug)]
pub struct Wish {
    directory: PathBuf,
    name: String,
    file: File,
    /// Who is asked, when it is known.
    pub pid: Option<u32>,
}

impl Store {
    /// Keeps the committed generation of the store in `path` under `name`, or asks the process that has it open to.
    ///
    /// # Errors
    /// As [`Store::snapshot`]; [`StoreError::WishExists`], [`StoreError::NotHome`].
    pub fn ask_for_snapshot(path: &Path, name: &str) -> Result<Asked, StoreError> {
        snapshot::check_new_name(name)?;
        let label = directory::read_label(path);
        if label.is_some_and(|(_, index)| index > 0) {
            return Err(StoreError::NotHome { path: path.to_owned() });
        }
        match Directory::open(path, 0) {
            Ok(directory) => {
                make(&directory, name)?;
                // Whose wish it was finds it granted.
                if is_wish(&wish_path(path, name)) {
                    drop(names::remove(&wish_path(path, name)));
                }
                Ok(Asked::Made)
            }
            Err(StoreError::Locked { pid, .. }) => {
                if let Found::Snapshot(_) = snapshot::find(path, name, label.map(|(store, _)| store))? {
                    return Err(StoreError::SnapshotExists { name: name.to_owned(), path: path.to_owned() });
                }
                Wish::leave(path, name, pid).map(Asked::Wished)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives up a snapshot of the store in `path`, whoever has it open.
    ///
    /// # Errors
    /// As [`Store::delete_snapshot`].
    pub fn delete_snapshot_in(path: &Path, name: &str) -> Result<Deleted, StoreError> {
        snapshot::check_name(name)?;
        // Held, so that nobody opens the store in between.
        let (_held, deleted) = match Directory::open(path, 0) {
            Ok(directory) => (Some(directory), Deleted::Now),
            Err(StoreError::Locked { pid, .. }) => (None, Deleted::AtNextCommit { pid }),
            Err(error) => return Err(error),
        };
        snapshot::delete(path, name, directory::read_label(path).map(|(store, _)| store))?;
        names::sync(path).map_err(|source| StoreError::directory("flush", path, source))?;
        Ok(deleted)
    }
}

impl Wish {
    fn leave(directory: &Path, name: &str, pid: Option<u32>) -> Result<Self, StoreError> {
        let path = wish_path(directory, name);
        let file = match names::create_empty(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_answer(&path) => {
                drop(names::remove(&path));
                names::create_empty(&path)
            }
            created => created,
        };
        match file {
            Ok(file) => Ok(Self { directory: directory.to_owned(), name: name.to_owned(), file, pid }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(StoreError::WishExists { name: name.to_owned(), path: directory.to_owned() })
            }
            Err(source) => Err(StoreError::directory("create", &path, source)),
        }
    }

    /// Looks whether there is an answer. If the owner has ended, the snapshot is made here.
    ///
    /// # Errors
    /// [`StoreError::WishRefused`] with the owner's reason, [`StoreError::WishGone`]; as [`Store::snapshot`] if the
    /// owner has ended. The wish is gone then.
    pub fn answer(&self) -> Result<Answer, StoreError> {
        self.check_reason()?;
        if !self.has_name() {
            return self.after();
        }
        match directory::owner(&self.directory) {
            Ok(Owner::Process { .. }) => Ok(Answer::Pending),
            Ok(Owner::Nobody) => self.make(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.remove();
                // It stays if anything but the wish was in it.
                drop(std::fs::remove_dir(&self.directory));
                self.after()
            }
            Err(source) => Err(StoreError::directory("look at", &self.directory, source)),
        }
    }

    /// Takes the wish back, unless it was granted meanwhile.
    ///
    /// # Errors
    /// As [`Wish::answer`], and [`StoreError::WishPending`] when the owner is answering and does not come to an end; the
    /// wish stays then.
    pub fn take_back(self) -> Result<Answer, StoreError> {
        self.take_back_within(PAUSES_MAX)
    }

    fn take_back_within(self, mut pauses: u32) -> Result<Answer, StoreError> {
        // Who answers has it locked. A file system without locks has no answers under way either.
        while matches!(self.file.try_lock(), Err(TryLockError::WouldBlock)) {
            if pauses == 0 {
                return Err(StoreError::WishPending { name: self.name, path: self.directory });
            }
            std::thread::park_timeout(PAUSE);
            pauses -= 1;
        }
        self.check_reason()?;
        if !self.has_name() {
            return self.after();
        }
        self.remove();
        Ok(Answer::Pending)
    }

    /// The owner has ended: what it was to do is done here, with its lock.
    fn make(&self) -> Result<Answer, StoreError> {
        let directory = match Directory::open(&self.directory, 0) {
            Ok(directory) => directory,
            Err(StoreError::Locked { .. }) => return Ok(Answer::Pending),
            Err(error) => {
                self.remove();
                return Err(error);
            }
        };
        self.check_reason()?;
        if !self.has_name() {
            return self.after();
        }
        let made = match make(&directory, &self.name) {
            // The owner came as far as that.
            Err(StoreError::SnapshotExists { .. }) => {
                directory.sync().map_err(|source| StoreError::directory("flush", &self.directory, source))
            }
            made => made,
        };
        self.remove();
        made.map(|()| Answer::Granted)
    }

    /// The wish is gone; whether it was granted.
    fn after(&self) -> Result<Answer, StoreError> {
        let store = directory::read_label(&self.directory).map(|(store, _)| store);
        match snapshot::find(&self.directory, &self.name, store) {
            Ok(Found::Snapshot(_)) => Ok(Answer::Granted),
            Err(error @ StoreError::Manifest { .. }) => Err(error),
            _ => Err(StoreError::WishGone { name: self.name.clone(), path: self.directory.clone() }),
        }
    }

    /// Ends in the owner's reason, if there is one. It comes in one piece.
    fn check_reason(&self) -> Result<(), StoreError> {
        let mut bytes = [0; ANSWER_BYTES_MAX];
        let read = self.file.read_at(&mut bytes, 0).unwrap_or(0);
        if read == 0 {
            return Ok(());
        }
        self.remove();
        let answer = String::from_utf8_lossy(&bytes[..read]);
        let reason = answer.strip_prefix(ANSWER).unwrap_or(&answer).to_owned();
        Err(StoreError::WishRefused { name: self.name.clone(), path: self.directory.clone(), reason })
    }

    fn has_name(&self) -> bool {
        directory::has_name(&self.file, &wish_path(&self.directory, &self.name)).unwrap_or(false)
    }

    /// Removes the file, unless the name is that of somebody else's wish by now.
    fn remove(&self) {
        if self.has_name() {
            drop(names::remove(&wish_path(&self.directory, &self.name)));
        }
    }
}

/// Keeps the committed generation of a store that nobody else has open.
fn make(directory: &Directory, name: &str) -> Result<(), StoreError> {
    // What cannot be read is not worth a name.
    Store::committed(directory.path())?;
    directory.sign()?;
    snapshot::make(directory.path(), name)?;
    directory.sync().map_err(|source| StoreError::directory("flush", directory.path(), source))
}

/// What the owner of a store finds in its directory.
#[derive(Debug, Default)]
pub(crate) struct Sight {
    /// Snapshots, by name.
    pub(crate) snapshots: Vec<String>,
    /// Wishes, by name.
    pub(crate) wishes: Vec<String>,
}

/// Looks at a directory once.
pub(crate) fn look(directory: &Path) -> io::Result<Sight> {
    let mut sight = Sight::default();
    for entry in std::fs::read_dir(directory)? {
        let file = entry?.file_name();
        sight.snapshots.extend(snapshot::name_of(file.to_str(), snapshot::PREFIX));
        let wish = snapshot::name_of(file.to_str(), PREFIX);
        sight.wishes.extend(wish.filter(|name| is_wish(&wish_path(directory, name))));
    }
    Ok(sight)
}

/// A wish that its owner is answering. Nobody takes it back meanwhile.
#[derive(Debug)]
pub(crate) struct Taken {
    path: PathBuf,
    file: File,
}

impl Taken {
    /// Takes a wish that is still there and has no answer.
    pub(crate) fn take(directory: &Path, name: &str) -> Option<Self> {
        let path = wish_path(directory, name);
        let file = directory::open_as_it_is(&path, OpenOptions::new().read(true).write(true)).ok()?;
        // Who has it locked takes it back.
        file.try_lock().ok()?;
        let is_open = file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == 0);
        (is_open && directory::has_name(&file, &path).unwrap_or(false)).then_some(Self { path, file })
    }

    /// The snapshot is there, durably.
    pub(crate) fn grant(self) {
        // If this fails the wish is found again after the next commit, and the snapshot with it.
        drop(names::remove(&self.path));
    }

    /// There will be no snapshot. A reason that cannot be written is found again after the next commit.
    pub(crate) fn refuse(self, reason: &str) {
        let answer = format!("{ANSWER}{reason}");
        let bytes = answer.as_bytes();
        drop(self.file.write_all_at(&bytes[..bytes.len().min(ANSWER_BYTES_MAX)], 0));
    }
}

/// The name of a wish's file.
pub(crate) fn file_name(name: &str) -> String {
    format!("{PREFIX}{name}")
}

fn wish_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(file_name(name))
}

/// Whether a wish lies there that nobody answered; other files are somebody else's.
pub(crate) fn is_wish(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == 0)
}

/// Whether an answer lies there that nobody collected.
fn is_answer(path: &Path) -> bool {
    let start = directory::read_start(path, ANSWER.len());
    start.is_ok_and(|start| start.is_some_and(|start| start.bytes == ANSWER.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_that_is_being_answered_is_not_taken_back_and_not_said_to_be_lost() {
        let folder = tempfile::tempdir().unwrap();
        let wish = Wish::leave(folder.path(), "slow", None).unwrap();
        let taken = Taken::take(folder.path(), "slow").unwrap();
        let error = wish.take_back_within(2).unwrap_err();
        assert!(matches!(error, StoreError::WishPending { .. }), "{error}");
        assert!(is_wish(&wish_path(folder.path(), "slow")), "whoever answers finds it");
        taken.grant();
    }
}
