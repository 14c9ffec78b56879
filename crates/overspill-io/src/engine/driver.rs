//! The thread that owns the backend.
//!
//! One turn of its loop: take what callers sent, issue chunks while the queue gives any, park until something comes
//! back, settle what came. With nothing to do it sleeps in the kernel. It ends when the intake is closed and the last
//! operation is over, or, after the drain patience, without those that are not.
//!
//! However it ends, also by a panic, nobody is left waiting: the operations it has taken are answered or dropped, which
//! answers too, and a [`Refusal`] answers those that it has not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use rustix::io::Errno;

use super::chunk::Way;
use super::completion::classify;
use super::detour::{Answered, Bounces, Detour, Turn};
use super::gate::Gate;
use super::op::{Op, Whole};
use super::queue::{Queue, Step, Verdict};
use super::stats::Stats;
use crate::backend::{Arrival, Backend, Transfer};
use crate::error::IoError;

pub(crate) struct Driver {
    backend: Box<dyn Backend>,
    intake: Receiver<Op>,
    gate: Gate<Op>,
    queue: Queue<Op>,
    bounces: Bounces,
    stats: Arc<Stats>,
    drain_patience: Duration,
}

/// Whether callers can still send operations.
#[derive(Clone, Copy)]
enum Intake {
    Open,
    /// No, and what is left has until then; without end if the patience goes beyond what clocks can say.
    Closed {
        drained_by: Option<Instant>,
    },
}

impl Driver {
    pub(crate) fn new(
        backend: Box<dyn Backend>,
        intake: Receiver<Op>,
        queue: Queue<Op>,
        stats: Arc<Stats>,
        drain_patience: Duration,
    ) -> Driver {
        let (gate, bounces) = (Gate::new(), Bounces::new());
        Driver { backend, intake, gate, queue, bounces, stats, drain_patience }
    }

    /// Drives until everybody is answered. If it ends early, the rest is refused until the intake is closed.
    pub(crate) fn run(self) -> Result<(), IoError> {
        let _refusal = Refusal(self.intake.clone());
        self.drive()
    }

    fn drive(mut self) -> Result<(), IoError> {
        let mut intake = Intake::Open;
        let mut arrivals = Vec::new();
        loop {
            if self.backend.doorbell().answer() {
                self.backend.tidy();
            }
            if matches!(intake, Intake::Open) {
                intake = self.accept();
            }
            // Looked at before anything is issued: what never went to the kernel can go back to its caller.
            let deadline = match intake {
                Intake::Open => None,
                Intake::Closed { .. } if self.queue.is_empty() => return Ok(()),
                Intake::Closed { drained_by: Some(passed) } if passed <= Instant::now() => {
                    return self.give_up(|patience, leaked_blocks| IoError::DrainTimeout {
                        patience,
                        leaked_blocks,
                    });
                }
                Intake::Closed { drained_by } => drained_by,
            };
            self.issue();
            let parked = self.backend.park(deadline, &mut arrivals);
            // What came back before the backend broke is as good as ever.
            for arrival in arrivals.drain(..) {
                self.settle(arrival);
            }
            if let Err(errno) = parked {
                return self.broken(errno);
            }
        }
    }

    /// Queues what callers sent.
    fn accept(&mut self) -> Intake {
        loop {
            match self.intake.try_recv() {
                Ok(op) => {
                    self.stats.began(op.direction);
                    let (file, access) = (op.file.id(), op.access());
                    if let Some(op) = self.gate.arrive(file, access, op) {
                        self.admit(op);
                    }
                }
                Err(TryRecvError::Empty) => return Intake::Open,
                Err(TryRecvError::Disconnected) => {
                    return Intake::Closed { drained_by: Instant::now().checked_add(self.drain_patience) };
                }
            }
        }
    }

    /// Queues an operation that has its file as it needs it.
    fn admit(&mut self, op: Op) {
        let extent = op.extent();
        self.queue.push(op, extent);
    }

    /// Fills the backend.
    fn issue(&mut self) {
        while let Some((chunk, op)) = self.queue.next() {
            match chunk.way() {
                Way::Straight => {
                    let block = op.issue(chunk.length);
                    let offset = op.offset + chunk.start as u64;
                    let (direction, file) = (op.direction, op.file.clone());
                    self.backend.submit(Transfer { chunk, direction, file, offset, block, detour: None });
                }
                Way::Detour => {
                    let turn = Detour::begin(chunk, op, &mut self.bounces);
                    self.take(turn);
                }
            }
        }
    }

    /// Acts on one answer.
    fn settle(&mut self, arrival: Arrival) {
        let Arrival { transfer: Transfer { chunk, direction, file, offset, block, detour }, result } =
            arrival;
        if let Some(detour) = detour {
            let op = self.queue.payload(detour.chunk());
            let turn = detour.go_on(Answered { carrier: chunk, bounce: block, result }, op);
            return self.take(turn);
        }
        let completion = classify(result, chunk.wanted());
        match self.queue.complete(chunk, completion) {
            Step::Again(chunk) => {
                self.backend.submit(Transfer { chunk, direction, file, offset, block, detour: None });
            }
            Step::Home(chunk, op) => op.home(chunk.start, block),
            Step::Over(chunk, mut op, verdict) => {
                op.home(chunk.start, block);
                self.over(op, verdict);
            }
        }
    }

    /// Takes the next turn of a detour.
    fn take(&mut self, turn: Turn) {
        match turn {
            Turn::Submit(transfer) => self.backend.submit(transfer),
            Turn::Land { chunk, moved, fault } => match self.queue.land(chunk, moved, fault) {
                Step::Over(_, op, verdict) => self.over(op, verdict),
                Step::Home(..) => {}
                Step::Again(_) => unreachable!("what landed is not issued again"),
            },
        }
    }

    /// Answers for an operation, and lets in those that waited for it.
    fn over(&mut self, op: Op, verdict: Verdict) {
        self.stats.ended(op.direction, verdict.done);
        for op in self.gate.leave(op.file.id()) {
            self.admit(op);
        }
        op.finish(verdict);
    }

    /// Ends without the operations that are not over. Those with chunks out lose their blocks: the kernel may touch
    /// them at any time.
    fn give_up(self, error: impl FnOnce(Duration, usize) -> IoError) -> Result<(), IoError> {
        let Driver { backend, gate, queue, stats, drain_patience, .. } = self;
        let mut leaked_blocks = 0;
        for op in queue.abandon().chain(gate.abandon()) {
            stats.ended(op.direction, 0);
            leaked_blocks += usize::from(op.stop() == Whole::Missing);
        }
        stats.leaked(leaked_blocks);
        drop(backend);
        Err(error(drain_patience, leaked_blocks))
    }

    /// Ends because the backend did.
    fn broken(self, errno: Errno) -> Result<(), IoError> {
        let backend = self.backend.kind();
        let errno = errno.raw_os_error();
        self.give_up(|_, _| IoError::Backend { backend, action: "wait for completions", errno })
    }
}

/// Stops, on drop, every operation that is in the intake or still comes, until nobody can send any more.
///
/// Messages outlive the receiver that drops first: without this, a ticket whose operation nobody took would wait for
/// an answer for as long as somebody could send another.
struct Refusal(Receiver<Op>);

impl Drop for Refusal {
    fn drop(&mut self) {
        for op in &self.0 {
            op.stop();
        }
    }
}

#[cfg(test)]
mod tests;
