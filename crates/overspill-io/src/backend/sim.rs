//! A kernel that is simulated: real bytes in real files, but answers, their order and their failures by seed.
//!
//! A transfer is given its fate and the time of its answer when it is submitted, by [`SimConfig`]. Time is virtual:
//! [`Sim::park`] sets the clock to the next answer that is due and carries the transfer out at that moment, so nobody
//! sleeps while anything is in flight, and what overtakes does so in the file too. Transfers that are stuck stay here
//! until the end. What a direct file asks of transfers is checked, whatever is below the file really takes.
//!
//! Every byte reaches a file through [`land`], where a device that may lose its power remembers what was written since
//! the last flush.
//!
//! It ends like a kernel whose ring is torn down: what is not back then keeps its memory for good.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};
use rustix::io::Errno;

use super::doorbell::{Doorbell, Wire};
use super::fate::{Fate, Random, SimConfig};
use super::power::Power;
use super::threads::Event;
use super::{Arrival, Backend, BackendKind, Transfer};
use crate::error::Direction;
use crate::file::File;

/// What a disk writes as a whole or not at all, at least.
pub(crate) const SECTOR_BYTES: usize = 512;

/// A simulated way to the kernel.
pub(crate) struct Sim {
    config: SimConfig,
    doorbell: Arc<Doorbell>,
    power: Option<Power>,
    rings: Receiver<Event>,
    now_ticks: u64,
    /// Transfers submitted so far.
    submitted: u64,
    /// By the time of the answer, and then by the order of submission.
    flying: BTreeMap<(u64, u64), (Transfer, Fate)>,
    stuck: Vec<Transfer>,
}

impl Sim {
    pub(crate) fn start(config: SimConfig) -> Sim {
        let (ring, rings) = bounded(1);
        let power = (config.cache_bytes > 0).then(|| Power::new(config.seed, config.cache_bytes));
        let doorbell = Arc::new(Doorbell::powered(Wire::Channel(ring), power.clone()));
        let (flying, stuck) = (BTreeMap::new(), Vec::new());
        Sim { config, doorbell, power, rings, now_ticks: 0, submitted: 0, flying, stuck }
    }

    /// Carries a transfer out as its fate wants, and answers as the kernel would.
    fn carry_out(&self, transfer: &mut Transfer, fate: Fate) -> Result<usize, Errno> {
        let alignment = transfer.file.alignment();
        let (done, position, wanted) = (transfer.chunk.done, transfer.position(), transfer.chunk.wanted());
        let address = transfer.block[done..].as_ptr().addr();
        if transfer.file.direct()
            && !(position.is_multiple_of(alignment as u64)
                && wanted.is_multiple_of(alignment)
                && address.is_multiple_of(alignment))
        {
            return Err(Errno::INVAL);
        }
        if let Some(power) = &self.power {
            power.check()?;
        }
        if let Fate::Fails(errno) = fate {
            return Err(errno);
        }
        if fate == Fate::Zero {
            return Ok(0);
        }
        let length = match transfer.direction {
            Direction::Read => wanted,
            Direction::Write => self.room(position, wanted, alignment)?,
        };
        let length = if let Fate::Short(random) = fate { part(length, alignment, random) } else { length };
        let Transfer { direction, file, block, .. } = transfer;
        let bytes = &mut block[done..done + length];
        match (direction, fate) {
            (Direction::Read, _) => rustix::io::pread(file, bytes, position),
            (Direction::Write, Fate::Torn(random)) => {
                Err(tear(self.power.as_ref(), file, bytes, position, random))
            }
            (Direction::Write, _) => land(self.power.as_ref(), file, bytes, position),
        }
    }

    /// How many of `wanted` bytes at `position` the disk has room for.
    fn room(&self, position: u64, wanted: usize, alignment: usize) -> Result<usize, Errno> {
        let room = usize::try_from(self.config.no_space_from.saturating_sub(position)).unwrap_or(usize::MAX);
        match room.min(wanted) / alignment * alignment {
            0 => Err(Errno::NOSPC),
            length => Ok(length),
        }
    }
}

