//! Signals: Ctrl-C, SIGTERM and SIGHUP ask the run to stop; it cleans up and ends by itself, with the exit status by which
//! shells tell the signal.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// The last signal that asked to stop; 0 for none. Signals are for the whole process.
static LAST: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// What shells add to a signal's number for the exit status of whom it ended.
const BY_SIGNAL: u8 = 128;

/// Exit status of a process that was asked to stop and did.
pub(crate) fn exit_status() -> u8 {
    let last = u8::try_from(LAST.load(Ordering::Relaxed)).ok().filter(|&signal| signal > 0);
    BY_SIGNAL.saturating_add(last.unwrap_or(SIGINT.unsigned_abs() as u8))
}

/// A flag that is set when somebody asks to stop.
pub(crate) fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // The flag comes last: whoever sees it finds the signal.
        let number = usize::try_from(signal).context("cannot tell signals apart")?;
        flag::register_usize(signal, Arc::clone(&LAST), number).context("cannot watch for Ctrl-C")?;
        flag::register(signal, stop.clone()).context("cannot watch for Ctrl-C")?;
    }
    // Left alone, this signal ends a process that reaches its limit of file size; the write says EFBIG as well.
    flag::register(SIGXFSZ, Arc::default()).context("cannot watch for the limit of file size")?;
    Ok(stop)
}
