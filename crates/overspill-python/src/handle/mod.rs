//! Tensors to files and back, as DeepSpeed's handle does it, on an engine of its own.
//!
//! ```text
//! aio_handle (python) ──► Handle ──► plan: what moves from where it lies, what is copied ──► engine or crew
//!                            │ pending                                                            │ parts
//!                            └── wait: covers what was asked for before it ◄── Operation ◄────────┘
//! ```
//!
//! Whoever waits covers every operation that was asked for before, but for those that another call waits for by itself: it
//! returns when all of them are over, counts those that no other wait counts, and tells the first failure of what it
//! covers. A synchronous call does the same with its own operation as the last. Operations that touch the same bytes are carried out in the order of their calls
//! ([`order`]); all others at the same time.
//!
//! A wait that Python interrupts gives back what it was to count, for the next one. A handle that goes finishes what is
//! pending, in bounded time.

mod crew;
mod file;
mod operation;
mod order;
pub(crate) mod pinned;
mod plan;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use overspill_io::{BLOCK_ALIGNMENT, Direction, Engine, EngineConfig};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

use self::crew::{Crew, Job, Load, PIECE_BYTES};
use self::file::Name;
use self::operation::Operation;
use self::order::Footprint;
use self::plan::{Route, Way};
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

struct Core {
    engine: Engine,
    crew: Crew,
    pending: Mutex<Vec<Pending>>,
    waiters: AtomicU64,
}

struct Pending {
    operation: Arc<Operation>,
    claim: Claim,
    /// Whether whoever waits for it counts it.
    counts: bool,
    landing: Option<Landing>,
}

impl Pending {
    fn is_of(&self, waiter: Waiter) -> bool {
        matches!(self.claim, Claim::Wait(other) | Claim::Caller(other) if other == waiter)
    }
}

/// A call that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiter(u64);

/// Who counts an operation, and takes it out of the books.
#[derive(Clone, Copy, Debug)]
enum Claim {
    /// The next wait.
    Nobody,
    /// A wait under way; others wait for it, too.
    Wait(Waiter),
    /// The call that asked for it, which nobody else's wait covers.
    Caller(Waiter),
}

/// What somebody asks for.
struct Order {
    tensor: Arc<Tensor>,
    name: Name,
    direction: Direction,
    offset: u64,
    is_pinned: bool,
    is_validated: bool,
    landing: Option<Landing>,
}

/// Where bytes go at last, and where they are, if the tensor itself cannot be read into.
struct Landing {
    target: Py<PyAny>,
    host: Py<PyAny>,
}

/// An order as Python gives it: `(tensor, file, write, offset, validate, landing)`.
type Asked<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, bool, Bound<'py, PyAny>, bool, Option<Py<PyAny>>);

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
            let crew = Crew::new(engine.clone(), threads);
            Ok(Core { engine, crew, pending: Mutex::new(Vec::new()), waiters: AtomicU64::new(0) })
        })?;
        Ok(Self { core: Owned::new(core) })
    }

    /// The backend in use.
    fn backend(&self) -> PyResult<String> {
        Ok(self.core.get()?.engine.report().backend.to_string())
    }

    /// Why it is not the best one, if nobody asked for it.
    fn degraded(&self) -> PyResult<Option<String>> {
        Ok(self.core.get()?.engine.report().degraded)
    }

    /// Begins to move a tensor.
    fn submit(&self, py: Python<'_>, order: Asked<'_>) -> PyResult<()> {
        let core = self.core.get()?;
        let order = Order::of(order)?;
        outside(py, || core.submit(order, Claim::Nobody, true))
    }

    /// Moves a tensor and waits for that: for that `alone`, which no wait counts; otherwise, as [`Handle::wait`] does, also
    /// for everything that was asked for before.
    fn run(&self, py: Python<'_>, order: Asked<'_>, alone: bool) -> PyResult<usize> {
        let core = self.core.get()?;
        let order = Order::of(order)?;
        let waiter = core.waiter();
        outside(py, || core.submit(order, Claim::Caller(waiter), !alone))?;
        core.wait(py, waiter, !alone)
    }

    /// Waits for everything that was asked for; the answer is how many operations no other wait has counted.
    fn wait(&self, py: Python<'_>) -> PyResult<usize> {
        let core = self.core.get()?;
        core.wait(py, core.waiter(), true)
    }

    /// Finishes what is pending, in bounded time, and stops the engine. In a fork it does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        match self.core.get() {
            Ok(core) => outside(py, || core.close()),
            Err(_forked) => Ok(()),
        }
    }
}

impl Order {
    fn of((tensor, file, write, offset, validate, landing): Asked<'_>) -> PyResult<Self> {
        let offset = whole("file_offset", &offset, 0..=i64::MAX)?.unsigned_abs();
        let name = Name::of(&file)?;
        let landing = landing.map(|target| Landing { target, host: tensor.clone().unbind() });
        // Another tensor over the same storage: assigning to `data` meanwhile changes the caller's only.
        let alias = tensor.call_method0("detach")?;
        let tensor = Arc::new(Tensor::of(&alias)?);
        let is_pinned = pinned::is_pinned(tensor.address(), tensor.len())
            || alias.call_method0("is_pinned")?.extract::<bool>()?;
        let direction = if write { Direction::Write } else { Direction::Read };
        Ok(Self { tensor, name, direction, offset, is_pinned, is_validated: validate, landing })
    }
}

impl Landing {
    /// Brings the bytes where they are to be.
    fn copy(&self, py: Python<'_>) -> PyResult<()> {
        match self.target.call_method1(py, "copy_", (&self.host,)) {
            Err(error) if error.is_instance_of::<PyException>(py) => {
                let reason = shown(error.value(py));
                let message = format!("what was read cannot be copied to its tensor as it is now: {reason}");
                Err(Error::State(message).into())
            }
            copied => copied.map(drop),
        }
    }
}

