//! Which state lies in which tile: parameters, cut and packed into tiles of about one length.
//!
//! Pure arithmetic, no I/O. A tile is what is loaded, computed on and stored together, and it has one extent on storage.
//! A large parameter is cut into many tiles, small ones share a tile; a *part* is what a tile has of one parameter: a
//! range of its elements, and the bytes of the tile that hold their state. Whoever computes sees parts only.
//!
//! The cuts follow from the parameters and the tile's length alone, so a state that was written with them is found
//! again with them, whatever the memory of the later run.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use overspill_io::BLOCK_ALIGNMENT;

/// Parts start at a multiple of this many bytes of their tile: one cache line.
pub const PART_ALIGNMENT: usize = 64;

/// What the swapper is told of one parameter.
#[derive(Clone, Debug)]
pub struct ParameterSpec {
    /// Unique among the parameters.
    pub name: String,
    /// Number of elements; not 0.
    pub numel: usize,
    /// How much state it has, and where that may be cut.
    pub state: StateSize,
    /// Whether it begins a tile, whatever room the last one has: the first parameter that was added to others later does,
    /// so that the others' tiles stay what they are.
    pub begins_tile: bool,
}

/// How many bytes of state so many elements have.
#[derive(Clone)]
pub enum StateSize {
    /// The parameter may be cut.
    Cut {
        /// Cuts are at multiples of so many elements.
        elements: usize,
        /// Bytes of the state of so many elements: never fewer for more of them.
        bytes: Arc<dyn Fn(usize) -> usize + Send + Sync>,
    },
    /// So many bytes for the whole parameter, which is never cut.
    Whole(usize),
}

impl StateSize {
    /// So many bytes for every element.
    pub fn per_element(bytes: usize) -> Self {
        Self::Cut { elements: 1, bytes: Arc::new(move |elements| elements.saturating_mul(bytes)) }
    }

    /// Bytes of the state of `elements` elements that begin at a cut.
    pub fn bytes(&self, elements: usize) -> usize {
        match self {
            Self::Cut { bytes, .. } => bytes(elements),
            Self::Whole(bytes) => *bytes,
        }
    }

    /// The most of `left` elements that can be cut off, at most `most` and with at most `room` bytes of state; 0 when
    /// there are none.
    fn fitting(&self, left: usize, most: usize, room: usize) -> usize {
        let Self::Cut { elements: cut, bytes } = self else { return 0 };
        let cut = (*cut).max(1);
        // All counts of cuts below the first that is too long fit.
        let (mut fits, mut too_many) = (0, left.div_ceil(cut).min(most / cut) + 1);
        while fits + 1 < too_many {
            let middle = fits.midpoint(too_many);
            if bytes((middle * cut).min(left)) <= room { fits = middle } else { too_many = middle }
        }
        (fits * cut).min(left)
    }

    /// The fewest of `left` elements that can be cut off.
    fn fewest(&self, left: usize) -> usize {
        match self {
            Self::Cut { elements, .. } => (*elements).clamp(1, left),
            Self::Whole(_) => left,
        }
    }
}

impl fmt::Debug for StateSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { elements, .. } => write!(f, "Cut at multiples of {elements}"),
            Self::Whole(bytes) => write!(f, "Whole({bytes})"),
        }
    }
}

/// What one tile has of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Index of the parameter.
    pub parameter: usize,
    /// Its elements.
    pub elements: Range<usize>,
    /// The bytes of the tile that hold their state.
    pub state: Range<usize>,
    /// The place of their gradients among all elements of the tile.
    pub gradient: Range<usize>,
}

/// What is loaded and stored together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tile {
    /// By their place in the tile.
    pub parts: Vec<Part>,
}

impl Tile {
    /// Bytes of the tile, padded to whole disk blocks; one block when its parameters have no state.
    pub fn bytes(&self) -> usize {
        self.end().max(1).next_multiple_of(BLOCK_ALIGNMENT)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.parts.last().map_or(0, |part| part.gradient.end)
    }

    /// What the tile has of a parameter, and its place among the parts.
    pub(crate) fn part_of(&self, parameter: usize) -> (usize, &Part) {
        let place = self.parts.binary_search_by_key(&parameter, |part| part.parameter);
        let place = place.expect("a parameter is looked for in its own tiles");
        (place, &self.parts[place])
    }

    fn end(&self) -> usize {
        self.parts.last().map_or(0, |part| part.state.end.next_multiple_of(PART_ALIGNMENT))
    }

    fn push(&mut self, parameter: usize, elements: Range<usize>, bytes: usize) {
        let (start, first) = (self.end(), self.elements());
        let gradient = first..first + elements.len();
        self.parts.push(Part { parameter, elements, state: start..start + bytes, gradient });
    }
}

