//! The rotary position embedding: a head's elements `i` and `i + head_dim / 2` turn by `position · frequency(i)`.

use std::f64::consts::TAU;

use crate::config::{Llama3Scaling, ModelConfig};

/// The angles of every position of a sequence.
#[derive(Debug)]
pub(super) struct Rotary {
    /// Cosine and sine, `[position][head_dim / 2]`.
    turns: Vec<(f32, f32)>,
    half: usize,
}

impl Rotary {
    /// The angles of positions `0..positions`.
    pub(super) fn new(config: &ModelConfig, positions: usize) -> Self {
        let half = config.head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let frequency = config.rope.theta.powf(-(i as f64) / half as f64);
                let scaling = config.rope.scaling.as_ref();
                scaling.map_or(frequency, |scaling| stretched(frequency, scaling)) as f32
            })
            .collect();
        // Frequencies and angles are rounded to f32 because the reference implementation does so; at late positions
        // the rounding turns visibly, and a checkpoint was trained with it.
        let turns = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
            .map(|angle| f64::from(angle).sin_cos())
            .map(|(sin, cos)| (cos as f32, sin as f32))
            .collect();
        Self { turns, half }
    }

    /// Writes head `x` turned to `position`, times `scale`, to `y`.
    pub(super) fn turn(&self, position: usize, scale: f32, x: &[f32], y: &mut [f32]) {
        self.turn_by(position, (scale, scale), x, y);
    }

    /// Writes head `x` turned back from `position`, times `scale`, to `y`: [`turn`](Self::turn)'s gradient.
    pub(super) fn turn_back(&self, position: usize, scale: f32, x: &[f32], y: &mut [f32]) {
        self.turn_by(position, (scale, -scale), x, y);
    }

    fn turn_by(&self, position: usize, (cos_scale, sin_scale): (f32, f32), x: &[f32], y: &mut [f32]) {
        let turns = &self.turns[position * self.half..][..self.half];
        let (x_low, x_high) = x.split_at(self.half);
        let (y_low, y_high) = y.split_at_mut(self.half);
        for ((((y_low, y_high), x_low), x_high), (cos, sin)) in
            y_low.iter_mut().zip(y_high).zip(x_low).zip(x_high).zip(turns)
        {
            let (cos, sin) = (cos * cos_scale, sin * sin_scale);
            *y_low = x_low * cos - x_high * sin;
            *y_high = x_high * cos + x_low * sin;
        }
    }
}

/// The frequency after stretching: long waves by `factor`, short ones not, those between by a blend.
fn stretched(frequency: f64, scaling: &Llama3Scaling) -> f64 {
    let waves = scaling.original_max_position_embeddings as f64 * frequency / TAU;
    let kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
    if waves < scaling.low_freq_factor {
        frequency / scaling.factor
    } else if waves > scaling.high_freq_factor {
        frequency
    } else {
        (1.0 - kept) * frequency / scaling.factor + kept * frequency
    }
}
