//! Workers that carry transfers out, one at a time each.
//!
//! Transfers wait for them in a channel that is as long as the queue is deep, so nobody blocks on it. An answer goes
//! wherever the backend wants to hear it. The workers end when the crew is dropped, or when nobody hears them.

use std::ops::ControlFlow;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::io::Errno;

use super::{Arrival, Transfer};
use crate::error::Direction;

/// A fixed number of workers.
pub(crate) struct Crew {
    /// Closed on drop, which ends the workers.
    jobs: Option<Sender<Transfer>>,
    workers: Vec<JoinHandle<()>>,
    out: usize,
}

impl Crew {
    /// Starts `workers` threads for at most `depth` transfers at a time. Each answer is given to `report`, which
    /// breaks when nobody is there to hear it.
    pub(crate) fn start(
        workers: usize,
        depth: usize,
        report: impl Fn(Arrival) -> ControlFlow<()> + Clone + Send + 'static,
    ) -> Result<Crew, Errno> {
        let (mut crew, jobs) = Crew::without_workers(depth);
        for number in 0..workers {
            let (jobs, report) = (jobs.clone(), report.clone());
            let builder = thread::Builder::new().name(format!("overspill-io-{number}"));
            let spawned = builder.spawn(move || work(&jobs, report));
            let errno =
                |error: std::io::Error| error.raw_os_error().map_or(Errno::AGAIN, Errno::from_raw_os_error);
            crew.workers.push(spawned.map_err(errno)?);
        }
        Ok(crew)
    }

    /// A crew, and what its workers would take transfers from.
    pub(crate) fn without_workers(depth: usize) -> (Crew, Receiver<Transfer>) {
        let (jobs, next_job) = bounded(depth);
        (Crew { jobs: Some(jobs), workers: Vec::new(), out: 0 }, next_job)
    }

    /// Gives the workers another transfer; no more than the crew's depth are out.
    pub(crate) fn submit(&mut self, transfer: Transfer) {
        self.out += 1;
        let jobs = self.jobs.as_ref().expect("the channel is closed on drop only");
        assert!(jobs.try_send(transfer).is_ok(), "no more transfers are out than the queue is deep");
    }

    /// Counts an answer that was heard.
    pub(crate) fn heard(&mut self) {
        self.out -= 1;
    }
}

impl Drop for Crew {
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

fn work(jobs: &Receiver<Transfer>, report: impl Fn(Arrival) -> ControlFlow<()>) {
    for mut transfer in jobs {
        let result = perform(&mut transfer);
        if report(Arrival { transfer, result }).is_break() {
            return;
        }
    }
}

/// One system call, answered as io_uring would.
///
/// A transfer is one contiguous piece of memory, for which the vectored calls do the same with one more step.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{Bed, CHUNK};

    #[test]
    fn what_nobody_would_hear_of_is_not_carried_out() {
        let bed = Bed::new(2);
        let (mut crew, jobs) = Crew::without_workers(2);
        crew.submit(bed.transfer(Direction::Write, 0));
        crew.submit(bed.transfer(Direction::Write, CHUNK as u64));
        drop(crew);
        work(&jobs, |_arrival| ControlFlow::Break(()));
        assert_eq!(bed.file.len().unwrap(), CHUNK as u64, "the second write came after the end");
        drop(jobs);
        assert_eq!(bed.pool.leased_blocks(), 0);
    }
}
