//! How other threads wake the driver out of its park.
//!
//! Ringing sets a flag and touches the wire only if the flag was down, so a burst of requests costs one wake-up. The
//! driver takes the flag down *before* it looks for work: whatever arrives later rings again, so nothing is missed,
//! and an idle driver sleeps.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;
use rustix::io::Errno;

#[cfg(feature = "sim")]
use super::power::Power;
use super::threads::Event;
use crate::sync::AtomicBool;

/// The driver's doorbell, shared by everybody who may have work for it.
pub(crate) struct Doorbell {
    rung: AtomicBool,
    wire: Wire,
    /// What the engine's device runs on, if that can go.
    #[cfg(feature = "sim")]
    power: Option<Power>,
}

/// What the parked driver listens to.
pub(crate) enum Wire {
    /// An eventfd that the ring polls.
    EventFd(OwnedFd),
    /// The channel that the worker threads answer on.
    Channel(Sender<Event>),
    /// What stands for both in a model: it stays pulled until somebody has heard it.
    #[cfg(all(test, loom))]
    Model(loom_models::Pull),
}

impl Doorbell {
    pub(crate) fn new(wire: Wire) -> Doorbell {
        Doorbell {
            rung: AtomicBool::new(false),
            wire,
            #[cfg(feature = "sim")]
            power: None,
        }
    }

    /// The doorbell of an engine whose device may lose its power.
    #[cfg(feature = "sim")]
    pub(crate) fn powered(wire: Wire, power: Option<Power>) -> Doorbell {
        Doorbell { power, ..Doorbell::new(wire) }
    }

    #[cfg(feature = "sim")]
    pub(crate) fn power(&self) -> Option<&Power> {
        self.power.as_ref()
    }

    /// Wakes the driver, now or when it parks next.
    pub(crate) fn ring(&self) {
        if self.rung.swap(true, Ordering::AcqRel) {
            return;
        }
        match &self.wire {
            Wire::EventFd(fd) => while rustix::io::write(fd, &1_u64.to_ne_bytes()) == Err(Errno::INTR) {},
            // A full channel has something for the driver to wake up to already.
            Wire::Channel(sender) => drop(sender.try_send(Event::Wake)),
            #[cfg(all(test, loom))]
            Wire::Model(pull) => pull.pull(),
        }
    }

    /// Takes the flag down; says whether it was up.
    pub(crate) fn answer(&self) -> bool {
        self.rung.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn wire(&self) -> &Wire {
        &self.wire
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell").field("rung", &self.rung).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_rings_is_one_wake_up() {
        let (sender, receiver) = crossbeam_channel::bounded(8);
        let bell = Doorbell::new(Wire::Channel(sender));
        bell.ring();
        bell.ring();
        assert_eq!(receiver.len(), 1);
        assert!(bell.answer() && !bell.answer());
        bell.ring();
        assert_eq!(receiver.len(), 2);
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;
    use crate::sync::{Condvar, Mutex, lock, wait};

    /// An eventfd, or a channel with one place for the doorbell.
    pub(crate) struct Pull {
        pulled: Mutex<bool>,
        heard: Condvar,
    }

    impl Pull {
        fn new() -> Pull {
            Pull { pulled: Mutex::new(false), heard: Condvar::new() }
        }

        pub(super) fn pull(&self) {
            *lock(&self.pulled) = true;
            self.heard.notify_one();
        }

        /// Sleeps until it is pulled, and lets it go.
        fn park(&self) {
            let mut pulled = lock(&self.pulled);
            while !*pulled {
                pulled = wait(&self.heard, pulled);
            }
            *pulled = false;
        }
    }

    /// Callers that leave work and ring, and a driver that sleeps whenever it finds none.
    fn drive(callers: usize, requests: usize) {
        loom::model(move || {
            let bell = Arc::new(Doorbell::new(Wire::Model(Pull::new())));
            // Relaxed: only the bell makes the driver see what was left before it rang.
            let left = Arc::new(AtomicUsize::new(0));
            let callers_at_work: Vec<_> = (0..callers)
                .map(|_| {
                    let (bell, left) = (Arc::clone(&bell), Arc::clone(&left));
                    thread::spawn(move || {
                        for _ in 0..requests {
                            left.fetch_add(1, Ordering::Relaxed);
                            bell.ring();
                        }
                    })
                })
                .collect();
            while {
                bell.answer();
                left.load(Ordering::Relaxed) < callers * requests
            } {
                let Wire::Model(pull) = bell.wire() else { unreachable!("it was made so") };
                pull.park();
            }
            for caller in callers_at_work {
                caller.join().unwrap();
            }
        });
    }

    #[test]
    fn a_driver_that_sleeps_is_woken_by_every_caller() {
        drive(2, 1);
    }

    #[test]
    fn a_ring_between_the_answer_and_the_park_is_not_lost() {
        drive(1, 3);
    }
}
