//! The last step of a read into memory that no device can reach: its bytes are copied to their tensor.
//!
//! Whoever waits for the read does it, with the GIL, once; others that wait for it wait for that, too. What a tensor
//! refuses is told by the waits that cover its operation. An interrupted copy is left for the next wait. A tensor's own
//! `copy_` may use this handle and others; a thread that copies waits for no other thread's copy, or two of them might wait
//! for each other.

use std::cell::Cell;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyException;
use pyo3::prelude::*;

use super::GLANCE;
use super::operation::Operation;
use crate::argument::shown;
use crate::border::outside;
use crate::error::Error;

thread_local! {
    /// Whether this thread is copying.
    static COPIES: Cell<bool> = const { Cell::new(false) };
}

/// Where bytes go at last, and where they are.
pub(super) struct Landing {
    target: Py<PyAny>,
    host: Py<PyAny>,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Due,
    Underway,
    Over,
}

impl Landing {
    pub(super) fn new(target: Py<PyAny>, host: Py<PyAny>) -> Self {
        Self { target, host, state: Mutex::new(State::Due), news: Condvar::new() }
    }

    /// Whether it is to be waited for.
    pub(super) fn is_ahead(&self) -> bool {
        match *self.lock() {
            State::Due => true,
            State::Underway => !COPIES.get(),
            State::Over => false,
        }
    }

    /// Brings what `operation` has read where it is to be, or waits until somebody else has.
    ///
    /// # Errors
    /// What interrupts it: what a signal handler raises, or anything else that is not for programs to handle.
    pub(super) fn land(&self, py: Python<'_>, operation: &Operation) -> PyResult<()> {
        while self.is_ahead() {
            if self.begin() {
                let copied = self.copy(py, operation);
                self.end(if copied.is_ok() { State::Over } else { State::Due });
                return copied;
            }
            outside(py, || self.glance())?;
            py.check_signals()?;
        }
        Ok(())
    }

    fn copy(&self, py: Python<'_>, operation: &Operation) -> PyResult<()> {
        if operation.failure().is_some() {
            return Ok(());
        }
        let outer = COPIES.replace(true);
        let copied = self.target.call_method1(py, "copy_", (&self.host,));
        COPIES.set(outer);
        match copied {
            Err(error) if error.is_instance_of::<PyException>(py) => {
                let reason = shown(error.value(py));
                let message = format!("what was read cannot be copied to its tensor as it is now: {reason}");
                operation.refuse(Error::State(message));
                Ok(())
            }
            copied => copied.map(drop),
        }
    }

    /// Whether it is this thread's to do from now on.
    fn begin(&self) -> bool {
        let mut state = self.lock();
        let is_due = *state == State::Due;
        if is_due {
            *state = State::Underway;
        }
        is_due
    }

    fn end(&self, ended: State) {
        *self.lock() = ended;
        self.news.notify_all();
    }

    /// Waits for another thread's copy, for a short while.
    fn glance(&self) -> Result<(), Error> {
        let state = self.lock();
        if *state == State::Underway {
            drop(self.news.wait_timeout(state, GLANCE));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
