//! The answers to the parts of one operation, put together to the answer that its caller waits for.
//!
//! An operation on several files is one operation of an engine for each of its parts. Each has a [`Part`] to answer
//! to; they share an [`Assembly`], which keeps what came, blocks included, until nothing is missing any more. Then it
//! joins the parts and sends the caller's reply, on the thread of the engine that was the last one to answer. So
//! whoever holds the ticket sees one operation, and a block goes home, or back to its owner, as a whole: its lease
//! would not return before the last part anyway, and after a failed write no byte of it may be missing.
//!
//! A part that is dropped without an answer answers too, as a promise does.

use std::mem;
use std::sync::Arc;

use super::stats::Stats;
use super::ticket::Reply;
use crate::error::{Direction, Failed, IoError};
use crate::file::File;
use crate::memory::block::Block;
use crate::sync::{Mutex, lock};

/// What the parts of one operation share.
pub(crate) struct Assembly {
    direction: Direction,
    stats: Arc<Stats>,
    state: Mutex<State>,
}

struct State {
    /// The answers so far, in the order of the parts; `None` for one that is missing.
    answers: Vec<Option<Result<Block, Failed>>>,
    missing: usize,
    /// Taken with the last answer.
    reply: Option<Reply>,
}

/// The obligation to answer for one part.
pub(crate) struct Part {
    /// `None` once it is answered.
    assembly: Option<Arc<Assembly>>,
    place: usize,
    /// Where the part's bytes are.
    file: File,
}

impl Assembly {
    /// Begins an operation that has a part in each of `files`, in this order; at least one.
    pub(crate) fn begin(
        reply: Reply,
        direction: Direction,
        files: impl IntoIterator<Item = File>,
        stats: &Arc<Stats>,
    ) -> Vec<Part> {
        let files: Vec<File> = files.into_iter().collect();
        let answers = files.iter().map(|_| None).collect();
        let state = Mutex::new(State { answers, missing: files.len(), reply: Some(reply) });
        stats.began(direction);
        let assembly = Arc::new(Assembly { direction, stats: Arc::clone(stats), state });
        let part = |(place, file)| Part { assembly: Some(Arc::clone(&assembly)), place, file };
        files.into_iter().enumerate().map(part).collect()
    }

    fn put(&self, place: usize, answer: Result<Block, Failed>) {
        let mut state = lock(&self.state);
        state.answers[place] = Some(answer);
        state.missing -= 1;
        if state.missing > 0 {
            return;
        }
        let (answers, reply) = (mem::take(&mut state.answers), state.reply.take());
        // Blocks that go home take the pool's lock: not under this one.
        drop(state);
        let (answer, moved) = join(answers.into_iter().flatten());
        self.stats.ended(self.direction, moved);
        if answer.as_ref().is_err_and(|failed| failed.block.is_none()) {
            self.stats.leaked(1);
        }
        reply.expect("the last answer comes once").send(answer);
    }
}

impl Part {
    pub(crate) fn send(mut self, answer: Result<Block, Failed>) {
        self.answer(answer);
    }

    fn answer(&mut self, answer: Result<Block, Failed>) {
        if let Some(assembly) = self.assembly.take() {
            assembly.put(self.place, answer.map_err(|failed| self.named(failed)));
        }
    }

    /// Of several engines it matters which one has stopped.
    fn named(&self, failed: Failed) -> Failed {
        let error = match failed.error {
            IoError::EngineStopped => IoError::LaneStopped { path: self.file.path().to_owned() },
            error => error,
        };
        Failed { error, ..failed }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.answer(Err(Failed { error: IoError::EngineStopped, block: None }));
    }
}

