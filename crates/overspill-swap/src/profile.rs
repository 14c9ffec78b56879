//! The profile of a disk: how an engine gets the most out of the directory that it was measured in.
//!
//! `overspill tune` measures and [`Profile::save`]s; a run [`Profile::load`]s. The file is JSON, for people to read and
//! to change, so a reader trusts nothing in it:
//!
//! ```text
//! { "version": 1, "chunk_bytes": 1048576, "queue_depth": 32, "rings": 1, "read_gbps": 3.4, "write_gbps": 6.8 }
//! ```
//!
//! Whoever asks names the directory to be used, which need not exist yet. The nearest profile above it counts, as long
//! as it lies on the same file system: another one is another disk, and its figures mean nothing here.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use overspill_io::BLOCK_ALIGNMENT;
use rustix::fs::OFlags;
use serde::Serialize;
use serde_json::{Map, Value};

/// What was found to be best, and how fast it was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profile {
    /// Bytes of a chunk, as in `EngineConfig`: a multiple of [`BLOCK_ALIGNMENT`], at most 1 GiB.
    pub chunk_bytes: usize,
    /// Chunks that each engine has with the kernel at a time, as in `EngineConfig`: from 1 to 4096.
    pub queue_depth: usize,
    /// Engines side by side: from 1 to [`Profile::RINGS_MAX`].
    pub rings: usize,
    /// Speed of reads by all rings together, in 10⁹ bytes per second.
    pub read_gbps: f64,
    /// Speed of writes by all rings together, in 10⁹ bytes per second.
    pub write_gbps: f64,
}

/// Why a profile was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file, or a directory on the way to it, could not be worked on.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    File {
        /// What was tried: "read", "write", ….
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// There is something else under the profile's name, such as a symbolic link.
    #[error("{path} is not a plain file: remove it, or run `overspill tune` again", path = path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// The file is not a JSON object of a profile's size.
    #[error("{path} is not a profile ({reason}): remove it, or run `overspill tune` again", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Written by another version of the format.
    #[error("{path} has version {found} and version {VERSION} is known here: run `overspill tune` again",
        path = path.display())]
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// The version it says.
        found: u64,
    },
    /// A field is missing, or its value cannot work.
    #[error("{path}: {field} is {found} and must be {requirement}", path = path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// Its value, cut short, or "missing".
        found: String,
        /// What it must be.
        requirement: &'static str,
    },
}

/// The version this code writes, and the only one it reads.
const VERSION: u64 = 1;
/// No profile is larger, in bytes, unless somebody wishes us ill.
const FILE_BYTES_MAX: usize = 4096;
/// As many directories are looked into, the first one included.
const DIRECTORIES_MAX: usize = 64;
/// Characters of a wrong value that are quoted.
const QUOTE_MAX: usize = 40;
/// The engine's own limits; a test compares them with what it accepts.
const CHUNK_BYTES_MAX: usize = 1 << 30;
const QUEUE_DEPTH_MAX: usize = 4096;
/// No storage is faster, in 10⁹ bytes per second.
const GBPS_MAX: f64 = 1e6;

const CHUNK_BYTES: &str = "a multiple of 4096, at least 4096 and at most 1073741824";
const QUEUE_DEPTH: &str = "a whole number from 1 to 4096";
const RINGS: &str = "a whole number from 1 to 16";
const GBPS: &str = "a number above 0 and at most 1000000";

impl Profile {
    /// Name of the file, in the directory that was measured.
    pub const FILE: &str = "overspill-tune.json";

    /// More rings than this only fight for the processor.
    pub const RINGS_MAX: usize = 16;

    /// The profile that counts for `directory`: its own, or else that of the nearest directory above it on the same
    /// file system. `directory` need not exist yet. One that could not is no error here: whoever makes it says so.
    ///
    /// # Errors
    ///
    /// [`ProfileError`] if the nearest profile cannot be read or is not what [`Profile::save`] writes.
    pub fn load(directory: &Path) -> Result<Option<Self>, ProfileError> {
        let Some(nearest) = existing(directory) else { return Ok(None) };
        let mut device = None;
        for directory in nearest.ancestors().take(DIRECTORIES_MAX) {
            // A directory that may not be looked at has no profile for us, and neither has what is above it.
            let Ok(found) = std::fs::metadata(directory) else { return Ok(None) };
            if *device.get_or_insert(found.dev()) != found.dev() {
                return Ok(None);
            }
            let path = directory.join(Self::FILE);
            if let Some(text) = read(&path)? {
                return Self::decode(&path, &text).map(Some);
            }
        }
        Ok(None)
    }

