//! What a store lies over: directories, who moves bytes there, and each one's share.
//!
//! Shares are small whole numbers, because stripes are dealt by them: [`weights`] finds some that are close enough to
//! what was measured, so that noise in the measurements does not make a pattern of its own.

use std::path::{Path, PathBuf};

use overspill_io::{Engine, IoError, Stripes};

use crate::directory;

/// A part of a store: a directory that the store will make, and the engines that serve it.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The directory; its parent must exist.
    pub directory: PathBuf,
    /// Each has a data file of its own there; at least one.
    pub engines: Vec<Engine>,
    /// The volume's share of the data, in proportion to those of the others.
    pub weight: u32,
}

impl Volume {
    /// The only volume of a store, with one engine.
    pub(crate) fn single(directory: &Path, engine: &Engine) -> Self {
        Self { directory: directory.to_owned(), engines: vec![engine.clone()], weight: 1 }
    }

    /// The volume's data files, each with its engine, in the order of the lanes.
    pub(crate) fn data_files(&self) -> impl Iterator<Item = (&Engine, PathBuf)> {
        let file = |ring| self.directory.join(directory::data_name(ring));
        self.engines.iter().enumerate().map(move |(ring, engine)| (engine, file(ring)))
    }
}

/// No volume's weight is larger: beside one that is so much faster, another hardly matters.
const WEIGHT_MAX: u32 = 64;
/// What a weight may be off by; measurements are no better.
const TOLERANCE: f64 = 0.15;

/// The smallest weights whose proportions are those of the bandwidths, each within 15 % if that is possible.
/// What is no positive number counts as very slow.
#[must_use]
pub fn weights(bandwidths: &[f64]) -> Vec<u32> {
    let fastest = bandwidths.iter().copied().filter(|gbps| gbps.is_finite()).fold(0.0, f64::max);
    let shares: Vec<f64> = bandwidths.iter().map(|gbps| (gbps / fastest).clamp(0.0, 1.0)).collect();
    let scaled = |largest: u32| {
        // What is not a number becomes the least weight.
        let weight = |share: &f64| ((share * f64::from(largest)).round() as u32).max(1);
        shares.iter().map(weight).collect::<Vec<_>>()
    };
    let is_close = |largest: u32, weights: &[u32]| {
        let off = |(&weight, share): (&u32, &f64)| f64::from(weight) / f64::from(largest) / share - 1.0;
        weights.iter().zip(&shares).map(off).all(|off| off.abs() <= TOLERANCE)
    };
    (1..WEIGHT_MAX)
        .map(|largest| (largest, scaled(largest)))
        .find(|(largest, weights)| is_close(*largest, weights))
        .map_or_else(|| scaled(WEIGHT_MAX), |(_, weights)| weights)
}

/// How stripes are dealt to volumes of these weights.
pub(crate) fn stripes(weights: impl IntoIterator<Item = u64>) -> Result<Stripes, IoError> {
    Stripes::new(Stripes::BYTES_DEFAULT, &dealable(weights.into_iter().collect()))
}

/// The weight of each lane: a volume's weight, divided among its engines.
pub(crate) fn lane_weights(volumes: &[Volume]) -> Result<Vec<u32>, IoError> {
    if volumes.iter().any(|volume| volume.engines.is_empty()) {
        return Err(IoError::Config { field: "engines of a volume", value: 0, requirement: "at least 1" });
    }
    // A number that every volume's weight can be divided by after it was multiplied with it.
    let common = volumes.iter().fold(1_u64, |common, volume| {
        let rings = volume.engines.len() as u64;
        if common.is_multiple_of(rings) { common } else { common.saturating_mul(rings).min(COMMON_MAX) }
    });
    let lanes = volumes.iter().flat_map(|Volume { engines, weight, .. }| {
        let rings = engines.len() as u64;
        // A weight of zero stays one, to be refused.
        engines.iter().map(move |_| (u64::from(*weight) * common).div_ceil(rings))
    });
    Ok(dealable(lanes.collect()))
}

/// Beyond this, weights are rounded anyway.
const COMMON_MAX: u64 = 1 << 20;

/// Weights of these proportions, coarser if their sum would be too large otherwise.
fn dealable(mut weights: Vec<u64>) -> Vec<u32> {
    // Halves come to an end long before the numbers do.
    while weights.iter().sum::<u64>() > Stripes::ROUND_MAX && weights.iter().any(|&weight| weight > 1) {
        for weight in &mut weights {
            *weight = weight.div_ceil(2);
        }
    }
    weights.into_iter().map(|weight| u32::try_from(weight).unwrap_or(u32::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn weights_are_as_small_as_the_measurements_are_coarse() {
        assert_eq!(weights(&[3.1]), [1]);
        assert_eq!(weights(&[3.1, 3.3, 2.9]), [1, 1, 1]);
        assert_eq!(weights(&[3.1, 1.5]), [2, 1]);
        assert_eq!(weights(&[7.0, 3.0, 0.5]), [13, 6, 1]);
        assert_eq!(weights(&[1000.0, 0.01]), [64, 1]);
    }

    #[test]
    fn what_is_no_speed_gets_the_least_weight() {
        assert_eq!(weights(&[2.0, f64::NAN, 0.0, -1.0]), [64, 1, 1, 1]);
        assert_eq!(weights(&[f64::INFINITY, f64::NAN]).len(), 2);
        assert_eq!(weights(&[0.0, 0.0]), [1, 1]);
        assert_eq!(weights(&[]), [0_u32; 0]);
    }

    #[test]
    fn weights_beyond_what_can_be_dealt_are_dealt_coarser() {
        assert_eq!(dealable(vec![3, 1]), [3, 1]);
        for weights in [vec![u64::from(u32::MAX), 1], vec![4000, 4000, 4000], vec![1_000_001, 999_999]] {
            let dealt = stripes(weights.iter().copied()).unwrap();
            let sum: u64 = dealt.weights().iter().sum();
            for (&dealt, &weight) in dealt.weights().iter().zip(&weights) {
                let fair = weight as f64 / weights.iter().sum::<u64>() as f64 * sum as f64;
                assert!((dealt as f64 - fair).abs() < 2.0, "{weights:?}: {dealt} of {fair}");
            }
        }
        assert!(stripes([0, 1]).is_err() && stripes([]).is_err());
    }

    proptest! {
        #[test]
        fn weights_are_in_proportion(bandwidths in prop::collection::vec(0.05_f64..3.0, 1..6)) {
            let weights = weights(&bandwidths);
            prop_assert!(weights.iter().all(|weight| (1..=WEIGHT_MAX).contains(weight)));
            for (a, wa) in bandwidths.iter().zip(&weights) {
                for (b, wb) in bandwidths.iter().zip(&weights) {
                    let off = (f64::from(*wa) / f64::from(*wb)) / (a / b);
                    prop_assert!((0.6..1.7).contains(&off), "{:?} by {:?}", bandwidths, weights);
                }
            }
        }
    }
}
