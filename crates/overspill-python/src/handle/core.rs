//! The books of a handle: what was asked for and is not yet told, who waits for it, and who counts it.
//!
//! ```text
//! submit ──► prepare: open, cut ──► register: enter the books, queue ──► begin what moves from where it lies
//!                                      │ ▲
//!                                      ▼ │ once that has landed
//!                                   something in the way has yet to land: settle
//! ```
//!
//! An operation enters the books, the crew's queue and what is known to other handles while all of that is locked, so that
//! the order is the same everywhere, and nothing waits for what is behind it. What lands needs Python, so nothing that would
//! have to wait for it is ever queued: its caller waits.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use overspill_io::{Direction, Engine, EngineReport};
use pyo3::prelude::*;

use super::crew::{self, Crew, Job, Load, PIECE_BYTES, Step, Validation};
use super::landing::Landing;
use super::neighbors::{Entrance, HandleId};
use super::operation::Operation;
use super::order::Footprint;
use super::plan::{Route, Way};
use super::{FAREWELL, GLANCE, Order, file};
use crate::border::outside;
use crate::error::Error;

/// An engine, and what was asked of it.
pub(super) struct Core {
    id: HandleId,
    engine: Engine,
    crew: Crew,
    books: Mutex<Vec<Entry>>,
    waiters: AtomicU64,
}

struct Entry {
    promise: Promise,
    claim: Claim,
    /// Whether whoever waits for it counts it.
    counts: bool,
}

/// What a wait that covers an operation waits for.
#[derive(Clone)]
struct Promise {
    operation: Arc<Operation>,
    landing: Option<Arc<Landing>>,
}

/// A call that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiter(u64);

/// Who counts an operation, and takes it out of the books.
#[derive(Clone, Copy, Debug)]
pub(super) enum Claim {
    /// The next wait.
    Nobody,
    /// A wait under way; others wait for it, too.
    Wait(Waiter),
    /// The call that asked for it, which nobody else's wait covers.
    Caller(Waiter),
}

impl Entry {
    fn is_of(&self, waiter: Waiter) -> bool {
        matches!(self.claim, Claim::Wait(other) | Claim::Caller(other) if other == waiter)
    }

    /// Whether `later` must not even be queued before this one has landed.
    fn holds_up(&self, later: &Self) -> bool {
        let (ours, theirs) = (&self.promise.operation.footprint, &later.promise.operation.footprint);
        // Both land for the waits that cover them, which do so in the order of the calls; a call covers only its own.
        let is_in_turn = theirs.lands && !self.is_callers() && !later.is_callers();
        let lands_ahead = self.promise.landing.as_ref().is_some_and(|landing| landing.is_ahead());
        lands_ahead && !is_in_turn && theirs.meets(ours)
    }

    fn is_callers(&self) -> bool {
        matches!(self.claim, Claim::Caller(_))
    }
}

/// An operation that is not in the books yet.
struct Prepared {
    entry: Entry,
    job: Job,
}

/// What became of it.
enum Registered {
    /// It is in the books; these pieces of it, its caller begins.
    Entered(Step, VecDeque<Load>),
    /// Something that it must wait for is to land.
    HeldUp(Prepared),
}

impl Core {
    pub(super) fn new(engine: Engine, threads: usize) -> Self {
        let crew = Crew::new(engine.clone(), threads);
        let (id, books) = (HandleId::next(), Mutex::new(Vec::new()));
        Self { id, engine, crew, books, waiters: AtomicU64::new(0) }
    }

    /// What the engine works with.
    pub(super) fn report(&self) -> EngineReport {
        self.engine.report()
    }

    /// Opens the file and begins; what can be begun here and now is.
    pub(super) fn submit(&self, py: Python<'_>, order: Order, claim: Claim, counts: bool) -> PyResult<()> {
        let mut prepared = outside(py, || self.prepare(order, claim, counts))?;
        loop {
            match self.register(prepared)? {
                Registered::Entered(step, direct) => {
                    return outside(py, || {
                        let begin =
                            |load| crew::begin_direct(&self.engine, step.clone(), load, self.crew.bell());
                        direct.into_iter().for_each(begin);
                        Ok::<_, Error>(())
                    });
                }
                Registered::HeldUp(again) => {
                    self.settle(py, &again.entry.promise.operation.footprint.memory)?;
                    prepared = again;
                }
            }
        }
    }