impl Backend for Sim {
    fn kind(&self) -> BackendKind {
        BackendKind::Sim
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    fn submit(&mut self, transfer: Transfer) {
        let number = self.submitted;
        self.submitted += 1;
        let decision = self.config.decide(number, transfer.direction, transfer.chunk.wanted());
        if decision.fate == Fate::Stuck {
            self.stuck.push(transfer);
        } else {
            let due = self.now_ticks + decision.latency_ticks;
            self.flying.insert((due, number), (transfer, decision.fate));
        }
    }

    fn park(&mut self, deadline: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        let Some((&(due, _), _)) = self.flying.first_key_value() else {
            // Nothing comes back by itself. Why this wakes up does not matter: the driver looks at everything.
            let woken = match deadline {
                Some(deadline) => self.rings.recv_deadline(deadline).is_ok(),
                None => self.rings.recv().is_ok(),
            };
            debug_assert!(woken || deadline.is_some(), "the doorbell lives as long as this does");
            return Ok(());
        };
        while self.rings.try_recv().is_ok() {}
        self.now_ticks = due;
        while let Some(next) = self.flying.first_entry()
            && next.key().0 == due
        {
            let (mut transfer, fate) = next.remove();
            let result = match self.carry_out(&mut transfer, fate) {
                Ok(moved) => i32::try_from(moved).expect("a chunk is shorter than 2 GiB"),
                Err(errno) => -errno.raw_os_error(),
            };
            arrivals.push(Arrival { transfer, result });
        }
        Ok(())
    }

    fn tidy(&mut self) {}
}

impl Drop for Sim {
    fn drop(&mut self) {
        let flying = std::mem::take(&mut self.flying).into_values().map(|(transfer, _)| transfer);
        for transfer in flying.chain(self.stuck.drain(..)) {
            // The driver has counted it. The file is let go of: this kernel needs no descriptor any more.
            let _given_up = ManuallyDrop::new(transfer.block);
        }
    }
}

/// Puts bytes into a file: the only way there.
fn land(power: Option<&Power>, file: &File, bytes: &[u8], position: u64) -> Result<usize, Errno> {
    match power {
        Some(power) => power.land(file, bytes, position),
        None => rustix::io::pwrite(file, bytes, position),
    }
}

/// Some of `length` bytes: at least one unit of `alignment`, and not all of them if there are several.
fn part(length: usize, alignment: usize, mut random: Random) -> usize {
    match length.div_ceil(alignment) {
        0 | 1 => length,
        units => alignment * (1 + random.below(units as u64 - 1) as usize),
    }
}

/// Writes some of the sectors of `bytes`, and never all; says how that is answered.
fn tear(power: Option<&Power>, file: &File, bytes: &[u8], position: u64, mut random: Random) -> Errno {
    let sector = SECTOR_BYTES.max(file.alignment());
    let head = sector - (position % sector as u64) as usize;
    let (first, rest) = bytes.split_at(head.min(bytes.len()));
    let sectors: Vec<&[u8]> = std::iter::once(first).chain(rest.chunks(sector)).collect();
    let lost = random.below(sectors.len() as u64) as usize;
    let mut at = position;
    for (index, sector) in sectors.into_iter().enumerate() {
        if index != lost && random.hits(500) && land(power, file, sector, at).is_err() {
            break;
        }
        at += sector.len() as u64;
    }
    Errno::IO
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;
    use crate::engine::extent::Extent;
    use crate::engine::queue::{Limits, Priority, Queue};
    use crate::{Block, BlockClass, Pool};

    const BYTES: usize = 16 * 1024;

    fn pool(count: usize) -> Pool {
        Pool::new(&[BlockClass { name: "test", block_bytes: BYTES, count }]).unwrap()
    }

    fn file(alignment: usize, sim: &Sim) -> File {
        File::in_memory_as("file", alignment, &sim.doorbell).unwrap()
    }

    fn submit(sim: &mut Sim, direction: Direction, file: &File, offset: u64, block: Block) {
        let mut queue = Queue::new(block.len(), Limits { depth: 1, bytes: block.len(), detours: 1 });
        queue.push((), Extent { length: block.len(), offset: 0, alignment: 1, priority: Priority::Urgent });
        let (chunk, ()) = queue.next().unwrap();
        sim.submit(Transfer { chunk, direction, file: file.clone(), offset, block, detour: None });
    }

    /// All answers to what was submitted, in their order.
    fn answers(sim: &mut Sim) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        while !sim.flying.is_empty() {
            sim.park(None, &mut arrivals).unwrap();
        }
        arrivals
    }

