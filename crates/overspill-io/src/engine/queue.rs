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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNK: usize = 8;

    /// What direct I/O asks for in these tests.
    const SECTOR: usize = 512;
    const WIDE: Limits = Limits { depth: 1024, bytes: usize::MAX, detours: 1024 };

    fn extent(length: usize, priority: Priority) -> Extent {
        Extent { offset: 0, length, alignment: 1, priority }
    }

    fn queue(ops: &[(u8, usize, Priority)]) -> Queue<u8> {
        let mut queue = Queue::new(CHUNK, WIDE);
        for &(name, length, priority) in ops {
            queue.push(name, extent(length, priority));
        }
        queue
    }

    fn issue_order(queue: &mut Queue<u8>) -> Vec<u8> {
        std::iter::from_fn(|| queue.next().map(|(_, &mut name)| name)).collect()
    }

    #[test]
    fn operations_of_one_priority_take_turns() {
        let mut queue = queue(&[
            (b'a', 4 * CHUNK, Priority::Urgent),
            (b'b', 1, Priority::Urgent),
            (b'c', 2 * CHUNK, Priority::Urgent),
        ]);
        assert_eq!(issue_order(&mut queue), b"abcacaa");
    }

    #[test]
    fn every_fourth_chunk_is_a_background_chunk_while_both_wait() {
        let ops = [(b'u', 7 * CHUNK, Priority::Urgent), (b'w', 4 * CHUNK, Priority::Background)];
        assert_eq!(issue_order(&mut queue(&ops)), b"uuuwuuuwuww");
    }

    #[test]
    fn no_more_than_depth_chunks_are_out() {
        let mut queue = Queue::new(CHUNK, Limits { depth: 2, ..WIDE });
        queue.push((), extent(3 * CHUNK, Priority::Urgent));
        let (first, ()) = queue.next().unwrap();
        let _second = queue.next().unwrap();
        assert!(queue.next().is_none());
        assert!(matches!(queue.complete(first, Completion::Positive(CHUNK)), Step::Home(..)));
        assert!(queue.next().is_some());
        assert!(queue.next().is_none());
    }

    #[test]
    fn no_more_bytes_are_out_than_allowed_but_for_a_single_chunk() {
        let mut queue = Queue::new(CHUNK, Limits { bytes: CHUNK + 3, ..WIDE });
        queue.push('a', extent(CHUNK + 3, Priority::Urgent));
        queue.push('b', extent(1, Priority::Urgent));
        let (whole, _) = queue.next().unwrap();
        let (_small, &mut name) = queue.next().unwrap();
        assert_eq!(name, 'b');
        assert!(queue.next().is_none(), "eight, one and three bytes are too many");
        assert!(matches!(queue.complete(whole, Completion::Positive(CHUNK)), Step::Home(..)));
        assert_eq!(queue.next().unwrap().0.length, 3);

        let mut narrow = Queue::new(CHUNK, Limits { bytes: 1, ..WIDE });
        narrow.push('a', extent(2 * CHUNK, Priority::Urgent));
        assert_eq!(narrow.next().unwrap().0.length, CHUNK);
        assert!(narrow.next().is_none());
    }

    #[test]
    fn an_operation_without_a_bounce_block_steps_aside_and_is_called_back() {
        let mut queue = Queue::new(4 * SECTOR, Limits { detours: 1, ..WIDE });
        for name in ['a', 'b'] {
            let skewed = Extent { offset: 1, length: SECTOR, alignment: SECTOR, priority: Priority::Urgent };
            queue.push(name, skewed);
        }
        queue.push('c', extent(1, Priority::Background));
        let (first, &mut name) = queue.next().unwrap();
        assert_eq!((first.way(), name), (Way::Detour, 'a'));
        let (third, &mut name) = queue.next().unwrap();
        assert_eq!((third.way(), name), (Way::Straight, 'c'), "those behind do not wait");
        assert!(queue.next().is_none());
        assert!(matches!(queue.land(first, SECTOR, None), Step::Over(_, 'a', Verdict { fault: None, .. })));
        let (second, &mut name) = queue.next().unwrap();
        assert_eq!((second.way(), name), (Way::Detour, 'b'));
        let failed = queue.land(second, 0, Some(Fault::Zero));
        assert!(matches!(failed, Step::Over(_, 'b', Verdict { done: 0, fault: Some(Fault::Zero) })));
    }

    #[test]
    fn one_that_fails_before_its_second_turn_leaves_the_bounce_block_to_the_next() {
        let mut queue = Queue::new(4096, Limits { detours: 1, ..WIDE });
        let extent =
            |offset, length| Extent { offset, length, alignment: SECTOR, priority: Priority::Urgent };
        queue.push('a', extent(1, SECTOR));
        queue.push('b', extent(0, 4097));
        let (first, _) = queue.next().unwrap();
        let (straight, &mut name) = queue.next().unwrap();
        assert_eq!((straight.way(), name), (Way::Straight, 'b'));
        assert!(queue.next().is_none(), "the rest of b waits for the bounce block");
        queue.push('c', extent(1, SECTOR));
        assert!(queue.next().is_none(), "so does c, behind it");
        assert!(matches!(queue.land(first, SECTOR, None), Step::Over(..)));
        assert!(matches!(queue.complete(straight, Completion::Error(libc::EIO)), Step::Over(_, 'b', _)));
        assert_eq!(queue.next().map(|(_, &mut name)| name), Some('c'));
    }

    #[test]
    fn an_urgent_operation_does_not_wait_for_bounce_blocks_behind_background_ones() {
        let mut queue = Queue::new(4096, Limits { detours: 1, ..WIDE });
        let skewed = |priority| Extent { offset: 1, length: SECTOR, alignment: SECTOR, priority };
        for _ in 0..10 {
            queue.push('w', skewed(Priority::Background));
        }
        let (mut out, _) = queue.next().unwrap();
        assert!(queue.next().is_none());
        for _ in 0..7 {
            queue.push('u', skewed(Priority::Urgent));
        }
        assert!(queue.next().is_none());
        let mut order = Vec::new();
        loop {
            assert!(matches!(queue.land(out, SECTOR, None), Step::Over(..)));
            let Some((chunk, &mut name)) = queue.next() else { break };
            order.push(name);
            out = chunk;
        }
        assert_eq!(order, Vec::from_iter("uuuwuuuwuwwwwwww".chars()));
        assert!(queue.is_empty());
    }

    #[test]
    fn a_failed_operation_is_over_only_when_its_last_chunk_is_home() {
        let mut queue = queue(&[(b'a', 5 * CHUNK, Priority::Urgent)]);
        let chunks: Vec<Chunk> = (0..3).map(|_| queue.next().unwrap().0).collect();
        let [first, second, third] = chunks.try_into().unwrap();
        assert!(matches!(queue.complete(first, Completion::Error(libc::EIO)), Step::Home(..)));
        assert!(queue.next().is_none(), "a failed operation issues nothing more");
        assert!(matches!(queue.complete(second, Completion::Positive(3)), Step::Home(..)));
        let Step::Over(_, name, verdict) = queue.complete(third, Completion::Error(libc::ENOSPC)) else {
            panic!("the last chunk is home")
        };
        assert_eq!((name, verdict), (b'a', Verdict { done: 3, fault: Some(Fault::Errno(libc::EIO)) }));
        assert!(queue.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Event {
        /// The last one tells whether direct I/O needs a bounce block for it.
        Push(usize, Priority, bool),
        Issue,
        /// Completes the chunk at this position among those out.
        Answer(usize, Completion),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let priority = prop_oneof![Just(Priority::Urgent), Just(Priority::Background)];
        let answer = prop_oneof![
            4 => (1_usize..=CHUNK).prop_map(Completion::Positive),
            6 => Just(Completion::Positive(usize::MAX)),
            1 => Just(Completion::Retry),
            1 => Just(Completion::Zero),
            1 => Just(Completion::Cancelled),
            1 => (1_i32..100).prop_map(Completion::Error),
        ];
        let event = prop_oneof![
            2 => (1_usize..10 * CHUNK, priority, any::<bool>())
                .prop_map(|(length, priority, skewed)| Event::Push(length, priority, skewed)),
            6 => Just(Event::Issue),
            6 => (any::<usize>(), answer).prop_map(|(pick, answer)| Event::Answer(pick, answer)),
        ];
        prop::collection::vec(event, 0..300)
    }

    /// One operation as the test sees it.
    #[derive(Default)]
    struct Seen {
        length: usize,
        skewed: bool,
        issued: usize,
        out: usize,
        moved: usize,
        fault: Option<Fault>,
        over: bool,
    }

    struct Run {
        queue: Queue<usize>,
        seen: Vec<Seen>,
        out: Vec<(usize, Chunk)>,
    }

    impl Run {
        fn issue(&mut self) -> Result<bool, TestCaseError> {
            let room = self.out.len() < 4;
            let Some((chunk, &mut name)) = self.queue.next() else {
                let detours = self.out.iter().filter(|(_, chunk)| chunk.way() == Way::Detour).count();
                let could =
                    |op: &Seen| op.issued < op.length && op.fault.is_none() && !(op.skewed && detours == 2);
                let waiting = self.seen.iter().any(could);
                prop_assert!(!room || !waiting, "a chunk could have been issued");
                return Ok(false);
            };
            prop_assert!(room);
            let op = &mut self.seen[name];
            prop_assert!(op.fault.is_none() && !op.over);
            prop_assert_eq!(chunk.start, op.issued, "every byte is issued once, in order");
            prop_assert!(chunk.length > 0 && chunk.length <= CHUNK && chunk.done == 0);
            op.issued += chunk.length;
            op.out += 1;
            prop_assert!(op.issued <= op.length);
            self.out.push((name, chunk));
            Ok(true)
        }

        fn answer(&mut self, pick: usize, answer: Completion) -> Result<(), TestCaseError> {
            if self.out.is_empty() {
                return Ok(());
            }
            let (name, chunk) = self.out.swap_remove(pick % self.out.len());
            let (before, wanted) = (chunk.done, chunk.wanted());
            let answer = match answer {
                Completion::Positive(bytes) => Completion::Positive(bytes.min(wanted)),
                other => other,
            };
            let op = &mut self.seen[name];
            // A bounce block lands once, with all of its chunk or none.
            let lands = chunk.way() == Way::Detour;
            let answer = match answer {
                Completion::Positive(_) | Completion::Retry if lands => Completion::Positive(wanted),
                other => other,
            };
            match answer {
                Completion::Positive(bytes) => op.moved += bytes,
                Completion::Retry => {}
                Completion::Zero => op.fault = op.fault.or(Some(Fault::Zero)),
                Completion::Cancelled => op.fault = op.fault.or(Some(Fault::Errno(libc::ECANCELED))),
                Completion::Error(errno) => op.fault = op.fault.or(Some(Fault::Errno(errno))),
            }
            let step = match answer {
                Completion::Positive(moved) if lands => self.queue.land(chunk, moved, None),
                _ if lands => self.queue.land(chunk, 0, op.fault),
                answer => self.queue.complete(chunk, answer),
            };
            match step {
                Step::Again(chunk) => {
                    prop_assert!(op.fault.is_none());
                    prop_assert!(chunk.done >= before && chunk.wanted() > 0);
                    self.out.push((name, chunk));
                }
                Step::Home(_, &mut owner) => {
                    op.out -= 1;
                    prop_assert_eq!(owner, name);
                    prop_assert!(op.out > 0 || (op.fault.is_none() && op.issued < op.length));
                }
                Step::Over(_, owner, verdict) => {
                    op.out -= 1;
                    op.over = true;
                    prop_assert_eq!(owner, name);
                    prop_assert_eq!(op.out, 0, "over with a chunk out");
                    prop_assert_eq!(verdict, Verdict { done: op.moved, fault: op.fault });
                    prop_assert!(op.fault.is_some() || op.moved == op.length);
                }
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn every_byte_is_issued_once_and_every_operation_ends_once(events in events()) {
            let mut run = Run { queue: Queue::new(CHUNK, Limits { depth: 4, detours: 2, ..WIDE }), seen: Vec::new(), out: Vec::new() };
            for event in events {
                match event {
                    Event::Push(length, priority, skewed) => {
                        let (offset, alignment) = if skewed { (1, 4) } else { (0, 1) };
                        run.queue.push(run.seen.len(), Extent { offset, length, alignment, priority });
                        run.seen.push(Seen { length, skewed, ..Seen::default() });
                    }
                    Event::Issue => { run.issue()?; }
                    Event::Answer(pick, answer) => run.answer(pick, answer)?,
                }
            }
            while run.issue()? || !run.out.is_empty() {
                run.answer(0, Completion::Positive(usize::MAX))?;
            }
            prop_assert!(run.queue.is_empty());
            prop_assert!(run.seen.iter().all(|op| op.over));
        }

        #[test]
        fn background_waits_for_no_more_than_three_urgent_chunks(
            lengths in prop::collection::vec((1_usize..40 * CHUNK, any::<bool>()), 1..20)
        ) {
            let mut queue = Queue::new(CHUNK, Limits { depth: usize::MAX, ..WIDE });
            let mut background_left = 0;
            for (length, urgent) in lengths {
                let priority = if urgent { Priority::Urgent } else { Priority::Background };
                queue.push(priority, extent(length, priority));
                background_left += if urgent { 0 } else { length.div_ceil(CHUNK) };
            }
            let mut run = 0;
            while let Some((_, &mut priority)) = queue.next() {
                match priority {
                    Priority::Urgent if background_left > 0 => run += 1,
                    Priority::Urgent => {}
                    Priority::Background => (run, background_left) = (0, background_left - 1),
                }
                prop_assert!(run < BACKGROUND_TURN);
            }
        }
    }
}
