//! What may come back, and whether it says the truth.

use std::ops::Range;

use super::model::Model;
use super::program::{self, Kind, Step};
use crate::SimConfig;
use crate::error::{Direction, IoError};
use crate::file::File;
use crate::memory::block::Block;

/// What became of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    Moved,
    Dropped,
    EndOfFile,
    Io,
    NoSpace,
    WriteZero,
    StoppedWithBlock,
    StoppedWithoutBlock,
}

impl Outcome {
    /// Everything that the whole set of schedules has to show.
    pub(super) const ALL: [Outcome; 8] = [
        Outcome::Moved,
        Outcome::Dropped,
        Outcome::EndOfFile,
        Outcome::Io,
        Outcome::NoSpace,
        Outcome::WriteZero,
        Outcome::StoppedWithBlock,
        Outcome::StoppedWithoutBlock,
    ];
}

/// How many bytes of the memory in `span` were answered for.
pub(super) fn within(moved: &[Range<usize>], span: &Range<usize>) -> usize {
    moved.iter().filter(|moved| span.contains(&moved.start)).map(Range::len).sum()
}

/// A write's block is what it was, where it was.
pub(super) fn check_block(step: &Step, span: &Range<usize>, block: &Block) {
    assert_eq!((block.as_ptr().addr(), block.len()), (span.start, span.len()), "another block: {step:?}");
    if step.kind != Kind::Read {
        let mut given = vec![0; step.length];
        program::fill(&mut given, step.tag);
        assert!(block[..] == given[..], "the data changed: {step:?}");
    }
}

pub(super) fn check_success(step: &Step, model: &Model, span: &Range<usize>, block: Option<&Block>) {
    assert_eq!(block.is_none(), step.kind == Kind::WriteBehind);
    let Some(block) = block else { return };
    check_block(step, span, block);
    if step.kind == Kind::Read {
        model.check_read(step, block);
    }
}

/// The error is one that the weather can bring, and says the truth about the step.
pub(super) fn check_failure(
    step: &Step,
    file: &File,
    model: &Model,
    sim: SimConfig,
    error: &IoError,
    moved: Option<usize>,
) {
    let calm = sim == SimConfig::calm(sim.seed);
    let (said, done) = match error {
        IoError::Transfer { direction, path, offset, length, done, errno } => {
            let write = *direction == Direction::Write;
            assert_eq!(write, step.kind != Kind::Read, "{error}");
            assert!(*errno == libc::EIO || write && *errno == libc::ENOSPC, "{error}");
            assert!(!calm, "{error} in a calm");
            ((path, *offset, *length), *done)
        }
        IoError::WriteZero { path, offset, length, done } => {
            assert!(step.kind != Kind::Read && !calm, "{error}");
            ((path, *offset, *length), *done)
        }
        IoError::EndOfFile { path, offset, length, done } => {
            assert!(step.kind == Kind::Read, "{error}");
            model.check_end(step, *done, calm);
            ((path, *offset, *length), *done)
        }
        IoError::EngineStopped => {
            assert!(sim.stuck_per_mille > 0, "{error} with nothing stuck");
            return;
        }
        other => panic!("{other}"),
    };
    assert_eq!((said.0.as_path(), said.1, said.2), (file.path(), step.offset, step.length));
    assert!(done < step.length, "{error} with all bytes done");
    // What direct reads bring of a file's unaligned end may come twice, and bounce blocks bring more than was asked for.
    let sector = file.alignment();
    let straight = step.offset.is_multiple_of(sector as u64) && step.length.is_multiple_of(sector);
    let exact = straight && (step.kind != Kind::Read || !file.direct());
    if exact {
        moved.into_iter().for_each(|moved| assert_eq!(done, moved, "bytes that moved: {error}"));
    }
}

pub(super) fn outcome_of(error: &IoError, block: Option<&Block>) -> Outcome {
    match error {
        IoError::EndOfFile { .. } => Outcome::EndOfFile,
        IoError::WriteZero { .. } => Outcome::WriteZero,
        IoError::EngineStopped if block.is_some() => Outcome::StoppedWithBlock,
        IoError::EngineStopped => Outcome::StoppedWithoutBlock,
        error if error.errno() == Some(libc::ENOSPC) => Outcome::NoSpace,
        _ => Outcome::Io,
    }
}
