//! One operation: everything the kernel may touch for it, and the way back to its caller.
//!
//! The operation owns its block whole until the driver issues chunks. A chunk's bytes are split off as a block of
//! their own, travel through the backend by value, and are put back when the chunk comes home. So no code can give
//! the caller a byte that the kernel may still touch: the parts do not join while one is missing. Bytes that go through
//! a bounce block stay with the operation: the kernel never sees them.

use super::chunk::Fault;
use super::extent::Extent;
use super::gate::Access;
use super::queue::{Priority, Verdict};
use super::ticket::Reply;
use crate::error::{Direction, Failed, IoError};
use crate::file::File;
use crate::memory::block::Block;

/// An accepted request to move all bytes of one block.
pub(crate) struct Op {
    pub(crate) direction: Direction,
    pub(crate) file: File,
    /// Where in the file the block's first byte goes.
    pub(crate) offset: u64,
    length: usize,
    priority: Priority,
    parts: Parts,
    reply: Reply,
}

/// What is asked of the engine.
pub(crate) struct Request<'a> {
    pub(crate) direction: Direction,
    pub(crate) file: &'a File,
    pub(crate) offset: u64,
    pub(crate) block: Block,
    pub(crate) priority: Priority,
}

impl Op {
    /// Checks the request and makes the operation that answers to `reply`. A request that is over before it begins,
    /// because something is wrong with it or because it is empty, is answered at once.
    pub(crate) fn new(request: Request<'_>, reply: Reply) -> Option<Op> {
        let Request { direction, file, offset, block, priority } = request;
        let length = block.len();
        // The kernel counts file positions in signed numbers.
        if offset.checked_add(length as u64).is_none_or(|end| i64::try_from(end).is_err()) {
            let errno = rustix::io::Errno::OVERFLOW.raw_os_error();
            let path = file.path().to_path_buf();
            let error = IoError::Transfer { direction, path, offset, length, done: 0, errno };
            reply.send(Err(Failed { error, block: Some(block) }));
            return None;
        }
        if length == 0 {
            reply.send(Ok(block));
            return None;
        }
        let parts = Parts { rest: Some(block), home: Vec::new() };
        Some(Op { direction, file: file.clone(), offset, length, priority, parts, reply })
    }

    pub(crate) fn extent(&self) -> Extent {
        let (offset, length, alignment) = (self.offset, self.length, self.file.alignment());
        Extent { offset, length, alignment, priority: self.priority }
    }

    /// How it uses its file. A write through a bounce block changes more of it than was asked for, for a moment.
    pub(crate) fn access(&self) -> Access {
        match self.direction {
            Direction::Write if !self.extent().is_aligned() => Access::Exclusive,
            Direction::Read | Direction::Write => Access::Shared,
        }
    }

    /// Takes the next `length` bytes out, for a chunk on its way to the kernel.
    pub(crate) fn issue(&mut self, length: usize) -> Block {
        self.parts.take(length)
    }

    /// The `length` bytes from `start` on, which stay with the operation while a bounce block travels for them.
    pub(crate) fn held(&self, start: usize, length: usize) -> &[u8] {
        let (rest, first) = self.parts.rest(self.length);
        &rest[start - first..start - first + length]
    }

    /// As [`Op::held`], to be changed.
    pub(crate) fn held_mut(&mut self, start: usize, length: usize) -> &mut [u8] {
        let (rest, first) = self.parts.rest_mut(self.length);
        &mut rest[start - first..start - first + length]
    }

    /// Puts a chunk's bytes back; it began `start` bytes into the operation.
    pub(crate) fn home(&mut self, start: usize, block: Block) {
        self.parts.home.push((start, block));
    }

