//! What all handles of the process do to a file at a time.
//!
//! A write whose ends are not aligned changes more of its file than its own bytes, for a moment, and sets the file's length.
//! The engine of its handle keeps the file to it meanwhile, but knows nothing of other engines. So such a write begins when
//! everything that other handles were asked for in that file before is over, and what they are asked for after it waits for
//! it. Other processes are not known here.
//!
//! Nobody waits in a circle: an operation enters here and in its handle's queue at the same time, and waits for earlier ones
//! only. The lock is taken by whoever has the GIL, so a fork finds it free, and forgets what its parent was doing.

use std::collections::BTreeMap;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::operation::Operation;
use super::order::FileKey;

/// What is over is forgotten when there is twice as much as was left the last time, and this.
const FORGOTTEN_MIN: usize = 64;

static TRAFFIC: Mutex<Traffic> =
    Mutex::new(Traffic { process: 0, files: BTreeMap::new(), count: 0, count_max: FORGOTTEN_MIN });

/// One of the handles of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HandleId(u64);

impl HandleId {
    pub(super) fn next() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

struct Traffic {
    process: u32,
    files: BTreeMap<FileKey, Vec<Entry>>,
    count: usize,
    count_max: usize,
}

struct Entry {
    handle: HandleId,
    operation: Weak<Operation>,
}

/// Keeps everybody else from entering.
pub(super) struct Entrance(MutexGuard<'static, Traffic>);

impl Entrance {
    pub(super) fn open() -> Self {
        let mut traffic = TRAFFIC.lock().unwrap_or_else(PoisonError::into_inner);
        let process = process::id();
        if traffic.process != process {
            *traffic = Traffic { process, files: BTreeMap::new(), count: 0, count_max: FORGOTTEN_MIN };
        }
        Self(traffic)
    }

    /// Those of other handles that an operation of `handle` has to wait for.
    pub(super) fn ahead_of(&self, operation: &Operation, handle: HandleId) -> Vec<Arc<Operation>> {
        let footprint = &operation.footprint;
        let others = self.0.files.get(&footprint.file).into_iter().flatten();
        let others = others.filter(|entry| entry.handle != handle);
        let others = others.filter_map(|entry| entry.operation.upgrade());
        others.filter(|other| (footprint.is_odd || other.footprint.is_odd) && !other.is_over()).collect()
    }

    pub(super) fn enter(mut self, operation: &Arc<Operation>, handle: HandleId) {
        if self.0.count == self.0.count_max {
            self.forget();
        }
        let entry = Entry { handle, operation: Arc::downgrade(operation) };
        self.0.files.entry(operation.footprint.file).or_default().push(entry);
        self.0.count += 1;
    }

    fn forget(&mut self) {
        let traffic = &mut *self.0;
        traffic.files.retain(|_, entries| {
            entries.retain(|entry| entry.operation.upgrade().is_some_and(|operation| !operation.is_over()));
            !entries.is_empty()
        });
        traffic.count = traffic.files.values().map(Vec::len).sum();
        traffic.count_max = 2 * traffic.count + FORGOTTEN_MIN;
    }
}
