//! Which way to the kernel works here.
//!
//! A ring that can be built may still fail at its first transfer (system call filters, restricted rings), so a
//! backend counts as working only after it has written and read back a file, with memory that the kernel has never
//! seen and with memory of the engine's pool, which travels by other requests where it is registered. The order is
//! io_uring, Linux AIO, threads; what is not the best is told with the reason of every better one, and never chosen
//! silently.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::backend::aio::Aio;
#[cfg(feature = "sim")]
use crate::backend::fate::SimConfig;
#[cfg(feature = "sim")]
use crate::backend::sim::Sim;
use crate::backend::threads::Threads;
use crate::backend::uring::Uring;
use crate::backend::{Backend, BackendChoice, Transfer};
use crate::engine::completion::{Completion, classify};
use crate::engine::config::{EngineConfig, EngineReport};
use crate::engine::extent::Extent;
use crate::engine::queue::{Limits, Priority, Queue};
use crate::error::{Direction, IoError};
use crate::file::File;
use crate::memory::block::Block;
use crate::{BackendKind, BlockClass, Locking, Pool};

/// How long the proof may take before the backend counts as not working.
const PROOF_PATIENCE: Duration = Duration::from_secs(10);
/// What the proof writes and reads back.
const PROOF_BYTES: usize = 4096;

/// Starts the backend that `config` asks for, on the thread that will own it.
pub(crate) fn start(config: &EngineConfig, pool: &Pool) -> Result<(Box<dyn Backend>, EngineReport), IoError> {
    let mut notes = Vec::new();
    let mut asked = |kind| start_one(kind, config, pool, &mut notes);
    let (backend, degraded) = match config.backend {
        BackendChoice::Uring => (asked(BackendKind::Uring)?, None),
        BackendChoice::Aio => (asked(BackendKind::Aio)?, None),
        BackendChoice::Threads => (asked(BackendKind::Threads)?, None),
        #[cfg(feature = "sim")]
        BackendChoice::Sim(sim) => (start_sim(sim, pool)?, None),
        BackendChoice::Auto => start_best(config, pool, &mut notes)?,
    };
    if let Locking::Unlocked { reason } = pool.report().locked {
        notes.insert(0, format!("memory is not locked: {reason}"));
    }
    let report = EngineReport { backend: backend.kind(), degraded, notes };
    Ok((backend, report))
}

/// Starts the first backend that works, and tells why each better one does not.
fn start_best(
    config: &EngineConfig,
    pool: &Pool,
    notes: &mut Vec<String>,
) -> Result<(Box<dyn Backend>, Option<String>), Refusal> {
    let mut reasons = Vec::new();
    for (kind, name) in [(BackendKind::Uring, "io_uring"), (BackendKind::Aio, "Linux AIO")] {
        match start_one(kind, config, pool, notes) {
            Ok(backend) => return Ok((backend, degraded(&reasons))),
            Err(refusal) => {
                // They are about a backend that is not in use.
                notes.clear();
                reasons.push(format!("{name} is not available: {refusal}"));
            }
        }
    }
    Ok((start_one(BackendKind::Threads, config, pool, notes)?, degraded(&reasons)))
}

