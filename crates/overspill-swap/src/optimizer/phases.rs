//! Where the time of a swapper went.

use std::fmt;
use std::time::Duration;

/// Times of the calling thread, summed up since the swapper was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Taking gradients over, and starting their writes.
    pub gradient_swap_out: Duration,
    /// Waiting for state, and gradients, to come in.
    pub swap_in: Duration,
    /// Computing.
    pub compute: Duration,
    /// Starting writes, and waiting for earlier ones.
    pub swap_out: Duration,
    /// Passes over the state.
    pub passes: u64,
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gradient_swap_out, swap_in, compute, swap_out, passes } = self;
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        write!(
            f,
            "{passes} passes: gradients out {:.1} ms, state in {:.1} ms, compute {:.1} ms, state out {:.1} ms",
            ms(gradient_swap_out),
            ms(swap_in),
            ms(compute),
            ms(swap_out)
        )
    }
}
