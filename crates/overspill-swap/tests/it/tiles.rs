use overspill_swap::tiles::{self, LoadingTiles};
use overspill_swap::{Kept, Slot, StoreError, Worth};
use proptest::prelude::*;

use crate::rig::{BACKENDS, BLOCK, Rig};

#[test]
fn a_row_of_tiles_is_one_piece_of_memory_again() {
    for backend in BACKENDS {
        let rig = Rig::new(backend, 1, 1);
        let vacant = tiles::reserve(&rig.store, "row", BLOCK, 12 << 10, Worth::State).unwrap();
        assert_eq!(vacant.len(), 6);
        let mut block = rig.pool.lease(BLOCK).unwrap();
        let pattern: Vec<u8> = (0..BLOCK).map(|i| (i / 4096 * 31 + i) as u8).collect();
        block.copy_from_slice(&pattern);
        let stored = tiles::store(vacant, block).unwrap();
        let (stored, block) =
            LoadingTiles::start(stored, rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
        assert_eq!(block.as_ref(), pattern);
        drop(block);

        rig.flip_bit(40_000);
        let error = LoadingTiles::start(stored, rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { tensor, .. } if tensor == "row/3"));
        assert_eq!(rig.pool.leased_blocks(), 0);
    }
}

#[test]
fn tiles_that_stay_in_memory_are_copied_in_and_out() {
    let rig = Rig::new(BACKENDS[0], 2, 1);
    let mut tiles = tiles::reserve(&rig.store, "row", BLOCK, BLOCK / 2, Worth::State).unwrap();
    let Slot::Vacant(second) = tiles.pop().unwrap() else { panic!("nothing was stored yet") };
    let mut zeros = rig.pool.lease(BLOCK / 2).unwrap();
    zeros.fill(0);
    tiles.push(Slot::Kept(Kept::Dirty(second.fill(zeros).unwrap())));
    let tiles = tiles::store(tiles, rig.block(7)).unwrap();
    let (tiles, block) = LoadingTiles::start(tiles, rig.pool.lease(BLOCK).unwrap()).unwrap().wait().unwrap();
    assert!(block.iter().all(|&byte| byte == 7));
    assert!(matches!(&tiles[..], [Slot::Swapped(_), Slot::Kept(Kept::Dirty(_))]));
    assert_eq!(rig.engine.stats().bytes_written as usize, BLOCK / 2);
}

#[test]
fn tiles_that_are_kept_again_have_the_newer_contents() {
    let rig = Rig::new(BACKENDS[0], 2, 1);
    let tiles = tiles::reserve(&rig.store, "row", BLOCK, BLOCK / 2, Worth::State).unwrap();
    let tiles = tiles::keep(tiles, rig.block(1)).unwrap();
    for tile in tiles::keep(tiles, rig.block(2)).unwrap() {
        let Slot::Kept(tensor) = tile else { panic!("it stays") };
        assert!(tensor.bytes().iter().all(|&byte| byte == 2));
    }
}

#[test]
fn a_block_that_is_too_short_is_refused() {
    let rig = Rig::new(BACKENDS[0], 1, 2);
    let vacant = tiles::reserve(&rig.store, "row", BLOCK + 4096, 32 << 10, Worth::State).unwrap();
    let error = tiles::store(vacant, rig.pool.lease(BLOCK).unwrap()).unwrap_err();
    assert!(matches!(error, StoreError::WrongLength { tensor, .. } if tensor == "row/2"));
}

proptest! {
    #[test]
    fn tiles_cover_a_tensor_without_gap_or_overlap(bytes in 1usize..10_000, tile_bytes in 1usize..3_000) {
        let lengths: Vec<_> = tiles::tile_lengths(bytes, tile_bytes).collect();
        prop_assert_eq!(lengths.iter().sum::<usize>(), bytes);
        prop_assert!(lengths[..lengths.len() - 1].iter().all(|&length| length == tile_bytes));
        prop_assert!((1..=tile_bytes).contains(lengths.last().unwrap()));
    }
}