    fn move_one(sim: &mut Sim, direction: Direction, file: &File, offset: u64, block: Block) -> (Block, i32) {
        submit(sim, direction, file, offset, block);
        let Arrival { transfer, result } = answers(sim).pop().unwrap();
        (transfer.block, result)
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        let length = rustix::io::pread(file.as_fd(), &mut bytes, 0).unwrap();
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn every_transfer_comes_back_once_and_not_in_its_turn() {
        let pool = pool(32);
        let mut sim = Sim::start(SimConfig::calm(1));
        let file = file(1, &sim);
        for number in 0..32 {
            submit(&mut sim, Direction::Write, &file, number * BYTES as u64, pool.lease(100).unwrap());
        }
        let order: Vec<u64> =
            answers(&mut sim).iter().map(|arrival| arrival.transfer.offset / BYTES as u64).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, Vec::from_iter(0..32));
        assert_ne!(sorted, order);
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn a_short_transfer_past_the_page_cache_ends_at_an_aligned_byte() {
        let pool = pool(1);
        for alignment in [1, 512, 4096] {
            let mut seen = Vec::new();
            for seed in 0..40 {
                let mut sim = Sim::start(SimConfig { short_per_mille: 1000, ..SimConfig::calm(seed) });
                let file = file(alignment, &sim);
                let block = pool.lease(BYTES).unwrap();
                let (block, moved) = move_one(&mut sim, Direction::Write, &file, 0, block);
                assert_eq!(contents(&file).len(), moved as usize);
                let (_, read) = move_one(&mut sim, Direction::Read, &file, 0, block);
                assert!(read > 0 && read <= moved);
                seen.push(moved as usize);
            }
            assert!(seen.iter().all(|moved| (1..BYTES).contains(moved) && moved.is_multiple_of(alignment)));
            assert_eq!(seen.iter().any(|moved| !moved.is_multiple_of(512)), alignment == 1);
        }
    }

    #[test]
    fn a_torn_write_leaves_old_and_new_sectors_and_is_an_error() {
        let pool = pool(1);
        let (mut torn, mut not_a_prefix) = (0, 0);
        for seed in 0..40 {
            let mut sim = Sim::start(SimConfig { torn_per_mille: 1000, ..SimConfig::calm(seed) });
            let file = file(1, &sim);
            assert_eq!(land(None, &file, &[1; BYTES], 0), Ok(BYTES));
            // Not at a sector's start, so its first part is a short one.
            let mut block = pool.lease(BYTES - 2048).unwrap();
            block.fill(2);
            let (_, result) = move_one(&mut sim, Direction::Write, &file, 1000, block);
            assert_eq!(result, -libc::EIO);
            let bytes = contents(&file);
            assert!(bytes[..1000].iter().chain(&bytes[BYTES - 1048..]).all(|&byte| byte == 1));
            let sectors: Vec<&[u8]> = bytes[1000..BYTES - 1048].split_at(24).1.chunks(512).collect();
            assert!(sectors.iter().all(|sector| sector.iter().all(|byte| byte == &sector[0])));
            assert!(bytes[1000..BYTES - 1048].contains(&1), "all of it was written");
            torn += usize::from(bytes.contains(&2));
            not_a_prefix += usize::from(sectors.windows(2).any(|pair| pair[0][0] < pair[1][0]));
        }
        assert!(torn > 30 && not_a_prefix > 30, "{torn} torn, {not_a_prefix} with a gap");
    }

    #[test]
    fn a_full_disk_takes_what_fits_and_nothing_behind_it() {
        let pool = pool(1);
        for (alignment, fits) in [(1, 5000), (512, 4608), (4096, 4096)] {
            let mut sim = Sim::start(SimConfig { no_space_from: 5000, ..SimConfig::calm(0) });
            let file = file(alignment, &sim);
            let (block, moved) = move_one(&mut sim, Direction::Write, &file, 0, pool.lease(BYTES).unwrap());
            assert_eq!(moved, fits);
            let (_, refused) = move_one(&mut sim, Direction::Write, &file, 8192, block);
            assert_eq!(refused, -libc::ENOSPC);
            assert_eq!(contents(&file).len(), fits as usize);
        }
    }

    #[test]
    fn what_direct_io_cannot_do_is_refused() {
        let pool = pool(1);
        let mut sim = Sim::start(SimConfig::calm(0));
        let file = file(512, &sim);
        for (offset, length) in [(100, 512), (512, 100), (512, 512)] {
            let block = pool.lease(length).unwrap();
            let (_, result) = move_one(&mut sim, Direction::Write, &file, offset, block);
            assert_eq!(result, if offset == 100 || length == 100 { -libc::EINVAL } else { 512 });
        }
    }

    #[test]
    fn a_stuck_transfer_never_comes_back_and_its_memory_is_nobody_elses() {
        let pool = pool(2);
        let mut sim = Sim::start(SimConfig { stuck_per_mille: 1000, ..SimConfig::calm(0) });
        let file = file(1, &sim);
        submit(&mut sim, Direction::Read, &file, 0, pool.lease(BYTES).unwrap());
        let mut arrivals = Vec::new();
        sim.park(Some(Instant::now() + Duration::from_millis(1)), &mut arrivals).unwrap();
        sim.doorbell.ring();
        sim.park(None, &mut arrivals).unwrap();
        assert!(arrivals.is_empty());
        drop(sim);
        assert_eq!(pool.leased_blocks(), 1);
    }
}
