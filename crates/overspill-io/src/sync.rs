//! Locks that outlive the panic of a holder.
//!
//! Locks and condition variables come from here, so that a build of the tests with `--cfg loom` can put loom's in their
//! place, which try every order in which threads can meet. Nothing else changes: the models, `loom_models` in the files
//! of what they are about, run the very code that runs elsewhere.

#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool};

#[cfg(all(test, loom))]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool};

use std::sync::PoisonError;
use std::time::Duration;

/// Locks `mutex`, whether or not a holder panicked.
///
/// What the locks of this crate guard is sound at every point of a change: totals, hands of a clock, a cell that is
/// filled or not, and the free list of a pool, which a block leaves before its lease exists and enters after its
/// lease is gone. So the worst that half a change leaves behind is a total that is off, or a block that nobody gets
/// any more; no byte ever has two owners. To fail instead would strike those who only want to hand a block back or
/// to hear an answer, often in a `drop`, where a second panic ends the process. The same holds for the engine's
/// intake, and for what condition variables lock again.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives `guard` up until `condition` is signaled, or for no reason at all: the caller looks again.
pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Like [`wait`], for `left` at most. A model never runs out of patience, so whoever is not woken there hangs, and is
/// found.
pub(crate) fn wait_for<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    left: Duration,
) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_panic_of_one_holder_is_not_the_panic_of_the_next() {
        let total = Mutex::new(1);
        let panicked = thread::scope(|scope| {
            scope
                .spawn(|| {
                    *lock(&total) += 1;
                    let _held = lock(&total);
                    panic!("while it holds the lock");
                })
                .join()
        });
        assert!(panicked.is_err() && total.is_poisoned());
        assert_eq!(*lock(&total), 2);
    }
}
