//! The power of a simulated device, and how it goes.
//!
//! Every write that lands, every change of a file's length and every flush is an *event*, and so is whatever others
//! add who lose their power with the device. The power goes at an event that somebody has chosen, or at once. The
//! event at which it goes has begun and is not over: a write may be there or not, a flush has flushed nothing for
//! certain. What is on the device then is what the [`Journal`] makes of it, by the seed, and whatever the engine and
//! its files are asked from then on fails with `EIO`.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::journal::Journal;
use crate::file::File;
use crate::sync::{Mutex, MutexGuard, lock};

/// The power supply of one engine's simulated device. Clones share it.
#[derive(Clone)]
pub struct Power {
    supply: Arc<Mutex<Supply>>,
}

struct Supply {
    seed: u64,
    /// Events so far.
    events: u64,
    /// Events that will have been when the power goes.
    goes_at: Option<u64>,
    is_out: bool,
    journal: Journal,
    /// Those who lose their power, too.
    sharers: Vec<Box<dyn FnOnce(u64) + Send>>,
}

impl Power {
    /// A supply that is on, of a device that may lose the last `cache_bytes` bytes that it was given.
    pub(crate) fn new(seed: u64, cache_bytes: usize) -> Power {
        let (goes_at, sharers, journal) = (None, Vec::new(), Journal::new(cache_bytes));
        let supply = Supply { seed, events: 0, goes_at, is_out: false, journal, sharers };
        Power { supply: Arc::new(Mutex::new(supply)) }
    }

    /// Cuts the power, if it is still on: every sector and every length is one that was there since its last flush.
    pub fn cut(&self) {
        self.supply().cut();
    }

    /// Lets the power go at an event after `events` others from now on.
    pub fn cut_after(&self, events: u64) {
        let mut supply = self.supply();
        supply.goes_at = Some(supply.events.saturating_add(events).saturating_add(1));
    }

    /// Whether the power is gone.
    #[must_use]
    pub fn is_out(&self) -> bool {
        self.supply().is_out
    }

    /// Events so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.supply().events
    }

    /// Adds an event of somebody who shares the power; whether it is still on.
    #[must_use]
    pub fn event(&self) -> bool {
        self.supply().event().is_ok()
    }

    /// Calls `act` with the seed when the power goes. It must not ask for anything that the power supplies.
    pub fn share(&self, act: impl FnOnce(u64) + Send + 'static) {
        self.supply().sharers.push(Box::new(act));
    }

    /// Fails when the power is gone.
    pub(crate) fn check(&self) -> Result<(), Errno> {
        self.supply().check()
    }

    /// Lets bytes land on the device, in its cache.
    pub(crate) fn land(&self, file: &File, bytes: &[u8], position: u64) -> Result<usize, Errno> {
        let mut supply = self.supply();
        supply.check()?;
        let landed = supply
            .journal
            .land(file, bytes, position, |bytes| rustix::io::pwrite(file.as_fd(), bytes, position))?;
        supply.event()?;
        Ok(landed)
    }

    /// Changes the length of a file.
    pub(crate) fn resize(&self, file: &File, act: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let mut supply = self.supply();
        supply.check()?;
        supply.journal.resize(file, act)?;
        supply.event()
    }

    /// Makes what has landed in a file last.
    pub(crate) fn flush(&self, file: &File) -> Result<(), Errno> {
        let mut supply = self.supply();
        supply.event()?;
        supply.journal.flush(file);
        Ok(())
    }

    fn supply(&self) -> MutexGuard<'_, Supply> {
        lock(&self.supply)
    }
}

impl Supply {
    fn check(&self) -> Result<(), Errno> {
        if self.is_out { Err(Errno::IO) } else { Ok(()) }
    }

    fn event(&mut self) -> Result<(), Errno> {
        self.check()?;
        self.events += 1;
        if self.goes_at == Some(self.events) {
            self.cut();
        }
        self.check()
    }

    fn cut(&mut self) {
        if !std::mem::replace(&mut self.is_out, true) {
            self.journal.lose(self.seed);
            self.sharers.drain(..).for_each(|act| act(self.seed));
        }
    }
}

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let supply = self.supply();
        f.debug_struct("Power")
            .field("events", &supply.events)
            .field("is_out", &supply.is_out)
            .finish_non_exhaustive()
    }
}
