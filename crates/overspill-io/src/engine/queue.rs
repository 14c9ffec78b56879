//! Which chunk of which operation goes to the kernel next, and when an operation is over.
//!
//! The queue knows lengths and nothing of memory, files or kernels: it is plain data, moved by three events.
//! [`Queue::push`] accepts an operation, [`Queue::next`] cuts the next [`Chunk`] off one of them, and
//! [`Queue::complete`] takes the chunk back with the answer. At most `depth` chunks, and as many bytes as
//! [`Limits`] allows, are out at a time.
//!
//! Operations of one priority take turns chunk by chunk, so a small one does not wait behind a large one. Urgent
//! chunks go first, but while background chunks wait too, every fourth is theirs: neither starves.
//!
//! Chunks that direct I/O cannot take as they are need a bounce block each. The next chunk of an operation that finds
//! none free does not hold up the others: the operation steps aside, and while one is free, those that stepped aside
//! go before the others of their priority.
//!
//! A chunk is a token that cannot be copied: it is out until it comes back, so every byte is issued once. After the
//! first failure an operation issues nothing more, but it is over only when its last chunk is home, because until
//! then the kernel may still touch its memory.

use std::collections::VecDeque;

use super::chunk::{Chunk, Fault, Way};
use super::completion::Completion;
use super::extent::Extent;
use super::table::{Slot, Table};

/// Of this many chunks issued while both priorities wait, one is a background chunk.
const BACKGROUND_TURN: usize = 4;

/// Which of two waiting operations goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Somebody waits for it, or soon will.
    Urgent,
    /// Nobody waits for it yet, such as write-behind.
    Background,
}

/// What may be out at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Chunks.
    pub(crate) depth: usize,
    /// Bytes of them; a single chunk goes out whatever its length.
    pub(crate) bytes: usize,
    /// Chunks that go through a bounce block.
    pub(crate) detours: usize,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Bytes moved, by all chunks together.
    pub(crate) done: usize,
    /// The first failure, if any.
    pub(crate) fault: Option<Fault>,
}

/// What becomes of a chunk that came back.
pub(crate) enum Step<'a, T> {
    /// It has bytes left to move: issue it again.
    Again(Chunk),
    /// It is home; its operation has others out, or still to issue.
    Home(Chunk, &'a mut T),
    /// It was the last one: the operation is over.
    Over(Chunk, T, Verdict),
}

/// The operations that were accepted and are not over, each with a payload of its owner's.
pub(crate) struct Queue<T> {
    chunk_bytes: usize,
    limits: Limits,
    out: Out,
    ops: Table<Work<T>>,
    urgent: Lane,
    background: Lane,
    /// Urgent chunks issued since the last background chunk, while one waited.
    urgent_run: usize,
}

/// The operations of one priority with bytes that were never issued.
#[derive(Default)]
struct Lane {
    /// In turn order.
    ready: VecDeque<Slot>,
    /// Those whose next chunk found no bounce block, in the order in which that happened.
    aside: VecDeque<Slot>,
}

/// What is out now, each counted as its limit is.
#[derive(Default)]
struct Out {
    chunks: usize,
    bytes: usize,
    detours: usize,
}

struct Work<T> {
    payload: T,
    extent: Extent,
    issued: usize,
    out: usize,
    verdict: Verdict,
}

impl<T> Queue<T> {
    /// An empty queue that cuts chunks of `chunk_bytes` and keeps to `limits`.
    pub(crate) fn new(chunk_bytes: usize, limits: Limits) -> Queue<T> {
        let Limits { depth, bytes, detours } = limits;
        assert!(chunk_bytes > 0 && depth > 0 && bytes > 0 && detours > 0, "a queue moves something");
        let (urgent, background) = (Lane::default(), Lane::default());
        let (ops, out) = (Table::new(), Out::default());
        Queue { chunk_bytes, limits, out, ops, urgent, background, urgent_run: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Accepts an operation.
    pub(crate) fn push(&mut self, payload: T, extent: Extent) {
        assert!(extent.length > 0, "an operation without bytes is over before it is queued");
        let verdict = Verdict { done: 0, fault: None };
        let slot = self.ops.insert(Work { payload, extent, issued: 0, out: 0, verdict });
        self.lane(extent.priority).ready.push_back(slot);
    }

    /// The next chunk to issue with its operation's payload; `None` while nothing waits or nothing more may be out.
    pub(crate) fn next(&mut self) -> Option<(Chunk, &mut T)> {
        if self.out.chunks == self.limits.depth {
            return None;
        }
        let has_bounce = self.out.detours < self.limits.detours;
        // Each round but the last makes an operation step aside, so there are as many as operations at most.
        loop {
            let priority = self.turn(has_bounce)?;
            let op = *self.lane(priority).waiting(has_bounce).front()?;
            let Work { extent, issued: start, .. } = *self.work(op);
            let (length, way) = extent.cut(start, self.chunk_bytes);
            if self.out.chunks > 0 && self.out.bytes.saturating_add(length) > self.limits.bytes {
                return None;
            }
            self.lane(priority).waiting(has_bounce).pop_front();
            if way == Way::Detour && !has_bounce {
                self.lane(priority).aside.push_back(op);
                continue;
            }
            self.took_turn(priority, has_bounce);
            if start + length < extent.length {
                self.lane(priority).ready.push_back(op);
            }
            self.out.add(length, way);
            let work = self.work(op);
            work.issued += length;
            work.out += 1;
            return Some((Chunk::new(op, start, length, way), &mut work.payload));
        }
    }

    /// The operation that `chunk` is a part of.
    pub(crate) fn payload(&mut self, chunk: &Chunk) -> &mut T {
        &mut self.work(chunk.op()).payload
    }

    /// Takes back `chunk`, of which the kernel was asked to move everything behind its `done` bytes.
    pub(crate) fn complete(&mut self, mut chunk: Chunk, completion: Completion) -> Step<'_, T> {
        let work = self.work(chunk.op());
        let progress = chunk.advance(completion, work.extent.alignment, &mut work.verdict.done);
        // An operation that failed meanwhile has no use for the rest of the chunk.
        if progress.is_ok() && chunk.wanted() > 0 && work.verdict.fault.is_none() {
            return Step::Again(chunk);
        }
        self.home(chunk, progress.err())
    }

    /// Takes back `chunk`, for which a bounce block travelled: `moved` bytes of it have arrived.
    pub(crate) fn land(&mut self, chunk: Chunk, moved: usize, fault: Option<Fault>) -> Step<'_, T> {
        self.work(chunk.op()).verdict.done += moved;
        self.home(chunk, fault)
    }

