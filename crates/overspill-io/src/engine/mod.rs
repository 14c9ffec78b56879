//! The engine: callers on one side, a driver thread with a backend on the other.
//!
//! A call makes an [`op::Op`] and sends it through a bounded channel; the [`driver`] cuts it into chunks by the rules
//! of the [`queue`], and answers through the operation's [`ticket`].

mod cell;
pub(crate) mod chunk;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod detour;
mod driver;
pub(crate) mod extent;
mod gate;
pub(crate) mod op;
pub(crate) mod parts;
pub(crate) mod queue;
#[cfg(test)]
mod schedules;
pub(crate) mod stats;
pub(crate) mod table;
pub(crate) mod ticket;

use std::fmt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};

use self::config::{EngineConfig, EngineReport};
use self::driver::Driver;
use self::op::{Op, Request};
use self::queue::{Priority, Queue};
use self::stats::{EngineStats, Stats};
use self::ticket::{Callback, Promise, Reply, Ticket};
use crate::backend::doorbell::Doorbell;
use crate::error::{Direction, Failed, IoError};
use crate::file::File;
use crate::memory::block::Block;
use crate::sync::{AtomicBool, Mutex, lock};
use crate::{BackendKind, Pool, probe};

/// Operations that may wait for the driver to look; a caller beyond that waits for the driver's next turn. It bounds
/// nothing else: what the driver has taken is bounded by the pool.
const INTAKE_OPS: usize = 1024;
/// How long a caller waits for the driver's next turn before it looks whether a shutdown waits for the intake.
const STEP_BACK: Duration = Duration::from_millis(100);
/// Beyond the drain patience, how long the driver may take to tell that it ended.
const FAREWELL: Duration = Duration::from_secs(5);

/// Moves blocks to and from files. Clones share the driver thread; dropping the last one shuts it down.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None` after shutdown. Held for reading while an operation is sent, so that none is sent behind the last one.
    intake: RwLock<Option<Sender<Op>>>,
    /// Whether a shutdown waits for the intake, or has had it.
    closing: AtomicBool,
    doorbell: Arc<Doorbell>,
    stats: Arc<Stats>,
    report: EngineReport,
    drain_patience: Duration,
    driver: Mutex<Option<DriverThread>>,
}

struct DriverThread {
    handle: JoinHandle<()>,
    ended: Receiver<Result<(), IoError>>,
}

