//! Signals: Ctrl-C, SIGTERM and SIGHUP ask the run to stop; it cleans up and ends by itself.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// A flag that is set when somebody asks to stop.
pub(crate) fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register(signal, stop.clone()).context("cannot watch for Ctrl-C")?;
    }
    // Left alone, this signal ends a process that reaches its limit of file size; the write says EFBIG as well.
    flag::register(SIGXFSZ, Arc::default()).context("cannot watch for the limit of file size")?;
    Ok(stop)
}
