//! The training state on its way to other programs, and from them.
//!
//! ```text
//! store ── export ──► Hugging Face folder (weights), or a folder with the whole state
//!       ◄── import ──
//! ```
//!
//! Weights go in single precision, or in half of its bits, whatever the recipe that they are stored by. A whole state
//! goes as it is stored, and comes back so, bit by bit; what it consists of is known from its [recipe](crate::optimizer),
//! which goes along.
//!
//! Everything goes tile by tile through a small pool, so memory does not depend on the size of the model. What is made
//! appears whole or not at all: a folder is written aside and renamed, a store is committed at its end.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//!
//! use overspill_train::transfer::{ExportOptions, Form, export};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = ExportOptions { form: Form::State, ..ExportOptions::new("/fast/disk".into(), "state".into()) };
//! let exported = export(&options, &AtomicBool::new(false), &mut |done, total| println!("{done}/{total}"))?;
//! println!("the state after step {}", exported.step);
//! # Ok(())
//! # }
//! ```

mod export;
mod folder;
mod import;
mod pieces;
mod source;
#[cfg(test)]
mod tests;

use overspill_io::{Block, BlockClass, Pool, PoolError};
use overspill_optim::RecordLayout;

pub use self::export::{ExportOptions, Exported, Form, export};
pub use self::import::{ImportOptions, Imported, import};
use crate::layout::{ModelLayout, UnitLayout};
use crate::piece::{Piece, PieceRule};

/// Hears how far a transfer is: bytes of the state that are done, and of all.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// Bytes of the pool, if tiles are not longer than this would allow.
const POOL_BYTES: usize = 24 << 20;

/// Tiles in motion at a time.
const TILES_MIN: usize = 2;
const TILES_MAX: usize = 16;

/// A tile of an array of a unit.
#[derive(Clone, Copy, Debug)]
struct Tile<'a> {
    unit: &'a UnitLayout,
    /// Its place in the row.
    index: usize,
    /// Its first element within the unit.
    start: usize,
    elements: usize,
    kind: TileKind,
    /// How its elements are recorded.
    rule: PieceRule,
    /// Its length in the store.
    bytes: usize,
}

impl Tile<'_> {
    /// The record of its elements.
    fn record(&self) -> RecordLayout {
        Piece { range: self.start..self.start + self.elements, rule: self.rule }.record()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TileKind {
    Weights,
    Moments,
}

/// Weights, and beside each tile of them its record.
const BOTH_KINDS: &[TileKind] = &[TileKind::Weights, TileKind::Moments];

/// The tiles of a unit's weights, and of its moments if `kinds` has them and there are any, those of one place side by
/// side.
fn tiles_of<'a>(
    layout: &'a ModelLayout,
    unit: &'a UnitLayout,
    tile_bytes: usize,
    kinds: &'a [TileKind],
) -> impl Iterator<Item = Tile<'a>> {
    unit.pieces(tile_bytes / size_of::<f32>()).enumerate().flat_map(move |(index, piece)| {
        let (start, elements, rule) = (piece.range.start, piece.elements(), piece.rule);
        let record_bytes = piece.record_bytes();
        let tile = move |&kind| {
            let bytes = match kind {
                TileKind::Weights => elements * layout.weight_bytes(),
                TileKind::Moments => record_bytes,
            };
            Tile { unit, index, start, elements, kind, rule, bytes }
        };
        kinds.iter().map(tile).filter(|tile| tile.bytes > 0)
    })
}

/// Those of all units.
fn tiles<'a>(
    layout: &'a ModelLayout,
    tile_bytes: usize,
    kinds: &'a [TileKind],
) -> impl Iterator<Item = Tile<'a>> {
    layout.units().iter().flat_map(move |unit| tiles_of(layout, unit, tile_bytes, kinds))
}

/// A block that is as long as the tile.
fn lease(pool: &Pool, tile: Tile<'_>) -> Result<Block, PoolError> {
    let mut block = pool.lease(tile.bytes)?;
    if tile.bytes < block.len() {
        drop(block.split_off(tile.bytes));
    }
    Ok(block)
}

/// Tiles of each kind that may be in motion at a time.
fn tiles_in_motion(layout: &ModelLayout, tile_bytes: usize) -> usize {
    let longest = layout.longest_piece(tile_bytes / size_of::<f32>()) * size_of::<f32>();
    (POOL_BYTES / (3 * longest.max(1))).clamp(TILES_MIN, TILES_MAX)
}

/// Blocks for so many tiles of each kind.
fn classes(layout: &ModelLayout, tile_bytes: usize, count: usize) -> Vec<BlockClass> {
    let tile_elements = tile_bytes / size_of::<f32>();
    let elements = layout.longest_piece(tile_elements);
    let class = |name, block_bytes, count| BlockClass { name, block_bytes, count };
    match (elements * layout.weight_bytes(), layout.longest_record_bytes(tile_elements)) {
        (weights, 0) => vec![class("tile of weights", weights, count)],
        (weights, moments) if weights == moments => vec![class("tile", weights, 2 * count)],
        (weights, moments) => {
            vec![class("tile of weights", weights, count), class("tile of moments", moments, count)]
        }
    }
}
