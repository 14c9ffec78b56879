//! Open files, and what their file systems ask of transfers.
//!
//! A [`File`] is opened for direct I/O where the file system takes it, and through the page cache where it does not;
//! [`File::direct`] and [`File::note`] say which and why. What direct I/O asks of offsets and lengths is probed per
//! file. What has no offsets, a pipe above all, is refused to readers and as a lane of a space, and not waited for. The
//! descriptor is closed when the last clone is gone, operations in flight included; the engine's ring lets go of it then,
//! too.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Stat, StatxFlags};
use rustix::io::Errno;

use crate::backend::doorbell::Doorbell;
use crate::error::IoError;
use crate::memory::BLOCK_ALIGNMENT;

/// What direct I/O is taken to need where the kernel does not say.
const FALLBACK_ALIGNMENT: usize = 4096;
/// No seat in the ring's table.
const UNSEATED: u32 = u32::MAX;

/// An open file of one engine. Clones share the descriptor.
#[derive(Clone)]
pub struct File {
    inner: Arc<Inner>,
}

/// The file behind every clone.
pub(crate) struct Inner {
    fd: OwnedFd,
    path: PathBuf,
    id: FileId,
    /// Whether it is a block device.
    is_disk: bool,
    access: Access,
    /// Index in the ring's table of registered files, once it has one.
    seat: AtomicU32,
    /// Of the engine that opened the file; rung when a registered file is gone.
    doorbell: Arc<Doorbell>,
}

/// Which file it is, whatever the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

/// How transfers go to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Access {
    /// Past the page cache, at multiples of `alignment` bytes.
    Direct { alignment: usize },
    /// Through the page cache, anywhere.
    Buffered { because: String },
    /// In memory, anywhere: there is no device.
    Memory,
}

impl File {
    /// Makes a file that does not exist yet, readable and writable by its owner only.
    pub(crate) fn create(path: &Path, doorbell: &Arc<Doorbell>) -> Result<File, IoError> {
        File::open_with("create", path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, doorbell)
    }

    /// Opens a file that exists.
    pub(crate) fn open(path: &Path, doorbell: &Arc<Doorbell>) -> Result<File, IoError> {
        File::open_with("open", path, OFlags::RDWR, doorbell)
    }

    /// Opens a file that exists, and that somebody else may be writing.
    pub(crate) fn open_to_read(path: &Path, doorbell: &Arc<Doorbell>) -> Result<File, IoError> {
        // Whoever opens a pipe to read waits for somebody to write, unless they say that they don't.
        let file = match File::open_with("open", path, OFlags::RDONLY | OFlags::NONBLOCK, doorbell) {
            // So the kernel answers for a socket.
            Err(IoError::File { errno, .. }) if errno == Errno::NXIO.raw_os_error() => {
                return Err(IoError::NotAFile { path: path.to_owned() });
            }
            opened => opened?,
        };
        file.check_places()?;
        let failed = |errno| file.failed("open", errno);
        // Left on, it would have the kernel refuse transfers that it cannot start at once.
        let set = rustix::fs::fcntl_getfl(&file).map_err(failed)?;
        rustix::fs::fcntl_setfl(&file, set - OFlags::NONBLOCK).map_err(failed)?;
        Ok(file)
    }

    /// Takes over a descriptor that nobody else uses.
    pub(crate) fn adopt(fd: OwnedFd, path: &Path, doorbell: &Arc<Doorbell>) -> Result<File, IoError> {
        let failed = |errno: Errno| IoError::File {
            action: "open",
            path: path.to_owned(),
            errno: errno.raw_os_error(),
        };
        check_power(doorbell).map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        check_places(&stat, path)?;
        // Left on, it would have the kernel refuse transfers that it cannot start at once, or move them to the end.
        let set = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
        rustix::fs::fcntl_setfl(&fd, set - OFlags::NONBLOCK - OFlags::APPEND).map_err(failed)?;
        let access = choose_access(&fd, &stat).map_err(failed)?;
        Ok(File::new(fd, path.to_owned(), &stat, access, doorbell))
    }

