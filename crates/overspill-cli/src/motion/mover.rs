//! An engine and its memory, as a program that swaps uses them: a fixed number of blocks go round, each read or written
//! and at once used again.

use std::collections::VecDeque;
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use overspill_io::{Block, BlockClass, Direction, Engine, EngineConfig, Pool, Priority, Ticket};
use overspill_train::check_stop;

use super::files::FileSet;
use super::marks;
use crate::output;

/// Moves the blocks of file sets.
#[derive(Debug)]
pub(crate) struct Mover {
    engine: Engine,
    pool: Pool,
    /// Blocks in motion.
    blocks: usize,
    stop: Arc<AtomicBool>,
}

/// How closely is looked at what was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// At both ends of every block: good enough while time is taken.
    Ends,
    /// At every byte.
    Bytes,
}

/// One block to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) block: usize,
    pub(crate) direction: Direction,
}

/// How much was moved in what time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    pub(crate) bytes: u64,
    pub(crate) elapsed: Duration,
}

impl Moved {
    /// The rate, in 10⁹ bytes per second.
    pub(crate) fn gbps(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64() / 1e9
    }
}

impl AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.elapsed += other.elapsed;
    }
}

/// A block on its way.
struct Flight {
    step: Step,
    ticket: Ticket,
}

impl Mover {
    /// Starts an engine with a quarter more blocks of each length than it has chunks with the kernel: the next chunk is
    /// there when one comes back, before anybody has looked at that. Still more memory in motion would fall out of the
    /// processor's cache and slow everybody down.
    pub(crate) fn start(
        config: EngineConfig,
        block_bytes: &[usize],
        stop: Arc<AtomicBool>,
    ) -> anyhow::Result<Self> {
        let blocks = config.queue_depth + config.queue_depth.div_ceil(4);
        let class = |&block_bytes| BlockClass { name: "bench", block_bytes, count: blocks };
        let pool = Pool::new(&block_bytes.iter().map(class).collect::<Vec<_>>())?;
        let engine = Engine::start(config, &pool)?;
        if let Some(reason) = engine.report().degraded {
            bail!("the engine is degraded, and its figures would mislead: {reason}");
        }
        Ok(Self { engine, pool, blocks, stop })
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Number of blocks in motion.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Says what else there is to say about the engine.
    pub(crate) fn say_notes(&self) {
        for note in self.engine.report().notes {
            output::say(&format!("note: {note}"));
        }
    }

    /// Takes the steps in their order, as many at a time as there are blocks; two steps of one block one after the other.
    pub(crate) fn run(
        &self,
        set: &mut FileSet,
        steps: impl Iterator<Item = Step>,
        look: Look,
    ) -> anyhow::Result<Moved> {
        let block_bytes = set.shape().block_bytes;
        let mut idle = self.pool.lease_all(&vec![block_bytes; self.blocks])?;
        idle.iter_mut().for_each(|block| marks::fill(block));
        let mut flights: VecDeque<Flight> = VecDeque::with_capacity(self.blocks);
        let mut moved = 0;
        let started = Instant::now();
        for step in steps {
            check_stop(&self.stop)?;
            while flights.iter().any(|flight| flight.step.block == step.block) {
                idle.push(land(set, &mut flights, look)?);
            }
            let mut block = match idle.pop() {
                Some(block) => block,
                None => land(set, &mut flights, look)?,
            };
            moved += 1;
            if step.direction == Direction::Write {
                marks::stamp(&mut block, step.block, set.next_version(step.block));
            }
            let (file, offset) = set.place(step.block);
            let ticket = match step.direction {
                Direction::Read => self.engine.read(file, offset, block, Priority::Urgent),
                Direction::Write => self.engine.write(file, offset, block, Priority::Urgent),
            };
            flights.push_back(Flight { step, ticket });
        }
        while !flights.is_empty() {
            drop(land(set, &mut flights, look)?);
        }
        Ok(Moved { bytes: moved * block_bytes as u64, elapsed: started.elapsed() })
    }

    /// Moves every block once, in the order of the files.
    pub(crate) fn pass(&self, set: &mut FileSet, direction: Direction, look: Look) -> anyhow::Result<Moved> {
        let steps = (0..set.shape().blocks()).map(move |block| Step { block, direction });
        self.run(set, steps, look)
    }

    /// Writes every block once.
    pub(crate) fn fill(&self, set: &mut FileSet) -> anyhow::Result<()> {
        self.pass(set, Direction::Write, Look::Ends).map(drop)
    }

    /// Reads every block once, and looks at every byte.
    pub(crate) fn check(&self, set: &mut FileSet) -> anyhow::Result<()> {
        self.pass(set, Direction::Read, Look::Bytes).map(drop)
    }
}

/// Waits for a block that is back, or else for the oldest, and looks at what was read.
fn land(set: &FileSet, flights: &mut VecDeque<Flight>, look: Look) -> anyhow::Result<Block> {
    // Writes overtake reads; the one that is back is used again before the one that is not is waited for.
    let back = flights.iter().position(|flight| flight.ticket.is_done()).unwrap_or(0);
    let Some(Flight { step, ticket }) = flights.remove(back) else { bail!("nothing is in motion") };
    let block = ticket.wait().map_err(|failed| failed.error)?;
    if step.direction == Direction::Read {
        let right = marks::is_stamped(&block, step.block, set.version(step.block))
            && (look == Look::Ends || marks::is_filled(&block));
        let (file, offset) = set.place(step.block);
        ensure!(right, "the block at byte {offset} of {} is not what was written", file.path().display());
    }
    Ok(block)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::motion::files::Shape;

    /// A folder on the disk that this was built on: others, such as those in memory, may not do direct I/O.
    fn beside_this_program() -> tempfile::TempDir {
        tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
    }

    fn mover_and_files(folder: &tempfile::TempDir, files: usize) -> (Mover, FileSet) {
        let config = EngineConfig { queue_depth: 4, chunk_bytes: 4096, ..EngineConfig::default() };
        let mover = Mover::start(config, &[8192], Arc::default()).unwrap();
        let shape = Shape { files, blocks_per_file: 5, block_bytes: 8192 };
        let set = FileSet::create(mover.engine(), folder.path(), "test".to_owned(), shape).unwrap();
        (mover, set)
    }

    #[test]
    fn what_is_written_is_found_and_nothing_is_left_behind() {
        let folder = beside_this_program();
        let (mover, mut set) = mover_and_files(&folder, 3);
        for _ in 0..2 {
            mover.fill(&mut set).unwrap();
            mover.check(&mut set).unwrap();
        }
        assert_eq!(mover.pass(&mut set, Direction::Read, Look::Ends).unwrap().bytes, 15 * 8192);
        set.renew(mover.engine()).unwrap();
        assert!(mover.check(&mut set).is_err(), "fresh files hold nothing");
        mover.fill(&mut set).unwrap();
        set.reshape(4096);
        assert_eq!((set.shape().blocks(), set.blocks_written()), (30, 0));
        drop(set);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_byte_that_somebody_else_wrote_is_found() {
        let folder = beside_this_program();
        let (mover, mut set) = mover_and_files(&folder, 2);
        mover.fill(&mut set).unwrap();
        let path = set.place(7).0.path().to_owned();
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all_at(&[0], 2 * 8192 + 4096)
            .unwrap();
        assert!(mover.pass(&mut set, Direction::Read, Look::Ends).is_ok(), "the ends are as they were");
        let error = mover.check(&mut set).unwrap_err().to_string();
        assert!(error.contains("byte 16384 of ") && error.contains("test.1"), "{error}");
    }

    #[test]
    fn steps_of_one_block_are_taken_one_after_the_other() {
        let folder = beside_this_program();
        let (mover, mut set) = mover_and_files(&folder, 1);
        let steps = [Direction::Write, Direction::Write, Direction::Read, Direction::Write, Direction::Read];
        let steps = steps.map(|direction| Step { block: 2, direction });
        let moved = mover.run(&mut set, steps.into_iter().cycle().take(50), Look::Bytes).unwrap();
        assert_eq!(moved.bytes, 50 * 8192);
        assert!(folder.path().join("test.0").exists());
    }
}