/// One answer of several, in the order of the parts, and how many bytes have moved.
fn join(answers: impl Iterator<Item = Result<Block, Failed>>) -> (Result<Block, Failed>, usize) {
    let (mut parts, mut moved, mut first_error) = (Vec::new(), 0, None);
    for answer in answers {
        let (block, done) = match answer {
            Ok(block) => {
                let done = block.len();
                (Some(block), done)
            }
            Err(Failed { error, block }) => {
                let done = error.done();
                first_error = first_error.or(Some(error));
                (block, done)
            }
        };
        parts.push(block);
        moved += done;
    }
    // While one is missing, the kernel may still touch it: the rest stays away, too.
    let all: Option<Vec<Block>> = parts.into_iter().collect();
    let whole = all.and_then(|parts| {
        let mut parts = parts.into_iter();
        let first = parts.next()?;
        parts.try_fold(first, |whole, part| whole.join(part).ok())
    });
    let answer = match (first_error, whole) {
        (None, Some(block)) => Ok(block),
        (None, None) => unreachable!("the parts were split off one block in this order"),
        (Some(error), block) => Err(Failed { error, block }),
    };
    (answer, moved)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::doorbell::{Doorbell, Wire};
    use crate::engine::ticket::{Promise, Ticket};
    use crate::{BLOCK_ALIGNMENT, BlockClass, Pool};

    const BYTES: usize = 3 * BLOCK_ALIGNMENT;

    /// An operation in three parts, and the block that was cut for it.
    struct Bench {
        pool: Pool,
        stats: Arc<Stats>,
        parts: Vec<Part>,
        blocks: Vec<Block>,
        ticket: Ticket,
    }

    impl Bench {
        fn new() -> Bench {
            let pool = Pool::new(&[BlockClass { name: "test", block_bytes: BYTES, count: 1 }]).unwrap();
            let (wire, _events) = crossbeam_channel::bounded(1);
            let file = File::in_memory(&Arc::new(Doorbell::new(Wire::Channel(wire)))).unwrap();
            let stats = Arc::new(Stats::default());
            let (promise, ticket) = Promise::new(Arc::clone(&stats));
            let files = [file.clone(), file.clone(), file];
            let parts = Assembly::begin(Reply::Block(promise), Direction::Write, files, &stats);
            let mut first = pool.lease(BYTES).unwrap();
            let mut second = first.split_off(BLOCK_ALIGNMENT);
            let third = second.split_off(BLOCK_ALIGNMENT);
            Bench { pool, stats, parts, blocks: vec![first, second, third], ticket }
        }
    }

    fn failed(errno: i32, block: Option<Block>) -> Result<Block, Failed> {
        Err(Failed { error: IoError::File { action: "test", path: "file".into(), errno }, block })
    }

    #[test]
    fn the_answer_comes_with_the_last_part_and_the_block_is_whole() {
        let Bench { pool, stats, parts, blocks, ticket } = Bench::new();
        // The last one first.
        for (part, block) in parts.into_iter().zip(blocks).rev() {
            assert!(!ticket.is_done());
            part.send(Ok(block));
        }
        assert!(ticket.is_done());
        assert_eq!(stats.totals().write_ops, 1, "one operation");
        assert_eq!(stats.totals().bytes_written, BYTES as u64);
        let block = ticket.wait().unwrap();
        assert_eq!(block.len(), BYTES);
        drop(block);
        assert_eq!(pool.leased_blocks(), 0);
        assert_eq!(stats.totals().waited, Duration::ZERO);
    }

    #[test]
    fn the_first_part_that_failed_says_why_and_every_byte_comes_back() {
        let Bench { parts, blocks, ticket, .. } = Bench::new();
        let answers: [fn(Block) -> _; 3] =
            [Ok, |block| failed(2, Some(block)), |block| failed(3, Some(block))];
        // In the order of the parts, not of their answers.
        for ((part, block), answer) in parts.into_iter().zip(blocks).zip(answers).rev() {
            part.send(answer(block));
        }
        let Failed { error, block } = ticket.wait().unwrap_err();
        assert_eq!(error.errno(), Some(2));
        assert_eq!(block.unwrap().len(), BYTES);
    }

    #[test]
    fn a_part_that_never_comes_back_keeps_the_lease_and_is_answered_for() {
        let Bench { pool, stats, parts, mut blocks, ticket } = Bench::new();
        let lost = blocks.remove(1);
        let mut parts = parts.into_iter();
        let (first, second, third) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
        third.send(Ok(blocks.pop().unwrap()));
        drop(second);
        first.send(Ok(blocks.pop().unwrap()));
        let Failed { error, block } = ticket.wait().unwrap_err();
        assert!(matches!(error, IoError::LaneStopped { .. }), "{error}");
        assert!(block.is_none());
        assert_eq!(pool.leased_blocks(), 1, "what the kernel may touch is leased to nobody else");
        assert_eq!(stats.totals().leaked_blocks, 1);
        drop(lost);
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn an_answer_to_a_dropped_ticket_sends_all_parts_home() {
        let Bench { pool, parts, blocks, ticket, .. } = Bench::new();
        drop(ticket);
        for (part, block) in parts.into_iter().zip(blocks) {
            assert_eq!(pool.leased_blocks(), 1);
            part.send(Ok(block));
        }
        assert_eq!(pool.leased_blocks(), 0);
    }
}
