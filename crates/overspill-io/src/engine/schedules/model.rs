//! What a file must hold after what was done to it.
//!
//! Every byte is known, or it may be anything: because a write of it failed, was given up or was not asked about, or
//! because two writes of it were in flight together. The length lies between two bounds for the same reasons. A byte
//! that no write was meant for stays known, so whatever reaches beyond its range is found.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use super::program::{self, FILE_BYTES, Step};
use crate::file::File;

pub(super) struct Model {
    /// `None` where anything may be; zeros where nothing was written.
    bytes: Vec<Option<u8>>,
    /// Writes of the current round that cover each byte.
    writers: Vec<u8>,
    /// The steps of the current round that may have written, by their tags, and where.
    announced: Vec<(u64, Range<usize>)>,
    length_min: usize,
    length_max: usize,
    /// As `length_max`, before the current round.
    length_max_before: usize,
    alignment: usize,
}

impl Model {
    pub(super) fn of_empty(alignment: usize) -> Model {
        let (bytes, writers) = (vec![Some(0); FILE_BYTES], vec![0; FILE_BYTES]);
        let announced = Vec::new();
        Model { bytes, writers, announced, length_min: 0, length_max: 0, length_max_before: 0, alignment }
    }

    /// The current round has a write, of which nothing more is known yet.
    pub(super) fn announce(&mut self, step: &Step) {
        if step.length == 0 {
            return;
        }
        self.writers[step.range()].iter_mut().for_each(|writers| *writers += 1);
        self.announced.push((step.tag, step.range()));
        // A failed one may end where direct I/O does.
        self.length_max = self.length_max.max(step.range().end.next_multiple_of(self.alignment));
    }

    /// The current round is over: `written` are its steps, on any file, that succeeded.
    pub(super) fn settle(&mut self, written: &[&Step]) {
        let announced = std::mem::take(&mut self.announced);
        let mine = |step: &&&Step| announced.iter().any(|&(tag, _)| tag == step.tag);
        let mine: Vec<&&Step> = written.iter().filter(mine).collect();
        let all_succeeded = mine.len() == announced.len();
        for (_, range) in &announced {
            self.bytes[range.clone()].fill(None);
        }
        for step in mine {
            let mut data = vec![0; step.length];
            program::fill(&mut data, step.tag);
            for (at, byte) in step.range().zip(data) {
                if self.writers[at] == 1 {
                    self.bytes[at] = Some(byte);
                }
            }
            self.length_min = self.length_min.max(step.range().end);
        }
        if all_succeeded {
            self.length_max = self.length_max_before.max(self.length_min);
        }
        self.length_max_before = self.length_max;
        for (_, range) in announced {
            self.writers[range].fill(0);
        }
    }

    /// A read of the current round brought these bytes.
    pub(super) fn check_read(&self, step: &Step, bytes: &[u8]) {
        // One of nothing asks for nothing.
        assert!(step.length == 0 || step.range().end <= self.length_max, "read beyond the end: {step:?}");
        for (at, &byte) in step.range().zip(bytes) {
            let known = self.bytes[at].filter(|_| self.writers[at] == 0);
            assert!(known.is_none_or(|known| known == byte), "byte {at} is {byte}, not {known:?}: {step:?}");
        }
    }

    /// A read of the current round found the file's end after `done` bytes.
    pub(super) fn check_end(&self, step: &Step, done: usize, calm: bool) {
        let range = step.range();
        assert!(range.end > self.length_min, "{step:?} ends before byte {}", self.length_min);
        assert!(done <= self.length_max.saturating_sub(range.start), "{done} bytes of {step:?}");
        if calm && self.announced.is_empty() {
            assert!(done >= self.length_min.saturating_sub(range.start), "only {done} bytes of {step:?}");
        }
    }

    /// Nothing was left out and nothing else was touched.
    pub(super) fn check_contents(&self, file: &File) {
        let length = file.len().unwrap() as usize;
        let (least, most) = (self.length_min, self.length_max);
        assert!((least..=most).contains(&length), "{file:?} has {length} bytes, not {least} to {most}");
        for (at, (byte, known)) in contents(file, length).into_iter().zip(&self.bytes).enumerate() {
            assert!(
                known.is_none_or(|known| known == byte),
                "byte {at} of {file:?} is {byte}, not {known:?}"
            );
        }
    }
}

/// The first `length` bytes, past no cache and through no engine.
fn contents(file: &File, length: usize) -> Vec<u8> {
    // Direct I/O would ask for aligned memory.
    let descriptor = file.as_fd().as_raw_fd();
    let through_cache = std::fs::File::open(format!("/proc/self/fd/{descriptor}")).unwrap();
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match rustix::io::pread(&through_cache, &mut bytes[done..], done as u64) {
            Ok(0) => panic!("{file:?} ends before its end"),
            Ok(moved) => done += moved,
            Err(Errno::INTR) => {}
            Err(errno) => panic!("{file:?}: {errno}"),
        }
    }
    bytes
}
