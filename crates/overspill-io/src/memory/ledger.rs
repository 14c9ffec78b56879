//! Who waits for which blocks, and who is next.
//!
//! The ledger knows the blocks of a pool by their places and has nothing to do with memory. An order takes the places
//! of all of its blocks under one lock, or none; a place that comes back wakes everybody who waits, for the order that
//! can be served now need not be the one that waits longest. Waiting ends after the caller's patience.

use std::time::{Duration, Instant};

use super::pool::PoolError;
use super::shelves::{Free, Place, Shelves};
use crate::sync::{Condvar, Mutex, lock, wait_for};

/// Which blocks are held, and the waiting for those that are not free.
pub(super) struct Ledger {
    shelves: Shelves,
    state: Mutex<State>,
    returned: Condvar,
}

struct State {
    free: Free,
    waiters: usize,
    waited: Duration,
}

impl Ledger {
    /// A ledger in which every block is free.
    pub(super) fn new(shelves: Shelves) -> Ledger {
        let state = State { free: shelves.all_free(), waiters: 0, waited: Duration::ZERO };
        Ledger { shelves, state: Mutex::new(state), returned: Condvar::new() }
    }

    /// How the blocks are laid out.
    pub(super) fn shelves(&self) -> &Shelves {
        &self.shelves
    }

    /// Takes one place for each entry of `bytes`, all or none, waiting for at most `patience`. Whoever gets them puts
    /// each back once.
    pub(super) fn take(&self, bytes: &[usize], patience: Duration) -> Result<Vec<Place>, PoolError> {
        let order = self.shelves.order(bytes)?;
        // What the pool could not give if everybody returned everything is not worth waiting for.
        let patience = if self.shelves.can_serve(&order) { patience } else { Duration::ZERO };
        let began = Instant::now();
        let mut state = lock(&self.state);
        loop {
            let refusal = match self.shelves.take(&mut state.free, &order) {
                Ok(places) => return Ok(places),
                Err(refusal) => refusal,
            };
            let left = patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(refusal);
            }
            let paused = Instant::now();
            state.waiters += 1;
            state = wait_for(&self.returned, state, left);
            state.waiters -= 1;
            state.waited += paused.elapsed();
        }
    }

    /// Gives a place that was taken to whoever waits for it.
    pub(super) fn put_back(&self, place: Place) {
        let mut state = lock(&self.state);
        state.free.put_back(place);
        let somebody_waits = state.waiters > 0;
        drop(state);
        if somebody_waits {
            self.returned.notify_all();
        }
    }

    /// Number of blocks that are not free.
    pub(super) fn leased(&self) -> usize {
        self.shelves.leased(&lock(&self.state).free)
    }

    /// Total time that callers spent waiting.
    pub(super) fn waited(&self) -> Duration {
        lock(&self.state).waited
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;
    use crate::BlockClass;

    const PATIENCE: Duration = Duration::from_secs(3600);

    /// Blocks that only loom can see the use of: two holders at a time, or one that does not see what the last one
    /// did, fail the model.
    struct Desk {
        ledger: Ledger,
        blocks: Vec<UnsafeCell<()>>,
    }

    impl Desk {
        fn new(count: usize) -> Arc<Desk> {
            let classes = [BlockClass { name: "model", block_bytes: 4096, count }];
            let ledger = Ledger::new(Shelves::lay_out(&classes).unwrap());
            Arc::new(Desk { ledger, blocks: (0..count).map(|_| UnsafeCell::new(())).collect() })
        }

        /// Leases `count` blocks together, uses them and gives them back one by one.
        fn work(&self, count: usize) {
            for place in self.ledger.take(&vec![4096; count], PATIENCE).unwrap() {
                let number = self.ledger.shelves().offset(place, 4096) / 4096;
                self.blocks[number].with_mut(|_block| ());
                self.ledger.put_back(place);
            }
        }
    }

    /// Lets an order of each size come from a thread of its own, and waits until all were served.
    fn contend(blocks: usize, orders: &'static [usize]) {
        loom::model(move || {
            let desk = Desk::new(blocks);
            let workers: Vec<_> = orders
                .iter()
                .map(|&order| {
                    let desk = Arc::clone(&desk);
                    thread::spawn(move || desk.work(order))
                })
                .collect();
            desk.work(1);
            for worker in workers {
                worker.join().unwrap();
            }
            assert_eq!(desk.ledger.leased(), 0);
            assert_eq!(lock(&desk.ledger.state).waiters, 0);
        });
    }

    #[test]
    fn a_block_has_one_holder_at_a_time_and_everybody_gets_it() {
        contend(1, &[1, 1]);
    }

    #[test]
    fn waiters_for_several_blocks_are_never_lost() {
        contend(2, &[2, 1]);
    }

    #[test]
    fn who_can_be_served_does_not_wait_for_one_who_cannot() {
        loom::model(|| {
            let desk = Desk::new(2);
            let held = desk.ledger.take(&[4096, 4096], PATIENCE).unwrap();
            let [both, one] = [2, 1].map(|order| {
                let desk = Arc::clone(&desk);
                thread::spawn(move || desk.work(order))
            });
            desk.ledger.put_back(held[0]);
            // The second block stays away until the order for one has been served.
            one.join().unwrap();
            desk.ledger.put_back(held[1]);
            both.join().unwrap();
        });
    }

    #[test]
    fn two_orders_for_everything_do_not_wait_for_each_other() {
        contend(2, &[2, 2]);
    }
}