    /// A nameless file in memory, on which a backend can prove that it works.
    pub(crate) fn in_memory(doorbell: &Arc<Doorbell>) -> Result<File, Errno> {
        let fd = rustix::fs::memfd_create("overspill-probe", rustix::fs::MemfdFlags::CLOEXEC)?;
        let stat = rustix::fs::fstat(&fd)?;
        Ok(File::new(fd, PathBuf::from("(memory)"), &stat, Access::Memory, doorbell))
    }

    /// A file in memory that transfers have to treat as one on a disk: direct, unless `alignment` is 1.
    #[cfg(test)]
    pub(crate) fn in_memory_as(
        path: &str,
        alignment: usize,
        doorbell: &Arc<Doorbell>,
    ) -> Result<File, Errno> {
        let fd = rustix::fs::memfd_create(path, rustix::fs::MemfdFlags::CLOEXEC)?;
        let access = match alignment {
            1 => Access::Buffered { because: "it is in memory".to_owned() },
            alignment => Access::Direct { alignment },
        };
        let stat = rustix::fs::fstat(&fd)?;
        Ok(File::new(fd, PathBuf::from(path), &stat, access, doorbell))
    }

    /// A file in memory, empty so far, that transfers have to treat as a disk.
    #[cfg(test)]
    pub(crate) fn disk_in_memory(alignment: usize, doorbell: &Arc<Doorbell>) -> Result<File, Errno> {
        let mut disk = File::in_memory_as("disk", alignment, doorbell)?;
        Arc::get_mut(&mut disk.inner).expect("it was just made").is_disk = true;
        Ok(disk)
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Whether transfers go past the page cache.
    #[must_use]
    pub fn direct(&self) -> bool {
        matches!(self.inner.access, Access::Direct { .. })
    }

    /// Why transfers go through the page cache, if they do.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        match &self.inner.access {
            Access::Direct { .. } => None,
            Access::Buffered { because } => Some(because),
            Access::Memory => Some("it is in memory"),
        }
    }

    /// What offsets and lengths of operations should be multiples of, in bytes; 1 through the page cache. Others work
    /// too, through bounce blocks.
    #[must_use]
    pub fn alignment(&self) -> usize {
        match self.inner.access {
            Access::Direct { alignment } => alignment,
            Access::Buffered { .. } | Access::Memory => 1,
        }
    }

    /// The size in bytes of the file, or of the disk.
    ///
    /// # Errors
    ///
    /// [`IoError::File`] if the file system cannot say.
    pub fn len(&self) -> Result<u64, IoError> {
        let failed = |errno| self.failed("measure", errno);
        check_power(&self.inner.doorbell).map_err(failed)?;
        if self.is_disk() {
            // Its status says 0. Nobody else uses the descriptor's position.
            return rustix::fs::seek(self, SeekFrom::End(0)).map_err(failed);
        }
        let stat = rustix::fs::fstat(self).map_err(failed)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Whether the file has no bytes.
    ///
    /// # Errors
    ///
    /// As [`File::len`].
    pub fn is_empty(&self) -> Result<bool, IoError> {
        Ok(self.len()? == 0)
    }

    /// Reserves space for the file's first `bytes` bytes and makes it at least that long. Nobody else may make it longer
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// [`IoError::NoSpace`] if the file system cannot hold them; the file keeps its length then, and takes no more space
    /// behind it than before.
    /// [`IoError::File`] otherwise, such as on a file system that cannot reserve.
    pub fn allocate(&self, bytes: u64) -> Result<(), IoError> {
        if bytes == 0 {
            return Ok(());
        }
        let length = self.len()?;
        let allocate = || rustix::fs::fallocate(self, FallocateFlags::empty(), 0, bytes);
        match self.resize(allocate) {
            Err(Errno::NOSPC | Errno::DQUOT) => {
                // Some file systems have made it as long as they could.
                self.truncate(length)?;
                let measured = |errno| self.failed("measure", errno);
                let stat = rustix::fs::fstat(self).map_err(measured)?;
                let space = rustix::fs::fstatvfs(self).map_err(measured)?;
                let present = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
                Err(IoError::NoSpace {
                    path: self.inner.path.clone(),
                    needed: bytes.saturating_sub(present),
                    free: space.f_bavail.saturating_mul(space.f_frsize),
                })
            }
            other => other.map_err(|errno| self.failed("allocate", errno)),
        }
    }

    /// Waits until the device has everything that was written, and what is needed to find it again.
    ///
    /// # Errors
    ///
    /// [`IoError::File`]. After that nothing is known about what was written since the last success, and trying
    /// again does not tell: the kernel reports a failed flush once.
    pub fn sync(&self) -> Result<(), IoError> {
        let failed = |errno| self.failed("flush", errno);
        #[cfg(feature = "sim")]
        if let Some(power) = self.inner.doorbell.power() {
            return power.flush(self).map_err(failed);
        }
        rustix::io::retry_on_intr(|| rustix::fs::fdatasync(self)).map_err(failed)
    }

    /// Whether whoever starts a transfer waits for the device there and then, as the page cache makes them.
    pub(crate) fn starts_by_waiting(&self) -> bool {
        matches!(self.inner.access, Access::Buffered { .. })
    }

    /// Whether it is a disk as a whole, which has all of its bytes always.
    pub(crate) fn is_disk(&self) -> bool {
        self.inner.is_disk
    }

    /// Fails if there are no offsets to read and write at. Character devices such as `/dev/full` take any.
    pub(crate) fn check_places(&self) -> Result<(), IoError> {
        let stat = rustix::fs::fstat(self).map_err(|errno| self.failed("measure", errno))?;
        check_places(&stat, &self.inner.path)
    }

    /// Cuts the file off behind its first `bytes` bytes.
    pub(crate) fn truncate(&self, bytes: u64) -> Result<(), IoError> {
        self.resize(|| rustix::fs::ftruncate(self, bytes)).map_err(|errno| self.failed("cut", errno))
    }

    /// Changes the file's length by `act`.
    fn resize(&self, act: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
        #[cfg(feature = "sim")]
        if let Some(power) = self.inner.doorbell.power() {
            return power.resize(self, || rustix::io::retry_on_intr(act));
        }
        rustix::io::retry_on_intr(act)
    }

    /// The same for everything that is open on one file of one file system.
    pub(crate) fn id(&self) -> FileId {
        self.inner.id
    }

    pub(crate) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.inner)
    }

    pub(crate) fn belongs_to(&self, doorbell: &Arc<Doorbell>) -> bool {
        Arc::ptr_eq(&self.inner.doorbell, doorbell)
    }

    /// Its index among the registered files of its engine's ring.
    pub(crate) fn seat(&self) -> Option<u32> {
        Some(self.inner.seat.load(Ordering::Relaxed)).filter(|&seat| seat != UNSEATED)
    }

    /// Remembers its index among the registered files of its engine's ring.
    pub(crate) fn take_seat(&self, seat: u32) {
        self.inner.seat.store(seat, Ordering::Relaxed);
    }

    fn new(fd: OwnedFd, path: PathBuf, stat: &Stat, access: Access, doorbell: &Arc<Doorbell>) -> File {
        let (seat, doorbell) = (AtomicU32::new(UNSEATED), Arc::clone(doorbell));
        let id = FileId { device: stat.st_dev, inode: stat.st_ino };
        let is_disk = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        File { inner: Arc::new(Inner { fd, path, id, is_disk, access, seat, doorbell }) }
    }

    fn open_with(
        action: &'static str,
        path: &Path,
        how: OFlags,
        doorbell: &Arc<Doorbell>,
    ) -> Result<File, IoError> {
        let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | how;
        let failed =
            |errno: Errno| IoError::File { action, path: path.to_owned(), errno: errno.raw_os_error() };
        check_power(doorbell).map_err(failed)?;
        let open = || rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
        let fd = rustix::io::retry_on_intr(open).map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        let access = choose_access(&fd, &stat).map_err(failed)?;
        Ok(File::new(fd, path.to_owned(), &stat, access, doorbell))
    }

    fn failed(&self, action: &'static str, errno: Errno) -> IoError {
        IoError::File { action, path: self.inner.path.clone(), errno: errno.raw_os_error() }
    }
}

