//! io_uring: one ring, made, fed and emptied by the thread that owns it.
//!
//! A transfer is moved into [`Ring::flying`] before its entry is pushed, and taken out by its completion alone. The
//! arena is registered in regions, files on first use, so the kernel looks neither up per request; what cannot be
//! registered travels by plain requests. The ring polls the doorbell's eventfd beside the transfers, which makes one
//! system call the only place to sleep.
//!
//! Closing a ring is no barrier: the kernel may go on with what it has. So a ring is closed only when nothing flies,
//! and otherwise left open with all of it, for good.

#![expect(unsafe_code, reason = "lends memory to the kernel for the time of a request")]

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::doorbell::{Doorbell, Wire};
use super::{Arrival, Backend, BackendKind, Transfer};
use crate::Pool;
use crate::engine::table::{Slot, Table};
use crate::error::Direction;
use crate::file::{File, Inner};
use crate::memory::locking::{Locking, limit_advice};

/// The kernel registers no larger buffer.
const REGION_BYTES: usize = 1 << 30;
/// Files that can be registered at a time; further ones are used by their descriptors. The kernel allows no more than
/// the process may open.
const SEATS: u32 = 256;
/// Marks the doorbell's completion; no slot has this address.
const WAKE: u64 = u64::MAX;
/// Pause after the kernel ran short of memory with nothing to reap.
const BACK_OFF: Duration = Duration::from_millis(1);

/// A ring with its registrations.
pub(crate) struct Uring {
    ring: ManuallyDrop<Ring>,
}

struct Ring {
    uring: IoUring,
    /// Everything the kernel may touch, until it says that it no longer will.
    flying: Table<Transfer>,
    regions: Regions,
    seats: Seats,
    doorbell: Arc<Doorbell>,
    /// Whether the ring polls the doorbell now.
    listening: bool,
    /// Keeps the registered arena mapped; dropped after the ring, for fields drop in this order.
    _pool: Pool,
}

impl Uring {
    /// Makes a ring for at most `depth` transfers at a time, and registers the arena of `pool`. What could not be
    /// set up as it should be is told in `notes`.
    pub(crate) fn start(depth: usize, pool: &Pool, notes: &mut Vec<String>) -> Result<Uring, Errno> {
        // Room for the doorbell beside every transfer.
        let entries = u32::try_from(depth + 1).map_err(|_| Errno::INVAL)?;
        let uring = build(entries, notes).map_err(|error| errno_of(&error))?;
        let wire = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let doorbell = Arc::new(Doorbell::new(Wire::EventFd(wire)));
        let seats = Seats::register(&uring, notes);
        let regions = Regions::register(&uring, pool, notes);
        let (flying, pool) = (Table::new(), pool.clone());
        let ring = Ring { uring, flying, regions, seats, doorbell, listening: false, _pool: pool };
        Ok(Uring { ring: ManuallyDrop::new(ring) })
    }
}

impl Backend for Uring {
    fn kind(&self) -> BackendKind {
        BackendKind::Uring
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        &self.ring.doorbell
    }

    fn submit(&mut self, transfer: Transfer) {
        self.ring.submit(transfer);
    }

    fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        self.ring.listen();
        match self.ring.enter(deadline) {
            Ok(()) | Err(Errno::INTR | Errno::TIME) => self.ring.reap(arrivals)?,
            // The kernel has no memory for a request, or no room for its answer, until answers are taken.
            Err(Errno::AGAIN | Errno::BUSY) => {
                self.ring.reap(arrivals)?;
                if arrivals.is_empty() {
                    thread::park_timeout(BACK_OFF);
                }
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    fn tidy(&mut self) {
        let Ring { uring, seats, .. } = &mut *self.ring;
        seats.sweep(uring);
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if !self.ring.flying.is_empty() {
            return;
        }
        // The kernel lets go of a closed ring's registrations some time later: here they end now, so that deleted
        // files free their space and the next ring finds the locked memory available. What was never registered is
        // refused.
        let submitter = self.ring.uring.submitter();
        drop(submitter.unregister_files());
        drop(submitter.unregister_buffers());
        // SAFETY: nothing flies, so the kernel holds no memory of ours; the field is not used after its drop.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
    }
}

impl Ring {
    fn submit(&mut self, transfer: Transfer) {
        let seat = self.seats.of(&transfer.file, &self.uring, &self.doorbell);
        let slot = self.flying.insert(transfer);
        let transfer = self.flying.get_mut(slot).expect("it was just put there");
        let entry = entry(transfer, seat, &self.regions).user_data(slot.to_bits());
        self.push(&entry);
    }

    /// Polls the doorbell, unless the ring does already.
    fn listen(&mut self) {
        if self.listening {
            return;
        }
        let Wire::EventFd(wire) = self.doorbell.wire() else { return };
        let poll = opcode::PollAdd::new(Fd(wire.as_raw_fd()), libc::POLLIN as u32).build();
        self.push(&poll.user_data(WAKE));
        self.listening = true;
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: a transfer's entry points into the block that `flying` holds until the completion, and `Drop`
        // leaves both in place if there is none; the doorbell's entry points to nothing.
        let pushed = unsafe { self.uring.submission().push(entry) };
        assert!(pushed.is_ok(), "the ring has room for the whole depth and the doorbell");
    }

    /// Hands over what was pushed and sleeps until there is an answer or `deadline` passes.
    fn enter(&self, deadline: Option<Instant>) -> Result<(), Errno> {
        let submitter = self.uring.submitter();
        let entered = match deadline {
            None => submitter.submit_and_wait(1),
            Some(deadline) => {
                let left = Timespec::from(deadline.saturating_duration_since(Instant::now()));
                submitter.submit_with_args(1, &SubmitArgs::new().timespec(&left))
            }
        };
        entered.map(drop).map_err(|error| errno_of(&error))
    }

    /// Takes every answer there is. Fails, after that, if the doorbell cannot be polled: without it nobody could
    /// wake the sleeper, and polling again would fail again, at once.
    fn reap(&mut self, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        let mut heard = Ok(());
        for completion in self.uring.completion() {
            if completion.user_data() == WAKE {
                self.listening = false;
                if completion.result() < 0 {
                    heard = Err(Errno::from_raw_os_error(-completion.result()));
                }
                if let Wire::EventFd(wire) = self.doorbell.wire() {
                    // Resets the count; that there is none is no harm.
                    let _none = rustix::io::read(wire, &mut [0_u8; 8]);
                }
                continue;
            }
            let slot = Slot::from_bits(completion.user_data());
            let transfer = self.flying.remove(slot).expect("the kernel answers every request once");
            arrivals.push(Arrival { transfer, result: completion.result() });
        }
        heard
    }
}

/// A ring that only this thread uses and whose completions run when it asks; older kernels get a plain one.
fn build(entries: u32, notes: &mut Vec<String>) -> std::io::Result<IoUring> {
    let tuned = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries);
    match tuned {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            notes.push("io_uring without DEFER_TASKRUN: the kernel is older than 6.1".to_owned());
            IoUring::new(entries)
        }
        other => other,
    }
}

/// The request for what is left of `transfer`.
fn entry(transfer: &mut Transfer, seat: Option<u32>, regions: &Regions) -> squeue::Entry {
    let descriptor = Fd(transfer.file.as_fd().as_raw_fd());
    let (position, direction) = (transfer.position(), transfer.direction);
    let done = transfer.chunk.done;
    let bytes = &mut transfer.block[done..];
    let length = u32::try_from(bytes.len()).expect("a chunk is shorter than 2 GiB");
    let (start, region) = (bytes.as_mut_ptr(), regions.holding(bytes.as_ptr().addr(), bytes.len()));
    macro_rules! build {
        ($plain:ident, $registered:ident) => {
            match (seat.map(Fixed), region) {
                (Some(file), Some(region)) => {
                    opcode::$registered::new(file, start, length, region).offset(position).build()
                }
                (None, Some(region)) => {
                    opcode::$registered::new(descriptor, start, length, region).offset(position).build()
                }
                (Some(file), None) => opcode::$plain::new(file, start, length).offset(position).build(),
                (None, None) => opcode::$plain::new(descriptor, start, length).offset(position).build(),
            }
        };
    }
    match direction {
        Direction::Read => build!(Read, ReadFixed),
        Direction::Write => build!(Write, WriteFixed),
    }
}

/// The registered memory: an address range that is cut every [`REGION_BYTES`].
struct Regions {
    span: Range<usize>,
}