    fn prepare(&self, order: Order, claim: Claim, counts: bool) -> Result<Prepared, Error> {
        let Order { tensor, name, direction, offset, is_pinned, is_validated, landing } = order;
        let bytes = tensor.len();
        let end = offset.checked_add(bytes as u64).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or_else(|| {
            Error::Argument(format!(
                "file_offset is {offset}, and no file has {bytes} bytes there: give a smaller one"
            ))
        })?;
        let opened = file::open(&self.engine, &name, direction, is_validated)?;
        let (address, alignment) = (tensor.address(), opened.file.alignment());
        let pieces = Route { address, bytes, offset, alignment, is_pinned }.pieces(PIECE_BYTES);
        if pieces.iter().any(|piece| piece.way == Way::Copied) {
            self.crew.prepare_blocks()?;
        }
        let (landing, memory) = landing.unzip();
        let is_aligned = [offset, end].iter().all(|end| end.is_multiple_of(alignment as u64));
        let footprint = Footprint {
            direction,
            file: opened.key,
            file_range: offset..end,
            is_odd: direction == Direction::Write && !is_aligned,
            memory: memory.unwrap_or(address..address + bytes),
            lands: landing.is_some(),
        };
        let operation = Operation::new(footprint, pieces.len() + usize::from(is_validated));
        let loads = pieces.into_iter().map(|piece| Load { piece, part: operation.part() }).collect();
        let validation = opened.witness.map(|witness| {
            let tensor = Arc::clone(&tensor);
            Validation { witness, tensor, offset, part: operation.part() }
        });
        let step = Step { direction, tensor, file: opened.file, offset };
        let job = Job { step, loads, after: Vec::new(), validation };
        let promise = Promise { operation, landing: landing.map(Arc::new) };
        Ok(Prepared { entry: Entry { promise, claim, counts }, job })
    }

    /// Enters an operation in the books and the queue, unless something that it must wait for is to land. With the GIL, so
    /// that a fork finds the locks free.
    fn register(&self, prepared: Prepared) -> Result<Registered, Error> {
        let Prepared { entry, mut job } = prepared;
        let operation = Arc::clone(&entry.promise.operation);
        let mut books = self.books();
        if books.iter().any(|earlier| earlier.holds_up(&entry)) {
            drop(books);
            return Ok(Registered::HeldUp(Prepared { entry, job }));
        }
        let earlier = books.iter().map(|earlier| &earlier.promise.operation);
        let conflicts = |earlier: &&Arc<Operation>| operation.footprint.conflicts_with(&earlier.footprint);
        job.after = earlier.filter(conflicts).filter(|earlier| !earlier.is_over()).cloned().collect();
        let entrance = Entrance::open();
        let ahead = entrance.ahead_of(&operation, self.id);
        job.after.extend(ahead.operations.iter().cloned());
        let waits = !ahead.operations.is_empty() || (ahead.is_queued && self.crew.has_jobs());
        let step = job.step.clone();
        let is_direct = job.after.is_empty() && !waits;
        let direct = if is_direct { take_direct(&mut job) } else { VecDeque::new() };
        let is_queued = !job.loads.is_empty() || job.validation.is_some();
        if let Some(Err(refusal)) = is_queued.then(|| self.crew.queue(job)) {
            // What this drops may run Python.
            drop((entrance, books));
            return Err(refusal);
        }
        for other in ahead.operations {
            let bell = self.crew.bell();
            other.watch(move || bell.ring());
        }
        entrance.enter(&operation, self.id, waits && is_queued);
        books.push(entry);
        Ok(Registered::Entered(step, direct))
    }

