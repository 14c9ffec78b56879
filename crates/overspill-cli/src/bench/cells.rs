//! The cells of `bench io`: which files, which blocks in which order, read or written.

use clap::ValueEnum;
use overspill_io::Direction;

use crate::motion::files::Shape;
use crate::motion::marks;
use crate::motion::mover::Step;

/// A kind of traffic over a kind of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cell {
    /// One file, in order
    Read,
    /// One file that was written before, in order
    Overwrite,
    /// Half of one file's blocks read, half written, in random order
    Mixed,
    /// A fresh, preallocated file, in order
    FirstWrite,
    /// Sixteen files, one after the other
    #[value(name = "read-16-files")]
    ReadSixteen,
    /// Sixteen files, one after the other
    #[value(name = "overwrite-16-files")]
    OverwriteSixteen,
    /// Half of sixteen files' blocks read, half written, in random order
    #[value(name = "mixed-16-files")]
    MixedSixteen,
    /// Files of one tile each, one after the other
    ReadSmallFiles,
    /// Files of one tile each, one after the other
    OverwriteSmallFiles,
    /// One file's tiles, in random order
    ReadTiles,
    /// One file's tiles, in random order
    OverwriteTiles,
}

/// What is moved at a time, in bytes, where nothing else is said.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;

/// What is moved at a time where it is said to be small, in bytes.
pub(crate) const TILE_BYTES: usize = 256 << 10;

/// All the small files together are this part of the one large file.
const SMALL_PART: u64 = 4;

/// Which blocks are read and which are written, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    Read,
    Write,
    Mixed,
    RandomRead,
    RandomWrite,
}

impl Cell {
    /// Its name in tables and in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Overwrite => "overwrite",
            Self::Mixed => "mixed",
            Self::FirstWrite => "first write",
            Self::ReadSixteen => "read, 16 files",
            Self::OverwriteSixteen => "overwrite, 16 files",
            Self::MixedSixteen => "mixed, 16 files",
            Self::ReadSmallFiles => "read, 256 KiB files",
            Self::OverwriteSmallFiles => "overwrite, 256 KiB files",
            Self::ReadTiles => "read, random 256 KiB tiles",
            Self::OverwriteTiles => "overwrite, random 256 KiB tiles",
        }
    }

    pub(crate) fn traffic(self) -> Traffic {
        match self {
            Self::Read | Self::ReadSixteen | Self::ReadSmallFiles => Traffic::Read,
            Self::Overwrite | Self::FirstWrite | Self::OverwriteSixteen | Self::OverwriteSmallFiles => {
                Traffic::Write
            }
            Self::Mixed | Self::MixedSixteen => Traffic::Mixed,
            Self::ReadTiles => Traffic::RandomRead,
            Self::OverwriteTiles => Traffic::RandomWrite,
        }
    }

    /// The files, given the size of the one large file; every file has a block at least.
    pub(crate) fn shape(self, bytes: u64) -> Shape {
        let blocks = |bytes: u64, block_bytes: usize| {
            usize::try_from(bytes / block_bytes as u64).unwrap_or(usize::MAX).max(1)
        };
        match self {
            Self::Read | Self::Overwrite | Self::Mixed | Self::FirstWrite => {
                Shape { files: 1, blocks_per_file: blocks(bytes, BLOCK_BYTES), block_bytes: BLOCK_BYTES }
            }
            Self::ReadSixteen | Self::OverwriteSixteen | Self::MixedSixteen => Shape {
                files: 16,
                blocks_per_file: blocks(bytes / 16, BLOCK_BYTES),
                block_bytes: BLOCK_BYTES,
            },
            Self::ReadSmallFiles | Self::OverwriteSmallFiles => Shape {
                files: blocks(bytes / SMALL_PART, TILE_BYTES).min(SMALL_FILES_MAX),
                blocks_per_file: 1,
                block_bytes: TILE_BYTES,
            },
            Self::ReadTiles | Self::OverwriteTiles => {
                Shape { files: 1, blocks_per_file: blocks(bytes, TILE_BYTES), block_bytes: TILE_BYTES }
            }
        }
    }

    /// How many times everything is moved in one measurement, so that it is long enough for a clock.
    pub(crate) fn rounds(self) -> usize {
        match self {
            Self::ReadSmallFiles | Self::OverwriteSmallFiles => SMALL_PART as usize,
            _ => 1,
        }
    }
}

/// More files cannot be open at a time everywhere.
const SMALL_FILES_MAX: usize = 1024;

impl Traffic {
    /// Whether anything is written.
    fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Mixed | Self::RandomWrite)
    }

    /// Every block once; a random order depends on `seed`.
    pub(crate) fn steps(self, blocks: usize, seed: u64) -> Vec<Step> {
        let step = |block, writes| Step {
            block,
            direction: if writes { Direction::Write } else { Direction::Read },
        };
        match self {
            Self::Read | Self::Write => (0..blocks).map(|block| step(block, self.writes())).collect(),
            Self::RandomRead | Self::RandomWrite => marks::shuffled(blocks, seed)
                .into_iter()
                .map(|(block, _)| step(block, self.writes()))
                .collect(),
            Self::Mixed => {
                marks::shuffled(blocks, seed).into_iter().map(|(block, bit)| step(block, bit)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_moves_about_as_much_and_has_a_name_of_its_own() {
        let mut names: Vec<_> = Cell::value_variants().iter().map(|cell| cell.name()).collect();
        for cell in Cell::value_variants() {
            let shape = cell.shape(1 << 30);
            assert_eq!(shape.bytes() * cell.rounds() as u64, 1 << 30, "{cell:?}");
            assert!(cell.shape(0).bytes() > 0);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Cell::value_variants().len());
    }

    #[test]
    fn every_block_is_moved_once_in_the_direction_of_the_cell() {
        for traffic in
            [Traffic::Read, Traffic::Write, Traffic::Mixed, Traffic::RandomRead, Traffic::RandomWrite]
        {
            let steps = traffic.steps(500, 3);
            let mut blocks: Vec<_> = steps.iter().map(|step| step.block).collect();
            blocks.sort_unstable();
            assert_eq!(blocks, (0..500).collect::<Vec<_>>());
            let writes = steps.iter().filter(|step| step.direction == Direction::Write).count();
            match traffic {
                Traffic::Read | Traffic::RandomRead => assert_eq!(writes, 0),
                Traffic::Write | Traffic::RandomWrite => assert_eq!(writes, 500),
                Traffic::Mixed => assert!((200..300).contains(&writes)),
            }
        }
    }
}
