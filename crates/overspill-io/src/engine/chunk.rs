//! A part of an operation on its way to the kernel and back, and what an answer does to it.
//!
//! A [`Chunk`] is a token: it cannot be copied, and only the queue makes one, so its bytes are with the kernel at most
//! once. It counts what has moved of it, over as many answers as that takes.

use rustix::io::Errno;

use super::completion::Completion;
use super::table::Slot;

/// How many times in a row a chunk may come back with nothing done before that counts as an error.
const STALLS_MAX: u32 = 100;

/// A part of an operation on its way to the kernel and back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    op: Slot,
    /// Where the chunk begins in its operation.
    pub(crate) start: usize,
    pub(crate) length: usize,
    /// How many of the chunk's first bytes have moved.
    pub(crate) done: usize,
    way: Way,
    stalls: u32,
}

/// How a chunk's bytes come to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From where they are.
    Straight,
    /// Through a bounce block.
    Detour,
}

/// Why an operation did not move all of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The kernel said so.
    Errno(i32),
    /// A transfer moved no byte.
    Zero,
}

impl Chunk {
    pub(super) fn new(op: Slot, start: usize, length: usize, way: Way) -> Chunk {
        Chunk { op, start, length, done: 0, way, stalls: 0 }
    }

    /// Counts the progress of a bounce block of `length` bytes, on behalf of a chunk of `op` that is out itself.
    pub(super) fn carrier(op: Slot, length: usize) -> Chunk {
        Chunk::new(op, 0, length, Way::Straight)
    }

    pub(super) fn way(&self) -> Way {
        self.way
    }

    /// The operation that it is a part of.
    pub(super) fn op(&self) -> Slot {
        self.op
    }

    /// Bytes that the kernel is asked to move next.
    pub(crate) fn wanted(&self) -> usize {
        self.length - self.done
    }

    /// Counts what one answer moved, here and in `moved`, the operation's total.
    pub(super) fn advance(
        &mut self,
        answer: Completion,
        granularity: usize,
        moved: &mut usize,
    ) -> Result<(), Fault> {
        match answer {
            Completion::Positive(bytes) if bytes >= self.wanted() => {
                *moved += self.wanted();
                self.done = self.length;
                Ok(())
            }
            // Direct I/O can only go on at an aligned byte, so a tail behind the last one is moved again; an answer
            // that does not reach the next one is as good as nothing, which is how a file's unaligned end looks.
            Completion::Positive(bytes) => {
                let whole = bytes - bytes % granularity;
                if whole == 0 {
                    *moved += bytes;
                    return Err(Fault::Zero);
                }
                *moved += whole;
                self.done += whole;
                self.stalls = 0;
                Ok(())
            }
            Completion::Zero => Err(Fault::Zero),
            Completion::Retry if self.stalls < STALLS_MAX => {
                self.stalls += 1;
                Ok(())
            }
            Completion::Retry => Err(Fault::Errno(Errno::AGAIN.raw_os_error())),
            Completion::Cancelled => Err(Fault::Errno(Errno::CANCELED.raw_os_error())),
            Completion::Error(errno) => Err(Fault::Errno(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk(length: usize) -> Chunk {
        Chunk::new(Slot::from_bits(0), 0, length, Way::Straight)
    }

    #[test]
    fn a_short_answer_goes_on_where_it_stopped() {
        let (mut chunk, mut moved) = (chunk(10), 100);
        assert_eq!(chunk.advance(Completion::Positive(3), 1, &mut moved), Ok(()));
        assert_eq!((chunk.done, chunk.wanted(), moved), (3, 7, 103));
        assert_eq!(chunk.advance(Completion::Positive(7), 1, &mut moved), Ok(()));
        assert_eq!((chunk.done, chunk.wanted(), moved), (10, 0, 110));
    }

    #[test]
    fn a_short_answer_to_direct_io_goes_on_at_an_aligned_byte() {
        let (mut chunk, mut moved) = (chunk(4096), 0);
        assert_eq!(chunk.advance(Completion::Positive(1100), 512, &mut moved), Ok(()));
        assert_eq!((chunk.done, moved), (1024, 1024));
        // The file ends at byte 1100.
        assert_eq!(chunk.advance(Completion::Positive(76), 512, &mut moved), Err(Fault::Zero));
        assert_eq!(moved, 1100);
    }

    #[test]
    fn asking_again_in_vain_ends_and_progress_starts_the_count_anew() {
        let (mut chunk, mut moved) = (chunk(10), 0);
        for progress in [1, 2] {
            for _ in 0..STALLS_MAX {
                assert_eq!(chunk.advance(Completion::Retry, 1, &mut moved), Ok(()));
            }
            assert_eq!(chunk.advance(Completion::Positive(1), 1, &mut moved), Ok(()));
            assert_eq!(chunk.done, progress);
        }
        for _ in 0..STALLS_MAX {
            assert_eq!(chunk.advance(Completion::Retry, 1, &mut moved), Ok(()));
        }
        assert_eq!(chunk.advance(Completion::Retry, 1, &mut moved), Err(Fault::Errno(libc::EAGAIN)));
    }

    proptest! {
        #[test]
        fn answers_add_up_to_the_chunk_and_never_go_back(
            granularity in prop_oneof![Just(1_usize), Just(512), Just(4096)],
            units in 1_usize..64,
            answers in prop::collection::vec(1_usize..40_000, 1..64),
        ) {
            let length = units * granularity;
            let (mut chunk, mut moved) = (chunk(length), 0);
            for answer in answers {
                let before = chunk.done;
                if chunk.wanted() == 0 {
                    break;
                }
                let answer = answer.min(chunk.wanted());
                let outcome = chunk.advance(Completion::Positive(answer), granularity, &mut moved);
                if outcome.is_err() {
                    prop_assert!(answer < granularity);
                    break;
                }
                prop_assert!(chunk.done > before && chunk.done.is_multiple_of(granularity));
                prop_assert_eq!(moved, chunk.done);
            }
            prop_assert!(moved <= length);
        }
    }
}