    /// Waits for what `waiter` has asked for and, unless that is all, for what is pending; tells what came of it, and
    /// counts what no other wait counts.
    pub(super) fn wait(&self, py: Python<'_>, waiter: Waiter, covers_pending: bool) -> PyResult<usize> {
        let (mut covered, mut count) = (Vec::new(), 0);
        for entry in self.books().iter_mut() {
            match entry.claim {
                Claim::Caller(other) if other != waiter => continue,
                Claim::Nobody | Claim::Wait(_) if !covers_pending => continue,
                Claim::Nobody => entry.claim = Claim::Wait(waiter),
                Claim::Wait(_) | Claim::Caller(_) => {}
            }
            count += usize::from(entry.counts && entry.is_of(waiter));
            covered.push(entry.promise.clone());
        }
        if let Err(raised) = keep(py, &covered) {
            let mut books = self.books();
            let mine = books.iter_mut().filter(|entry| entry.is_of(waiter));
            mine.for_each(|entry| entry.claim = Claim::Nobody);
            return Err(raised);
        }
        drop(self.take_out(|entry| entry.is_of(waiter)));
        match failure(&covered) {
            Some(error) => Err(error.into()),
            None => Ok(count),
        }
    }

    /// Waits until nothing that was asked for is yet to change `memory`. What came of it is told by the wait that covers it.
    pub(super) fn settle(&self, py: Python<'_>, memory: &Range<usize>) -> PyResult<()> {
        let changes = |entry: &Entry| entry.promise.operation.footprint.changes(memory);
        let books = self.books();
        // What lands does so in the order of the calls: nothing may come down later on what has landed here.
        let last = books.iter().rposition(changes).map_or(0, |last| last + 1);
        let wanted =
            books[..last].iter().filter(|entry| changes(entry) || entry.promise.operation.footprint.lands);
        let promises: Vec<_> = wanted.map(|entry| entry.promise.clone()).collect();
        drop(books);
        keep(py, &promises)
    }

    pub(super) fn waiter(&self) -> Waiter {
        Waiter(self.waiters.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits until everything is over or patience is, and stops the engine.
    pub(super) fn close(&self, py: Python<'_>) -> PyResult<()> {
        let deadline = Instant::now() + FAREWELL;
        let stopped = outside(py, || {
            self.crew.close(deadline);
            Ok::<_, Error>(self.engine.shutdown())
        })?;
        let unheard = self.take_out(|entry| matches!(entry.claim, Claim::Nobody));
        let unheard: Vec<_> = unheard.into_iter().map(|entry| entry.promise).collect();
        for promise in unheard.iter().filter(|promise| promise.operation.is_over()) {
            promise.land(py)?;
        }
        match failure(&unheard) {
            Some(error) => Err(error.into()),
            None => stopped.map_err(|error| Error::from(error).into()),
        }
    }

    /// Takes entries out of the books, to be dropped when nothing is locked.
    fn take_out(&self, is_wanted: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let mut books = self.books();
        let (taken, rest) = std::mem::take(&mut *books).into_iter().partition(is_wanted);
        *books = rest;
        taken
    }

    fn books(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promise {
    /// Brings what was read where it is to be, if it is elsewhere.
    fn land(&self, py: Python<'_>) -> PyResult<()> {
        self.landing.as_ref().map_or(Ok(()), |landing| landing.land(py, &self.operation))
    }
}

/// What the caller of a job begins itself.
fn take_direct(job: &mut Job) -> VecDeque<Load> {
    let loads = std::mem::take(&mut job.loads);
    let (direct, copied) = loads.into_iter().partition(|load| load.piece.way == Way::Direct);
    job.loads = copied;
    direct
}

/// Waits until all are over, and what was read has landed, in the order of the calls; ends before for a signal.
fn keep(py: Python<'_>, promises: &[Promise]) -> PyResult<()> {
    while !outside(py, || Ok::<_, Error>(all_over(promises)))? {
        py.check_signals()?;
    }
    promises.iter().try_for_each(|promise| promise.land(py))
}

/// Whether all are over; waits for a short while.
fn all_over(promises: &[Promise]) -> bool {
    let deadline = Instant::now() + GLANCE;
    promises.iter().all(|promise| promise.operation.wait_until(deadline))
}

/// The first failure, and how many more there are. What the system refused comes before what a tensor did.
fn failure(promises: &[Promise]) -> Option<Error> {
    let operations = || promises.iter().map(|promise| &promise.operation);
    let failures = operations().filter_map(|operation| operation.failure());
    let mut failures = failures.chain(operations().filter_map(|operation| operation.refusal()));
    let first = failures.next()?;
    Some(Error::Several { first, more: failures.count() })
}