/// One line of all reasons.
fn degraded(reasons: &[String]) -> Option<String> {
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// Why a backend does not work here.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("cannot {action}: {}", std::io::Error::from(*errno))]
struct Refusal {
    backend: BackendKind,
    action: &'static str,
    errno: Errno,
}

impl From<Refusal> for IoError {
    fn from(Refusal { backend, action, errno }: Refusal) -> IoError {
        IoError::Backend { backend, action, errno: errno.raw_os_error() }
    }
}

fn start_one(
    kind: BackendKind,
    config: &EngineConfig,
    pool: &Pool,
    notes: &mut Vec<String>,
) -> Result<Box<dyn Backend>, Refusal> {
    fn boxed(backend: impl Backend + 'static) -> Box<dyn Backend> {
        Box::new(backend)
    }
    let &EngineConfig { queue_depth, threads, .. } = config;
    let started = match kind {
        BackendKind::Uring => Uring::start(queue_depth, pool, notes).map(boxed),
        BackendKind::Aio => Aio::start(queue_depth, threads).map(boxed),
        BackendKind::Threads => Threads::start(threads, queue_depth).map(boxed),
        // It has faults to be asked for, which only `start_sim` knows.
        #[cfg(feature = "sim")]
        BackendKind::Sim => Err(Errno::INVAL),
    };
    proven(kind, started, pool)
}

/// Proves a simulation without faults, and starts the one that was asked for with its first transfer still to come.
#[cfg(feature = "sim")]
fn start_sim(config: SimConfig, pool: &Pool) -> Result<Box<dyn Backend>, Refusal> {
    proven(BackendKind::Sim, Ok(Box::new(Sim::start(SimConfig::calm(config.seed)))), pool)?;
    Ok(Box::new(Sim::start(config)))
}

fn proven(
    backend: BackendKind,
    started: Result<Box<dyn Backend>, Errno>,
    pool: &Pool,
) -> Result<Box<dyn Backend>, Refusal> {
    let refusal = |action, errno| Refusal { backend, action, errno };
    let mut backend = started.map_err(|errno| refusal(starting(backend, errno), errno))?;
    prove(backend.as_mut(), pool).map_err(|errno| refusal("move the first bytes", errno))?;
    Ok(backend)
}

/// What a backend was about to do when it could not start.
fn starting(backend: BackendKind, errno: Errno) -> &'static str {
    match (backend, errno) {
        (BackendKind::Aio, Errno::AGAIN) => {
            "reserve as many requests as its queue is deep, for which the machine's limit, \
             `sysctl fs.aio-max-nr`, must be raised"
        }
        _ => "start",
    }
}

/// Writes a file in memory and reads it back, with each kind of memory. Such a file never waits for a device, so every
/// backend moves it by the system calls that it uses for direct transfers.
fn prove(backend: &mut dyn Backend, pool: &Pool) -> Result<(), Errno> {
    // First memory of its own: a backend that never answers keeps what it was given.
    let class = BlockClass { name: "probe", block_bytes: PROOF_BYTES, count: 1 };
    let memory = Pool::new(&[class]).map_err(|_| Errno::NOMEM)?;
    let block = memory.try_lease(PROOF_BYTES).map_err(|_| Errno::NOMEM)?;
    let file = File::in_memory(backend.doorbell())?;
    round_trip(backend, &file, block)?;
    // A pool whose blocks are all leased, or too small, is no reason to refuse the backend.
    pool.try_lease(PROOF_BYTES).map_or(Ok(()), |block| round_trip(backend, &file, block))
}

/// Writes a pattern from `block` and reads it back.
fn round_trip(backend: &mut dyn Backend, file: &File, mut block: Block) -> Result<(), Errno> {
    let pattern = |index: usize| (index % 251) as u8;
    for (index, byte) in block.iter_mut().enumerate() {
        *byte = pattern(index);
    }
    let mut block = transfer(backend, Direction::Write, file, block)?;
    block.fill(0);
    let block = transfer(backend, Direction::Read, file, block)?;
    let same = block.iter().enumerate().all(|(index, &byte)| byte == pattern(index));
    if same { Ok(()) } else { Err(Errno::IO) }
}