/// Packs the parameters, in their order, into tiles of at most `tile_bytes` bytes and as many elements, so that the
/// gradients of parameters with hardly any state do not make long tiles; a parameter that may not be cut has a longer one
/// if it must.
pub fn pack(specs: &[ParameterSpec], tile_bytes: usize) -> Vec<Tile> {
    let mut tiles = Vec::new();
    let mut tile = Tile::default();
    for (parameter, spec) in specs.iter().enumerate() {
        let mut next = 0;
        if spec.begins_tile && !tile.parts.is_empty() {
            tiles.push(std::mem::take(&mut tile));
        }
        while next < spec.numel {
            let left = spec.numel - next;
            let bytes = spec.state.bytes(left);
            let room = tile_bytes.saturating_sub(tile.end());
            let most = tile_bytes.saturating_sub(tile.elements());
            let taken = match spec.state.fitting(left, most, room) {
                _ if bytes <= room && left <= most => left,
                // A tile of its own is no shorter than it must be; the rest of a shared one is not worth a cut.
                0 if tile.parts.is_empty() => spec.state.fewest(left),
                fitting if tile.parts.is_empty() => fitting,
                _ => {
                    tiles.push(std::mem::take(&mut tile));
                    continue;
                }
            };
            tile.push(parameter, next..next + taken, spec.state.bytes(taken));
            next += taken;
        }
    }
    if !tile.parts.is_empty() {
        tiles.push(tile);
    }
    tiles
}

/// Which tiles of these lengths stay when so many bytes may: of every first part of them about the same share of bytes.
pub(crate) fn spread(lengths: &[usize], bytes: usize) -> Vec<bool> {
    let all: u128 = lengths.iter().map(|&length| length as u128).sum();
    let (mut passed, mut kept) = (0, 0);
    let mut chosen: Vec<bool> = lengths
        .iter()
        .map(|&length| {
            passed += length as u128;
            // Less than the longest tile is left over at every point.
            let stays = (kept + length as u128) * all <= bytes as u128 * passed;
            kept += if stays { length as u128 } else { 0 };
            stays
        })
        .collect();
    for (stays, &length) in chosen.iter_mut().zip(lengths).filter(|(stays, _)| !**stays) {
        *stays = kept + length as u128 <= bytes as u128;
        kept += if *stays { length as u128 } else { 0 };
    }
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn specs() -> impl Strategy<Value = Vec<ParameterSpec>> {
        let size = prop_oneof![
            // Columns of cells that several elements share, each padded to a cache line.
            (1usize..300, 1usize..40).prop_map(|(elements, bytes)| StateSize::Cut {
                elements,
                bytes: Arc::new(move |n: usize| 2 * (n.div_ceil(elements) * bytes).next_multiple_of(64)),
            }),
            (0usize..50_000).prop_map(StateSize::Whole),
        ];
        let spec = (1usize..20_000, size);
        prop::collection::vec(spec, 0..20).prop_map(|specs| {
            let named = |(i, (numel, state))| ParameterSpec {
                name: format!("{i}"),
                numel,
                state,
                begins_tile: false,
            };
            specs.into_iter().enumerate().map(named).collect()
        })
    }

    proptest! {
        #[test]
        fn every_element_has_one_place_and_no_two_states_overlap(specs in specs(), tile_bytes in 1usize..40_000) {
            let tiles = pack(&specs, tile_bytes);
            let mut next = vec![0; specs.len()];
            for tile in &tiles {
                prop_assert!(!tile.parts.is_empty());
                let (mut state_end, mut gradient_end) = (0, 0);
                for part in &tile.parts {
                    let spec = &specs[part.parameter];
                    prop_assert_eq!(part.elements.start, next[part.parameter]);
                    next[part.parameter] = part.elements.end;
                    prop_assert!(part.state.start >= state_end && part.state.start.is_multiple_of(PART_ALIGNMENT));
                    prop_assert_eq!(part.state.len(), spec.state.bytes(part.elements.len()));
                    if let StateSize::Cut { elements, .. } = spec.state {
                        prop_assert!(part.elements.start.is_multiple_of(elements));
                    } else {
                        prop_assert_eq!(part.elements.len(), spec.numel);
                    }
                    prop_assert_eq!(part.gradient.clone(), gradient_end..gradient_end + part.elements.len());
                    (state_end, gradient_end) = (part.state.end, part.gradient.end);
                }
                prop_assert!(tile.bytes() >= state_end && tile.bytes().is_multiple_of(BLOCK_ALIGNMENT));
                prop_assert!(gradient_end <= tile_bytes || tile.parts.len() == 1);
                // Parameters without state find room anywhere.
                let stored: Vec<_> = tile.parts.iter().filter(|part| !part.state.is_empty()).collect();
                let stored_end = stored.last().map_or(0, |part| part.state.end);
                prop_assert!(stored_end <= tile_bytes || stored.len() == 1);
                prop_assert_eq!(tile.elements(), gradient_end);
            }
            for (spec, next) in specs.iter().zip(next) {
                prop_assert_eq!(spec.numel, next);
            }
        }

        #[test]
        fn what_is_kept_fills_its_room_and_is_spread_evenly(
            lengths in prop::collection::vec(1usize..5000, 0..200),
            bytes in prop_oneof![0usize..500_000, Just(usize::MAX)],
        ) {
            let chosen = spread(&lengths, bytes);
            let (all, longest) = (lengths.iter().sum::<usize>(), lengths.iter().max().map_or(0, |&longest| longest));
            let (mut passed, mut kept) = (0, 0);
            for (&length, &stays) in lengths.iter().zip(&chosen) {
                passed += length;
                kept += if stays { length } else { 0 };
                let even = bytes.min(all) as f64 * passed as f64 / all as f64;
                prop_assert!((kept as f64 - even).abs() <= longest as f64 + 1.0);
            }
            prop_assert!(kept <= bytes);
            let mut left_out = lengths.iter().zip(&chosen).filter(|(_, stays)| !**stays);
            prop_assert!(left_out.all(|(&length, _)| length > bytes - kept));
        }
    }
}
