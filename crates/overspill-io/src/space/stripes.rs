//! Which byte of a striped space is where: plain arithmetic.
//!
//! The space is cut into stripes, which are dealt to the lanes by a round of turns that repeats for ever. A lane has
//! as many turns in a round as it has weight, and they are spread over the round, so that a range of a few stripes
//! already keeps all lanes busy in proportion. A lane's stripes lie one behind the other in its file, without gaps:
//!
//! ```text
//! weights 2 and 1, so rounds of three     space   0 1 2 │ 3 4 5 │ 6 …
//!                                         lane 0  0   2 │ 3   5 │ 6          stripes of the space, in the order
//!                                         lane 1    1   │   4   │   7        in which they lie in the lane's file
//! ```

use std::fmt;
use std::iter;

use crate::error::IoError;
use crate::memory::BLOCK_ALIGNMENT;

/// A longer stripe than this would keep the lanes from working side by side.
const STRIPE_BYTES_MAX: usize = 1 << 30;

/// How a space of bytes is dealt to lanes.
#[derive(Clone, PartialEq, Eq)]
pub struct Stripes {
    stripe_bytes: u64,
    /// Whose turn it is, for one round.
    round: Vec<Turn>,
    /// Turns of each lane in a round.
    shares: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Turn {
    lane: usize,
    /// How many turns the lane had before, in this round.
    before: u64,
}

/// A part of a range of the space that lies in one piece in one lane's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the lane.
    pub lane: usize,
    /// First byte in the lane's file.
    pub offset: u64,
    /// Number of bytes.
    pub length: usize,
}

impl Stripes {
    /// Length of a stripe when nobody knows better: as long as a chunk of an engine, so that cutting costs nothing.
    pub const BYTES_DEFAULT: usize = 1 << 20;

    /// Longest round, in stripes: the table of turns stays small, whatever the weights.
    pub const ROUND_MAX: u64 = 4096;

    /// Deals stripes of `stripe_bytes` to as many lanes as there are `weights`, in proportion to them.
    ///
    /// # Errors
    ///
    /// [`IoError::Config`] for stripes that blocks cannot be cut into, for no lanes, for a lane without weight, and
    /// for weights whose sum, divided by what they have in common, is larger than
    /// [`Stripes::ROUND_MAX`].
    pub fn new(stripe_bytes: usize, weights: &[u32]) -> Result<Stripes, IoError> {
        let refuse = |field, value, requirement| Err(IoError::Config { field, value, requirement });
        let is_cuttable = stripe_bytes > 0 && stripe_bytes.is_multiple_of(BLOCK_ALIGNMENT);
        if !is_cuttable || stripe_bytes > STRIPE_BYTES_MAX {
            return refuse(
                "stripe_bytes",
                stripe_bytes,
                "a multiple of 4096, at least 4096 and at most 1 GiB",
            );
        }
        if weights.is_empty() {
            return refuse("lanes", 0, "at least 1");
        }
        if weights.contains(&0) {
            return refuse("weight", 0, "at least 1");
        }
        let divisor = weights.iter().fold(0, |divisor, &weight| common_divisor(divisor, weight.into()));
        let shares: Vec<u64> = weights.iter().map(|&weight| u64::from(weight) / divisor).collect();
        let turns: u64 = shares.iter().sum();
        if turns > Stripes::ROUND_MAX {
            let value = usize::try_from(turns).unwrap_or(usize::MAX);
            return refuse("sum of weights", value, "at most 4096, divided by what they have in common");
        }
        Ok(Stripes { stripe_bytes: stripe_bytes as u64, round: deal(&shares, turns), shares })
    }

    /// Number of lanes.
    #[must_use]
    pub fn lanes(&self) -> usize {
        self.shares.len()
    }

    /// Length of a stripe, in bytes.
    #[must_use]
    pub fn stripe_bytes(&self) -> u64 {
        self.stripe_bytes
    }

    /// The lanes' weights, divided by what they have in common.
    #[must_use]
    pub fn weights(&self) -> &[u64] {
        &self.shares
    }

