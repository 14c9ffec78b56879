//! The threads that copy between tensors and blocks, and begin what has to wait.
//!
//! ```text
//! submit ──► jobs, in the order of their calls ──► worker: lease, copy in ──► Engine::call ──► write is home
//!                                                  worker: lease ───────────► Engine::call ──► landed ──► worker: copy out
//! ```
//!
//! No worker waits for a device: completions come by calls of the engine's thread, which only put the landed block in the
//! queue. What bounds the memory is the pool: a piece that finds no free block waits for one, and so does everything
//! behind it. A job that has to wait for earlier operations holds up those behind it, too; the earlier ones have begun, so
//! they end. Workers end when they are told to, with nothing left to do.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use overspill_io::{Block, Direction, Engine, Failed, File, Pool, Priority};

use super::operation::{Operation, Part};
use super::pinned;
use super::plan::{Piece, Way};
use crate::error::Error;
use crate::tensor::Tensor;

/// The most that is copied at a time; it fits into a core's cache.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Blocks to copy through, for each handle that has to.
const BLOCKS: usize = 48;

/// A piece, ready to go.
pub(super) struct Load {
    pub(super) piece: Piece,
    pub(super) part: Part,
}

/// The pieces of one operation that are not begun by its caller.
pub(super) struct Job {
    pub(super) direction: Direction,
    pub(super) tensor: Arc<Tensor>,
    pub(super) file: File,
    pub(super) offset: u64,
    pub(super) loads: VecDeque<Load>,
    /// Those that have to be over first.
    pub(super) after: Vec<Arc<Operation>>,
}

/// A block that was read, to be copied out.
struct Landed {
    block: Block,
    tensor: Arc<Tensor>,
    start: usize,
    part: Part,
}

/// What the workers and the engine's thread share.
struct Desk {
    state: Mutex<State>,
    news: Condvar,
}

struct State {
    landed: VecDeque<Landed>,
    jobs: VecDeque<Job>,
    /// Made when the first piece is to be copied.
    pool: Option<Pool>,
    /// Reads that have not landed.
    away: usize,
    is_closing: bool,
    workers: usize,
}

/// What a worker does next.
enum Task {
    CopyOut(Landed),
    Begin { step: Step, load: Load, block: Option<Block> },
    End,
}

/// What all pieces of a job have in common.
struct Step {
    direction: Direction,
    tensor: Arc<Tensor>,
    file: File,
    offset: u64,
}

/// The workers of one handle; started when there is something to do for them.
pub(super) struct Crew {
    desk: Arc<Desk>,
    engine: Engine,
    size: usize,
}

impl Crew {
    pub(super) fn new(engine: Engine, size: usize) -> Self {
        let state = State {
            landed: VecDeque::new(),
            jobs: VecDeque::new(),
            pool: None,
            away: 0,
            is_closing: false,
            workers: 0,
        };
        Self { desk: Arc::new(Desk { state: Mutex::new(state), news: Condvar::new() }), engine, size }
    }

    /// Takes a job on. If it cannot be begun, its operation fails.
    pub(super) fn take(&self, job: Job) {
        let copies = job.loads.iter().any(|load| load.piece.way == Way::Copied);
        let prepared = self.desk.prepare(&self.engine, self.size, copies);
        match prepared {
            Ok(()) => {
                self.desk.lock().jobs.push_back(job);
                self.desk.news.notify_all();
            }
            Err(error) => {
                let error = Arc::new(error);
                for load in job.loads {
                    load.part.answer(Err(Error::Several { first: Arc::clone(&error), more: 0 }));
                }
            }
        }
    }

    /// What is called when an operation is over that others may be waiting for.
    pub(super) fn bell(&self) -> Bell {
        Bell(Arc::clone(&self.desk))
    }

    /// Lets the workers end once everything is done, and waits for that until `deadline`.
    pub(super) fn close(&self, deadline: Instant) {
        let mut state = self.desk.lock();
        state.is_closing = true;
        self.desk.news.notify_all();
        while state.workers > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return;
            }
            state = self.desk.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.desk.lock().is_closing = true;
        self.desk.news.notify_all();
    }
}

/// Wakes workers.
#[derive(Clone)]
pub(super) struct Bell(Arc<Desk>);

