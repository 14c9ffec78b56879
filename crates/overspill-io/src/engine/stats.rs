//! What the engine has moved, and for how long it was busy.
//!
//! Busy time is the length of the union of the operations' lifetimes, from the driver's acceptance to the answer:
//! bytes over busy time is the bandwidth the device really gave, however many operations overlapped.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::Direction;
use crate::sync::{Mutex, lock};

/// Totals since the engine's start; none ever falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Bytes that reads brought in, failed ones included.
    pub bytes_read: u64,
    /// Bytes that writes put out, failed ones included.
    pub bytes_written: u64,
    /// Reads that ended, well or not.
    pub read_ops: u64,
    /// Writes that ended, well or not.
    pub write_ops: u64,
    /// Time with at least one operation in flight.
    pub busy: Duration,
    /// Time with at least one read in flight.
    pub read_busy: Duration,
    /// Time with at least one write in flight.
    pub write_busy: Duration,
    /// Time that callers were blocked in [`Ticket::wait`](crate::Ticket::wait), summed over callers.
    pub waited: Duration,
    /// Blocks that never come home because the kernel may still touch them.
    pub leaked_blocks: u64,
}

/// The engine's counters, written by the driver once per operation and read by anybody.
#[derive(Default)]
pub(crate) struct Stats {
    flow: Mutex<Flow>,
    waited_ns: AtomicU64,
}

#[derive(Default)]
struct Flow {
    reads: Lane,
    writes: Lane,
    any: Busy,
    leaked_blocks: u64,
}

#[derive(Default)]
struct Lane {
    ops: u64,
    bytes: u64,
    busy: Busy,
}

impl Flow {
    fn lane(&mut self, direction: Direction) -> &mut Lane {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }
}

impl Stats {
    /// An operation was accepted.
    pub(crate) fn began(&self, direction: Direction) {
        let mut flow = lock(&self.flow);
        let now = Instant::now();
        flow.any.enter(now);
        flow.lane(direction).busy.enter(now);
    }

    /// An accepted operation is over; `bytes` of it moved.
    pub(crate) fn ended(&self, direction: Direction, bytes: usize) {
        let mut flow = lock(&self.flow);
        let now = Instant::now();
        flow.any.leave(now);
        let lane = flow.lane(direction);
        lane.busy.leave(now);
        lane.ops += 1;
        lane.bytes += bytes as u64;
    }

    /// Operations that were accepted and are not over.
    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.flow).any.open.as_ref().map_or(0, |open| open.inside)
    }

    /// A caller was blocked for `time`.
    pub(crate) fn waited(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.waited_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// `blocks` blocks were given up.
    pub(crate) fn leaked(&self, blocks: usize) {
        lock(&self.flow).leaked_blocks += blocks as u64;
    }

    pub(crate) fn totals(&self) -> EngineStats {
        let flow = lock(&self.flow);
        let now = Instant::now();
        EngineStats {
            bytes_read: flow.reads.bytes,
            bytes_written: flow.writes.bytes,
            read_ops: flow.reads.ops,
            write_ops: flow.writes.ops,
            busy: flow.any.total(now),
            read_busy: flow.reads.busy.total(now),
            write_busy: flow.writes.busy.total(now),
            waited: Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed)),
            leaked_blocks: flow.leaked_blocks,
        }
    }
}

/// The length of a union of intervals whose ends come in the order of time.
#[derive(Default)]
struct Busy {
    past: Duration,
    open: Option<Open>,
}

/// The union's last part, still growing.
struct Open {
    since: Instant,
    inside: usize,
}

impl Busy {
    fn enter(&mut self, now: Instant) {
        self.open.get_or_insert(Open { since: now, inside: 0 }).inside += 1;
    }

    fn leave(&mut self, now: Instant) {
        let open = self.open.as_mut().expect("what ends has begun");
        open.inside -= 1;
        if open.inside == 0 {
            self.past += now.saturating_duration_since(open.since);
            self.open = None;
        }
    }

    fn total(&self, now: Instant) -> Duration {
        self.past
            + self.open.as_ref().map_or(Duration::ZERO, |open| now.saturating_duration_since(open.since))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn busy_time_counts_overlaps_once_and_gaps_never() {
        let at = |ms| Instant::now() + Duration::from_millis(ms);
        let start = at(0);
        let at = |ms| start + Duration::from_millis(ms);
        let mut busy = Busy::default();
        busy.enter(at(0));
        busy.enter(at(10));
        busy.leave(at(20));
        assert_eq!(busy.total(at(25)), Duration::from_millis(25));
        busy.leave(at(30));
        busy.enter(at(100));
        busy.leave(at(105));
        assert_eq!(busy.total(at(1000)), Duration::from_millis(35));
    }

    #[test]
    fn totals_tell_reads_from_writes() {
        let stats = Stats::default();
        stats.began(Direction::Read);
        stats.began(Direction::Write);
        assert_eq!(stats.in_flight(), 2);
        stats.ended(Direction::Write, 5);
        stats.ended(Direction::Read, 7);
        assert_eq!(stats.in_flight(), 0);
        stats.waited(Duration::from_nanos(3));
        let totals = stats.totals();
        assert_eq!((totals.bytes_read, totals.bytes_written), (7, 5));
        assert_eq!((totals.read_ops, totals.write_ops), (1, 1));
        assert_eq!(totals.waited, Duration::from_nanos(3));
        assert!(totals.busy >= totals.read_busy && totals.read_busy >= totals.write_busy);
    }

    proptest! {
        #[test]
        fn busy_time_is_the_union_of_the_intervals(intervals in prop::collection::vec((0_u64..500, 0_u64..50), 0..30)) {
            let start = Instant::now();
            let at = |ms| start + Duration::from_millis(ms);
            let enters = intervals.iter().map(|&(begin, _)| (begin, 0));
            let mut ends: Vec<(u64, u8)> =
                enters.chain(intervals.iter().map(|&(begin, length)| (begin + length, 1))).collect();
            ends.sort_unstable();
            let mut busy = Busy::default();
            for (ms, kind) in ends {
                if kind == 0 { busy.enter(at(ms)) } else { busy.leave(at(ms)) }
            }
            let covered = (0..600).filter(|ms| intervals.iter().any(|(begin, length)| (*begin..begin + length).contains(ms)));
            prop_assert_eq!(busy.total(at(1000)), Duration::from_millis(covered.count() as u64));
        }
    }
}