    /// Answers the caller, with the block if all of its parts are here. Says whether they were.
    pub(crate) fn finish(self, verdict: Verdict) -> Whole {
        let Op { direction, file, offset, length, parts, reply, .. } = self;
        let (path, done) = (file.path().to_path_buf(), verdict.done);
        let error = match (verdict.fault, direction) {
            (None, _) => None,
            (Some(Fault::Errno(errno)), _) => {
                Some(IoError::Transfer { direction, path, offset, length, done, errno })
            }
            (Some(Fault::Zero), Direction::Read) => Some(IoError::EndOfFile { path, offset, length, done }),
            (Some(Fault::Zero), Direction::Write) => Some(IoError::WriteZero { path, offset, length, done }),
        };
        answer(reply, parts, length, error)
    }

    /// Answers the caller that the engine stopped, with the block if all of its parts are here.
    pub(crate) fn stop(self) -> Whole {
        answer(self.reply, self.parts, self.length, Some(IoError::EngineStopped))
    }
}

/// Whether an operation's block was complete when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whole {
    /// It went back to the caller.
    Returned,
    /// A part of it is with the kernel, and the rest stays away with it.
    Missing,
}

fn answer(reply: Reply, parts: Parts, length: usize, error: Option<IoError>) -> Whole {
    let block = parts.join(length);
    let whole = if block.is_some() { Whole::Returned } else { Whole::Missing };
    reply.send(match (error, block) {
        (None, Some(block)) => Ok(block),
        (None, None) => unreachable!("an operation succeeds with every chunk home"),
        (Some(error), block) => Err(Failed { error, block }),
    });
    whole
}

/// A block of which chunks are out.
struct Parts {
    /// What was never issued.
    rest: Option<Block>,
    /// Chunks that came home, with where they begin.
    home: Vec<(usize, Block)>,
}

impl Parts {
    fn take(&mut self, length: usize) -> Block {
        let mut chunk = self.rest.take().expect("no more is issued than the operation has");
        if length < chunk.len() {
            self.rest = Some(chunk.split_off(length));
        }
        chunk
    }

    /// What was never issued of a block of `length` bytes, and where it begins.
    fn rest(&self, length: usize) -> (&[u8], usize) {
        let rest = self.rest.as_deref().expect("what is held was never issued");
        (rest, length - rest.len())
    }

    fn rest_mut(&mut self, length: usize) -> (&mut [u8], usize) {
        let rest = self.rest.as_deref_mut().expect("what is held was never issued");
        let first = length - rest.len();
        (rest, first)
    }

    /// The whole block of `length` bytes, if no part is missing.
    fn join(self, length: usize) -> Option<Block> {
        let Parts { rest, mut home } = self;
        home.sort_unstable_by_key(|&(start, _)| start);
        let mut parts = home.into_iter().map(|(_, part)| part).chain(rest);
        let first = parts.next()?;
        let whole = parts.try_fold(first, |whole, part| whole.join(part).ok())?;
        (whole.len() == length).then_some(whole)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{BlockClass, Pool};

    const CHUNK: usize = 4096;

    fn parts(pool: &Pool, bytes: usize) -> Parts {
        Parts { rest: Some(pool.lease(bytes).unwrap()), home: Vec::new() }
    }

    proptest! {
        #[test]
        fn parts_join_only_when_every_chunk_is_home(bytes in 1_usize..10 * CHUNK, order in any::<u64>(), lose in any::<bool>()) {
            let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 10 * CHUNK, count: 1 }]).unwrap();
            let mut parts = parts(&pool, bytes);
            let issued = (bytes / CHUNK) / 2 + 1;
            let mut out: Vec<(usize, Block)> = (0..issued.min(bytes.div_ceil(CHUNK)))
                .map(|chunk| (chunk * CHUNK, parts.take(CHUNK.min(bytes - chunk * CHUNK))))
                .collect();
            let lost = lose.then(|| out.swap_remove(order as usize % out.len()));
            while !out.is_empty() {
                parts.home.push(out.swap_remove(order as usize % out.len()));
            }
            let whole = parts.join(bytes);
            prop_assert_eq!(whole.as_ref().map(|whole| whole.len()), (!lose).then_some(bytes));
            drop(whole);
            // What is missing keeps the lease.
            prop_assert_eq!(pool.leased_blocks(), usize::from(lose));
            drop(lost);
            prop_assert_eq!(pool.leased_blocks(), 0);
        }
    }
}
