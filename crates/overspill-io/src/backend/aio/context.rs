//! The system calls of Linux AIO: a context, what it is asked, and what it answers.
//!
//! The kernel reads a [`Request`] while it takes it, and never again; the memory that the request names is lent from
//! then until its [`Event`] is there.

#![expect(unsafe_code, reason = "system calls that are offered by address only")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::io::Errno;

use crate::error::Direction;

/// Requests that one system call is given; more take another.
const BATCH: usize = 64;

/// What the kernel can be asked (`IOCB_CMD_*`).
const READ: u16 = 0;
const WRITE: u16 = 1;
const POLL: u16 = 5;

/// One request (`struct iocb`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Request {
    /// Comes back with the event.
    tag: u64,
    /// Two numbers in an order that differs between machines: one that the kernel sets, and flags. 0 serves for both.
    key_and_flags: u64,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    /// Where the memory begins; of a poll, what to wait for.
    start: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    notify: u64,
}

/// One answer (`struct io_event`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Event {
    pub(super) tag: u64,
    request: u64,
    /// Bytes moved, or a negated errno.
    pub(super) result: i64,
    more: i64,
}

const _: () = assert!(size_of::<Request>() == 64 && size_of::<Event>() == 32);

impl Request {
    /// To move all of `bytes`.
    pub(super) fn transfer(
        tag: u64,
        direction: Direction,
        descriptor: BorrowedFd<'_>,
        bytes: &mut [u8],
        offset: u64,
    ) -> Request {
        let opcode = match direction {
            Direction::Read => READ,
            Direction::Write => WRITE,
        };
        Request {
            tag,
            opcode,
            descriptor: descriptor.as_raw_fd().cast_unsigned(),
            // The kernel uses the memory behind the borrow's back, as `Context::submit` asks for.
            start: bytes.as_mut_ptr().expose_provenance() as u64,
            length: bytes.len() as u64,
            // What is beyond the kernel's numbers becomes negative, which it refuses.
            offset: offset.cast_signed(),
            ..Request::default()
        }
    }

    /// To tell once that `descriptor` can be read.
    pub(super) fn poll(tag: u64, descriptor: BorrowedFd<'_>) -> Request {
        let descriptor = descriptor.as_raw_fd().cast_unsigned();
        Request { tag, opcode: POLL, descriptor, start: libc::POLLIN as u64, ..Request::default() }
    }

    pub(super) fn tag(&self) -> u64 {
        self.tag
    }
}

/// A queue in the kernel, with room for a number of requests.
#[derive(Debug)]
pub(super) struct Context(libc::c_ulong);

impl Context {
    /// Fails with [`Errno::AGAIN`] if the requests of all contexts of the machine would be more than its limit.
    pub(super) fn with_room_for(requests: u32) -> Result<Context, Errno> {
        let mut id: libc::c_ulong = 0;
        // SAFETY: the kernel writes one number, to where the last argument points.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, libc::c_ulong::from(requests), &raw mut id) };
        checked(made)?;
        Ok(Context(id))
    }

    /// Asks for the first of `requests`; says how many the kernel took. An error is about the first one.
    ///
    /// # Safety
    ///
    /// The memory of the requests that were taken must be valid, and used by nobody else, until their events were
    /// received.
    pub(super) unsafe fn submit(&self, requests: &mut [Request]) -> Result<usize, Errno> {
        let mut batch = [std::ptr::null_mut(); BATCH];
        let given = requests.len().min(BATCH);
        for (place, request) in batch.iter_mut().zip(requests) {
            *place = &raw mut *request;
        }
        // SAFETY: `given` pointers lead to requests that nobody else has; they are not used after the call, and the
        // caller answers for what they name.
        let taken =
            unsafe { libc::syscall(libc::SYS_io_submit, self.0, given as libc::c_long, batch.as_mut_ptr()) };
        checked(taken)
    }

    /// Sleeps until there is an answer or `patience` ends; fills `events` from the front and says how many there are.
    pub(super) fn wait(&self, events: &mut [Event], patience: Option<Duration>) -> Result<usize, Errno> {
        let mut timeout = patience.map(|patience| libc::timespec {
            tv_sec: libc::time_t::try_from(patience.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        });
        let timeout = timeout.as_mut().map_or(std::ptr::null_mut(), |timeout| &raw mut *timeout);
        let (least, room): (libc::c_long, _) = (1, events.len() as libc::c_long);
        // SAFETY: the kernel writes at most `room` events, which are plain numbers, and reads a time that lives until
        // the end of this function.
        let received = unsafe {
            libc::syscall(libc::SYS_io_getevents, self.0, least, room, events.as_mut_ptr(), timeout)
        };
        checked(received)
    }
}

impl Drop for Context {
    /// Takes polls back, and waits for transfers, however long they take.
    fn drop(&mut self) {
        // SAFETY: it ends the context that this value alone stands for, and touches no memory of ours.
        let ended = unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
        debug_assert!(ended == 0, "a context is destroyed once");
    }
}

/// The number that a system call returned, or the error that it set.
fn checked(returned: libc::c_long) -> Result<usize, Errno> {
    usize::try_from(returned)
        .map_err(|_negative| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
