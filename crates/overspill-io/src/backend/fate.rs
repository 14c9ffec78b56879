//! What the simulated kernel does to a transfer, decided in plain data.
//!
//! A decision is a pure function of the seed, the transfer's number, its direction and its length: who submits the
//! same transfers in the same order meets the same faults, on every machine. Each fault has a rate of its own and is
//! drawn for by itself; the first of them that hits, in the order of [`SimConfig`]'s fields, is what happens.

use rustix::io::Errno;

use crate::error::Direction;

/// The faults of a simulated way to the kernel, as rates per thousand transfers.
///
/// An operation is as many transfers as it has chunks, and one more for every answer that was short or asked for
/// another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimConfig {
    /// Where all decisions come from.
    pub seed: u64,
    /// A transfer takes from one to this many ticks of a clock that jumps from answer to answer; 0 counts as 1. The
    /// longer, the more overtake each other.
    pub latency_ticks_max: u32,
    /// Transfers that are never answered.
    pub stuck_per_mille: u16,
    /// Answers that a signal came first, `EINTR`.
    pub interrupted_per_mille: u16,
    /// Answers to try again, `EAGAIN`.
    pub again_per_mille: u16,
    /// Reads that fail with `EIO`.
    pub read_error_per_mille: u16,
    /// Writes that fail with `EIO` and change nothing.
    pub write_error_per_mille: u16,
    /// Writes that fail with `EIO` after some of their sectors, not always the first ones, were written.
    pub torn_per_mille: u16,
    /// Writes that fail with `ENOSPC` and change nothing.
    pub no_space_per_mille: u16,
    /// Writes that move no byte and name no error. Reads have no such fault, for the kernel means the end of the file
    /// by that answer.
    pub write_zero_per_mille: u16,
    /// Transfers of which only a part is moved: any part through the page cache, a multiple of the file's alignment
    /// past it.
    pub short_per_mille: u16,
    /// No file has room for this byte and those behind it: writes end before it, and fail with `ENOSPC` there.
    pub no_space_from: u64,
    /// Bytes that the device may have lost when its power goes, old and new contents together: see
    /// [`Power`](crate::Power). 0 is a device whose power does not go.
    pub cache_bytes: usize,
}

impl SimConfig {
    /// Nothing fails; answers come in any order.
    #[must_use]
    pub fn calm(seed: u64) -> SimConfig {
        SimConfig {
            seed,
            latency_ticks_max: 64,
            stuck_per_mille: 0,
            interrupted_per_mille: 0,
            again_per_mille: 0,
            read_error_per_mille: 0,
            write_error_per_mille: 0,
            torn_per_mille: 0,
            no_space_per_mille: 0,
            write_zero_per_mille: 0,
            short_per_mille: 0,
            no_space_from: u64::MAX,
            cache_bytes: 0,
        }
    }

    /// Everything happens, but every transfer is answered. Of operations of ten chunks about half succeed.
    #[must_use]
    pub fn stormy(seed: u64) -> SimConfig {
        SimConfig {
            interrupted_per_mille: 50,
            again_per_mille: 50,
            read_error_per_mille: 20,
            write_error_per_mille: 15,
            torn_per_mille: 15,
            no_space_per_mille: 10,
            write_zero_per_mille: 10,
            short_per_mille: 200,
            ..SimConfig::calm(seed)
        }
    }

    /// What happens to the transfer with this number, which wants `length` bytes moved.
    pub(crate) fn decide(&self, number: u64, direction: Direction, length: usize) -> Decision {
        let way = match direction {
            Direction::Read => 0,
            Direction::Write => 1,
        };
        let mut random = Random::new(&[self.seed, number, way, length as u64]);
        let latency_ticks = 1 + random.below(u64::from(self.latency_ticks_max.max(1)));
        let fate = match direction {
            _ if random.hits(self.stuck_per_mille) => Fate::Stuck,
            _ if random.hits(self.interrupted_per_mille) => Fate::Fails(Errno::INTR),
            _ if random.hits(self.again_per_mille) => Fate::Fails(Errno::AGAIN),
            Direction::Read if random.hits(self.read_error_per_mille) => Fate::Fails(Errno::IO),
            Direction::Write if random.hits(self.write_error_per_mille) => Fate::Fails(Errno::IO),
            Direction::Write if random.hits(self.torn_per_mille) => Fate::Torn(random),
            Direction::Write if random.hits(self.no_space_per_mille) => Fate::Fails(Errno::NOSPC),
            Direction::Write if random.hits(self.write_zero_per_mille) => Fate::Zero,
            _ if random.hits(self.short_per_mille) => Fate::Short(random),
            _ => Fate::Whole,
        };
        Decision { latency_ticks, fate }
    }
}

