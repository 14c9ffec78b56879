//! One read or write of a tensor, from the call that asks for it to the wait that covers it.
//!
//! It is cut into [`Part`]s that travel by themselves, its validation being the last; it is over when all of them have
//! answered, and a part that is dropped has. The first failure is kept for every wait that covers it. Nothing here waits
//! without a bound: whoever waits looks for signals in between, or is called when it is over.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use overspill_io::IoError;

use super::order::Footprint;
use crate::error::Error;

/// What was asked for, and what has come of it.
pub(super) struct Operation {
    pub(super) footprint: Footprint,
    state: Mutex<State>,
    over: Condvar,
}

type Watcher = Box<dyn FnOnce() + Send>;

struct State {
    watchers: Vec<Watcher>,
    /// Parts that have not answered.
    missing: usize,
    failure: Option<Arc<Error>>,
    /// Why what was read has not landed.
    refusal: Option<Arc<Error>>,
}

impl Operation {
    /// An operation of `parts` parts, each of which is to be made by [`Operation::part`].
    pub(super) fn new(footprint: Footprint, parts: usize) -> Arc<Self> {
        let state = Mutex::new(State { watchers: Vec::new(), missing: parts, failure: None, refusal: None });
        Arc::new(Self { footprint, state, over: Condvar::new() })
    }

    pub(super) fn part(self: &Arc<Self>) -> Part {
        Part(Some(Arc::clone(self)))
    }

    pub(super) fn is_over(&self) -> bool {
        self.lock().missing == 0
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// What went wrong first, if anything did; known once it is over.
    pub(super) fn failure(&self) -> Option<Arc<Error>> {
        self.lock().failure.clone()
    }

    /// Waits until it is over, until `deadline` at most; says whether it is.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        while state.missing > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            state = self.over.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Calls `watcher` once it is over, with nothing locked here.
    pub(super) fn watch(&self, watcher: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.missing > 0 {
            return state.watchers.push(Box::new(watcher));
        }
        drop(state);
        watcher();
    }

    /// Once it is over: what it has read cannot be brought where it is to be.
    pub(super) fn refuse(&self, refusal: Error) {
        self.lock().refusal.get_or_insert_with(|| Arc::new(refusal));
    }

    /// Why what it has read is not where it is to be, though it was read.
    pub(super) fn refusal(&self) -> Option<Arc<Error>> {
        self.lock().refusal.clone()
    }

    fn answer(&self, answer: Result<(), Error>) {
        let mut state = self.lock();
        if let Err(error) = answer {
            state.failure.get_or_insert_with(|| Arc::new(error));
        }
        state.missing -= 1;
        if state.missing == 0 {
            let watchers = std::mem::take(&mut state.watchers);
            drop(state);
            self.over.notify_all();
            watchers.into_iter().for_each(|watcher| watcher());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The obligation to answer for one part.
pub(super) struct Part(Option<Arc<Operation>>);

impl Part {
    pub(super) fn answer(mut self, answer: Result<(), Error>) {
        if let Some(operation) = self.0.take() {
            operation.answer(answer);
        }
    }

    /// Whether all other parts have answered.
    pub(super) fn is_last(&self) -> bool {
        self.0.as_ref().is_some_and(|operation| operation.lock().missing == 1)
    }

    /// Whether another part has failed, so that this one need not begin.
    pub(super) fn is_pointless(&self) -> bool {
        self.0.as_ref().is_some_and(|operation| operation.has_failed())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(operation) = self.0.take() {
            operation.answer(Err(IoError::EngineStopped.into()));
        }
    }
}
