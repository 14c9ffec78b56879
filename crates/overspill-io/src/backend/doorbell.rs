//! How other threads wake the driver out of its park.
//!
//! Ringing sets a flag and touches the wire only if the flag was down, so a burst of requests costs one wake-up. The
//! driver takes the flag down *before* it looks for work: whatever arrives later rings again, so nothing is missed,
//! and an idle driver sleeps.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;
use rustix::io::Errno;

use super::threads::Event;

/// The driver's doorbell, shared by everybody who may have work for it.
pub(crate) struct Doorbell {
    rung: AtomicBool,
    wire: Wire,
}

/// What the parked driver listens to.
pub(crate) enum Wire {
    /// An eventfd that the ring polls.
    EventFd(OwnedFd),
    /// The channel that the worker threads answer on.
    Channel(Sender<Event>),
}

impl Doorbell {
    pub(crate) fn new(wire: Wire) -> Doorbell {
        Doorbell { rung: AtomicBool::new(false), wire }
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
