//! Whole blocks to and from files, several at once.
//!
//! A call goes through three steps, and only the last one moves bytes: all files are opened or made and compared with
//! what is asked; files that are longer than what is written are cut; every transfer is handed to the engine. What
//! stops the first two is told at once, with the blocks; files that were made for it are removed again.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use overspill_io::{Block, Direction, Engine, File, IoError, Priority, Ticket};
use rustix::fs::{AtFlags, CWD, FileType, Stat};
use rustix::io::Errno;

use super::error::SwapError;

/// Starts filling each of `blocks` with the first bytes of the file at the same place of `paths`. Files may be longer
/// than their blocks.
///
/// # Errors
///
/// [`Refused`] with all blocks, and nothing was started: [`SwapError::Lists`] if there are not as many paths as
/// blocks, [`SwapError::Io`] if a file can't be opened, [`SwapError::ShortFile`] if one is shorter than its block,
/// [`SwapError::SameFile`] if two are one. A failure after that comes through the ticket of its block.
pub fn swap_in_tensors<P: AsRef<Path>>(
    engine: &Engine,
    blocks: Vec<Block>,
    paths: &[P],
) -> Result<Vec<SwapTicket>, Refused> {
    start(engine, Direction::Read, blocks, paths)
}

/// Starts writing each of `blocks` to the file at the same place of `paths`.
///
/// Files that don't exist are made, readable and writable by their owner only; others are overwritten and keep their
/// mode. Each file ends where its block does: what was longer is cut before anything is written, so the old
/// contents are gone from then on. Symbolic links are not followed. Wait for the last write of a file before the next.
///
/// # Errors
///
/// [`Refused`] with all blocks, and nothing was started: [`SwapError::Lists`] if there are not as many paths as
/// blocks, [`SwapError::Io`] if a file can't be made, opened or cut, [`SwapError::SameFile`] if two are one. A failure
/// after that comes through the ticket of its block; what its file holds is unknown then.
pub fn swap_out_tensors<P: AsRef<Path>>(
    engine: &Engine,
    blocks: Vec<Block>,
    paths: &[P],
) -> Result<Vec<SwapTicket>, Refused> {
    start(engine, Direction::Write, blocks, paths)
}

/// Blocks that were not taken. Nothing was started.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Refused {
    /// Why.
    pub error: SwapError,
    /// All blocks, in their order.
    pub blocks: Vec<Block>,
}

/// A claim on one block that is on its way to or from its file. Dropping it abandons the answer, not the transfer.
#[must_use = "the block and the outcome come back through the ticket"]
pub struct SwapTicket {
    path: PathBuf,
    ticket: Ticket,
}

/// A transfer that failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SwapFailed {
    /// Why, and for which file.
    pub error: SwapError,
    /// The block: after a write with its bytes, after a read with unspecified ones. `None` only when the kernel never
    /// gave the memory back.
    pub block: Option<Block>,
}

impl SwapTicket {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether [`SwapTicket::wait`] would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.ticket.is_done()
    }

    /// Waits until the transfer is over.
    ///
    /// # Errors
    ///
    /// [`SwapFailed`] with [`SwapError::Io`] and the block, if not every byte was moved.
    pub fn wait(self) -> Result<Block, SwapFailed> {
        let SwapTicket { path, ticket } = self;
        ticket.wait().map_err(|failed| SwapFailed {
            error: SwapError::Io { path, source: failed.error },
            block: failed.block,
        })
    }
}

impl fmt::Debug for SwapTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ticket = f.debug_struct("SwapTicket");
        ticket.field("path", &self.path).field("is_done", &self.is_done()).finish()
    }
}

fn start<P: AsRef<Path>>(
    engine: &Engine,
    direction: Direction,
    blocks: Vec<Block>,
    paths: &[P],
) -> Result<Vec<SwapTicket>, Refused> {
    if blocks.len() != paths.len() {
        return Err(Refused {
            error: SwapError::Lists { tensors: blocks.len(), paths: paths.len() },
            blocks,
        });
    }
    let requests = paths.iter().map(AsRef::as_ref).zip(blocks.iter().map(|block| block.len()));
    let opened = Targets::open(engine, direction, requests).and_then(|targets| {
        targets.cut()?;
        Ok(targets)
    });
    match opened {
        Ok(targets) => Ok(targets.submit(engine, blocks)),
        Err(error) => Err(Refused { error, blocks }),
    }
}

/// The open files of one call. Dropped before they are used, they take those back that were made for it.
pub(crate) struct Targets {
    direction: Direction,
    files: Vec<Target>,
}

struct Target {
    file: File,
    length: usize,
    origin: Origin,
    kind: Kind,
}

/// Where a file comes from.
enum Origin {
    Found,
    Made,
}

/// What a file is.
enum Kind {
    /// A file of so many bytes.
    Regular { id: FileId, length: u64 },
    /// A disk as a whole, whose length is not that of a file.
    Disk { id: FileId },
    /// A pipe or another device, without contents that two writers could mix.
    Stream,
}