    /// Writes the profile into `directory`, in place of an earlier one, readable by everybody; returns the file's path.
    /// Whoever loads meanwhile gets the one or the other, and after a crash there is one of them too.
    ///
    /// # Errors
    ///
    /// [`ProfileError::Field`] if [`Profile::load`] would refuse it, [`ProfileError::File`] if it cannot be written.
    pub fn save(&self, directory: &Path) -> Result<PathBuf, ProfileError> {
        let path = directory.join(Self::FILE);
        let text = self.encode();
        Self::decode(&path, &text)?;
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| ProfileError::File { action, path, source }
        };
        let aside = path.with_added_extension(format!("new-{}", std::process::id()));
        let written = write_aside(&aside, &text)
            .map_err(failed("write", &aside))
            .and_then(|()| std::fs::rename(&aside, &path).map_err(failed("replace", &path)));
        if let Err(error) = written {
            drop(std::fs::remove_file(&aside));
            return Err(error);
        }
        let sync = || File::open(directory)?.sync_all();
        sync().map_err(failed("sync", directory))?;
        Ok(path)
    }

    fn encode(&self) -> Vec<u8> {
        let mut fields = Map::new();
        fields.insert("version".to_owned(), VERSION.into());
        fields.insert("chunk_bytes".to_owned(), self.chunk_bytes.into());
        fields.insert("queue_depth".to_owned(), self.queue_depth.into());
        fields.insert("rings".to_owned(), self.rings.into());
        // What is no number becomes null, which no reader accepts.
        fields.insert("read_gbps".to_owned(), self.read_gbps.into());
        fields.insert("write_gbps".to_owned(), self.write_gbps.into());
        format!("{:#}\n", Value::Object(fields)).into_bytes()
    }

    /// Reads the bytes of the file at `path`.
    fn decode(path: &Path, text: &[u8]) -> Result<Self, ProfileError> {
        let malformed = |reason: String| ProfileError::Malformed { path: path.to_owned(), reason };
        if text.len() > FILE_BYTES_MAX {
            return Err(malformed(format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        let values = serde_json::from_slice(text).map_err(|error| malformed(error.to_string()))?;
        let fields = Fields { path, values };
        match fields.number("version", "a whole number", Value::as_u64)? {
            VERSION => {}
            found => return Err(ProfileError::UnknownVersion { path: path.to_owned(), found }),
        }
        let whole = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
        let chunk = |&bytes: &usize| {
            (BLOCK_ALIGNMENT..=CHUNK_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(BLOCK_ALIGNMENT)
        };
        let gbps = |value: &Value| value.as_f64().filter(|&gbps| gbps > 0.0 && gbps <= GBPS_MAX);
        let up_to = |max| move |value: &Value| whole(value).filter(|number| (1..=max).contains(number));
        let profile = Self {
            chunk_bytes: fields.number("chunk_bytes", CHUNK_BYTES, |value| whole(value).filter(chunk))?,
            queue_depth: fields.number("queue_depth", QUEUE_DEPTH, up_to(QUEUE_DEPTH_MAX))?,
            rings: fields.number("rings", RINGS, up_to(Self::RINGS_MAX))?,
            read_gbps: fields.number("read_gbps", GBPS, gbps)?,
            write_gbps: fields.number("write_gbps", GBPS, gbps)?,
        };
        fields.nothing_else()?;
        Ok(profile)
    }
}

/// The object in a file.
struct Fields<'a> {
    path: &'a Path,
    values: Map<String, Value>,
}

/// Every name there is.
const NAMES: [&str; 6] = ["version", "chunk_bytes", "queue_depth", "rings", "read_gbps", "write_gbps"];

impl Fields<'_> {
    /// What `accept` makes of the field's value.
    fn number<T>(
        &self,
        field: &'static str,
        requirement: &'static str,
        accept: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T, ProfileError> {
        let value = self.values.get(field);
        value.and_then(accept).ok_or_else(|| {
            let found = value.map_or_else(|| "missing".to_owned(), quote);
            ProfileError::Field { path: self.path.to_owned(), field, found, requirement }
        })
    }

    /// A name that is misspelled is one too many.
    fn nothing_else(&self) -> Result<(), ProfileError> {
        match self.values.keys().find(|name| !NAMES.contains(&name.as_str())) {
            Some(name) => Err(ProfileError::Malformed {
                path: self.path.to_owned(),
                reason: format!("it has an unknown field {}", quote(&Value::from(name.as_str()))),
            }),
            None => Ok(()),
        }
    }
}

/// The beginning of a value, on one line.
fn quote(value: &impl fmt::Display) -> String {
    let text = value.to_string();
    let quoted: String = text.chars().take(QUOTE_MAX).collect();
    if quoted.len() < text.len() { quoted + "…" } else { quoted }
}

/// The nearest directory above `directory`, itself included, that exists, without links in its path; `None` if that cannot
/// be found out.
fn existing(directory: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(directory).ok()?;
    for ancestor in absolute.ancestors() {
        match std::fs::canonicalize(ancestor) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            found => return found.ok(),
        }
    }
    Some(PathBuf::from("/"))
}

/// The beginning of the plain file at `path`, one byte more than a profile may have; `None` if there is no file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, ProfileError> {
    let failed = |source| ProfileError::File { action: "read", path: path.to_owned(), source };
    // A pipe must not be waited on, nor a link be followed to a file that is not ours to show.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => {
            let is_other = std::fs::symlink_metadata(path).is_ok_and(|found| !found.is_file());
            return Err(if is_other {
                ProfileError::NotAFile { path: path.to_owned() }
            } else {
                failed(error)
            });
        }
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ProfileError::NotAFile { path: path.to_owned() });
    }
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut text).map_err(failed)?;
    Ok(Some(text))
}

/// Makes the file at `path`, which is nobody's but this process's, and waits until the disk has it.
fn write_aside(path: &Path, text: &[u8]) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
    // Whatever the mask of the user says: who shares the disk shares its figures.
    file.set_permissions(PermissionsExt::from_mode(MODE))?;
    file.write_all(text)?;
    file.sync_all()
}

const MODE: u32 = 0o644;

#[cfg(test)]
mod tests;