    /// The pieces of `length` bytes from `offset` on, in the order of the space. Neighboring stripes of one lane are
    /// one piece, and with a single lane the whole range is.
    ///
    /// # Panics
    ///
    /// If the range ends behind what 64 bits can count.
    pub fn pieces(&self, offset: u64, length: usize) -> impl Iterator<Item = Piece> + '_ {
        let end = offset + length as u64;
        let mut at = offset;
        iter::from_fn(move || {
            if at == end {
                return None;
            }
            let (first, (lane, offset)) = (at, self.locate(at));
            at = self.stripe_end(at).min(end);
            while at < end && self.locate(at).0 == lane {
                at = self.stripe_end(at).min(end);
            }
            // A part of `length`, so it fits.
            Some(Piece { lane, offset, length: (at - first) as usize })
        })
    }

    /// How many of the space's first `capacity` bytes are a lane's: as long its file must be.
    ///
    /// # Panics
    ///
    /// If there is no such lane.
    #[must_use]
    pub fn lane_bytes(&self, lane: usize, capacity: u64) -> u64 {
        let round_bytes = self.stripe_bytes * self.round.len() as u64;
        let (rounds, rest) = (capacity / round_bytes, capacity % round_bytes);
        let begins = (0..).step_by(self.stripe_bytes as usize);
        let turns = self.round.iter().zip(begins).filter(|(turn, _)| turn.lane == lane);
        let rest: u64 = turns.map(|(_, begin)| rest.saturating_sub(begin).min(self.stripe_bytes)).sum();
        rounds * self.shares[lane] * self.stripe_bytes + rest
    }

    /// The lane of a byte, and where in the lane's file it is.
    fn locate(&self, at: u64) -> (usize, u64) {
        let (stripe, within) = (at / self.stripe_bytes, at % self.stripe_bytes);
        let turns = self.round.len() as u64;
        let Turn { lane, before } = self.round[(stripe % turns) as usize];
        (lane, (stripe / turns * self.shares[lane] + before) * self.stripe_bytes + within)
    }

    /// Where the stripe of a byte ends; with a single lane nowhere.
    fn stripe_end(&self, at: u64) -> u64 {
        match self.shares.len() {
            1 => u64::MAX,
            _ => (at - at % self.stripe_bytes).saturating_add(self.stripe_bytes),
        }
    }
}

impl fmt::Debug for Stripes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stripes { stripe_bytes, shares, .. } = self;
        f.debug_struct("Stripes").field("stripe_bytes", stripe_bytes).field("weights", shares).finish()
    }
}

/// One round: at each turn every lane is owed its share more, and the lane that is owed most, or the first of them,
/// has the turn and pays for it with a whole round's worth.
fn deal(shares: &[u64], turns: u64) -> Vec<Turn> {
    let mut owed = vec![0_i64; shares.len()];
    let mut dealt = vec![0; shares.len()];
    let mut next = || {
        for (owed, &share) in owed.iter_mut().zip(shares) {
            *owed += share as i64;
        }
        let mut lane = 0;
        for candidate in 1..owed.len() {
            lane = if owed[candidate] > owed[lane] { candidate } else { lane };
        }
        owed[lane] -= turns as i64;
        dealt[lane] += 1;
        Turn { lane, before: dealt[lane] - 1 }
    };
    (0..turns).map(|_| next()).collect()
}

