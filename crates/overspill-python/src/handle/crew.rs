//! The threads that copy between tensors and blocks, begin what has to wait, and compare what was moved.
//!
//! ```text
//! submit ──► jobs, in the order of their calls ──► worker: lease, copy in ──► Engine::call ──► write is home
//!                                                  worker: lease ───────────► Engine::call ──► landed ──► worker: copy out
//! ```
//!
//! No worker waits for a device: completions come by calls of the engine's thread, which only put the landed block in the
//! queue. What bounds the memory is the pool: a piece that finds no free block waits for one, and so does everything
//! behind it. A job that has to wait for earlier operations holds up those behind it, too. That ends: what a job waits for has
//! entered its queue before it, this one or another handle's ([`neighbors`](super::neighbors)), or has nothing to do there.
//! Whoever registers operations queues their jobs under the same lock, or two of them would wait for each other.
//!
//! An operation is validated when all its other parts have answered, before anything begins that has to wait for it.
//! Workers end when they are told to, with nothing left to do.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use overspill_io::{Block, Direction, Engine, Failed, File, Pool, Priority};

use super::file::Witness;
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

/// What of an operation is not begun by its caller.
pub(super) struct Job {
    pub(super) step: Step,
    pub(super) loads: VecDeque<Load>,
    /// Those that have to be over first.
    pub(super) after: Vec<Arc<Operation>>,
    pub(super) validation: Option<Validation>,
}

/// What all pieces of a job have in common.
#[derive(Clone)]
pub(super) struct Step {
    pub(super) direction: Direction,
    pub(super) tensor: Arc<Tensor>,
    pub(super) file: File,
    /// Where in the file the tensor begins.
    pub(super) offset: u64,
}

/// What is to be compared once it has moved.
pub(super) struct Validation {
    pub(super) witness: Witness,
    pub(super) tensor: Arc<Tensor>,
    pub(super) offset: u64,
    pub(super) part: Part,
}

impl Validation {
    fn carry_out(self) {
        let Self { witness, tensor, offset, part } = self;
        let compared = if part.is_pointless() { Ok(()) } else { witness.compare(offset, &tensor) };
        drop((witness, tensor));
        part.answer(compared);
    }
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
    /// Of operations that have begun, or whose jobs are queued.
    validations: Vec<Validation>,
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
    Validate(Validation),
    Begin {
        step: Step,
        load: Load,
        block: Option<Block>,
    },
    /// Another part of its operation has failed.
    Skip(Part),
    End,
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
            validations: Vec::new(),
            pool: None,
            away: 0,
            is_closing: false,
            workers: 0,
        };
        Self { desk: Arc::new(Desk { state: Mutex::new(state), news: Condvar::new() }), engine, size }
    }

    /// Sees to it that there are blocks to copy through.
    pub(super) fn prepare_blocks(&self) -> Result<(), Error> {
        let mut state = self.desk.lock();
        if state.pool.is_none() {
            state.pool = Some(pinned::pool("copies", PIECE_BYTES, BLOCKS)?);
        }
        Ok(())
    }

    /// Takes a job on, for which blocks are prepared if it copies anything.
    ///
    /// # Errors
    /// If there is nobody to do it. Nothing of it was begun.
    pub(super) fn queue(&self, mut job: Job) -> Result<(), Error> {
        let mut state = self.desk.lock();
        self.staff(&mut state)?;
        state.validations.extend(job.validation.take());
        state.jobs.push_back(job);
        self.desk.news.notify_all();
        Ok(())
    }

    /// Whether anything is queued that has not begun.
    pub(super) fn has_jobs(&self) -> bool {
        !self.desk.lock().jobs.is_empty()
    }

    /// Sees to it that there are workers.
    fn staff(&self, state: &mut State) -> Result<(), Error> {
        while state.workers < self.size {
            let (desk, engine) = (Arc::clone(&self.desk), self.engine.clone());
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
                Task::Validate(validation) => {
                    validation.carry_out();
                    self.bell().ring();
                }
                Task::Begin { step, load, block } => match block {
                    None => begin_direct(engine, step, load, self.bell()),
                    Some(block) => self.begin_copied(engine, step, load, block),
                },
                Task::Skip(part) => {
                    part.answer(Ok(()));
                    self.bell().ring();
                }
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
        loop {
            if let Some(landed) = self.landed.pop_front() {
                return Some(Task::CopyOut(landed));
            }
            let moved = self.validations.iter().position(|validation| validation.part.is_last());
            if let Some(moved) = moved {
                return Some(Task::Validate(self.validations.swap_remove(moved)));
            }
            let Some(job) = self.jobs.front_mut() else {
                return (self.is_closing && self.away == 0 && self.validations.is_empty())
                    .then_some(Task::End);
            };
            while job.after.pop_if(|earlier| earlier.is_over()).is_some() {}
            if !job.after.is_empty() {
                return None;
            }
            let Some(load) = job.loads.pop_front() else {
                self.jobs.pop_front();
                continue;
            };
            if load.part.is_pointless() {
                // Not here: what waits for the operation is called, other handles' workers, too.
                return Some(Task::Skip(load.part));
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
            return Some(Task::Begin { step: job.step.clone(), load, block });
        }
    }
}

/// Moves a piece from where it lies.
pub(super) fn begin_direct(engine: &Engine, step: Step, load: Load, bell: Bell) {
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