impl Engine {
    /// Starts the driver thread and proves, with real transfers, that its backend works. The memory of `pool` is
    /// registered with the kernel where it can be; blocks of other pools work too.
    ///
    /// # Errors
    ///
    /// [`IoError::Config`] for a value that cannot work, [`IoError::Backend`] if no backend that `config` allows
    /// works here.
    pub fn start(config: EngineConfig, pool: &Pool) -> Result<Engine, IoError> {
        config.check()?;
        let stats = Arc::new(Stats::default());
        let (intake, requests) = bounded(INTAKE_OPS);
        let (ready, started) = bounded(1);
        let (farewell, ended) = bounded(1);
        let drain_patience = config.drain_patience;
        let run = {
            let (pool, stats) = (pool.clone(), Arc::clone(&stats));
            // A ring belongs to the thread that made it, so the backend is made over there.
            move || match probe::start(&config, &pool) {
                Err(error) => drop(ready.send(Err(error))),
                Ok((backend, report)) => {
                    drop(ready.send(Ok((Arc::clone(backend.doorbell()), report))));
                    let queue = Queue::new(config.chunk_bytes, config.limits());
                    let driver = Driver::new(backend, requests, queue, stats, drain_patience);
                    drop(farewell.send(driver.run()));
                }
            }
        };
        let handle = thread::Builder::new().name("overspill-io".to_owned()).spawn(run).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or_else(|| rustix::io::Errno::AGAIN.raw_os_error());
            IoError::Backend { backend: BackendKind::Threads, action: "start the driver thread", errno }
        })?;
        let (doorbell, report) = started.recv().unwrap_or(Err(IoError::EngineStopped))?;
        let driver = Mutex::new(Some(DriverThread { handle, ended }));
        let (intake, closing) = (RwLock::new(Some(intake)), AtomicBool::new(false));
        let inner = Inner { intake, closing, doorbell, stats, report, drain_patience, driver };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// Makes a file that does not exist yet, readable and writable by its owner only.
    ///
    /// # Errors
    ///
    /// [`IoError::File`], also if `path` exists, be it as a symbolic link.
    pub fn create(&self, path: &Path) -> Result<File, IoError> {
        File::create(path, &self.inner.doorbell)
    }

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    ///
    /// [`IoError::File`], also if `path` is a symbolic link.
    pub fn open(&self, path: &Path) -> Result<File, IoError> {
        File::open(path, &self.inner.doorbell)
    }

    /// Opens an existing file for reading only: every write to it fails.
    ///
    /// # Errors
    ///
    /// [`IoError::File`], also if `path` is a symbolic link; [`IoError::NotAFile`].
    pub fn open_to_read(&self, path: &Path) -> Result<File, IoError> {
        File::open_to_read(path, &self.inner.doorbell)
    }

    /// Takes over a file that somebody else has opened and that nobody else uses the descriptor of; `path` is what errors
    /// call it. What it was opened for decides what can be done with it. A write that is not aligned reads, too.
    ///
    /// # Errors
    ///
    /// [`IoError::NotAFile`] for a pipe, a socket or a directory, [`IoError::File`].
    pub fn adopt(&self, file: std::fs::File, path: &Path) -> Result<File, IoError> {
        File::adopt(file.into(), path, &self.inner.doorbell)
    }

    /// Fills `block` with the bytes of `file` from `offset` on, at any offset and of any length; [`File::alignment`]
    /// tells which ones are fastest. Every failure comes through the ticket.
    pub fn read(&self, file: &File, offset: u64, block: Block, priority: Priority) -> Ticket {
        let (promise, ticket) = self.promise();
        self.submit(
            Request { direction: Direction::Read, file, offset, block, priority },
            Reply::Block(promise),
        );
        ticket
    }

    /// Puts the bytes of `block` into `file` at `offset` and brings the block back. Every failure comes through the
    /// ticket.
    ///
    /// Any offset and any length will do. If they are not multiples of [`File::alignment`], the sectors around them
    /// are read and written too, so the write waits for all earlier operations on the file, and later ones wait for
    /// it; the file is as long afterwards as it should be. Another engine or process that writes to the same sectors
    /// or to the file's end at the same time may lose what it wrote there.
    pub fn write(&self, file: &File, offset: u64, block: Block, priority: Priority) -> Ticket {
        let (promise, ticket) = self.promise();
        self.submit(
            Request { direction: Direction::Write, file, offset, block, priority },
            Reply::Block(promise),
        );
        ticket
    }

    /// Puts the bytes of `block` into `file` at `offset` behind the caller's back: the block returns to its pool the
    /// moment they are written. A failure comes through the ticket, with the block.
    pub fn write_behind(&self, file: &File, offset: u64, block: Block, priority: Priority) -> Ticket<()> {
        let (promise, ticket) = self.promise();
        self.submit(
            Request { direction: Direction::Write, file, offset, block, priority },
            Reply::Done(promise),
        );
        ticket
    }

    /// Moves `block` like [`Engine::read`] or [`Engine::write`], and calls `call` with what comes of it instead of having
    /// somebody wait: once, on the driver's thread or, if the operation never begins, on this one. The device waits for
    /// it, so it must be short, must not block or panic, and must not drop the last handle of this engine.
    pub fn call(
        &self,
        direction: Direction,
        file: &File,
        offset: u64,
        block: Block,
        priority: Priority,
        call: impl FnOnce(Result<Block, Failed>) + Send + 'static,
    ) {
        let reply = Reply::Call(Callback::new(Box::new(call)));
        self.submit(Request { direction, file, offset, block, priority }, reply);
    }

    /// What the engine works with, and why not with something better.
    #[must_use]
    pub fn report(&self) -> EngineReport {
        self.inner.report.clone()
    }

    /// What it has moved so far.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.inner.stats.totals()
    }

    /// What the simulated device runs on, if its configuration says that it can go.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn power(&self) -> Option<crate::Power> {
        self.inner.doorbell.power().cloned()
    }

    /// Refuses new operations, waits until the accepted ones are over, and ends the driver thread. Operations that
    /// come later get [`IoError::EngineStopped`] and their block. Does nothing the second time.
    ///
    /// # Errors
    ///
    /// [`IoError::DrainTimeout`] if operations were not over after the drain patience: the blocks of those that the
    /// kernel has are lost, those of all others come back. [`IoError::Backend`] if the backend broke,
    /// [`IoError::EngineStopped`] if the driver thread panicked.
    pub fn shutdown(&self) -> Result<(), IoError> {
        self.inner.shutdown()
    }

    pub(crate) fn promise<T>(&self) -> (Promise<T>, Ticket<T>) {
        Promise::new(Arc::clone(&self.inner.stats))
    }

    pub(crate) fn submit(&self, request: Request<'_>, reply: Reply) {
        let Some(op) = Op::new(request, reply) else { return };
        match self.inner.send(op) {
            Ok(()) => self.inner.doorbell.ring(),
            Err(op) => drop(op.stop()),
        }
    }
}

