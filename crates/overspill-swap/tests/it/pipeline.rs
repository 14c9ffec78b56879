use overspill_io::BackendChoice;
use overspill_swap::pipeline::{self, Item, Limits, PipelineError};
use overspill_swap::{Slot, StoreError, Swapped};

use crate::rig::{BACKENDS, BLOCK, Rig};

const ITEMS: usize = 9;

/// Items of one tensor to change and one to read; the pool holds `blocks` blocks.
fn items(rig: &Rig) -> Vec<Item> {
    let item = |i: usize| Item {
        edited: vec![Slot::Swapped(rig.tensor(&format!("edited {i}"), i as u8))],
        read: vec![Slot::Swapped(rig.tensor(&format!("read {i}"), 100 + i as u8))],
    };
    (0..ITEMS).map(item).collect()
}

fn limits(rig: &Rig, depth: usize) -> Limits<'_> {
    Limits { pool: &rig.pool, depth, block_bytes: &[BLOCK, BLOCK] }
}

/// The tensor, after its write is over.
fn swapped(slot: Slot) -> Swapped {
    match slot.settle().unwrap() {
        Slot::Swapped(tensor) => tensor,
        other => panic!("{other:?}"),
    }
}

fn mix(index: usize, edited: &mut [&mut [u8]], read: &[&[u8]]) -> Result<(), String> {
    for (i, (out, from)) in edited[0].iter_mut().zip(read[0]).enumerate() {
        *out = out.wrapping_mul(3).wrapping_add(*from) ^ (i + index) as u8;
    }
    Ok(())
}

#[test]
fn every_depth_and_backend_gives_the_same_bytes_in_the_same_order() {
    let mut first: Option<Vec<Vec<u8>>> = None;
    for backend in BACKENDS {
        for depth in 0..4 {
            let rig = Rig::new(backend, 2 * pipeline::items_in_memory(depth), 2 * ITEMS);
            let mut order = Vec::new();
            let done = pipeline::run(limits(&rig, depth), items(&rig), |index, edited, read| {
                order.push(index);
                mix(index, edited, read)
            })
            .unwrap();
            assert_eq!(order, (0..ITEMS).collect::<Vec<_>>());
            let bytes: Vec<_> = done
                .items
                .into_iter()
                .flat_map(|item| item.edited)
                .map(|slot| rig.read(swapped(slot)).1)
                .collect();
            assert_eq!(bytes.len(), ITEMS);
            assert!(first.get_or_insert_with(|| bytes.clone()) == &bytes, "{backend} at depth {depth}");
            assert_eq!(rig.pool.leased_blocks(), 0);
        }
    }
}

#[test]
fn a_pool_with_room_for_one_item_slows_the_pipeline_down_but_does_not_stop_it() {
    let rig = Rig::new(BackendChoice::Auto, 2, 2 * ITEMS);
    let done = pipeline::run(limits(&rig, 3), items(&rig), mix).unwrap();
    assert_eq!(done.items.len(), ITEMS);
}

#[test]
fn a_refusal_of_the_computation_leaves_every_block_in_the_pool() {
    for backend in BACKENDS {
        for depth in [0, 2] {
            let rig = Rig::new(backend, 2 * pipeline::items_in_memory(depth), 2 * ITEMS);
            let result = pipeline::run(limits(&rig, depth), items(&rig), |index, edited, read| match index {
                4 => Err("no".to_owned()),
                _ => mix(index, edited, read),
            });
            assert!(matches!(result, Err(PipelineError::Compute(reason)) if reason == "no"));
            assert_eq!(rig.pool.leased_blocks(), 0);
        }
    }
}

#[test]
fn damage_stops_the_pipeline_at_the_damaged_tensor() {
    for depth in [0, 2] {
        let rig = Rig::new(BackendChoice::Auto, 2 * pipeline::items_in_memory(depth), 2 * ITEMS);
        let items = items(&rig);
        rig.flip_bit((2 * 5 * BLOCK) as u64);
        let mut computed = 0;
        let result = pipeline::run(limits(&rig, depth), items, |index, edited, read| {
            computed += 1;
            mix(index, edited, read)
        });
        match result {
            Err(PipelineError::Store(StoreError::Corrupt { tensor, .. })) => assert_eq!(tensor, "edited 5"),
            other => panic!("{:?}", other.map(|done| done.items.len())),
        }
        assert_eq!(computed, 5);
        assert_eq!(rig.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_pool_that_somebody_else_empties_is_an_error_when_it_can_never_do() {
    let rig = Rig::new(BackendChoice::Auto, 1, 2);
    let pair = |name: &str| -> Vec<Slot> { vec![Slot::Swapped(rig.tensor(name, 1))] };
    let item = Item { edited: pair("a"), read: pair("b") };
    let result = pipeline::run(limits(&rig, 0), vec![item], mix);
    assert!(
        matches!(result, Err(PipelineError::Store(StoreError::Pool(_)))),
        "two blocks are needed, one exists"
    );
}
