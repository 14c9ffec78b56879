//! The order in which chunks are issued, and laws over random operations and answers.

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
    let extent = |offset, length| Extent { offset, length, alignment: SECTOR, priority: Priority::Urgent };
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