impl Inner {
    /// Sends the operation to the driver; it comes back if the engine stopped.
    fn send(&self, mut op: Op) -> Result<(), Op> {
        while !self.closing.load(Ordering::Acquire) {
            let intake = self.intake.read().unwrap_or_else(PoisonError::into_inner);
            let Some(sender) = &*intake else { return Err(op) };
            op = match sender.send_timeout(op, STEP_BACK) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Disconnected(op)) => return Err(op),
                Err(SendTimeoutError::Timeout(op)) => op,
            };
        }
        Err(op)
    }

    fn shutdown(&self) -> Result<(), IoError> {
        let mut driver = lock(&self.driver);
        let Some(DriverThread { handle, ended }) = driver.take() else {
            return Ok(());
        };
        self.closing.store(true, Ordering::Release);
        let intake = self.intake.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(intake);
        self.doorbell.ring();
        match ended.recv_timeout(self.drain_patience.saturating_add(FAREWELL)) {
            Ok(ended) => {
                // It has said all it had to say, so this does not wait.
                drop(handle.join());
                ended
            }
            Err(RecvTimeoutError::Disconnected) => {
                // It panicked, and has answered everybody on the way out.
                drop(handle.join());
                Err(IoError::EngineStopped)
            }
            // It hangs inside a system call, where nothing can reach it. Should it return, it counts what it gives
            // up; until then, nobody knows better than that no more is lost than what it had accepted.
            Err(RecvTimeoutError::Timeout) => {
                let leaked_blocks = self.stats.in_flight();
                Err(IoError::DrainTimeout { patience: self.drain_patience, leaked_blocks })
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Every ticket has told its own failure, and the counters the rest.
        drop(self.shutdown());
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("report", &self.inner.report).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockClass;
    use crate::backend::doorbell::Wire;

    #[test]
    fn a_shutdown_that_gives_a_hanging_driver_up_leaves_the_counting_to_it() {
        let stats = Arc::new(Stats::default());
        stats.began(Direction::Read);
        let (_hangs, ended) = bounded(1);
        let handle = thread::spawn(|| ());
        let (wire, _events) = bounded(1);
        let inner = Inner {
            intake: RwLock::new(None),
            closing: AtomicBool::new(false),
            doorbell: Arc::new(Doorbell::new(Wire::Channel(wire))),
            stats: Arc::clone(&stats),
            report: EngineReport { backend: BackendKind::Threads, degraded: None, notes: Vec::new() },
            drain_patience: Duration::ZERO,
            driver: Mutex::new(Some(DriverThread { handle, ended })),
        };
        let patience = Duration::ZERO;
        assert_eq!(inner.shutdown(), Err(IoError::DrainTimeout { patience, leaked_blocks: 1 }));
        assert_eq!(stats.totals().leaked_blocks, 0, "the driver still holds the operation");
    }

    #[test]
    fn callers_who_wait_for_a_hanging_driver_do_not_hold_up_a_shutdown() {
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 4096, count: 2 }]).unwrap();
        let (wire, _events) = bounded(1);
        let doorbell = Arc::new(Doorbell::new(Wire::Channel(wire)));
        let file = File::in_memory(&doorbell).unwrap();
        let (_hangs, ended) = bounded(1);
        let (intake, hung) = bounded(1);
        let driver = Mutex::new(Some(DriverThread { handle: thread::spawn(|| ()), ended }));
        let inner = Inner {
            intake: RwLock::new(Some(intake)),
            closing: AtomicBool::new(false),
            doorbell,
            stats: Arc::new(Stats::default()),
            report: EngineReport { backend: BackendKind::Threads, degraded: None, notes: Vec::new() },
            drain_patience: Duration::ZERO,
            driver,
        };
        let engine = Engine { inner: Arc::new(inner) };
        let taken = engine.read(&file, 0, pool.lease(1).unwrap(), Priority::Urgent);
        let (said, heard) = bounded(1);
        let caller = {
            let (engine, block) = (engine.clone(), pool.lease(1).unwrap());
            thread::spawn(move || {
                said.send(()).unwrap();
                engine.read(&file, 0, block, Priority::Urgent).wait()
            })
        };
        heard.recv().unwrap();
        // Until the caller waits for room.
        while engine.inner.intake.try_write().is_ok() {
            thread::yield_now();
        }
        let (said, heard) = bounded(1);
        let closer = thread::spawn(move || said.send(engine.shutdown()).unwrap());
        let outcome = heard.recv_timeout(4 * FAREWELL);
        drop(hung);
        assert!(matches!(outcome, Ok(Err(IoError::DrainTimeout { .. }))), "{outcome:?}");
        closer.join().unwrap();
        let failed = caller.join().unwrap().unwrap_err();
        assert_eq!((failed.error, failed.block.map(|block| block.len())), (IoError::EngineStopped, Some(1)));
        assert_eq!(taken.wait().unwrap_err().error, IoError::EngineStopped);
    }
}