impl Bell {
    pub(super) fn ring(&self) {
        // Under the lock, or a worker that has just looked would sleep on.
        let _state = self.0.lock();
        self.0.news.notify_all();
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that there are workers and, if anything is to be copied, blocks.
    fn prepare(self: &Arc<Self>, engine: &Engine, size: usize, copies: bool) -> Result<(), Error> {
        let mut state = self.lock();
        if copies && state.pool.is_none() {
            state.pool = Some(pinned::pool("copies", PIECE_BYTES, BLOCKS)?);
        }
        while state.workers < size {
            let (desk, engine) = (Arc::clone(self), engine.clone());
            let spawned =
                thread::Builder::new().name("overspill-copy".into()).spawn(move || desk.work(&engine));
            match spawned {
                Ok(_handle) => state.workers += 1,
                // Fewer do it, too.
                Err(_refusal) if state.workers > 0 => break,
                Err(refusal) => return Err(Error::State(format!("cannot start a thread: {refusal}"))),
            }
        }
        Ok(())
    }

    fn work(self: Arc<Self>, engine: &Engine) {
        let _leaving = Leaving(Arc::clone(&self));
        loop {
            match self.next() {
                Task::CopyOut(Landed { block, tensor, start, part }) => {
                    tensor.copy_from(start, &block);
                    drop((block, tensor));
                    self.bell().ring();
                    part.answer(Ok(()));
                    self.bell().ring();
                }
                Task::Begin { step, load, block } => match block {
                    None => begin_direct(engine, step, load, self.bell()),
                    Some(block) => self.begin_copied(engine, step, load, block),
                },
                Task::End => return,
            }
        }
    }

    fn bell(self: &Arc<Self>) -> Bell {
        Bell(Arc::clone(self))
    }

    /// Waits for something to do.
    fn next(&self) -> Task {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.next() {
                return task;
            }
            state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn begin_copied(self: &Arc<Self>, engine: &Engine, step: Step, load: Load, mut block: Block) {
        let Step { direction, tensor, file, offset } = step;
        let Load { piece, part } = load;
        let start = piece.range.start;
        let offset = offset + start as u64;
        let desk = Arc::clone(self);
        match direction {
            Direction::Write => {
                tensor.copy_to(start, &mut block);
                drop(tensor);
                engine.call(direction, &file, offset, block, Priority::Background, move |answer| {
                    desk.written(answer, part);
                });
            }
            Direction::Read => {
                desk.lock().away += 1;
                engine.call(direction, &file, offset, block, Priority::Urgent, move |answer| {
                    desk.land(answer, tensor, start, part);
                });
            }
        }
    }

    fn written(self: Arc<Self>, answer: Result<Block, Failed>, part: Part) {
        part.answer(answer.map(drop).map_err(Error::from));
        self.bell().ring();
    }

    fn land(self: Arc<Self>, answer: Result<Block, Failed>, tensor: Arc<Tensor>, start: usize, part: Part) {
        match answer {
            Ok(block) => {
                let mut state = self.lock();
                state.landed.push_back(Landed { block, tensor, start, part });
                state.away -= 1;
            }
            Err(failed) => {
                drop(tensor);
                part.answer(Err(failed.into()));
                self.lock().away -= 1;
            }
        }
        self.bell().ring();
    }
}

impl State {
    fn next(&mut self) -> Option<Task> {
        if let Some(landed) = self.landed.pop_front() {
            return Some(Task::CopyOut(landed));
        }
        while let Some(job) = self.jobs.front_mut() {
            job.after.retain(|earlier| !earlier.is_over());
            if !job.after.is_empty() {
                return None;
            }
            let Some(load) = job.loads.pop_front() else {
                self.jobs.pop_front();
                continue;
            };
            if load.part.is_pointless() {
                load.part.answer(Ok(()));
                continue;
            }
            let block = match load.piece.way {
                Way::Direct => None,
                Way::Copied => {
                    let pool = self.pool.as_ref().expect("whoever brought the job has made it");
                    match pool.try_lease(load.piece.range.len()) {
                        Ok(block) => Some(block),
                        Err(_exhausted) => {
                            job.loads.push_front(load);
                            return None;
                        }
                    }
                }
            };
            let Job { direction, tensor, file, offset, .. } = &*job;
            let (tensor, file) = (Arc::clone(tensor), file.clone());
            let step = Step { direction: *direction, tensor, file, offset: *offset };
            return Some(Task::Begin { step, load, block });
        }
        (self.is_closing && self.away == 0).then_some(Task::End)
    }
}

/// Moves a piece from where it lies.
pub(super) fn begin(engine: &Engine, job: &Job, load: Load, bell: Bell) {
    let Job { direction, tensor, file, offset, .. } = job;
    let (tensor, file) = (Arc::clone(tensor), file.clone());
    begin_direct(engine, Step { direction: *direction, tensor, file, offset: *offset }, load, bell);
}

fn begin_direct(engine: &Engine, step: Step, load: Load, bell: Bell) {
    let Step { direction, tensor, file, offset } = step;
    let Load { piece, part } = load;
    let offset = offset + piece.range.start as u64;
    let priority = match direction {
        Direction::Read => Priority::Urgent,
        Direction::Write => Priority::Background,
    };
    let block = tensor.block(piece.range);
    engine.call(direction, &file, offset, block, priority, move |answer| {
        part.answer(answer.map(drop).map_err(Error::from));
        bell.ring();
    });
}

/// Counts a worker out, however it ends.
struct Leaving(Arc<Desk>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.news.notify_all();
    }
}
