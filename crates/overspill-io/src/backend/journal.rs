//! What a simulated device may have lost when its power goes.
//!
//! Of every sector and of every file's length the journal knows what was there at the last flush and everything that
//! came since. [`Journal::lose`] picks one of them for each, by seed: so writes are dropped, torn and carried out in
//! another order than they were made, and growth is lost, while what was flushed stays. All that was remembered takes
//! no more than the bytes of a cache; what is beyond that the device has written by itself, the oldest first. Only what
//! was cut off a file is not remembered: its old end comes back as zeros.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::fate::Random;
use super::sim::SECTOR_BYTES;
use crate::file::{File, FileId};

/// What was written since the last flush.
pub(crate) struct Journal {
    cache_bytes: usize,
    remembered_bytes: usize,
    files: Vec<Unflushed>,
    /// Sectors in the order in which they were written to first; those that were flushed since count for nothing.
    order: VecDeque<(FileId, u64)>,
}

/// A file with something that was not flushed.
struct Unflushed {
    id: FileId,
    /// Through the page cache, so that a sector need not suit direct I/O.
    buffered: OwnedFd,
    sector_bytes: usize,
    /// By their numbers, the contents: at the last flush, and after each write since.
    sectors: BTreeMap<u64, Vec<Box<[u8]>>>,
    /// The same for the file's length, in bytes; empty if it has not changed.
    lengths: Vec<u64>,
}

impl Journal {
    pub(crate) fn new(cache_bytes: usize) -> Journal {
        Journal { cache_bytes, remembered_bytes: 0, files: Vec::new(), order: VecDeque::new() }
    }

    /// Carries a write out and remembers what it wrote over, and what it wrote.
    pub(crate) fn land(
        &mut self,
        file: &File,
        bytes: &[u8],
        position: u64,
        write: impl FnOnce(&[u8]) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let index = self.index(file)?;
        let unflushed = &mut self.files[index];
        let sector_bytes = unflushed.sector_bytes as u64;
        let touched = position / sector_bytes..(position + bytes.len() as u64).div_ceil(sector_bytes);
        let present = unflushed.read(touched.clone())?;
        for (sector, present) in touched.clone().zip(present.chunks(unflushed.sector_bytes)) {
            unflushed.sectors.entry(sector).or_insert_with(|| {
                self.remembered_bytes += present.len();
                self.order.push_back((unflushed.id, sector));
                vec![present.into()]
            });
        }
        let before = length(file)?;
        let landed = write(bytes)?;
        unflushed.note_length(before, length(file)?);
        for (sector, versions) in unflushed.sectors.range_mut(touched) {
            let begin = sector * sector_bytes;
            let (first, end) = (position.max(begin), (position + landed as u64).min(begin + sector_bytes));
            if first < end {
                let mut next = versions.last().expect("there is the one from before").clone();
                let part = &bytes[(first - position) as usize..(end - position) as usize];
                next[(first - begin) as usize..][..part.len()].copy_from_slice(part);
                self.remembered_bytes += next.len();
                versions.push(next);
            }
        }
        self.write_back();
        Ok(landed)
    }

    /// Carries a change of a file's length out and remembers the old one.
    pub(crate) fn resize(
        &mut self,
        file: &File,
        act: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let index = self.index(file)?;
        let before = length(file)?;
        let done = act();
        self.files[index].note_length(before, length(file)?);
        done
    }

    /// What is in the file now stays.
    pub(crate) fn flush(&mut self, file: &File) {
        if let Some(index) = self.files.iter().position(|unflushed| unflushed.id == file.id()) {
            let flushed = self.files.remove(index).sectors;
            self.remembered_bytes -= flushed.values().map(|versions| bytes_of(versions)).sum::<usize>();
        }
        self.order.retain(|&(id, _)| id != file.id());
    }

    /// Takes from each sector and each length one of its versions, and forgets all of them.
    pub(crate) fn lose(&mut self, seed: u64) {
        // Now and then nothing at all was written by then, or everything.
        let mood = Random::new(&[seed]).below(8);
        let pick = |versions: usize, words: [u64; 2]| match mood {
            0 => 0,
            1 => versions - 1,
            _ => Random::new(&[seed, words[0], words[1]]).below(versions as u64) as usize,
        };
        for (number, unflushed) in (0..).zip(self.files.drain(..)) {
            for (sector, versions) in &unflushed.sectors {
                let version = &versions[pick(versions.len(), [number, *sector])];
                unflushed.write(*sector, version);
            }
            if !unflushed.lengths.is_empty() {
                let length = unflushed.lengths[pick(unflushed.lengths.len(), [number, u64::MAX])];
                rustix::fs::ftruncate(&unflushed.buffered, length).expect("a file that grew can be cut");
            }
        }
        self.order.clear();
        self.remembered_bytes = 0;
    }

    /// Lets the device write what does not fit into its cache.
    fn write_back(&mut self) {
        while self.remembered_bytes > self.cache_bytes
            && let Some((id, sector)) = self.order.pop_front()
        {
            let unflushed = self.files.iter_mut().find(|unflushed| unflushed.id == id);
            if let Some(versions) = unflushed.and_then(|unflushed| unflushed.sectors.remove(&sector)) {
                self.remembered_bytes -= bytes_of(&versions);
            }
        }
    }

    fn index(&mut self, file: &File) -> Result<usize, Errno> {
        if let Some(index) = self.files.iter().position(|unflushed| unflushed.id == file.id()) {
            return Ok(index);
        }
        let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let buffered = rustix::fs::open(link, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let (sectors, lengths) = (BTreeMap::new(), Vec::new());
        let sector_bytes = SECTOR_BYTES.max(file.alignment());
        self.files.push(Unflushed { id: file.id(), buffered, sector_bytes, sectors, lengths });
        Ok(self.files.len() - 1)
    }
}

impl Unflushed {
    /// Some sectors as they are; zeros behind the end of the file.
    fn read(&self, sectors: Range<u64>) -> Result<Vec<u8>, Errno> {
        let position = sectors.start * self.sector_bytes as u64;
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize * self.sector_bytes];
        rustix::io::pread(&self.buffered, &mut *bytes, position)?;
        Ok(bytes)
    }

    /// Puts a sector back, as far as the file reaches.
    fn write(&self, sector: u64, bytes: &[u8]) {
        let position = sector * self.sector_bytes as u64;
        let stat = rustix::fs::fstat(&self.buffered).expect("an open file has a status");
        let left = u64::try_from(stat.st_size).unwrap_or(0).saturating_sub(position);
        let bytes = &bytes[..bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
        let written = rustix::io::pwrite(&self.buffered, bytes, position);
        assert_eq!(written, Ok(bytes.len()), "what was on the disk before fits there");
    }

    fn note_length(&mut self, before: u64, after: u64) {
        if self.lengths.is_empty() && before != after {
            self.lengths.push(before);
        }
        if self.lengths.last().is_some_and(|&last| last != after) {
            self.lengths.push(after);
        }
    }
}

fn length(file: &File) -> Result<u64, Errno> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

fn bytes_of(versions: &[Box<[u8]>]) -> usize {
    versions.iter().map(|version| version.len()).sum()
}