/// Moves `block` in one transfer.
fn transfer(
    backend: &mut dyn Backend,
    direction: Direction,
    file: &File,
    block: Block,
) -> Result<Block, Errno> {
    let mut queue = Queue::new(block.len(), Limits { depth: 1, bytes: block.len(), detours: 1 });
    queue.push((), Extent { offset: 0, length: block.len(), alignment: 1, priority: Priority::Urgent });
    let (chunk, ()) = queue.next().ok_or(Errno::IO)?;
    backend.submit(Transfer { chunk, direction, file: file.clone(), offset: 0, block, detour: None });
    let deadline = Instant::now() + PROOF_PATIENCE;
    let mut arrivals = Vec::new();
    loop {
        backend.park(Some(deadline), &mut arrivals)?;
        match arrivals.pop() {
            Some(arrival) => {
                let block = arrival.transfer.block;
                return match classify(arrival.result, block.len()) {
                    Completion::Positive(moved) if moved == block.len() => Ok(block),
                    Completion::Error(errno) => Err(Errno::from_raw_os_error(errno)),
                    _ => Err(Errno::IO),
                };
            }
            None if Instant::now() >= deadline => return Err(Errno::TIMEDOUT),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;

    use super::*;
    use crate::backend::Arrival;
    use crate::backend::doorbell::Doorbell;

    /// Works, except for memory in a range of addresses, as a ring that refuses requests with registered memory.
    struct Picky {
        threads: Threads,
        refused: Range<usize>,
        arrivals: Vec<Arrival>,
    }

    impl Picky {
        fn refusing(pool: &Pool) -> Box<dyn Backend> {
            let (start, bytes) = pool.span();
            let start = start.as_ptr().addr();
            let threads = Threads::start(1, 1).unwrap();
            Box::new(Picky { threads, refused: start..start + bytes, arrivals: Vec::new() })
        }
    }

    impl Backend for Picky {
        fn kind(&self) -> BackendKind {
            BackendKind::Uring
        }

        fn doorbell(&self) -> &Arc<Doorbell> {
            self.threads.doorbell()
        }

        fn submit(&mut self, transfer: Transfer) {
            if self.refused.contains(&transfer.block.as_ptr().addr()) {
                self.arrivals.push(Arrival { transfer, result: -libc::EACCES });
            } else {
                self.threads.submit(transfer);
            }
        }

        fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
            if self.arrivals.is_empty() {
                return self.threads.park(deadline, arrivals);
            }
            arrivals.append(&mut self.arrivals);
            Ok(())
        }

        fn tidy(&mut self) {}
    }

    fn pool() -> Pool {
        Pool::new(&[BlockClass { name: "test", block_bytes: PROOF_BYTES, count: 1 }]).unwrap()
    }

    #[test]
    fn a_backend_that_cannot_move_the_memory_of_the_pool_is_refused() {
        let (pool, other) = (pool(), pool());
        let refusal = proven(BackendKind::Uring, Ok(Picky::refusing(&pool)), &pool).err().unwrap();
        assert_eq!(refusal.errno, Errno::ACCESS);
        assert_eq!(pool.leased_blocks(), 0, "the answer came, so the block is home");
        assert!(proven(BackendKind::Uring, Ok(Picky::refusing(&other)), &pool).is_ok());
    }

    #[test]
    fn the_limit_on_asynchronous_requests_is_called_by_its_name() {
        let said = |backend, errno| {
            let refusal = proven(backend, Err(errno), &pool()).err().unwrap();
            (refusal.to_string(), IoError::from(refusal).to_string())
        };
        let (reason, error) = said(BackendKind::Aio, Errno::AGAIN);
        assert!(reason.contains("`sysctl fs.aio-max-nr`, must be raised: Resource"), "{reason}");
        assert_eq!(error, format!("aio: {reason}"));
        let others = [(BackendKind::Aio, Errno::PERM), (BackendKind::Threads, Errno::AGAIN)];
        for (backend, errno) in others {
            assert!(said(backend, errno).0.starts_with("cannot start: "));
        }
    }

    #[test]
    fn a_backend_can_be_proven_while_every_block_is_leased() {
        let pool = pool();
        let held = pool.try_lease(1).unwrap();
        assert!(proven(BackendKind::Uring, Ok(Picky::refusing(&pool)), &pool).is_ok());
        drop(held);
    }
}