impl Kind {
    fn of(stat: &Stat) -> Kind {
        let id = FileId { device: stat.st_dev, inode: stat.st_ino };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::Regular { id, length: u64::try_from(stat.st_size).unwrap_or(0) },
            FileType::BlockDevice => Kind::Disk { id },
            _ => Kind::Stream,
        }
    }

    fn id(&self) -> Option<FileId> {
        match *self {
            Kind::Regular { id, .. } | Kind::Disk { id } => Some(id),
            Kind::Stream => None,
        }
    }
}

/// Tells a file from all others, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl Targets {
    /// Opens a file for each request, which is a path and the number of bytes to move.
    pub(crate) fn open<'a>(
        engine: &Engine,
        direction: Direction,
        requests: impl Iterator<Item = (&'a Path, usize)>,
    ) -> Result<Targets, SwapError> {
        let mut targets = Targets { direction, files: Vec::new() };
        let mut seen: HashMap<FileId, usize> = HashMap::new();
        for (index, (path, length)) in requests.enumerate() {
            // Among the others at once, so that it is taken back with them.
            targets.files.push(Target::open(engine, direction, path, length)?);
            let (path, kind, expected) = (path.to_owned(), &targets.files[index].kind, length as u64);
            if let Some(earlier) = kind.id().and_then(|id| seen.insert(id, index)) {
                let other = targets.files[earlier].file.path().to_owned();
                return Err(SwapError::SameFile { path, other });
            }
            match (direction, kind) {
                (Direction::Read, &Kind::Regular { length: found, .. }) if found < expected => {
                    return Err(SwapError::ShortFile { path, expected, found });
                }
                _ => {}
            }
        }
        Ok(targets)
    }

    /// Which files they are, as far as they are on a disk.
    pub(crate) fn ids(&self) -> impl Iterator<Item = Option<FileId>> {
        self.files.iter().map(|target| target.kind.id())
    }

    /// Cuts files that are longer than what is written to them. Nobody else may be writing to them now.
    pub(crate) fn cut(&self) -> Result<(), SwapError> {
        if self.direction == Direction::Read {
            return Ok(());
        }
        for Target { file, length, kind, .. } in &self.files {
            let length = *length as u64;
            // A file that is being written by an earlier call may have grown since it was opened.
            if matches!(kind, Kind::Regular { .. }) && file.len().map_err(|e| io_error(file, e))? > length {
                let cut = || rustix::fs::ftruncate(file, length);
                rustix::io::retry_on_intr(cut).map_err(|errno| failed(file, "cut", errno))?;
            }
        }
        Ok(())
    }

    /// Hands all transfers to the engine, one for each of `blocks`, which have the requests' lengths.
    pub(crate) fn submit(mut self, engine: &Engine, blocks: Vec<Block>) -> Vec<SwapTicket> {
        assert_eq!(self.files.len(), blocks.len(), "one block for each file");
        let submit = |(target, block): (Target, Block)| {
            let file = target.file;
            assert_eq!(target.length, block.len(), "a block as long as the request");
            let ticket = match self.direction {
                Direction::Read => engine.read(&file, 0, block, Priority::Urgent),
                Direction::Write => engine.write(&file, 0, block, Priority::Background),
            };
            SwapTicket { path: file.path().to_owned(), ticket }
        };
        std::mem::take(&mut self.files).into_iter().zip(blocks).map(submit).collect()
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        for target in &self.files {
            if let (Origin::Made, Some(id)) = (&target.origin, target.kind.id()) {
                remove_if_still(target.file.path(), id);
            }
        }
    }
}

impl Target {
    fn open(engine: &Engine, direction: Direction, path: &Path, length: usize) -> Result<Target, SwapError> {
        let (file, origin) = match direction {
            Direction::Read => engine.open(path).map(|file| (file, Origin::Found)),
            Direction::Write => open_or_make(engine, path),
        }
        .map_err(|source| SwapError::Io { path: path.to_owned(), source })?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed(&file, "measure", errno))?;
        Ok(Target { file, length, origin, kind: Kind::of(&stat) })
    }
}

fn open_or_make(engine: &Engine, path: &Path) -> Result<(File, Origin), IoError> {
    let is = |error: &IoError, errno: Errno| error.errno() == Some(errno.raw_os_error());
    match engine.open(path) {
        Err(error) if is(&error, Errno::NOENT) => match engine.create(path) {
            // Somebody else made it in between.
            Err(error) if is(&error, Errno::EXIST) => engine.open(path).map(|file| (file, Origin::Found)),
            made => made.map(|file| (file, Origin::Made)),
        },
        found => found.map(|file| (file, Origin::Found)),
    }
}

/// Removes a file that was made a moment ago, unless the name has come to mean another one.
fn remove_if_still(path: &Path, id: FileId) {
    let now = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW);
    let is_still = now.is_ok_and(|stat| Kind::of(&stat).id() == Some(id));
    if is_still {
        // An empty file that stays is no harm, and the error that led here is the one to tell.
        drop(std::fs::remove_file(path));
    }
}

fn io_error(file: &File, source: IoError) -> SwapError {
    SwapError::Io { path: file.path().to_owned(), source }
}

fn failed(file: &File, action: &'static str, errno: Errno) -> SwapError {
    let path = file.path().to_owned();
    io_error(file, IoError::File { action, path, errno: errno.raw_os_error() })
}
