//! Linux AIO, by its system calls: for machines and containers that forbid io_uring.
//!
//! A transfer is moved into [`Kernel::flying`] when it is submitted, and taken out by its answer alone. Requests
//! gather in plain memory and go to the kernel together when the driver parks; what the kernel has no room for stays
//! there, and what it refuses is answered at once. The context polls the doorbell's eventfd beside the transfers,
//! which makes one system call the only place to sleep.
//!
//! The kernel starts direct transfers and lets go of the caller; a file that goes through the page cache would hold
//! the driver until its bytes are moved. So those transfers go to a [`Crew`], hired for the first of them, whose
//! answers come over a channel and ring the doorbell. What can still hold the driver is a write that makes a direct
//! file longer, which file systems carry out on the spot: a file that is allocated beforehand is faster.
//!
//! Destroying a context waits for every transfer in it. So it is destroyed only when nothing flies, and otherwise left
//! with all of it, for good; the end of the process waits for it then.

#![expect(unsafe_code, reason = "lends memory to the kernel for the time of a request")]

mod context;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use self::context::{Context, Event, Request};
use super::crew::Crew;
use super::doorbell::{Doorbell, Wire};
use super::{Arrival, Backend, BackendKind, Transfer};
use crate::engine::table::{Slot, Table};

/// Marks the doorbell's event; no slot has this address.
const WAKE: u64 = u64::MAX;
/// Longest sleep while requests wait for room in the kernel that no answer may ever make.
const BACK_OFF: Duration = Duration::from_millis(1);

/// A context for direct files, and a crew for the others.
pub(crate) struct Aio {
    kernel: ManuallyDrop<Kernel>,
    doorbell: Arc<Doorbell>,
    /// Whether the context polls the doorbell, or will when it has taken what waits.
    listening: bool,
    depth: usize,
    workers: usize,
    /// From the first transfer on that needs it.
    hired: Option<Hired>,
    /// What no crew could be hired for.
    turned_away: Vec<Arrival>,
}

/// The context and what it may touch.
struct Kernel {
    context: Context,
    /// Everything the kernel may touch, until it says that it no longer will.
    flying: Table<Transfer>,
    /// Requests that the kernel has not taken, in turn order.
    waiting: VecDeque<Request>,
    /// Room for every answer that can be there at a time.
    events: Vec<Event>,
}

/// A crew at work.
struct Hired {
    /// Dropped before the crew, which takes nothing more on when nobody hears it.
    answers: Receiver<Arrival>,
    crew: Crew,
}

impl Aio {
    /// Makes a context for at most `depth` transfers at a time, and `workers` for files that it does not suit when
    /// there is one. [`Errno::AGAIN`] means the limit of the machine, `fs.aio-max-nr`.
    pub(crate) fn start(depth: usize, workers: usize) -> Result<Aio, Errno> {
        let wire = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let doorbell = Arc::new(Doorbell::new(Wire::EventFd(wire)));
        // Room for the doorbell beside every transfer.
        let room = u32::try_from(depth + 1).map_err(|_| Errno::INVAL)?;
        let context = Context::with_room_for(room)?;
        let (flying, waiting) = (Table::new(), VecDeque::new());
        let kernel = Kernel { context, flying, waiting, events: vec![Event::default(); depth + 1] };
        let kernel = ManuallyDrop::new(kernel);
        let (hired, turned_away) = (None, Vec::new());
        Ok(Aio { kernel, doorbell, listening: false, depth, workers, hired, turned_away })
    }

    /// Gives `transfer` to the crew.
    fn delegate(&mut self, transfer: Transfer) {
        let hired = match self.hired.take().map_or_else(|| self.hire(), Ok) {
            Ok(hired) => self.hired.insert(hired),
            Err(errno) => {
                self.turned_away.push(Arrival { transfer, result: -errno.raw_os_error() });
                return;
            }
        };
        hired.crew.submit(transfer);
    }

    fn hire(&self) -> Result<Hired, Errno> {
        // As long as the queue is deep, so no worker blocks on it.
        let (done, answers) = bounded(self.depth);
        let doorbell = Arc::clone(&self.doorbell);
        let report = move |arrival| match done.send(arrival) {
            Ok(()) => {
                doorbell.ring();
                ControlFlow::Continue(())
            }
            Err(_nobody) => ControlFlow::Break(()),
        };
        Ok(Hired { answers, crew: Crew::start(self.workers, self.depth, report)? })
    }

    /// Takes what came back without the kernel's events.
    fn gather(&mut self, arrivals: &mut Vec<Arrival>) {
        arrivals.append(&mut self.turned_away);
        if let Some(Hired { answers, crew }) = &mut self.hired {
            for arrival in answers.try_iter() {
                crew.heard();
                arrivals.push(arrival);
            }
        }
    }

    /// Polls the doorbell, unless the context does already.
    fn listen(&mut self) {
        if self.listening {
            return;
        }
        let Wire::EventFd(wire) = self.doorbell.wire() else { return };
        self.kernel.waiting.push_back(Request::poll(WAKE, wire.as_fd()));
        self.listening = true;
    }