/// The largest number that divides both; 0 divides like nothing.
fn common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNIT: usize = BLOCK_ALIGNMENT;

    fn lanes_of(weights: &[u32], stripes: usize) -> Vec<usize> {
        let dealt = Stripes::new(UNIT, weights).unwrap();
        (0..stripes).map(|stripe| dealt.locate((stripe * UNIT) as u64).0).collect()
    }

    fn any_stripes() -> impl Strategy<Value = Stripes> {
        (1_usize..5, prop::collection::vec(1_u32..9, 1..6))
            .prop_map(|(units, weights)| Stripes::new(units * UNIT, &weights).unwrap())
    }

    #[test]
    fn turns_are_spread_over_the_round() {
        assert_eq!(lanes_of(&[2, 1], 6), [0, 1, 0, 0, 1, 0]);
        assert_eq!(lanes_of(&[1, 1, 1], 6), [0, 1, 2, 0, 1, 2]);
        assert_eq!(lanes_of(&[50, 30, 10], 9), [0, 1, 0, 2, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn one_lane_is_the_space_itself() {
        for weight in [1, 7] {
            let stripes = Stripes::new(UNIT, &[weight]).unwrap();
            for (offset, length) in [(0, 1), (5, 10 * UNIT), (u64::MAX - 100, 100), (3, 0)] {
                let piece = Piece { lane: 0, offset, length };
                let expected = if length == 0 { vec![] } else { vec![piece] };
                assert_eq!(stripes.pieces(offset, length).collect::<Vec<_>>(), expected);
            }
            assert_eq!(stripes.lane_bytes(0, 12_345_678), 12_345_678);
        }
    }

    #[test]
    fn values_that_cannot_work_are_refused_by_name() {
        let refused = [
            (Stripes::new(0, &[1]), "stripe_bytes"),
            (Stripes::new(5000, &[1]), "stripe_bytes"),
            (Stripes::new(2 << 30, &[1]), "stripe_bytes"),
            (Stripes::new(UNIT, &[]), "lanes"),
            (Stripes::new(UNIT, &[1, 0]), "weight"),
            (Stripes::new(UNIT, &[4096, 1]), "sum of weights"),
            (Stripes::new(UNIT, &[u32::MAX; 5000]), "sum of weights"),
        ];
        for (result, name) in refused {
            assert!(matches!(result, Err(IoError::Config { field, .. }) if field == name), "{name}");
        }
        assert!(Stripes::new(UNIT, &[u32::MAX, u32::MAX]).is_ok());
    }

    proptest! {
        #[test]
        fn every_byte_has_one_place_and_every_place_one_byte(stripes in any_stripes(), units in 1_u64..200) {
            let mut places = vec![Vec::new(); stripes.lanes()];
            for unit in 0..units {
                let (lane, offset) = stripes.locate(unit * UNIT as u64);
                places[lane].push(offset);
            }
            for (lane, places) in places.iter().enumerate() {
                let dense: Vec<u64> = (0..places.len()).map(|unit| (unit * UNIT) as u64).collect();
                prop_assert_eq!(places, &dense, "lane {} is dense and in the order of the space", lane);
                let bytes = stripes.lane_bytes(lane, units * UNIT as u64);
                prop_assert_eq!(bytes, (places.len() * UNIT) as u64);
            }
        }

        #[test]
        fn pieces_follow_one_another_without_gap_or_overlap(
            stripes in any_stripes(),
            offset in 0_u64..200 * UNIT as u64,
            length in 0_usize..100 * UNIT,
        ) {
            let (mut at, end) = (offset, offset + length as u64);
            let mut last: Option<Piece> = None;
            for piece in stripes.pieces(offset, length) {
                prop_assert!(piece.length > 0);
                // The first byte, the last, and the first of every stripe between them.
                for byte in (0..piece.length).step_by(UNIT).chain([piece.length - 1]) {
                    let (lane, place) = stripes.locate(at + byte as u64);
                    prop_assert_eq!((lane, place), (piece.lane, piece.offset + byte as u64));
                }
                let behind = stripes.lane_bytes(piece.lane, end);
                prop_assert!(piece.offset + piece.length as u64 <= behind, "it fits into the lane's file");
                prop_assert!(last.is_none_or(|last| last.lane != piece.lane), "neighbors are one piece");
                at += piece.length as u64;
                last = Some(piece);
            }
            prop_assert_eq!(at, end);
        }

        #[test]
        fn cuts_are_where_blocks_can_be_cut(
            stripes in any_stripes(),
            unit in 0_u64..200,
            length in 1_usize..100 * UNIT,
        ) {
            let pieces: Vec<Piece> = stripes.pieces(unit * UNIT as u64, length).collect();
            let (_, all_but_last) = pieces.split_last().unwrap();
            prop_assert!(all_but_last.iter().all(|piece| piece.length.is_multiple_of(UNIT)));
            prop_assert!(pieces.iter().all(|piece| piece.offset.is_multiple_of(UNIT as u64)));
        }

        #[test]
        fn every_beginning_of_the_space_is_dealt_in_proportion(
            weights in prop::collection::vec(1_u32..40, 1..9),
            capacity in 0_u64..1 << 40,
        ) {
            let stripes = Stripes::new(UNIT, &weights).unwrap();
            let total: u32 = weights.iter().sum();
            let shares: Vec<u64> = (0..weights.len()).map(|lane| stripes.lane_bytes(lane, capacity)).collect();
            prop_assert_eq!(shares.iter().sum::<u64>(), capacity);
            for (&share, &weight) in shares.iter().zip(&weights) {
                let fair = u128::from(capacity) * u128::from(weight) / u128::from(total);
                prop_assert!(u128::from(share).abs_diff(fair) < 2 * UNIT as u128, "{} of {}", share, fair);
            }
        }
    }
}