/// What happens to one transfer, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// From its submission to its answer; at least 1.
    pub(crate) latency_ticks: u64,
    pub(crate) fate: Fate,
}

/// What happens to one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// All of it is moved, as far as the file allows.
    Whole,
    /// A part of it, drawn from here, is moved.
    Short(Random),
    /// Some of its sectors, drawn from here, are written, and then it fails.
    Torn(Random),
    /// Nothing is moved, for this reason.
    Fails(Errno),
    /// Nothing is moved, for no reason.
    Zero,
    /// It never comes back.
    Stuck,
}

/// A generator of numbers that a program which is not an adversary cannot tell from random ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// A generator of its own for each sequence of `words`.
    pub(crate) fn new(words: &[u64]) -> Random {
        let state = words.iter().fold(0, |state, &word| Random { state: state ^ word }.next());
        Random { state }
    }

    pub(crate) fn next(&mut self) -> u64 {
        // Steps by an odd number reach every state; multiplying and folding spreads each bit over all others.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
            word = (word ^ (word >> 30)).wrapping_mul(multiplier);
        }
        word ^ (word >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True in `per_mille` of a thousand cases.
    pub(crate) fn hits(&mut self, per_mille: u16) -> bool {
        self.below(1000) < u64::from(per_mille)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_depends_on_its_transfer_alone() {
        let (storm, other) = (SimConfig::stormy(1), SimConfig::stormy(2));
        let decide = |config: SimConfig| {
            let direction = |number| if number % 3 == 0 { Direction::Read } else { Direction::Write };
            (0..500).map(|number| config.decide(number, direction(number), 4096)).collect::<Vec<_>>()
        };
        assert_eq!(decide(storm), decide(storm));
        assert_ne!(decide(storm), decide(other));
        let at = storm.decide(7, Direction::Write, 4096);
        assert_eq!(at, decide(storm)[7]);
        assert_ne!(at.latency_ticks, storm.decide(7, Direction::Write, 8192).latency_ticks);
    }

    #[test]
    fn a_storm_has_every_fault_but_stuck_transfers_and_a_calm_has_none() {
        let fates = |config: SimConfig, direction| -> Vec<Fate> {
            (0..5000).map(|number| config.decide(number, direction, 4096).fate).collect()
        };
        for direction in [Direction::Read, Direction::Write] {
            assert!(fates(SimConfig::calm(3), direction).iter().all(|&fate| fate == Fate::Whole));
            let storm = fates(SimConfig::stormy(3), direction);
            let write = direction == Direction::Write;
            let count = |wanted: fn(&Fate) -> bool| storm.iter().filter(|fate| wanted(fate)).count();
            for errno in [Errno::INTR, Errno::AGAIN, Errno::IO] {
                assert!(storm.contains(&Fate::Fails(errno)), "{errno}");
            }
            assert_eq!(storm.contains(&Fate::Fails(Errno::NOSPC)), write);
            assert_eq!(storm.contains(&Fate::Zero), write);
            assert_eq!(count(|fate| matches!(fate, Fate::Torn(_))) > 0, write);
            assert_eq!(count(|&fate| fate == Fate::Stuck), 0);
            let (short, whole) =
                (count(|fate| matches!(fate, Fate::Short(_))), count(|&fate| fate == Fate::Whole));
            assert!((700..1100).contains(&short) && whole > 3000, "{short} short, {whole} whole");
        }
    }

    #[test]
    fn a_rate_of_a_thousand_hits_always() {
        let config = SimConfig { stuck_per_mille: 1000, ..SimConfig::calm(0) };
        assert!((0..100).all(|number| config.decide(number, Direction::Read, 1).fate == Fate::Stuck));
    }
}
