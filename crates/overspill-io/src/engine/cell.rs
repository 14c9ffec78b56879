//! The place where an answer waits for the one who asked.
//!
//! A [`Cell`] is filled once; what is filled in later is dropped. Whoever asked takes the answer, waiting for it if it
//! is not there yet, or closes the cell; then the answer is dropped wherever it arrives, never under the cell's lock,
//! for it may own memory whose return takes locks of its own. It ends with the last of its two owners, the ticket and
//! the promise.

use std::mem;
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, lock, wait};

/// One answer, on its way from one thread to another.
pub(super) struct Cell<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
}

enum State<T> {
    Owed,
    Filled(T),
    /// The answer was taken, or nobody wants it.
    Closed,
}

impl<T> Cell<T> {
    /// A cell whose answer is owed.
    pub(super) fn new() -> Cell<T> {
        Cell { state: Mutex::new(State::Owed), filled: Condvar::new() }
    }

    /// Puts the answer in, unless there was one before or nobody wants it.
    pub(super) fn fill(&self, answer: T) {
        let mut state = lock(&self.state);
        if matches!(*state, State::Owed) {
            *state = State::Filled(answer);
            self.filled.notify_all();
        } else {
            drop(state);
            drop(answer);
        }
    }

    /// Waits for the answer and takes it out; also says how long that took. May be called once.
    pub(super) fn take(&self) -> (T, Duration) {
        let mut waited = Duration::ZERO;
        let mut state = lock(&self.state);
        if matches!(*state, State::Owed) {
            let began = Instant::now();
            while matches!(*state, State::Owed) {
                state = wait(&self.filled, state);
            }
            waited = began.elapsed();
        }
        match mem::replace(&mut *state, State::Closed) {
            State::Filled(answer) => (answer, waited),
            State::Owed | State::Closed => unreachable!("an answer is taken once, after it came"),
        }
    }

    /// Whether [`Cell::take`] would return at once.
    pub(super) fn is_filled(&self) -> bool {
        !matches!(*lock(&self.state), State::Owed)
    }

    /// Gives the answer up, whether it is there or yet to come.
    pub(super) fn close(&self) {
        // The answer may hold the last part of a lease, whose drop takes the pool's lock: not under this one.
        let abandoned = mem::replace(&mut *lock(&self.state), State::Closed);
        drop(abandoned);
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    use super::*;

    /// An answer that counts how often it is dropped, and can be lost only as memory that loom misses.
    struct Answer {
        number: u32,
        drops: Arc<AtomicUsize>,
    }

    impl Drop for Answer {
        fn drop(&mut self) {
            self.drops.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn cell() -> (Arc<Cell<Answer>>, impl Fn(u32) -> Answer, Arc<AtomicUsize>) {
        let drops = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&drops);
        (Arc::new(Cell::new()), move |number| Answer { number, drops: Arc::clone(&counted) }, drops)
    }

    #[test]
    fn an_answer_is_delivered_once_whoever_comes_first() {
        loom::model(|| {
            let (cell, answer, drops) = cell();
            let filler = {
                let cell = Arc::clone(&cell);
                // As a promise does: it keeps its word, and its drop finds that it has.
                thread::spawn(move || {
                    cell.fill(answer(1));
                    cell.fill(answer(2));
                })
            };
            let (taken, _waited) = cell.take();
            assert_eq!(taken.number, 1);
            drop(taken);
            filler.join().unwrap();
            assert_eq!(drops.load(Ordering::Relaxed), 2);
        });
    }

    #[test]
    fn one_answer_is_enough_to_wake_the_waiter() {
        loom::model(|| {
            let (cell, answer, _drops) = cell();
            let filler = {
                let cell = Arc::clone(&cell);
                thread::spawn(move || cell.fill(answer(1)))
            };
            assert_eq!(cell.take().0.number, 1);
            filler.join().unwrap();
        });
    }

    #[test]
    fn a_cell_that_says_it_is_filled_is_taken_from_without_waiting() {
        loom::model(|| {
            let (cell, answer, _drops) = cell();
            let filler = {
                let cell = Arc::clone(&cell);
                thread::spawn(move || cell.fill(answer(1)))
            };
            if cell.is_filled() {
                let (taken, waited) = cell.take();
                assert_eq!((taken.number, waited), (1, Duration::ZERO));
            } else {
                cell.close();
            }
            filler.join().unwrap();
        });
    }

    #[test]
    fn an_answer_that_is_given_up_at_any_moment_is_dropped_once() {
        loom::model(|| {
            let (cell, answer, drops) = cell();
            let filler = {
                let cell = Arc::clone(&cell);
                thread::spawn(move || cell.fill(answer(1)))
            };
            cell.close();
            filler.join().unwrap();
            assert_eq!(drops.load(Ordering::Relaxed), 1, "while the cell is still there");
        });
    }
}
