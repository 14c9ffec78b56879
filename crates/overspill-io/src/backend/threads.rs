//! Threads that read and write at positions: works wherever files do.
//!
//! The crew's answers come back over a channel, and the doorbell rings on it too, so the driver parks in a single
//! place. The channel is as long as the queue is deep, so nobody blocks on it.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::Errno;

use super::crew::Crew;
use super::doorbell::{Doorbell, Wire};
use super::{Arrival, Backend, BackendKind, Transfer};

/// What a parked driver wakes up to.
pub(crate) enum Event {
    /// A worker has finished.
    Arrived(Arrival),
    /// The doorbell rang.
    Wake,
}

/// A crew and nothing else.
pub(crate) struct Threads {
    /// Dropped before the crew, which takes nothing more on when nobody hears it.
    events: Receiver<Event>,
    crew: Crew,
    doorbell: Arc<Doorbell>,
}

impl Threads {
    /// Starts `workers` threads for at most `depth` transfers at a time.
    pub(crate) fn start(workers: usize, depth: usize) -> Result<Threads, Errno> {
        let (done, events, doorbell) = channel(depth);
        let report = move |arrival| match done.send(Event::Arrived(arrival)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_nobody) => ControlFlow::Break(()),
        };
        Ok(Threads { events, crew: Crew::start(workers, depth, report)?, doorbell })
    }

    /// The driver's ends of the channels, and the workers' ends.
    #[cfg(test)]
    pub(crate) fn without_workers(depth: usize) -> (Threads, Receiver<Transfer>, Sender<Event>) {
        let (crew, next_job) = Crew::without_workers(depth);
        let (done, events, doorbell) = channel(depth);
        (Threads { events, crew, doorbell }, next_job, done)
    }

    fn take(&mut self, event: Event, arrivals: &mut Vec<Arrival>) {
        if let Event::Arrived(arrival) = event {
            self.crew.heard();
            arrivals.push(arrival);
        }
    }
}

/// Where answers go in and come out, and the doorbell that rings on it.
fn channel(depth: usize) -> (Sender<Event>, Receiver<Event>, Arc<Doorbell>) {
    // Room for the doorbell beside every transfer.
    let (done, events) = bounded(depth + 1);
    let doorbell = Arc::new(Doorbell::new(Wire::Channel(done.clone())));
    (done, events, doorbell)
}

impl Backend for Threads {
    fn kind(&self) -> BackendKind {
        BackendKind::Threads
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    fn submit(&mut self, transfer: Transfer) {
        self.crew.submit(transfer);
    }

    fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        let first = match deadline {
            Some(deadline) => self.events.recv_deadline(deadline).ok(),
            None => self.events.recv().ok(),
        };
        if let Some(event) = first {
            self.take(event, arrivals);
        }
        while let Ok(event) = self.events.try_recv() {
            self.take(event, arrivals);
        }
        Ok(())
    }

    fn tidy(&mut self) {}
}