    /// Counts `chunk` as no longer out.
    fn home(&mut self, chunk: Chunk, fault: Option<Fault>) -> Step<'_, T> {
        let op = chunk.op();
        self.out.remove(chunk.length, chunk.way());
        let work = self.work(op);
        work.out -= 1;
        if fault.is_some() && work.verdict.fault.is_none() {
            work.verdict.fault = fault;
            let Extent { length, priority, .. } = work.extent;
            // One that has no more to issue is in no lane; looking for each of many that fail would take for ever.
            if work.issued < length {
                self.lane(priority).remove(op);
            }
        }
        let work = self.work(op);
        let issues_more = work.verdict.fault.is_none() && work.issued < work.extent.length;
        if work.out == 0 && !issues_more {
            let work = self.ops.remove(op).expect("it was found above");
            return Step::Over(chunk, work.payload, work.verdict);
        }
        Step::Home(chunk, &mut self.work(op).payload)
    }

    /// Gives every operation up, whether chunks of it are out or not.
    pub(crate) fn abandon(self) -> impl Iterator<Item = T> {
        self.ops.into_values().map(|work| work.payload)
    }

    /// Whose turn it is: the urgent ones', but for every fourth while background operations wait too.
    fn turn(&self, has_bounce: bool) -> Option<Priority> {
        match (self.urgent.is_idle(has_bounce), self.background.is_idle(has_bounce)) {
            (true, true) => None,
            (false, true) => Some(Priority::Urgent),
            (false, false) if self.urgent_run + 1 < BACKGROUND_TURN => Some(Priority::Urgent),
            (_, false) => Some(Priority::Background),
        }
    }

    /// Counts the turn that `priority` had.
    fn took_turn(&mut self, priority: Priority, has_bounce: bool) {
        match priority {
            Priority::Background => self.urgent_run = 0,
            Priority::Urgent if self.background.is_idle(has_bounce) => {}
            Priority::Urgent => self.urgent_run += 1,
        }
    }

    fn lane(&mut self, priority: Priority) -> &mut Lane {
        match priority {
            Priority::Urgent => &mut self.urgent,
            Priority::Background => &mut self.background,
        }
    }

    fn work(&mut self, op: Slot) -> &mut Work<T> {
        self.ops.get_mut(op).expect("who waits or has a chunk out is not over")
    }
}

impl Lane {
    /// Those of whom the first has the lane's next turn.
    fn waiting(&mut self, has_bounce: bool) -> &mut VecDeque<Slot> {
        if has_bounce && !self.aside.is_empty() { &mut self.aside } else { &mut self.ready }
    }

    /// Whether nobody in it can issue anything now, as far as bounce blocks go.
    fn is_idle(&self, has_bounce: bool) -> bool {
        self.ready.is_empty() && (!has_bounce || self.aside.is_empty())
    }

    fn remove(&mut self, op: Slot) {
        for waiting in [&mut self.ready, &mut self.aside] {
            waiting.retain(|&slot| slot != op);
        }
    }
}

impl Out {
    fn add(&mut self, length: usize, way: Way) {
        self.chunks += 1;
        self.bytes += length;
        self.detours += usize::from(way == Way::Detour);
    }

    fn remove(&mut self, length: usize, way: Way) {
        self.chunks -= 1;
        self.bytes -= length;
        self.detours -= usize::from(way == Way::Detour);
    }
}

#[cfg(test)]
mod tests;
