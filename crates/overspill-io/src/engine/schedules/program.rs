//! What a seed stands for: files, and rounds of operations on them.

use std::time::Duration;

use crate::SimConfig;
use crate::backend::fate::Random;
use crate::engine::queue::{Limits, Priority};

/// Operations begin and end below this byte of their file.
pub(super) const FILE_BYTES: usize = 256 << 10;
/// The longest operation.
pub(super) const LENGTH_MAX: usize = 48 << 10;
/// Of this many operations, the ones that begin and end at any byte.
const UNALIGNED_PER_MILLE: u16 = 500;
/// What the others begin and end at multiples of; no file asks for more.
const UNIT: usize = 4096;

/// Everything that happens, but for what the simulated kernel decides.
#[derive(Debug)]
pub(super) struct Program {
    seed: u64,
    pub(super) way: Way,
    pub(super) chunk_bytes: usize,
    pub(super) depth: usize,
    weather: SimConfig,
    pub(super) places: Vec<Place>,
    /// Operations of one round are in flight together.
    pub(super) rounds: Vec<Vec<Step>>,
}

/// Who carries a program out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A driver alone.
    Driver,
    /// An engine and its thread.
    Engine(Ending),
}

/// When an engine is shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    AfterAnswers,
    WithOperationsInFlight,
}

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In memory; direct, unless the alignment is 1.
    Memory { alignment: usize },
    /// On a real disk, and direct if it can be.
    Disk,
}

/// One operation.
#[derive(Debug)]
pub(super) struct Step {
    /// Index of the file.
    pub(super) file: usize,
    pub(super) kind: Kind,
    pub(super) offset: u64,
    pub(super) length: usize,
    pub(super) priority: Priority,
    /// Whether the ticket is dropped at once.
    pub(super) dropped: bool,
    /// What its block is filled with; of every step another.
    pub(super) tag: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    WriteBehind,
}

impl Step {
    /// The bytes of the file that it is about.
    pub(super) fn range(&self) -> std::ops::Range<usize> {
        let start = self.offset as usize;
        start..start + self.length
    }
}

impl Program {
    pub(super) fn of(seed: u64) -> Program {
        let mut random = Random::new(&[seed]);
        let way = match seed % 8 {
            3 => Way::Engine(Ending::AfterAnswers),
            7 => Way::Engine(Ending::WithOperationsInFlight),
            _ => Way::Driver,
        };
        let weather = if random.hits(250) { SimConfig::calm(seed) } else { SimConfig::stormy(seed) };
        let weather = SimConfig {
            stuck_per_mille: if random.hits(60) { 10 + random.below(300) as u16 } else { 0 },
            no_space_from: if random.hits(150) { random.below(FILE_BYTES as u64) } else { u64::MAX },
            ..weather
        };
        let place = |random: &mut Random| match random.below(16) {
            0 => Place::Disk,
            1..6 => Place::Memory { alignment: 1 },
            6..12 => Place::Memory { alignment: 512 },
            _ => Place::Memory { alignment: 4096 },
        };
        let places: Vec<Place> = (0..1 + random.below(3)).map(|_| place(&mut random)).collect();
        let mut tags = 1..;
        let mut round = |random: &mut Random| -> Vec<Step> {
            (0..1 + random.below(12)).zip(&mut tags).map(|(_, tag)| step(random, places.len(), tag)).collect()
        };
        let rounds = (0..2 + random.below(4)).map(|_| round(&mut random)).collect();
        let chunk_bytes = UNIT << random.below(3);
        let depth = 1 + random.below(16) as usize;
        Program { seed, way, chunk_bytes, depth, weather, places, rounds }
    }

    /// The faults of one round.
    pub(super) fn sim(&self, round: u64) -> SimConfig {
        SimConfig { seed: Random::new(&[self.seed, round]).next(), ..self.weather }
    }

    /// How many blocks it needs: all of a round, and if some do not come home, all of every round.
    pub(super) fn blocks(&self) -> usize {
        let steps = self.rounds.iter().map(Vec::len);
        if self.stuck() { steps.sum() } else { steps.max().unwrap_or(0) }
    }

    /// Whether it has transfers that never end.
    pub(super) fn stuck(&self) -> bool {
        self.weather.stuck_per_mille > 0
    }

    /// What may be with the kernel at a time; few enough bounce blocks that some operations have to step aside.
    pub(super) fn limits(&self) -> Limits {
        Limits { depth: self.depth, bytes: self.depth * self.chunk_bytes, detours: 2 }
    }

    /// Time for what is not stuck, and little more where something is.
    pub(super) fn patience(&self) -> Duration {
        if self.stuck() { Duration::from_millis(5) } else { Duration::from_secs(60) }
    }

    /// Whether nothing but the seed decides what happens: no clock, no second thread.
    pub(super) fn is_deterministic(&self) -> bool {
        self.way == Way::Driver && !self.stuck()
    }
}

fn step(random: &mut Random, files: usize, tag: u64) -> Step {
    let kind = match random.below(5) {
        0 | 1 => Kind::Read,
        2 | 3 => Kind::Write,
        _ => Kind::WriteBehind,
    };
    let (offset, length) = extent(random);
    Step {
        file: random.below(files as u64) as usize,
        kind,
        offset: offset as u64,
        length,
        priority: if random.hits(500) { Priority::Urgent } else { Priority::Background },
        dropped: random.hits(100),
        tag,
    }
}

/// Where a step begins and how long it is: the one place that decides about alignment.
fn extent(random: &mut Random) -> (usize, usize) {
    let unit = if random.hits(UNALIGNED_PER_MILLE) { 1 } else { UNIT };
    let offset = random.below((FILE_BYTES / unit) as u64) as usize * unit;
    // A few are very short, because that is where ends meet.
    let length_max = if random.hits(200) { 2 * UNIT } else { LENGTH_MAX };
    let length = random.below((length_max / unit) as u64 + 1) as usize * unit;
    (offset, length.min(FILE_BYTES - offset))
}

/// Fills a block with bytes that tell tags, and places within a block, apart.
pub(super) fn fill(bytes: &mut [u8], tag: u64) {
    let mut random = Random::new(&[tag]);
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
    }
}