impl Regions {
    fn register(uring: &IoUring, pool: &Pool, notes: &mut Vec<String>) -> Regions {
        let (start, bytes) = pool.span();
        let iovec = |offset| libc::iovec {
            iov_base: start.as_ptr().wrapping_add(offset).cast(),
            iov_len: REGION_BYTES.min(bytes - offset),
        };
        let iovecs: Vec<libc::iovec> = (0..bytes).step_by(REGION_BYTES).map(iovec).collect();
        // SAFETY: the regions cover the arena, which stays mapped while the ring's clone of the pool lives.
        match unsafe { uring.submitter().register_buffers(&iovecs) } {
            Ok(()) => {
                let start = start.as_ptr().addr();
                Regions { span: start..start + bytes }
            }
            Err(error) => {
                // Registered memory is counted apart from locked memory, against the same limit; where the memory is
                // not locked either, that has been told already.
                let advice = match pool.report().locked {
                    Locking::Locked => format!("; {}", limit_advice(0)),
                    Locking::Unlocked { .. } => String::new(),
                };
                notes.push(format!("memory is not registered with io_uring: {error}{advice}"));
                Regions { span: 0..0 }
            }
        }
    }

    /// The region that holds all of the `length` bytes at address `first`.
    fn holding(&self, first: usize, length: usize) -> Option<u16> {
        if length == 0 || !self.span.contains(&first) || self.span.end - first < length {
            return None;
        }
        let region = |address: usize| (address - self.span.start) / REGION_BYTES;
        u16::try_from(region(first)).ok().filter(|_| region(first) == region(first + length - 1))
    }
}

/// The table of registered files.
struct Seats {
    taken: Vec<(u32, Weak<Inner>)>,
    free: Vec<u32>,
}

impl Seats {
    fn register(uring: &IoUring, notes: &mut Vec<String>) -> Seats {
        let empty = vec![-1; SEATS as usize];
        let registered = uring.submitter().register_files(&empty);
        if let Err(error) = &registered {
            notes.push(format!("files are not registered with io_uring: {error}"));
        }
        let seats = if registered.is_ok() { SEATS } else { 0 };
        Seats { taken: Vec::new(), free: (0..seats).rev().collect() }
    }

    /// The seat of `file`, given now if it has none; `None` if there is none to give.
    fn of(&mut self, file: &File, uring: &IoUring, doorbell: &Arc<Doorbell>) -> Option<u32> {
        // A file of another engine would ring there when it is gone, and keep its seat here.
        if !file.belongs_to(doorbell) {
            return None;
        }
        if let Some(seat) = file.seat() {
            return Some(seat);
        }
        let seat = self.free.pop()?;
        if let Err(_refusal) = update(uring, seat, file.as_fd().as_raw_fd()) {
            self.free.push(seat);
            return None;
        }
        file.take_seat(seat);
        self.taken.push((seat, file.downgrade()));
        Some(seat)
    }

    /// Frees the seats of files that everybody dropped.
    fn sweep(&mut self, uring: &IoUring) {
        let Seats { taken, free } = self;
        taken.retain(|(seat, file)| {
            let gone = file.strong_count() == 0 && update(uring, *seat, -1).is_ok();
            if gone {
                free.push(*seat);
            }
            !gone
        });
    }
}

/// Registers `descriptor` at `seat`, in place of what was there; −1 empties the seat.
fn update(uring: &IoUring, seat: u32, descriptor: RawFd) -> Result<(), Errno> {
    uring.submitter().register_files_update(seat, &[descriptor]).map(drop).map_err(|error| errno_of(&error))
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};

    use super::*;
    use crate::BlockClass;

    #[test]
    fn a_doorbell_that_cannot_be_polled_breaks_the_ring() {
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 4096, count: 1 }]).unwrap();
        let mut uring = Uring::start(1, &pool, &mut Vec::new()).unwrap();
        // A descriptor that stands for a path only: nothing can be done with the file behind it.
        let deaf = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        uring.ring.doorbell = Arc::new(Doorbell::new(Wire::EventFd(deaf)));
        let deadline = Instant::now() + Duration::from_secs(20);
        assert_eq!(uring.park(Some(deadline), &mut Vec::new()), Err(Errno::BADF));
    }

    #[test]
    fn memory_across_two_regions_is_in_neither() {
        let regions = Regions { span: 0x1000..0x1000 + 2 * REGION_BYTES };
        let holding = |offset, length| regions.holding(0x1000 + offset, length);
        assert_eq!(holding(0, 4096), Some(0));
        assert_eq!(holding(REGION_BYTES - 4096, 4096), Some(0));
        assert_eq!(holding(REGION_BYTES, 4096), Some(1));
        assert_eq!(holding(REGION_BYTES - 4096, 8192), None);
        assert_eq!(holding(2 * REGION_BYTES - 4096, 8192), None);
    }
}
