//! What all handles of the process do to a file at a time.
//!
//! A write whose ends are not aligned changes more of its file than its own bytes, for a moment, and sets the file's length.
//! The engine of its handle keeps the file to it meanwhile, but knows nothing of other engines. So such a write begins when
//! everything that other handles were asked for in that file before is over, and what they are asked for after it waits for
//! it. Other processes are not known here.
//!
//! No queue waits in a circle: an operation enters here and in its handle's queue at the same time, and waits for earlier
//! ones only. A queue is worked through in order, so what a job in it waits for, the jobs behind it need not wait for again:
//! every operation is waited for once by each other handle, and looked at once. The lock is taken by whoever has the GIL, so a
//! fork finds it free, and forgets what its parent was doing.

use std::collections::{BTreeMap, BTreeSet};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::operation::Operation;
use super::order::FileKey;

/// What is over is forgotten when there is twice as much as was left the last time, and this.
const FORGOTTEN_MIN: usize = 64;

static TRAFFIC: Mutex<Traffic> = Mutex::new(Traffic::new(0));

/// One of the handles of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HandleId(u64);

impl HandleId {
    pub(super) fn next() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

struct Traffic {
    process: u32,
    files: BTreeMap<FileKey, Lane>,
    /// Of the next operation that enters.
    number: u64,
    count: usize,
    count_max: usize,
}

/// What was begun in one file.
#[derive(Default)]
struct Lane {
    /// In the order of their numbers.
    entries: Vec<Entry>,
    seen: BTreeMap<HandleId, Seen>,
}

struct Entry {
    number: u64,
    handle: HandleId,
    is_odd: bool,
    operation: Weak<Operation>,
}

/// Up to which numbers a handle's queue waits for whom, or has waited.
#[derive(Clone, Copy, Default)]
struct Seen {
    odd: u64,
    all: u64,
}

/// What an operation has to wait for.
pub(super) struct Ahead {
    /// What its queue does not wait for yet.
    pub(super) operations: Vec<Arc<Operation>>,
    /// Whether there may be more of it that the queue waits for already.
    pub(super) is_queued: bool,
}

/// Keeps everybody else from entering.
pub(super) struct Entrance(MutexGuard<'static, Traffic>);

impl Traffic {
    const fn new(process: u32) -> Self {
        Self { process, files: BTreeMap::new(), number: 1, count: 0, count_max: FORGOTTEN_MIN }
    }

    fn forget(&mut self) {
        self.files.retain(|_, lane| {
            let is_going_on = |entry: &Entry| entry.operation.upgrade().is_some_and(|found| !found.is_over());
            lane.entries.retain(is_going_on);
            // Of whom nothing goes on here, nothing waits here.
            let handles: BTreeSet<_> = lane.entries.iter().map(|entry| entry.handle).collect();
            lane.seen.retain(|handle, _| handles.contains(handle));
            !lane.entries.is_empty()
        });
        self.count = self.files.values().map(|lane| lane.entries.len()).sum();
        self.count_max = 2 * self.count + FORGOTTEN_MIN;
    }
}

impl Entrance {
    pub(super) fn open() -> Self {
        let mut traffic = TRAFFIC.lock().unwrap_or_else(PoisonError::into_inner);
        if traffic.process != process::id() {
            *traffic = Traffic::new(process::id());
        }
        Self(traffic)
    }

    /// What of other handles an operation of `handle` has to wait for.
    pub(super) fn ahead_of(&self, operation: &Operation, handle: HandleId) -> Ahead {
        let Some(lane) = self.0.files.get(&operation.footprint.file) else {
            return Ahead { operations: Vec::new(), is_queued: false };
        };
        let seen = lane.seen.get(&handle).copied().unwrap_or_default();
        let is_odd = operation.footprint.is_odd;
        let oldest = if is_odd { seen.all } else { seen.odd };
        let new = &lane.entries[lane.entries.partition_point(|entry| entry.number <= oldest)..];
        let others = new.iter().filter(|entry| entry.handle != handle);
        let wanted = others.filter(|entry| if entry.is_odd { entry.number > seen.odd } else { is_odd });
        let operations = wanted.filter_map(|entry| entry.operation.upgrade());
        let operations = operations.filter(|operation| !operation.is_over()).collect();
        Ahead { operations, is_queued: seen.odd > 0 }
    }

    /// Enters an operation of `handle`, whose queue waits from now on for what was ahead of it if it `is_queued`.
    pub(super) fn enter(mut self, operation: &Arc<Operation>, handle: HandleId, is_queued: bool) {
        let traffic = &mut *self.0;
        if traffic.count == traffic.count_max {
            traffic.forget();
        }
        let lane = traffic.files.entry(operation.footprint.file).or_default();
        let (number, is_odd) = (traffic.number, operation.footprint.is_odd);
        if is_queued {
            let seen = lane.seen.entry(handle).or_default();
            seen.odd = number;
            if is_odd {
                seen.all = number;
            }
        }
        lane.entries.push(Entry { number, handle, is_odd, operation: Arc::downgrade(operation) });
        traffic.number += 1;
        traffic.count += 1;
    }
}
