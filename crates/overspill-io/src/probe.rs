//! Which way to the kernel works here.
//!
//! A ring that can be built may still fail at its first transfer (system call filters, restricted rings), so a
//! backend counts as working only after it has written and read back a file, with memory that the kernel has never
//! seen and with memory of the engine's pool, which travels by other requests where it is registered. What is not the best is told with its
//! reason, and never chosen silently.

use std::time::{Duration, Instant};

use rustix::io::Errno;

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
use crate::{BackendKind, BlockClass, Pool};

/// How long the proof may take before the backend counts as not working.
const PROOF_PATIENCE: Duration = Duration::from_secs(10);
/// What the proof writes and reads back.
const PROOF_BYTES: usize = 4096;

/// Starts the backend that `config` asks for, on the thread that will own it.
pub(crate) fn start(config: &EngineConfig, pool: &Pool) -> Result<(Box<dyn Backend>, EngineReport), IoError> {
    let mut notes = Vec::new();
    let (backend, degraded) = match config.backend {
        BackendChoice::Uring => (start_uring(config, pool, &mut notes)?, None),
        BackendChoice::Threads => (start_threads(config, pool)?, None),
        BackendChoice::Auto => match start_uring(config, pool, &mut notes) {
            Ok(backend) => (backend, None),
            Err(refusal) => {
                // They are about a ring that is not in use.
                notes.clear();
                (start_threads(config, pool)?, Some(format!("io_uring is not available: {refusal}")))
            }
        },
    };
    let report = EngineReport { backend: backend.kind(), degraded, notes };
    Ok((backend, report))
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

fn start_uring(
    config: &EngineConfig,
    pool: &Pool,
    notes: &mut Vec<String>,
) -> Result<Box<dyn Backend>, Refusal> {
    let started = Uring::start(config.queue_depth, pool, notes);
    proven(BackendKind::Uring, started.map(|uring| Box::new(uring) as Box<dyn Backend>), pool)
}

fn start_threads(config: &EngineConfig, pool: &Pool) -> Result<Box<dyn Backend>, Refusal> {
    let started = Threads::start(config.threads, config.queue_depth);
    proven(BackendKind::Threads, started.map(|threads| Box::new(threads) as Box<dyn Backend>), pool)
}

fn proven(
    backend: BackendKind,
    started: Result<Box<dyn Backend>, Errno>,
    pool: &Pool,
) -> Result<Box<dyn Backend>, Refusal> {
    let refused = |action| move |errno| Refusal { backend, action, errno };
    let mut backend = started.map_err(refused("start"))?;
    prove(backend.as_mut(), pool).map_err(refused("move the first bytes"))?;
    Ok(backend)
}

/// Writes a file in memory and reads it back, with each kind of memory.
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
    fn a_backend_can_be_proven_while_every_block_is_leased() {
        let pool = pool();
        let held = pool.try_lease(1).unwrap();
        assert!(proven(BackendKind::Uring, Ok(Picky::refusing(&pool)), &pool).is_ok());
        drop(held);
    }
}
