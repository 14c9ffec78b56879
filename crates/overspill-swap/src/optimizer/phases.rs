//! Where the time of a swapper went, to be logged as one line.

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
    /// Of all of these: waiting for transfers, and for blocks.
    pub wait: Duration,
    /// Passes over the state.
    pub passes: u64,
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gradient_swap_out, swap_in, compute, swap_out, wait, passes } = self;
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        write!(
            f,
            "{passes} passes: gradients out {:.1} ms, state in {:.1} ms, compute {:.1} ms, state out {:.1} ms, \
             of these waiting {:.1} ms",
            ms(gradient_swap_out),
            ms(swap_in),
            ms(compute),
            ms(swap_out),
            ms(wait)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phases_are_one_line() {
        let ms = Duration::from_millis;
        let phases = Phases {
            gradient_swap_out: ms(1),
            swap_in: ms(20),
            compute: ms(3),
            swap_out: ms(40),
            wait: ms(50),
            passes: 6,
        };
        assert_eq!(
            phases.to_string(),
            "6 passes: gradients out 1.0 ms, state in 20.0 ms, compute 3.0 ms, state out 40.0 ms, of these waiting 50.0 ms"
        );
    }
}
