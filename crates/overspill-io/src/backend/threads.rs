//! Threads that read and write at positions: works wherever files do.
//!
//! Transfers go to the workers over one channel and come back over another; the doorbell rings on that other one, so
//! the driver parks in a single place. Both channels are as long as the queue is deep, so nobody blocks on them.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::Errno;

use super::doorbell::{Doorbell, Wire};
use super::{Arrival, Backend, BackendKind, Transfer};
use crate::error::Direction;

/// What a parked driver wakes up to.
pub(crate) enum Event {
    /// A worker has finished.
    Arrived(Arrival),
    /// The doorbell rang.
    Wake,
}

/// A fixed number of workers.
pub(crate) struct Threads {
    /// Closed on drop, which ends the workers.
    jobs: Option<Sender<Transfer>>,
    events: Receiver<Event>,
    doorbell: Arc<Doorbell>,
    workers: Vec<JoinHandle<()>>,
    out: usize,
}

impl Threads {
    /// Starts `workers` threads for at most `depth` transfers at a time.
    pub(crate) fn start(workers: usize, depth: usize) -> Result<Threads, Errno> {
        let (mut threads, next_job, done) = Threads::without_workers(depth);
        for number in 0..workers {
            let (next_job, done) = (next_job.clone(), done.clone());
            let builder = thread::Builder::new().name(format!("overspill-io-{number}"));
            let spawned = builder.spawn(move || work(&next_job, &done));
            let errno =
                |error: std::io::Error| error.raw_os_error().map_or(Errno::AGAIN, Errno::from_raw_os_error);
            threads.workers.push(spawned.map_err(errno)?);
        }
        Ok(threads)
    }

    /// The driver's ends of the channels, and the workers' ends.
    pub(crate) fn without_workers(depth: usize) -> (Threads, Receiver<Transfer>, Sender<Event>) {
        let (jobs, next_job) = bounded(depth);
        // Room for the doorbell beside every transfer.
        let (done, events) = bounded(depth + 1);
        let doorbell = Arc::new(Doorbell::new(Wire::Channel(done.clone())));
        (Threads { jobs: Some(jobs), events, doorbell, workers: Vec::new(), out: 0 }, next_job, done)
    }

    fn take(&mut self, event: Event, arrivals: &mut Vec<Arrival>) {
        if let Event::Arrived(arrival) = event {
            self.out -= 1;
            arrivals.push(arrival);
        }
    }
}

impl Backend for Threads {
    fn kind(&self) -> BackendKind {
        BackendKind::Threads
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    fn submit(&mut self, transfer: Transfer) {
        self.out += 1;
        let jobs = self.jobs.as_ref().expect("the channel is closed on drop only");
        assert!(jobs.try_send(transfer).is_ok(), "no more transfers are out than the queue is deep");
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

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        // A worker that hangs in the kernel keeps its transfer, and is left alone with it.
        if self.out == 0 {
            for worker in self.workers.drain(..) {
                let ended = worker.join();
                debug_assert!(ended.is_ok(), "a worker has nothing to panic about");
            }
        }
    }
}

fn work(jobs: &Receiver<Transfer>, done: &Sender<Event>) {
    for mut transfer in jobs {
        let result = perform(&mut transfer);
        if done.send(Event::Arrived(Arrival { transfer, result })).is_err() {
            return;
        }
    }
}

/// One system call, answered as io_uring would.
fn perform(transfer: &mut Transfer) -> i32 {
    let (position, done) = (transfer.position(), transfer.chunk.done);
    let moved = match transfer.direction {
        Direction::Read => rustix::io::pread(&transfer.file, &mut transfer.block[done..], position),
        Direction::Write => rustix::io::pwrite(&transfer.file, &transfer.block[done..], position),
    };
    match moved {
        Ok(moved) => i32::try_from(moved).expect("a chunk is shorter than 2 GiB"),
        Err(errno) => -errno.raw_os_error(),
    }
}
