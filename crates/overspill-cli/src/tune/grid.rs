//! The grid of chunk lengths and queue depths, and which point of it is best.

use serde::Serialize;

use crate::bench::pairs::median;

/// Lengths of chunks that are tried, in bytes.
const CHUNKS: [usize; 6] = [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20];

/// Numbers of chunks with the kernel that are tried.
const DEPTHS: [usize; 5] = [4, 8, 16, 32, 64];

/// More bytes in motion than this are not tried: a run that swaps needs its memory for other things.
const MEMORY_BYTES_MAX: usize = 128 << 20;

/// A point has no more neighbors.
pub(crate) const NEIGHBORS_MAX: usize = 8;

/// What is slower than the fastest by less than this part is as good, and may be better in another way.
const TOLERANCE: f64 = 0.03;

/// A chunk length and a queue depth, as places in the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    chunk: usize,
    depth: usize,
}

/// Rates in 10⁹ bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Speed {
    pub(crate) read_gbps: f64,
    pub(crate) write_gbps: f64,
}

/// A setting and what came of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured<T> {
    pub(crate) what: T,
    pub(crate) speed: Speed,
    /// What it has in motion; only comparable among settings of one kind.
    memory: usize,
}

/// What can be measured.
pub(crate) trait Setting: Copy {
    /// What it has in motion, in a unit of its kind.
    fn memory(self) -> usize;
}

impl Setting for Point {
    fn memory(self) -> usize {
        self.memory_bytes()
    }
}

/// A number of rings, which have the same in motion each.
impl Setting for usize {
    fn memory(self) -> usize {
        self
    }
}

impl Point {
    /// 1 MiB and 32, as an engine has it of itself.
    pub(crate) const DEFAULT: Self = Self { chunk: 2, depth: 3 };

    pub(crate) fn chunk_bytes(self) -> usize {
        CHUNKS[self.chunk]
    }

    pub(crate) fn queue_depth(self) -> usize {
        DEPTHS[self.depth]
    }

    pub(crate) fn memory_bytes(self) -> usize {
        self.chunk_bytes() * self.queue_depth()
    }

    /// The points around this one.
    pub(crate) fn neighbors(self) -> impl Iterator<Item = Self> {
        all().filter(move |&point| {
            point != self && point.chunk.abs_diff(self.chunk) <= 1 && point.depth.abs_diff(self.depth) <= 1
        })
    }
}

/// Every point that is not too large.
fn all() -> impl Iterator<Item = Point> {
    let points =
        (0..CHUNKS.len()).flat_map(|chunk| (0..DEPTHS.len()).map(move |depth| Point { chunk, depth }));
    points.filter(|point| point.memory_bytes() <= MEMORY_BYTES_MAX)
}

/// Every second point in either direction.
pub(crate) fn coarse() -> Vec<Point> {
    all().filter(|point| point.chunk.is_multiple_of(2) && point.depth.is_multiple_of(2)).collect()
}

/// All lengths and depths, for rows and columns.
pub(crate) fn rows() -> impl Iterator<Item = (usize, Vec<Point>)> {
    let row = |chunk| (0..DEPTHS.len()).map(|depth| Point { chunk, depth }).collect();
    CHUNKS.iter().enumerate().map(move |(chunk, &bytes)| (bytes, row(chunk)))
}

pub(crate) fn depths() -> impl Iterator<Item = usize> {
    DEPTHS.into_iter()
}

impl Speed {
    /// The rate of traffic that is half reads and half writes, one after the other.
    pub(crate) fn harmonic_mean(self) -> f64 {
        2.0 / (1.0 / self.read_gbps + 1.0 / self.write_gbps)
    }
}

impl<T: Setting> Measured<T> {
    pub(crate) fn new(what: T, speeds: &[Speed]) -> Self {
        let read_gbps = median(speeds.iter().map(|speed| speed.read_gbps).collect());
        let write_gbps = median(speeds.iter().map(|speed| speed.write_gbps).collect());
        Self { what, speed: Speed { read_gbps, write_gbps }, memory: what.memory() }
    }
}

/// The one with the highest rate.
pub(crate) fn fastest<T>(found: &[Measured<T>]) -> Option<&Measured<T>> {
    found.iter().max_by(|a, b| a.speed.harmonic_mean().total_cmp(&b.speed.harmonic_mean()))
}

/// The one with the least in motion of those that are as good as the fastest; of several, the fastest.
pub(crate) fn choose<T>(found: &[Measured<T>]) -> Option<&Measured<T>> {
    let enough = (1.0 - TOLERANCE) * fastest(found)?.speed.harmonic_mean();
    let good = found.iter().filter(|measured| measured.speed.harmonic_mean() >= enough);
    good.min_by(|a, b| {
        let faster = || b.speed.harmonic_mean().total_cmp(&a.speed.harmonic_mean());
        a.memory.cmp(&b.memory).then_with(faster)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(what: Point, gbps: f64) -> Measured<Point> {
        Measured::new(what, &[Speed { read_gbps: gbps, write_gbps: gbps }])
    }

    #[test]
    fn less_memory_wins_among_those_that_are_as_good() {
        let [small, middle, large] = [0, 1, 2].map(|depth| Point { chunk: 2, depth });
        let found = [measured(large, 4.0), measured(middle, 3.9), measured(small, 3.5)];
        assert_eq!(fastest(&found).unwrap().what, large);
        assert_eq!(choose(&found).unwrap().what, middle);
        let same_memory = Point { chunk: 1, depth: 2 };
        let found = [measured(middle, 3.9), measured(same_memory, 4.0)];
        assert_eq!(choose(&found).unwrap().what, same_memory);
        assert!(choose::<Point>(&[]).is_none());
    }

    #[test]
    fn slow_writes_are_not_made_up_for_by_fast_reads() {
        let speed = |read_gbps, write_gbps| Speed { read_gbps, write_gbps };
        assert!(speed(3.0, 3.0).harmonic_mean() > speed(10.0, 1.0).harmonic_mean());
        let median = Measured::new(Point::DEFAULT, &[speed(1.0, 9.0), speed(2.0, 8.0), speed(9.0, 1.0)]);
        assert_eq!(median.speed, speed(2.0, 8.0));
    }

    #[test]
    fn the_grid_is_bounded_and_around_every_point_there_are_others() {
        assert_eq!((Point::DEFAULT.chunk_bytes(), Point::DEFAULT.queue_depth()), (1 << 20, 32));
        for point in all() {
            assert!(point.memory_bytes() <= MEMORY_BYTES_MAX);
            let neighbors = point.neighbors().count();
            assert!((1..=NEIGHBORS_MAX).contains(&neighbors));
        }
        assert!(coarse().len() >= 8 && coarse().iter().all(|point| all().any(|other| other == *point)));
    }
}