impl Core {
    /// Opens the file and begins; what can be begun here and now is.
    fn submit(&self, order: Order, claim: Claim, counts: bool) -> Result<(), Error> {
        let Order { tensor, name, direction, offset, is_pinned, is_validated, landing } = order;
        let bytes = tensor.len();
        let end = offset.checked_add(bytes as u64).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or_else(|| {
            Error::Argument(format!(
                "file_offset is {offset}, and no file has {bytes} bytes there: give a smaller one"
            ))
        })?;
        let opened = file::open(&self.engine, &name, direction)?;
        let (address, alignment) = (tensor.address(), opened.file.alignment());
        let pieces = Route { address, bytes, offset, alignment, is_pinned }.pieces(PIECE_BYTES);
        let memory = address..address + bytes;
        let footprint = Footprint { direction, file: opened.key, file_range: offset..end, memory };
        let path = opened.file.path().to_owned();
        let to_validate = is_validated.then(|| Arc::clone(&tensor));
        let operation = Operation::new(path, footprint, pieces.len(), to_validate);
        let loads = pieces.into_iter().map(|piece| Load { piece, part: operation.part() }).collect();
        let mut job = Job { direction, tensor, file: opened.file, offset, loads, after: Vec::new() };
        {
            let mut pending = self.pending();
            let earlier = pending.iter().map(|pending| &pending.operation);
            let in_the_way = |earlier: &&Arc<Operation>| {
                operation.footprint.conflicts_with(&earlier.footprint) && !earlier.is_over()
            };
            job.after = earlier.filter(in_the_way).cloned().collect();
            pending.push(Pending { operation, claim, counts, landing });
        }
        self.begin(job);
        Ok(())
    }

    fn begin(&self, mut job: Job) {
        if job.after.is_empty() {
            let loads = std::mem::take(&mut job.loads);
            let (direct, copied): (VecDeque<Load>, _) =
                loads.into_iter().partition(|load| load.piece.way == Way::Direct);
            job.loads = copied;
            for load in direct {
                crew::begin(&self.engine, &job, load, self.crew.bell());
            }
        }
        if !job.loads.is_empty() {
            self.crew.take(job);
        }
    }

    /// Waits for what `waiter` has asked for and, unless that is all, for what is pending; tells what came of it, and
    /// counts what no other wait counts.
    fn wait(&self, py: Python<'_>, waiter: Waiter, covers_pending: bool) -> PyResult<usize> {
        let (mut covered, mut count) = (Vec::new(), 0);
        for entry in self.pending().iter_mut() {
            match entry.claim {
                Claim::Caller(other) if other != waiter => continue,
                Claim::Nobody | Claim::Wait(_) if !covers_pending => continue,
                Claim::Nobody => entry.claim = Claim::Wait(waiter),
                Claim::Wait(_) | Claim::Caller(_) => {}
            }
            count += usize::from(entry.counts && entry.is_of(waiter));
            covered.push(Arc::clone(&entry.operation));
        }
        while !outside(py, || Ok::<_, Error>(all_over(&covered)))? {
            if let Err(signal) = py.check_signals() {
                let mut pending = self.pending();
                let mine = pending.iter_mut().filter(|entry| entry.is_of(waiter));
                mine.for_each(|entry| entry.claim = Claim::Nobody);
                return Err(signal);
            }
        }
        let landed = self.settle(waiter).into_iter().map(|landing| landing.copy(py));
        // All of them, whatever became of the first.
        let refused = landed.filter_map(Result::err).reduce(|first, _| first);
        match failure(&covered) {
            Some(error) => Err(error.into()),
            None => refused.map_or(Ok(count), Err),
        }
    }

    /// Takes what is over out of the books; what was read into other memory is to be copied.
    fn settle(&self, waiter: Waiter) -> Vec<Landing> {
        let mut pending = self.pending();
        let all = std::mem::take(&mut *pending);
        let (over, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|entry| entry.is_of(waiter));
        *pending = rest;
        let succeeded = over.into_iter().filter(|entry| entry.operation.failure().is_none());
        succeeded.filter_map(|entry| entry.landing).collect()
    }

    fn waiter(&self) -> Waiter {
        Waiter(self.waiters.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits until everything is over or patience is, and stops the engine.
    fn close(&self) -> Result<(), Error> {
        let deadline = Instant::now() + FAREWELL;
        self.crew.close(deadline);
        let stopped = self.engine.shutdown();
        let unheard: Vec<_> = std::mem::take(&mut *self.pending())
            .into_iter()
            .filter(|pending| matches!(pending.claim, Claim::Nobody))
            .map(|pending| pending.operation)
            .collect();
        match failure(&unheard) {
            Some(error) => Err(error),
            None => Ok(stopped?),
        }
    }

    fn pending(&self) -> MutexGuard<'_, Vec<Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether all are over, and what was to be validated is; waits for a short while.
fn all_over(operations: &[Arc<Operation>]) -> bool {
    let deadline = Instant::now() + GLANCE;
    if !operations.iter().all(|operation| operation.wait_until(deadline)) {
        return false;
    }
    operations.iter().for_each(|operation| operation.validate());
    true
}

/// The first failure, and how many more there are.
fn failure(operations: &[Arc<Operation>]) -> Option<Error> {
    let mut failures = operations.iter().filter_map(|operation| operation.failure());
    let first = failures.next()?;
    Some(Error::Several { first, more: failures.count() })
}
