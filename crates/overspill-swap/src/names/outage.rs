//! A directory that loses its power together with a simulated device.
//!
//! Changes are made to the real directory. Of every name it is known which file it meant at the last flush of the
//! directory and which ones it has meant since, and of every file whether its bytes were flushed. When the power goes,
//! each name means any one of them or nothing, if it did so meanwhile, whatever order the changes had; a file that was
//! not flushed is whole, torn or empty. File systems promise more than that, so what survives here survives there.
//! Each change, and each part of making a file, is an event of the power.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use overspill_io::Power;
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Every directory in danger.
static DIRECTORIES: Mutex<Vec<Weak<Directory>>> = Mutex::new(Vec::new());

/// Keeps a store's directory in danger until it is dropped.
#[derive(Debug)]
#[must_use = "the directory is safe again when this is dropped"]
pub struct Endangered(#[expect(dead_code, reason = "it is held, and found by its path")] Arc<Directory>);

/// How many names a file may have in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// Any number.
    Any,
    /// One, as on file systems without hard links.
    One,
}

/// Lets the store's directory `path` lose its power together with a device.
pub fn endanger(path: &Path, links: Links, power: &Power) -> Endangered {
    let state = Mutex::new(State { is_out: false, names: BTreeMap::new() });
    let directory = Arc::new(Directory { path: path.to_owned(), links, power: power.clone(), state });
    let weak = Arc::downgrade(&directory);
    power.share({
        let directory = weak.clone();
        move |seed| {
            if let Some(directory) = directory.upgrade() {
                directory.state().lose(&directory.path, seed);
            }
        }
    });
    let mut directories = directories();
    directories.retain(|directory| directory.strong_count() > 0);
    directories.push(weak);
    Endangered(directory)
}

/// The directory that a name is in, if it is in danger.
pub(super) fn of(name: &Path) -> Option<Arc<Directory>> {
    name.parent().and_then(in_directory)
}

/// The directory, if it is in danger.
pub(super) fn in_directory(path: &Path) -> Option<Arc<Directory>> {
    directories().iter().filter_map(Weak::upgrade).find(|directory| directory.path == path)
}

fn directories() -> MutexGuard<'static, Vec<Weak<Directory>>> {
    DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory in danger.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    links: Links,
    power: Power,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    is_out: bool,
    /// What each name meant at the last flush, and what it has meant since.
    names: BTreeMap<OsString, Vec<Option<Arc<Contents>>>>,
}

/// The bytes of a file.
#[derive(Debug)]
struct Contents {
    bytes: Vec<u8>,
    is_flushed: bool,
}

impl Directory {
    pub(super) fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let contents =
            |bytes: &[u8], is_flushed| Some(Arc::new(Contents { bytes: bytes.to_vec(), is_flushed }));
        self.change(|state| {
            state.know(path)?;
            File::create_new(path)?;
            state.versions(path).push(contents(&[], false));
            Ok(())
        })?;
        for is_flushed in [false, true] {
            self.change(|state| {
                std::fs::write(path, bytes)?;
                *state.versions(path).last_mut().expect("it was just made") = contents(bytes, is_flushed);
                Ok(())
            })?;
        }
        Ok(())
    }

    pub(super) fn create_empty(&self, path: &Path) -> io::Result<File> {
        let mut created = None;
        self.change(|state| {
            state.know(path)?;
            created = Some(super::open_new(path)?);
            let contents = Contents { bytes: Vec::new(), is_flushed: false };
            state.versions(path).push(Some(Arc::new(contents)));
            Ok(())
        })?;
        Ok(created.expect("it was just made"))
    }

    pub(super) fn link(&self, file: &Path, name: &Path) -> io::Result<()> {
        if self.links == Links::One {
            return Err(Errno::PERM.into());
        }
        self.change(|state| {
            let contents = state.know(file)?;
            state.know(name)?;
            std::fs::hard_link(file, name)?;
            state.versions(name).push(contents);
            Ok(())
        })
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|state| {
            let contents = state.know(from)?;
            state.know(to)?;
            std::fs::rename(from, to)?;
            state.versions(from).push(None);
            state.versions(to).push(contents);
            Ok(())
        })
    }

    pub(super) fn remove(&self, name: &Path) -> io::Result<()> {
        self.change(|state| {
            state.know(name)?;
            std::fs::remove_file(name)?;
            state.versions(name).push(None);
            Ok(())
        })
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        // The power goes before anything is durable.
        self.change(|_| Ok(()))?;
        for versions in self.state().names.values_mut() {
            versions.drain(..versions.len() - 1);
        }
        Ok(())
    }

    /// Makes one change, which is an event.
    fn change(&self, make: impl FnOnce(&mut State) -> io::Result<()>) -> io::Result<()> {
        {
            let mut state = self.state();
            if state.is_out {
                return Err(Errno::IO.into());
            }
            make(&mut state)?;
        }
        // Not with the lock: it may be now that the power goes.
        if self.power.event() { Ok(()) } else { Err(Errno::IO.into()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What a name means; what was there before anybody looked counts as flushed.
    fn know(&mut self, path: &Path) -> io::Result<Option<Arc<Contents>>> {
        if !self.names.contains_key(name(path)) {
            let present = match std::fs::read(path) {
                Ok(bytes) => Some(Arc::new(Contents { bytes, is_flushed: true })),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            self.names.insert(name(path).to_owned(), vec![present]);
        }
        Ok(self.versions(path).last().cloned().flatten())
    }

    fn versions(&mut self, path: &Path) -> &mut Vec<Option<Arc<Contents>>> {
        self.names.get_mut(name(path)).expect("it was looked at before it changed")
    }

    /// Lets every name mean one of the files that it has meant since the last flush.
    fn lose(&mut self, directory: &Path, seed: u64) {
        self.is_out = true;
        for (name, versions) in std::mem::take(&mut self.names) {
            let drawn = xxh3_64_with_seed(name.as_encoded_bytes(), seed);
            let found = &versions[(drawn % versions.len() as u64) as usize];
            let path = directory.join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    panic!("{}: {error}", path.display())
                }
                Ok(()) | Err(_) => {}
            }
            let Some(contents) = found else { continue };
            let length = match drawn >> 32 & 3 {
                _ if contents.is_flushed => contents.bytes.len(),
                0 => 0,
                1 => contents.bytes.len() / 2,
                _ => contents.bytes.len(),
            };
            std::fs::write(&path, &contents.bytes[..length]).expect("a small file can be written");
        }
    }
}

fn name(path: &Path) -> &OsStr {
    path.file_name().expect("who changes a name has one")
}
