//! A long tensor as a row of tiles, loaded into one block and stored from one.
//!
//! Each tile is a tensor of its own, with its own extent and checksum, so the optimizer can change one tile at a
//! time; the model sees the row as one piece of memory. The block is split at the tiles' borders on the way to the
//! engine and joined on the way back; no byte is copied, but for tiles that stay in memory.

use overspill_io::{BLOCK_ALIGNMENT, Block};

use crate::error::StoreError;
use crate::ledger::Worth;
use crate::slot::{Coming, Kept, Slot};
use crate::store::Store;
use crate::tensor::{Dirty, Loading};

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
) -> Result<Vec<Slot>, StoreError> {
    let tiles = named_tiles(name, bytes, tile_bytes);
    tiles.map(|(name, length)| store.reserve(name, length, worth).map(Slot::Vacant)).collect()
}

/// Takes up the tiles that [`reserve`] made and that were committed since.
///
/// # Errors
/// As [`Store::adopt`].
///
/// # Panics
/// As [`reserve`].
pub fn adopt(store: &Store, name: &str, bytes: usize, tile_bytes: usize) -> Result<Vec<Slot>, StoreError> {
    let tiles = named_tiles(name, bytes, tile_bytes);
    tiles.map(|(name, length)| store.adopt(&name, length).map(Slot::Swapped)).collect()
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

/// Whether reading the tiles could start without waiting for a write.
pub fn are_at_rest(tiles: &[Slot]) -> bool {
    tiles.iter().all(Slot::is_at_rest)
}

/// Tiles on their way into one block.
#[derive(Debug)]
#[must_use = "a load that nobody waits for was for nothing"]
pub struct LoadingTiles(Vec<Tile>);

/// A tile, and the part of the block that is its own.
#[derive(Debug)]
enum Tile {
    Loading(Loading),
    /// Copied from where it stays.
    Copied(Kept, Block),
}

impl LoadingTiles {
    /// Starts reading all tiles into `block`, whose length is the sum of theirs.
    ///
    /// # Errors
    /// [`StoreError::WrongLength`], naming the first tile that does not fit; nothing was started. What a write that is
    /// still under way failed with.
    pub fn start(tiles: Vec<Slot>, block: Block) -> Result<Self, StoreError> {
        let begin = |(slot, mut part): (Slot, Block)| match slot {
            Slot::Kept(tensor) => {
                part.copy_from_slice(tensor.bytes());
                Ok(Tile::Copied(tensor, part))
            }
            // What was prefetched has a block of its own.
            slot => match slot.settle()?.begin(Some(part))? {
                Coming::Loading(loading) => Ok(Tile::Loading(loading)),
                Coming::New(tensor) | Coming::Kept(Kept::Dirty(tensor)) => Err(tensor.unfinished()),
                Coming::Kept(Kept::Clean(tensor)) => Err(tensor.edit().unfinished()),
            },
        };
        let begun: Vec<_> = split(tiles, block)?.into_iter().map(begin).collect();
        begun.into_iter().collect::<Result<_, _>>().map(Self)
    }

    /// Waits for every tile; each stays in its part of the block.
    ///
    /// # Errors
    /// As [`LoadingTiles::wait`].
    pub fn stay(self) -> Result<Vec<Slot>, StoreError> {
        let stay = |tile| match tile {
            Tile::Loading(tensor) => {
                let tensor = tensor.wait().map_err(|failed| failed.error)?;
                Ok(Slot::Kept(Kept::Clean(tensor)))
            }
            Tile::Copied(tensor, _) => Ok(Slot::Kept(tensor)),
        };
        let results: Vec<_> = self.0.into_iter().map(stay).collect();
        results.into_iter().collect()
    }

    /// Waits for every tile; the block is one piece again.
    ///
    /// # Errors
    /// The first tile's error, after all others have come to rest.
    pub fn wait(self) -> Result<(Vec<Slot>, Block), StoreError> {
        let mut loading = Vec::with_capacity(self.0.len());
        let mut copied = Vec::with_capacity(self.0.len());
        for tile in self.0 {
            match tile {
                Tile::Loading(tensor) => {
                    loading.push(tensor);
                    copied.push(None);
                }
                Tile::Copied(tensor, part) => copied.push(Some((Slot::Kept(tensor), part))),
            }
        }
        let mut loaded = Loading::wait_all(loading).into_iter();
        let mut tiles = Vec::with_capacity(copied.len());
        let mut whole: Option<Block> = None;
        for copied in copied {
            let (tile, part) = match copied {
                Some(copied) => copied,
                None => {
                    let loaded = loaded.next().expect("one of the tiles that were loaded");
                    let (tensor, part) = loaded.map_err(|failed| failed.error)?.take();
                    (Slot::Swapped(tensor), part)
                }
            };
            tiles.push(tile);
            whole = Some(match whole {
                None => part,
                Some(block) => block.join(part).expect("the parts were split off one block in this order"),
            });
        }
        Ok((tiles, whole.expect("a tensor has at least one tile")))
    }
}

/// Starts writing the contents of `block` to all tiles; those that stay in memory take a copy.
///
/// # Errors
/// [`StoreError::WrongLength`], naming the first tile that does not fit; nothing was started. What a write that is still
/// under way failed with.
pub fn store(tiles: Vec<Slot>, block: Block) -> Result<Vec<Slot>, StoreError> {
    let replace = |(slot, part): (Slot, Block)| -> Result<Result<Dirty, Slot>, StoreError> {
        match slot.settle()? {
            Slot::Vacant(tensor) => tensor.fill(part).map(Ok).map_err(|refused| refused.error),
            Slot::Swapped(tensor) => tensor.overwrite(part).map(Ok).map_err(|refused| refused.error),
            Slot::Kept(tensor) => {
                let mut tensor = tensor.edit();
                tensor.bytes_mut().copy_from_slice(&part);
                Ok(Err(Slot::Kept(Kept::Dirty(tensor))))
            }
            Slot::Loading(_) | Slot::Storing(_) | Slot::Saving(_) => unreachable!("it was settled"),
        }
    };
    let replaced: Vec<_> = split(tiles, block)?.into_iter().map(replace).collect();
    let replaced = replaced.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut kept = Vec::with_capacity(replaced.len());
    let mut moving = Vec::with_capacity(replaced.len());
    for tile in replaced {
        match tile {
            Ok(tensor) => {
                moving.push(tensor);
                kept.push(None);
            }
            Err(slot) => kept.push(Some(slot)),
        }
    }
    let mut storing = Dirty::store_all(moving).into_iter().map(Slot::Storing);
    Ok(kept.into_iter().filter_map(|kept| kept.or_else(|| storing.next())).collect())
}

/// Gives tiles the contents of `block`, and keeps them in its parts; those that stay in memory already take a copy.
///
/// # Errors
/// As [`store`].
pub fn keep(tiles: Vec<Slot>, block: Block) -> Result<Vec<Slot>, StoreError> {
    let keep = |(slot, part): (Slot, Block)| {
        let tensor = match slot.settle()? {
            Slot::Vacant(tensor) => tensor.fill(part).map_err(|refused| refused.error)?,
            Slot::Swapped(tensor) => tensor.overwrite(part).map_err(|refused| refused.error)?,
            Slot::Kept(tensor) => {
                let mut tensor = tensor.edit();
                tensor.bytes_mut().copy_from_slice(&part);
                tensor
            }
            Slot::Loading(_) | Slot::Storing(_) | Slot::Saving(_) => unreachable!("it was settled"),
        };
        Ok(Slot::Kept(Kept::Dirty(tensor)))
    };
    let kept: Vec<_> = split(tiles, block)?.into_iter().map(keep).collect();
    kept.into_iter().collect()
}

/// Cuts the block at the tiles' borders, each part as long as its tile; the last tile takes what is left.
fn split(tiles: Vec<Slot>, mut block: Block) -> Result<Vec<(Slot, Block)>, StoreError> {
    let mut left = block.len();
    for (i, tile) in tiles.iter().enumerate() {
        let is_last = i + 1 == tiles.len();
        if tile.bytes() > left || (is_last && tile.bytes() < left) {
            return Err(tile.wrong_length(left));
        }
        left -= tile.bytes();
    }
    let cut = |tile: Slot| {
        let rest = block.split_off(tile.bytes());
        (tile, std::mem::replace(&mut block, rest))
    };
    Ok(tiles.into_iter().map(cut).collect())
}
