//! A long tensor as a row of tiles, loaded into one block and stored from one.
//!
//! Each tile is a tensor of its own, with its own extent and checksum, so the optimizer can change one tile at a
//! time; the model sees the row as one piece of memory. The block is split at the tiles' borders on the way to the
//! engine and joined on the way back; no byte is copied.

use std::mem;

use overspill_io::{BLOCK_ALIGNMENT, Block};

use crate::error::StoreError;
use crate::ledger::Worth;
use crate::store::Store;
use crate::tensor::{Dirty, Loading, Storing, Swapped, Vacant};

/// Reserves a tensor of `bytes` bytes as tiles of `tile_bytes` (the last may be shorter).
///
/// # Errors
/// As [`Store::reserve`].
///
/// # Panics
/// When `tile_bytes` is not a multiple of [`BLOCK_ALIGNMENT`]: a block could not be split at the tiles' borders.
pub fn reserve(
    store: &Store,
    name: &str,
    bytes: usize,
    tile_bytes: usize,
    worth: Worth,
) -> Result<Vec<Vacant>, StoreError> {
    let tiles = named_tiles(name, bytes, tile_bytes);
    tiles.map(|(name, length)| store.reserve(name, length, worth)).collect()
}

/// Takes up the tiles that [`reserve`] made and that were committed since.
///
/// # Errors
/// As [`Store::adopt`].
///
/// # Panics
/// As [`reserve`].
pub fn adopt(store: &Store, name: &str, bytes: usize, tile_bytes: usize) -> Result<Vec<Swapped>, StoreError> {
    named_tiles(name, bytes, tile_bytes).map(|(name, length)| store.adopt(&name, length)).collect()
}

fn named_tiles(name: &str, bytes: usize, tile_bytes: usize) -> impl Iterator<Item = (String, usize)> {
    assert!(tile_bytes.is_multiple_of(BLOCK_ALIGNMENT), "tiles of {tile_bytes} bytes");
    tile_lengths(bytes, tile_bytes).enumerate().map(move |(i, length)| (tile_name(name, i), length))
}

/// What a tile of a tensor is called.
pub fn tile_name(tensor: &str, index: usize) -> String {
    format!("{tensor}/{index}")
}

/// The lengths of the tiles that `bytes` are cut into.
pub fn tile_lengths(bytes: usize, tile_bytes: usize) -> impl Iterator<Item = usize> {
    (0..bytes).step_by(tile_bytes).map(move |start| tile_bytes.min(bytes - start))
}

/// Tiles on their way into one block.
#[derive(Debug)]
#[must_use = "a load that nobody waits for was for nothing"]
pub struct LoadingTiles(Vec<Loading>);

/// Tiles on their way to storage, from one block.
#[derive(Debug)]
#[must_use = "whether the tiles were stored is known only after waiting"]
pub struct StoringTiles(Vec<Storing>);

impl LoadingTiles {
    /// Starts reading all tiles into `block`, whose length is the sum of theirs.
    ///
    /// # Errors
    /// [`StoreError::WrongLength`], naming the first tile that does not fit; nothing was started.
    pub fn start(tiles: Vec<Swapped>, block: Block) -> Result<Self, StoreError> {
        let pairs = split(tiles, block)?;
        let loading: Result<_, _> = pairs.into_iter().map(|(tile, part)| tile.load(part)).collect();
        loading.map(Self).map_err(|refused| refused.error)
    }

    /// Waits for every tile; the block is one piece again.
    ///
    /// # Errors
    /// The first tile's error, after all others have come to rest.
    pub fn wait(self) -> Result<(Vec<Swapped>, Block), StoreError> {
        let results = Loading::wait_all(self.0);
        let mut tiles = Vec::with_capacity(results.len());
        let mut whole: Option<Block> = None;
        for result in results {
            let (tile, part) = result.map_err(|failed| failed.error)?.take();
            tiles.push(tile);
            whole = Some(match whole {
                None => part,
                Some(block) => block.join(part).expect("the parts were split off one block in this order"),
            });
        }
        Ok((tiles, whole.expect("a tensor has at least one tile")))
    }
}

impl StoringTiles {
    /// Starts writing the contents of `block` over all tiles.
    ///
    /// # Errors
    /// [`StoreError::WrongLength`], naming the first tile that does not fit; nothing was started.
    pub fn overwrite(tiles: Vec<Swapped>, block: Block) -> Result<Self, StoreError> {
        let pairs = split(tiles, block)?;
        let dirty: Result<Vec<_>, _> = pairs.into_iter().map(|(tile, part)| tile.overwrite(part)).collect();
        Ok(Self(Dirty::store_all(dirty.map_err(|refused| refused.error)?)))
    }

    /// Starts writing the first contents of all tiles.
    ///
    /// # Errors
    /// [`StoreError::WrongLength`], naming the first tile that does not fit; nothing was started.
    pub fn fill(tiles: Vec<Vacant>, block: Block) -> Result<Self, StoreError> {
        let pairs = split(tiles, block)?;
        let dirty: Result<Vec<_>, _> = pairs.into_iter().map(|(tile, part)| tile.fill(part)).collect();
        Ok(Self(Dirty::store_all(dirty.map_err(|refused| refused.error)?)))
    }

    /// Whether [`StoringTiles::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.0.iter().all(Storing::is_done)
    }

    /// Waits until every tile is on storage.
    ///
    /// # Errors
    /// The first tile's error, after all others have come to rest.
    pub fn wait(self) -> Result<Vec<Swapped>, StoreError> {
        let results: Vec<_> = self.0.into_iter().map(Storing::wait).collect();
        results.into_iter().map(|result| result.map_err(|failed| failed.error)).collect()
    }
}

/// A tensor that a part of the block is for.
trait Tile: Sized {
    fn length(&self) -> usize;
    fn wrong_length(&self, found: usize) -> StoreError;
}

impl Tile for Vacant {
    fn length(&self) -> usize {
        self.bytes()
    }

    fn wrong_length(&self, found: usize) -> StoreError {
        Vacant::wrong_length(self, found)
    }
}

impl Tile for Swapped {
    fn length(&self) -> usize {
        self.bytes()
    }

    fn wrong_length(&self, found: usize) -> StoreError {
        Swapped::wrong_length(self, found)
    }
}

/// Cuts the block at the tiles' borders, each part as long as its tile; the last tile takes what is left.
fn split<T: Tile>(tiles: Vec<T>, mut block: Block) -> Result<Vec<(T, Block)>, StoreError> {
    let mut left = block.len();
    for (i, tile) in tiles.iter().enumerate() {
        let is_last = i + 1 == tiles.len();
        if tile.length() > left || (is_last && tile.length() < left) {
            return Err(tile.wrong_length(left));
        }
        left -= tile.length();
    }
    let cut = |tile: T| {
        let rest = block.split_off(tile.length());
        (tile, mem::replace(&mut block, rest))
    };
    Ok(tiles.into_iter().map(cut).collect())
}