#[cfg(test)]
impl FileId {
    pub(crate) const fn test(inode: u64) -> FileId {
        FileId { device: 0, inode }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { path, access, .. } = &*self.inner;
        f.debug_struct("File").field("path", path).field("access", access).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if *self.seat.get_mut() != UNSEATED {
            self.doorbell.ring();
        }
    }
}

/// Fails if what is at `path` has no offsets to read and write at. Character devices such as `/dev/full` take any.
fn check_places(stat: &Stat, path: &Path) -> Result<(), IoError> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice | FileType::CharacterDevice => Ok(()),
        _ => Err(IoError::NotAFile { path: path.to_owned() }),
    }
}

/// Fails if the engine's device has lost its power, as only a simulated one can.
fn check_power(doorbell: &Doorbell) -> Result<(), Errno> {
    #[cfg(feature = "sim")]
    if let Some(power) = doorbell.power() {
        return power.check();
    }
    let _none_to_lose = doorbell;
    Ok(())
}

/// Turns the page cache off where that works, and says how transfers go.
///
/// It is asked for after the file was opened, since a file system that refuses may do so after it has made the file.
fn choose_access(fd: &OwnedFd, stat: &Stat) -> Result<Access, Errno> {
    let buffered = |because: &str| Ok(Access::Buffered { because: because.to_owned() });
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
        // To a pipe the flag means something else.
        return buffered("it is not a file on a disk");
    }
    let before = match set_direct(fd) {
        Ok(before) => before,
        Err(errno) => return buffered(&format!("direct I/O is refused: {}", std::io::Error::from(errno))),
    };
    match common_alignment(probe(fd)) {
        Ok(alignment) => Ok(Access::Direct { alignment }),
        Err(unusable) => {
            rustix::fs::fcntl_setfl(fd, before)?;
            buffered(unusable)
        }
    }
}

