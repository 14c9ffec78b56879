//! The border between Python and Rust: every call that takes longer than a look goes through [`outside`].

use std::any::Any;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::OnceLock;

use pyo3::prelude::*;

use crate::error::Error;

/// Does `work` with the GIL released. A panic becomes `overspill.InternalError`, and any error its own exception.
pub(crate) fn outside<T, E>(py: Python<'_>, work: impl FnOnce() -> Result<T, E> + Send) -> PyResult<T>
where
    T: Send,
    E: Into<Error> + Send,
{
    // What `work` had borrowed when it panicked is behind locks, which are poisoned then, or dropped with it.
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into().into()),
        Err(panic) => Err(Error::Panic(message(&*panic)).into()),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

/// What is called before anything is computed on all cores: the threads that do that are those of the process that was the
/// first to need them, and a fork of it would wait for them forever.
///
/// # Errors
/// [`Error::ThreadsForked`] in such a fork.
pub(crate) fn computing_threads() -> Result<(), Error> {
    static OWNER: OnceLock<u32> = OnceLock::new();
    let (owner, current) = (*OWNER.get_or_init(process::id), process::id());
    if owner == current { Ok(()) } else { Err(Error::ThreadsForked { owner, current }) }
}

/// What belongs to the process that made it: a fork has none of its threads, and must not close its files either.
#[derive(Debug)]
pub(crate) struct Owned<T> {
    process: u32,
    /// `None` once it is dropped.
    value: Option<ManuallyDrop<T>>,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { process: process::id(), value: Some(ManuallyDrop::new(value)) }
    }

    /// # Errors
    /// [`Error::Forked`] in any other process than the one that made it.
    pub(crate) fn get(&self) -> Result<&T, Error> {
        self.check()?;
        Ok(self.value.as_ref().expect("it is there until it is dropped"))
    }

    fn check(&self) -> Result<(), Error> {
        let current = process::id();
        if current == self.process { Ok(()) } else { Err(Error::Forked { owner: self.process, current }) }
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // In a fork, dropping would wait for threads that do not exist.
        if self.check().is_ok() {
            drop(self.value.take().map(ManuallyDrop::into_inner));
        }
    }
}