    /// Sees to it that the next ring is heard.
    fn rearm(&mut self) {
        self.listening = false;
        if let Wire::EventFd(wire) = self.doorbell.wire() {
            // Resets the count; that there is none is no harm.
            let _none = rustix::io::read(wire, &mut [0_u8; 8]);
        }
    }

    /// Sleeps until there is an answer or `deadline` passes, and takes every answer there is. What is in `arrivals`
    /// already, or waits for room in the kernel, keeps it from sleeping for long.
    fn receive(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let patience = match left {
            _ if !arrivals.is_empty() => Some(Duration::ZERO),
            left if self.kernel.waiting.is_empty() => left,
            left => Some(left.map_or(BACK_OFF, |left| left.min(BACK_OFF))),
        };
        match self.kernel.receive(patience, arrivals) {
            Ok(Heard::Ring) => self.rearm(),
            Ok(Heard::Nothing) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }
}

impl Backend for Aio {
    fn kind(&self) -> BackendKind {
        BackendKind::Aio
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    fn submit(&mut self, transfer: Transfer) {
        if transfer.file.starts_by_waiting() {
            self.delegate(transfer);
        } else {
            self.kernel.submit(transfer);
        }
    }

    fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        self.listen();
        let sent = self.kernel.send(arrivals);
        // A worker that finds the doorbell rung does not ring again, so its answer is looked for before sleeping.
        self.gather(arrivals);
        let deadline = if sent.is_ok() { deadline } else { Some(Instant::now()) };
        let received = self.receive(deadline, arrivals);
        self.gather(arrivals);
        sent.and(received)
    }

    fn tidy(&mut self) {}
}

impl Drop for Aio {
    fn drop(&mut self) {
        if self.kernel.flying.is_empty() {
            // SAFETY: the field is not used after its drop. Nothing flies, so its context waits for nothing, and
            // the kernel holds no memory of ours.
            unsafe { ManuallyDrop::drop(&mut self.kernel) };
        }
    }
}

/// Whether the doorbell rang.
enum Heard {
    Ring,
    Nothing,
}

impl Kernel {
    fn submit(&mut self, transfer: Transfer) {
        let slot = self.flying.insert(transfer);
        let transfer = self.flying.get_mut(slot).expect("it was just put there");
        let (position, direction) = (transfer.position(), transfer.direction);
        let Transfer { chunk, file, block, .. } = transfer;
        let bytes = &mut block[chunk.done..];
        self.waiting.push_back(Request::transfer(slot.to_bits(), direction, file.as_fd(), bytes, position));
    }

    /// Sends what waits. Fails if the doorbell cannot be polled: without it nobody could wake the sleeper.
    fn send(&mut self, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        let Kernel { context, flying, waiting, .. } = self;
        let mut polled = Ok(());
        hand_over(
            waiting,
            // SAFETY: a transfer's request names the part of its block that is still to move, which `flying` holds
            // until the event, and `Drop` leaves in place if there is none; the doorbell's names nothing.
            |requests| unsafe { context.submit(requests) },
            |request, errno| match request.tag() {
                WAKE => polled = Err(errno),
                tag => arrivals.push(home(flying, tag, -errno.raw_os_error())),
            },
        );
        polled
    }

    /// Sleeps until there is an answer or `patience` ends, and takes every answer there is. Fails, after that, if the
    /// doorbell cannot be polled.
    fn receive(&mut self, patience: Option<Duration>, arrivals: &mut Vec<Arrival>) -> Result<Heard, Errno> {
        let received = self.context.wait(&mut self.events, patience)?;
        let mut heard = Ok(Heard::Nothing);
        for &Event { tag, result, .. } in &self.events[..received] {
            let result = answer(result);
            match tag {
                WAKE if result < 0 => heard = Err(Errno::from_raw_os_error(-result)),
                WAKE => heard = Ok(Heard::Ring),
                tag => arrivals.push(home(&mut self.flying, tag, result)),
            }
        }
        heard
    }
}

/// The transfer behind `tag`, with its answer.
fn home(flying: &mut Table<Transfer>, tag: u64, result: i32) -> Arrival {
    let transfer = flying.remove(Slot::from_bits(tag)).expect("the kernel answers every request once");
    Arrival { transfer, result }
}

/// An answer in the 32 bits in which io_uring would give it. No transfer is so long that its answer needs more.
fn answer(result: i64) -> i32 {
    i32::try_from(result).unwrap_or(-Errno::IO.raw_os_error())
}

/// Empties `waiting` from the front: what `submit` takes is gone, what it refuses goes to `refuse`. It says how many
/// it took, or why it refused the first. For want of room the rest stays where it is.
fn hand_over<T>(
    waiting: &mut VecDeque<T>,
    mut submit: impl FnMut(&mut [T]) -> Result<usize, Errno>,
    mut refuse: impl FnMut(T, Errno),
) {
    while !waiting.is_empty() {
        match submit(waiting.make_contiguous()) {
            Ok(0) | Err(Errno::AGAIN | Errno::INTR) => return,
            Ok(taken) => drop(waiting.drain(..taken)),
            Err(errno) => {
                let first = waiting.pop_front().expect("it is not empty");
                refuse(first, errno);
            }
        }
    }
}