/// One alignment for offsets, lengths and memory alike, or why blocks cannot have it.
fn common_alignment(probed: Probed) -> Result<usize, &'static str> {
    match probed {
        Probed::Aligned { offset, memory } if offset.max(memory) <= BLOCK_ALIGNMENT => Ok(offset.max(memory)),
        Probed::Aligned { .. } => Err("direct I/O wants more alignment than blocks have"),
        Probed::Unsupported => Err("the file does not support direct I/O"),
    }
}

/// Turns the page cache off; returns the flags from before.
fn set_direct(fd: &OwnedFd) -> Result<OFlags, Errno> {
    let before = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, before | OFlags::DIRECT)?;
    Ok(before)
}

#[derive(Clone, Copy)]
enum Probed {
    Aligned { offset: usize, memory: usize },
    Unsupported,
}

/// What direct I/O on this file needs, as far as the kernel says.
fn probe(fd: &OwnedFd) -> Probed {
    let fallback = Probed::Aligned { offset: FALLBACK_ALIGNMENT, memory: FALLBACK_ALIGNMENT };
    let Ok(stat) = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return fallback;
    };
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return fallback;
    }
    match (stat.stx_dio_offset_align as usize, stat.stx_dio_mem_align as usize) {
        (0, _) | (_, 0) => Probed::Unsupported,
        (offset, memory) => Probed::Aligned { offset, memory },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_io_is_used_only_where_blocks_are_aligned_enough_for_it() {
        let alignment = |offset, memory| common_alignment(Probed::Aligned { offset, memory }).ok();
        assert_eq!(alignment(512, 4), Some(512));
        assert_eq!(alignment(512, 4096), Some(4096));
        assert_eq!(alignment(BLOCK_ALIGNMENT, 512), Some(BLOCK_ALIGNMENT));
        assert_eq!(alignment(2 * BLOCK_ALIGNMENT, 512), None);
        assert_eq!(alignment(512, 2 * BLOCK_ALIGNMENT), None);
        assert!(common_alignment(Probed::Unsupported).is_err());
    }
}
