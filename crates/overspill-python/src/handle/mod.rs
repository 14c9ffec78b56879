//! Tensors to files and back, as DeepSpeed's handle does it, on an engine of its own.
//!
//! ```text
//! aio_handle (python) ──► Handle ──► plan: what moves from where it lies, what is copied ──► engine or crew
//!                            │ books                                                              │ parts
//!                            └── wait: covers what was asked for before it ◄── Operation ◄────────┘
//! ```
//!
//! Whoever waits covers every operation that was asked for before, but for those that another call waits for by itself: it
//! returns when all of them are over, what is to be validated is, and what was read elsewhere has landed; it counts those
//! that no other wait counts, and tells the first failure of what it covers. A synchronous call does the same with its own
//! operation as the last. Operations that touch the same bytes are carried out in the order of their calls ([`order`]); all
//! others at the same time. Handles know of each other where they have to ([`neighbors`]).
//!
//! A wait that Python interrupts gives back what it was to count, for the next one. A handle that goes finishes what is
//! pending, in bounded time.
//!
//! Python's objects are neither called nor dropped while a lock is held, because what they run then may call the handle.

mod core;
mod crew;
mod file;
mod landing;
mod neighbors;
mod operation;
mod order;
pub(crate) mod pinned;
mod plan;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use overspill_io::{BLOCK_ALIGNMENT, Direction, Engine, EngineConfig};
use pyo3::prelude::*;

use self::core::{Claim, Core};
use self::file::Name;
use self::landing::Landing;
use crate::argument::{self, shown, whole};
use crate::border::{Owned, outside};
use crate::error::Error;
use crate::tensor::Tensor;

/// How long a wait goes without a look at signals.
const GLANCE: Duration = Duration::from_millis(50);
/// How long a handle that goes waits for what is pending.
const FAREWELL: Duration = Duration::from_secs(60);
/// The engine's own limits; what goes beyond gains nothing.
const BLOCK_BYTES_MAX: usize = 1 << 30;
const QUEUE_DEPTH_MAX: usize = 4096;
const THREADS_MAX: usize = 256;
/// Bytes that may be with the kernel at a time.
const IN_FLIGHT_BYTES: usize = 64 << 20;

/// An engine, and what was asked of it.
#[pyclass(frozen, module = "overspill._native")]
pub(crate) struct Handle {
    core: Owned<Core>,
}

/// What somebody asks for.
struct Order {
    tensor: Arc<Tensor>,
    name: Name,
    direction: Direction,
    offset: u64,
    is_pinned: bool,
    is_validated: bool,
    /// Where bytes go at last, if they cannot be read there.
    landing: Option<(Landing, Range<usize>)>,
}

/// An order as Python gives it: `(tensor, file, write, offset, validate, landing)`, the last being a tensor and the
/// addresses from its first byte to behind its last.
type Asked<'py> =
    (Bound<'py, PyAny>, Bound<'py, PyAny>, bool, Bound<'py, PyAny>, bool, Option<(Py<PyAny>, usize, usize)>);

#[pymethods]
impl Handle {
    /// Starts an engine; `backend` is `"auto"`, `"io_uring"`, `"aio"` or `"threads"`.
    #[new]
    fn new(
        py: Python<'_>,
        block_size: &Bound<'_, PyAny>,
        queue_depth: &Bound<'_, PyAny>,
        intra_op_parallelism: &Bound<'_, PyAny>,
        backend: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let at_least_one = |name, value| whole(name, value, 1..=isize::MAX as usize);
        let block_bytes = at_least_one("block_size", block_size)?.min(BLOCK_BYTES_MAX);
        let queue_depth = at_least_one("queue_depth", queue_depth)?.min(QUEUE_DEPTH_MAX);
        let threads = at_least_one("intra_op_parallelism", intra_op_parallelism)?.min(THREADS_MAX);
        let backend = argument::backend(&backend.extract::<String>().unwrap_or_else(|_| shown(backend)))?;
        let chunk_bytes = block_bytes.next_multiple_of(BLOCK_ALIGNMENT);
        let default = EngineConfig::default();
        let config = EngineConfig {
            backend,
            chunk_bytes,
            queue_depth,
            bytes_in_flight_max: IN_FLIGHT_BYTES,
            threads: threads.max(default.threads),
            drain_patience: FAREWELL,
        };
        let core = outside(py, || -> Result<Core, Error> {
            // What a ring could register: nothing, for memory is pinned later, and costs nothing measurable then.
            let pool = pinned::pool("probe", BLOCK_ALIGNMENT, 1)?;
            let engine = Engine::start(config, &pool)?;
            Ok(Core::new(engine, threads))
        })?;
        Ok(Self { core: Owned::new(core) })
    }

    /// The backend in use.
    fn backend(&self) -> PyResult<String> {
        Ok(self.core.get()?.report().backend.to_string())
    }

    /// Why it is not the best one, if nobody asked for it.
    fn degraded(&self) -> PyResult<Option<String>> {
        Ok(self.core.get()?.report().degraded)
    }

    /// Begins to move a tensor.
    fn submit(&self, py: Python<'_>, order: Asked<'_>) -> PyResult<()> {
        let core = self.core.get()?;
        core.submit(py, Order::of(order)?, Claim::Nobody, true)
    }

    /// Moves a tensor and waits for that: for that `alone`, which no wait counts; otherwise, as [`Handle::wait`] does, also
    /// for everything that was asked for before.
    fn run(&self, py: Python<'_>, order: Asked<'_>, alone: bool) -> PyResult<usize> {
        let core = self.core.get()?;
        let waiter = core.waiter();
        core.submit(py, Order::of(order)?, Claim::Caller(waiter), !alone)?;
        core.wait(py, waiter, !alone)
    }

    /// Waits for everything that was asked for; the answer is how many operations no other wait has counted.
    fn wait(&self, py: Python<'_>) -> PyResult<usize> {
        let core = self.core.get()?;
        core.wait(py, core.waiter(), true)
    }

    /// Waits until nothing that was asked for is yet to change the memory from `start` to before `end`.
    fn settle(&self, py: Python<'_>, start: usize, end: usize) -> PyResult<()> {
        self.core.get()?.settle(py, &(start..end))
    }

    /// Finishes what is pending, in bounded time, and stops the engine. In a fork it does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        match self.core.get() {
            Ok(core) => core.close(py),
            Err(_forked) => Ok(()),
        }
    }
}

impl Order {
    fn of((tensor, file, write, offset, validate, landing): Asked<'_>) -> PyResult<Self> {
        let offset = whole("file_offset", &offset, 0..=i64::MAX)?.unsigned_abs();
        let name = Name::of(&file)?;
        let landing = landing.map(|(target, start, end)| {
            let host = tensor.clone().unbind();
            (Landing::new(target, host), start..end)
        });
        // Another tensor over the same storage: assigning to `data` meanwhile changes the caller's only.
        let alias = tensor.call_method0("detach")?;
        let tensor = Arc::new(Tensor::of(&alias)?);
        let is_pinned = pinned::is_pinned(tensor.address(), tensor.len())
            || alias.call_method0("is_pinned")?.extract::<bool>()?;
        let direction = if write { Direction::Write } else { Direction::Read };
        Ok(Self { tensor, name, direction, offset, is_pinned, is_validated: validate, landing })
    }
}
