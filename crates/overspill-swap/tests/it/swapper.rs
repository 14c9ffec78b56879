//! The asynchronous swapper: packing, order, failures, and that nothing is lost on the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use overspill_io::{BackendChoice, EngineConfig};
use overspill_swap::buffers::{Alignment, Dtype, Refused, SwapError, TensorBytes, dump};
use overspill_swap::swapper::{AsyncTensorSwapper, BufferStates, SwapOutFailed, SwapStats, WAIT_TIMER};
use proptest::prelude::*;
use rustix::io::Errno;

use crate::apart::{apart, mount};
use crate::folder::{BOTH, Folder, KIB, assert_file, eventually, pattern};

fn swapper(folder: &Folder, buffers: &[usize]) -> AsyncTensorSwapper {
    let mut swapper = AsyncTensorSwapper::new(&folder.engine, Alignment::MAX);
    swapper.add_buffers(folder.pool.lease_all(buffers).unwrap(), Dtype::U8).unwrap();
    swapper
}

fn put(swapper: &mut AsyncTensorSwapper, path: &Path, tensor: &[u8]) -> Result<(), SwapOutFailed> {
    swapper.swap_out_tensors(&[TensorBytes::from(tensor)], &[path])
}

fn states(free: usize, filling: usize, writing: usize, failed: usize) -> BufferStates {
    BufferStates { free, filling, writing, failed }
}

#[test]
fn buffers_are_added_and_all_given_back() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 3);
    let mut swapper = AsyncTensorSwapper::new(&folder.engine, Alignment::MAX);
    assert!(!swapper.has_buffers() && swapper.dtype().is_none());
    let Refused { error, blocks } = swapper.add_buffers(Vec::new(), Dtype::F32).unwrap_err();
    assert_eq!((error, blocks.len()), (SwapError::NoBuffers, 0));
    let refused = swapper.add_buffers(vec![folder.pool.lease(100).unwrap()], Dtype::F32).unwrap_err();
    assert_eq!(refused.error, SwapError::TinyBuffer { bytes: 100 });
    drop(refused);
    assert!(!swapper.has_buffers());
    swapper.add_buffers(folder.pool.lease_all(&[4096, 8192]).unwrap(), Dtype::F32).unwrap();
    let refused = swapper.add_buffers(folder.pool.lease_all(&[4096]).unwrap(), Dtype::Bf16).unwrap_err();
    assert_eq!(refused.error, SwapError::MixedDtypes { held: Dtype::F32, given: Dtype::Bf16 });
    swapper.add_buffers(refused.blocks, Dtype::F32).unwrap();
    assert_eq!((swapper.dtype(), swapper.states()), (Some(Dtype::F32), states(3, 0, 0, 0)));
    swapper.swap_out_tensors(&[[1.0_f32, 2.0][..].into()], &[folder.path("a")]).unwrap();

    let released = swapper.release_buffers().unwrap();
    let mut lengths: Vec<_> = released.blocks.iter().map(|block| block.len()).collect();
    lengths.sort_unstable();
    assert_eq!(lengths, [4096, 4096, 8192]);
    assert_file(&folder.path("a"), bytemuck::cast_slice(&[1.0_f32, 2.0]));
    assert_eq!((released.stats.tensors, released.stats.numel, released.stats.bytes), (1, 2, 8));
    assert!(!swapper.has_buffers());
    assert_eq!(swapper.stats(), SwapStats::default());
    assert!(swapper.release_buffers().unwrap().blocks.is_empty());
    swapper.add_buffers(released.blocks, Dtype::Bf16).unwrap();
    drop(swapper);
    assert_eq!(folder.pool.leased_blocks(), 0);
}

#[test]
fn a_call_that_is_refused_changes_nothing() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 2);
    let [a, b] = folder.paths(["a", "b"]);
    let bytes = pattern(9000, 1);
    let (small, large) = (TensorBytes::from(&bytes[..100]), TensorBytes::from(&bytes[..8193]));
    let mut without = AsyncTensorSwapper::new(&folder.engine, Alignment::MAX);
    let refused = without.swap_out_tensors(&[small], &[&a]).unwrap_err();
    assert_eq!(refused, SwapOutFailed { error: SwapError::NoBuffers, taken: 0 });

    let mut swapper = swapper(&folder, &[8192, 4096]);
    swapper.swap_out_tensors(&[small], &[&a]).unwrap();
    let before = dump(&swapper).to_string();
    let refused = swapper.swap_out_tensors(&[small, large], &[&a, &b]).unwrap_err();
    let (numel, dtype, numel_max) = (8193, Dtype::U8, 8192);
    assert_eq!(refused.error, SwapError::TooLarge { path: b.clone(), numel, dtype, numel_max });
    let other = TensorBytes::new(Dtype::I8, &bytes).unwrap();
    let refused = swapper.swap_out_tensors(&[small, other], &[&a, &b]).unwrap_err();
    let (expected, found) = (Dtype::U8, Dtype::I8);
    assert_eq!(refused.error, SwapError::WrongDtype { path: b.clone(), expected, found });
    let refused = swapper.swap_out_tensors(&[small, small], &[&a]).unwrap_err();
    assert_eq!(refused.error, SwapError::Lists { tensors: 2, paths: 1 });
    let refused = swapper.swap_out_tensors(&[small, small], &[&b, &b]).unwrap_err();
    assert_eq!((refused.error, refused.taken), (SwapError::SameFile { path: b.clone(), other: b }, 0));
    assert_eq!(dump(&swapper).to_string(), before);

    let released = swapper.release_buffers().unwrap();
    assert_eq!((released.stats.tensors, released.blocks.len()), (1, 2));
    assert_eq!(folder.names(), ["a"]);
    assert_file(&a, &bytes[..100]);
}

#[test]
fn tensors_share_buffers_and_a_flush_leaves_every_buffer_free() {
    for backend in BOTH {
        let folder = Folder::new(backend, 16 * KIB, 2);
        let mut swapper = swapper(&folder, &[16 * KIB; 2]);
        let tensors: Vec<(PathBuf, Vec<u8>)> = (0..20_u8)
            .map(|seed| (folder.path(&seed.to_string()), pattern(1000 + 700 * usize::from(seed), seed)))
            .collect();
        let bytes: Vec<TensorBytes<'_>> =
            tensors.iter().map(|(_, tensor)| tensor.as_slice().into()).collect();
        let paths: Vec<&Path> = tensors.iter().map(|(path, _)| path.as_path()).collect();
        swapper.swap_out_tensors(&bytes, &paths).unwrap();
        assert_eq!(swapper.states().filling, 1);
        swapper.flush().unwrap();
        assert_eq!(swapper.states(), states(2, 0, 0, 0));
        for (path, tensor) in &tensors {
            assert_file(path, tensor);
        }
        let stats = swapper.stats();
        let numel: usize = tensors.iter().map(|(_, tensor)| tensor.len()).sum();
        let padded: usize = tensors.iter().map(|(_, tensor)| tensor.len().next_multiple_of(4096)).sum();
        assert_eq!((stats.tensors, stats.numel, stats.bytes), (20, numel as u64, numel as u64));
        assert_eq!(stats.bytes_written, padded as u64);
        swapper.flush().unwrap();
        assert_eq!(swapper.stats(), stats, "nothing was left to do");
        assert_eq!(swapper.release_buffers().unwrap().blocks.len(), 2);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_caller_waits_only_when_no_buffer_is_free_and_may_reuse_its_memory_at_once() {
    let folder = Folder::new(BackendChoice::Uring, 128 * KIB, 3);
    let pipe = folder.pipe("pipe");
    let mut swapper = swapper(&folder, &[128 * KIB; 3]);
    let mut tensor = pattern(128 * KIB, 1);
    // More than a pipe holds, so its write goes on until somebody reads.
    put(&mut swapper, &pipe.path, &tensor).unwrap();
    tensor.fill(0);
    assert_eq!(swapper.states(), states(2, 1, 0, 0));
    put(&mut swapper, &folder.path("a"), &pattern(128 * KIB, 2)).unwrap();
    assert_eq!(swapper.states(), states(1, 1, 1, 0));
    put(&mut swapper, &folder.path("b"), &pattern(128 * KIB, 3)).unwrap();
    assert_eq!(swapper.states().filling, 1);
    assert_eq!((swapper.stats().waits, swapper.stats().timers()), (0, Vec::new()));

    // From here on no buffer needs to be free, and the oldest write ends only while this thread waits for it.
    let drained = std::thread::scope(|scope| {
        let drained = scope.spawn(|| pipe.drain(128 * KIB));
        for (name, seed) in [("c", 4), ("d", 5)] {
            put(&mut swapper, &folder.path(name), &pattern(128 * KIB, seed)).unwrap();
        }
        swapper.flush().unwrap();
        drained.join().unwrap()
    });
    assert!(drained == pattern(128 * KIB, 1), "the tensor as it was when the call returned");
    for (name, seed) in [("a", 2), ("b", 3), ("c", 4), ("d", 5)] {
        assert_file(&folder.path(name), &pattern(128 * KIB, seed));
    }
    assert_eq!(swapper.stats().tensors, 5);
}

#[test]
fn waiting_is_counted_under_its_name() {
    let folder = Folder::new(BackendChoice::Uring, 128 * KIB, 1);
    let pipe = folder.pipe("pipe");
    let mut swapper = swapper(&folder, &[128 * KIB]);
    put(&mut swapper, &pipe.path, &pattern(128 * KIB, 1)).unwrap();
    let stat = std::fs::read_link("/proc/thread-self").unwrap();
    let stat = Path::new("/proc").join(stat).join("stat");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            eventually("the flush is blocked", || {
                let stat = std::fs::read_to_string(&stat).unwrap();
                stat.rsplit(')').next().is_some_and(|state| state.trim_start().starts_with('S'))
            });
            pipe.drain(128 * KIB)
        });
        swapper.flush().unwrap();
        assert!(reader.join().unwrap() == pattern(128 * KIB, 1));
    });
    let stats = swapper.stats();
    assert_eq!((stats.waits, stats.timers()), (1, vec![(WAIT_TIMER, stats.waited)]));
    assert!(!stats.waited.is_zero());
    assert!(dump(&swapper).to_string().contains(WAIT_TIMER));
}

/// Many small chunks, two at a time: a write that is not waited for goes on while the next one ends.
fn slow(backend: BackendChoice) -> EngineConfig {
    EngineConfig { backend, chunk_bytes: 4096, queue_depth: 2, ..EngineConfig::default() }
}

#[test]
fn the_last_tensor_for_a_file_is_what_it_holds() {
    for backend in BOTH {
        let folder = Folder::with(slow(backend), 1024 * KIB, 3);
        let [file, alias] = folder.paths(["file", "alias"]);
        std::fs::write(&file, b"").unwrap();
        std::fs::hard_link(&file, &alias).unwrap();
        for (first, second) in [(&file, &file), (&file, &alias)] {
            let mut swapper = swapper(&folder, &[1024 * KIB; 3]);
            put(&mut swapper, first, &pattern(1000 * KIB, 1)).unwrap();
            put(&mut swapper, &folder.path("between"), &pattern(1024 * KIB, 2)).unwrap();
            put(&mut swapper, second, &pattern(5000, 3)).unwrap();
            swapper.flush().unwrap();
            assert_file(&file, &pattern(5000, 3));
            // Now all of them at once, in one buffer.
            put(&mut swapper, first, &pattern(9000, 4)).unwrap();
            put(&mut swapper, first, &pattern(100, 5)).unwrap();
            swapper.flush().unwrap();
            assert_file(&file, &pattern(100, 5));
        }
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn two_names_of_one_file_in_one_buffer_are_refused_with_the_tensors() {
    let folder = Folder::new(BackendChoice::Auto, 16 * KIB, 1);
    let [file, alias] = folder.paths(["file", "alias"]);
    std::fs::write(&file, b"old").unwrap();
    std::fs::hard_link(&file, &alias).unwrap();
    let mut swapper = swapper(&folder, &[16 * KIB]);
    put(&mut swapper, &file, &pattern(10, 1)).unwrap();
    put(&mut swapper, &alias, &pattern(10, 2)).unwrap();
    assert_eq!(swapper.flush(), Err(SwapError::SameFile { path: alias.clone(), other: file.clone() }));
    assert_eq!(std::fs::read(&file).unwrap(), b"old");
    assert_eq!(swapper.discard_failed(), [file, alias]);
    assert_eq!(swapper.release_buffers().unwrap().blocks.len(), 1);
}

#[test]
fn a_failed_write_keeps_its_tensors_until_somebody_decides() {
    for backend in BOTH {
        let folder = Folder::new(backend, 8 * KIB, 2);
        let [file, missing, later] = folder.paths(["file", "later/file", "after"]);
        let mut swapper = swapper(&folder, &[8 * KIB; 2]);
        put(&mut swapper, &file, &pattern(10, 1)).unwrap();
        put(&mut swapper, &missing, &pattern(4096, 2)).unwrap();
        let (third, fourth) = (pattern(8192, 3), pattern(100, 4));
        let two = [third.as_slice().into(), fourth.as_slice().into()];
        let SwapOutFailed { error, taken } = swapper.swap_out_tensors(&two, &[&later, &file]).unwrap_err();
        assert_eq!(
            (error.path(), error.errno(), taken),
            (Some(&*missing), Some(Errno::NOENT.raw_os_error()), 0)
        );
        assert_eq!(swapper.states(), states(1, 0, 0, 1));
        assert!(folder.names().is_empty(), "not one of the buffer's files is there");

        // Nothing passes by what failed, and nothing is forgotten.
        let unwritten = SwapError::Unwritten { path: missing.clone(), buffers: 1 };
        assert_eq!(put(&mut swapper, &file, b"new").unwrap_err().error, unwritten);
        assert_eq!(swapper.flush(), Err(unwritten.clone()));
        assert_eq!(swapper.release_buffers().unwrap_err(), unwritten);
        assert_eq!(swapper.retry().unwrap_err(), error);
        let failed = swapper.failed().next().unwrap();
        assert_eq!(failed.remains.paths(), [file.clone(), missing.clone()]);
        assert_eq!(swapper.stats().tensors, 0);

        std::fs::create_dir(folder.path("later")).unwrap();
        swapper.retry().unwrap();
        assert_eq!(swapper.states(), states(2, 0, 0, 0));
        assert_file(&file, &pattern(10, 1));
        assert_file(&missing, &pattern(4096, 2));
        swapper.swap_out_tensors(&two, &[&later, &file]).unwrap();
        let released = swapper.release_buffers().unwrap();
        assert_file(&later, &third);
        assert_file(&file, &fourth);
        assert_eq!((released.blocks.len(), released.stats.tensors), (2, 4));
        drop(released);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_full_device_is_told_with_its_name_and_what_was_taken() {
    for backend in BOTH {
        let folder = Folder::new(backend, 8 * KIB, 1);
        let full = Path::new("/dev/full");
        let mut swapper = swapper(&folder, &[8 * KIB]);
        let tensors: Vec<Vec<u8>> = (1..4).map(|seed| pattern(8 * KIB, seed)).collect();
        let bytes: Vec<TensorBytes<'_>> = tensors.iter().map(|tensor| tensor.as_slice().into()).collect();
        let paths = [folder.path("a"), full.to_owned(), folder.path("b")];
        let SwapOutFailed { error, taken } = swapper.swap_out_tensors(&bytes, &paths).unwrap_err();
        assert_eq!((error.path(), error.errno(), taken), (Some(full), Some(Errno::NOSPC.raw_os_error()), 2));
        assert_file(&paths[0], &tensors[0]);
        assert_eq!(swapper.states(), states(0, 0, 0, 1));
        assert_eq!(swapper.retry().unwrap_err().errno(), Some(Errno::NOSPC.raw_os_error()));
        assert_eq!(swapper.discard_failed(), [full]);
        swapper.swap_out_tensors(&bytes[2..], &paths[2..]).unwrap();
        let released = swapper.release_buffers().unwrap();
        assert_eq!((released.blocks.len(), released.stats.tensors), (1, 2));
        assert_file(&paths[2], &tensors[2]);
    }
}

#[test]
fn what_is_written_meanwhile_ends_well_and_what_is_not_submitted_is_kept() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 3);
    let full = Path::new("/dev/full");
    let mut swapper = swapper(&folder, &[8 * KIB; 3]);
    let [a, b] = folder.paths(["a", "b"]);
    put(&mut swapper, &a, &pattern(8192, 1)).unwrap();
    put(&mut swapper, full, &pattern(8192, 2)).unwrap();
    put(&mut swapper, &b, &pattern(100, 3)).map_or_else(|failed| assert_eq!(failed.taken, 0), |()| ());
    assert_eq!(swapper.flush().unwrap_err().path(), Some(full));
    assert_file(&a, &pattern(8192, 1));
    assert_eq!(swapper.discard_failed(), [full]);
    put(&mut swapper, &b, &pattern(100, 4)).unwrap();
    assert_eq!(swapper.release_buffers().unwrap().blocks.len(), 3);
    assert_file(&b, &pattern(100, 4));
}

#[test]
fn what_failed_first_is_tried_again_first_and_alone() {
    let folder = Folder::new(BackendChoice::Uring, 256 * KIB, 3);
    let pipe = folder.pipe("pipe");
    let [file, missing] = folder.paths(["file", "later/file"]);
    let full = Path::new("/dev/full");
    let mut swapper = swapper(&folder, &[256 * KIB; 3]);
    for (path, bytes) in [(full, 4096), (&file, 100), (&pipe.path, 128 * KIB)] {
        put(&mut swapper, path, &pattern(bytes, 1)).unwrap();
    }
    // The next buffer begins with the same file again and can't even be submitted, while this one is being written.
    put(&mut swapper, &file, &pattern(200, 2)).unwrap();
    put(&mut swapper, &missing, &pattern(300, 3)).unwrap();
    let failed = |swapper: &AsyncTensorSwapper| -> Vec<Vec<PathBuf>> {
        swapper.failed().map(|failed| failed.remains.paths()).collect()
    };
    let in_order =
        [vec![full.to_owned(), file.clone(), pipe.path.clone()], vec![file.clone(), missing.clone()]];
    let while_drained = |act: &mut dyn FnMut() -> Result<(), SwapError>| {
        std::thread::scope(|scope| {
            scope.spawn(|| pipe.drain(128 * KIB));
            act().unwrap_err()
        })
    };
    assert_eq!(while_drained(&mut || swapper.flush()).path(), Some(full));
    assert_eq!(failed(&swapper), in_order);
    std::fs::create_dir(folder.path("later")).unwrap();
    assert_eq!(while_drained(&mut || swapper.retry()).path(), Some(full));
    assert_eq!(failed(&swapper), in_order, "the later one has to wait");
    assert!(!missing.exists());
    assert_eq!(swapper.discard_failed().len(), 5);
    assert_eq!(swapper.release_buffers().unwrap().blocks.len(), 3);
}

#[test]
fn a_stopped_engine_loses_nothing() {
    for backend in BOTH {
        let folder = Folder::new(backend, 8 * KIB, 2);
        let mut swapper = swapper(&folder, &[8 * KIB; 2]);
        put(&mut swapper, &folder.path("a"), &pattern(100, 1)).unwrap();
        folder.engine.shutdown().unwrap();
        for _ in 0..2 {
            let error = swapper.release_buffers().unwrap_err();
            assert_eq!(error.path(), Some(&*folder.path("a")), "{error}");
        }
        assert_eq!(swapper.states(), states(1, 0, 0, 1));
        assert_eq!(swapper.discard_failed(), [folder.path("a")]);
        assert_eq!(swapper.release_buffers().unwrap().blocks.len(), 2);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_dropped_swapper_has_submitted_everything() {
    for backend in BOTH {
        let folder = Folder::with(slow(backend), 64 * KIB, 2);
        let mut swapper = swapper(&folder, &[64 * KIB; 2]);
        put(&mut swapper, &folder.path("a"), &pattern(64 * KIB, 1)).unwrap();
        put(&mut swapper, &folder.path("b"), &pattern(1000, 2)).unwrap();
        drop(swapper);
        folder.engine.shutdown().unwrap();
        assert_file(&folder.path("a"), &pattern(64 * KIB, 1));
        assert_file(&folder.path("b"), &pattern(1000, 2));
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_full_disk_that_is_mended_gets_every_tensor() {
    apart("swapper::a_full_disk_that_is_mended_gets_every_tensor_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by a_full_disk_that_is_mended_gets_every_tensor"]
fn a_full_disk_that_is_mended_gets_every_tensor_here() {
    for backend in BOTH {
        let folder = Folder::new(backend, 512 * KIB, 3);
        mount(folder.folder.path(), "size=1m");
        std::fs::write(folder.path("filler"), vec![1; 700 * KIB]).unwrap();
        let mut swapper = swapper(&folder, &[512 * KIB; 3]);
        let path = folder.path("tensor");
        put(&mut swapper, &path, &pattern(512 * KIB, 1)).unwrap();
        let error = swapper.flush().unwrap_err();
        assert_eq!(
            (error.path(), error.errno()),
            (Some(&*path), Some(Errno::NOSPC.raw_os_error())),
            "{error}"
        );
        std::fs::remove_file(folder.path("filler")).unwrap();
        swapper.retry().unwrap();
        assert_file(&path, &pattern(512 * KIB, 1));
        assert_eq!(swapper.release_buffers().unwrap().blocks.len(), 3);
    }
}

/// One thing that a caller of the swapper does.
#[derive(Clone, Debug)]
enum Step {
    /// Tensors, each for the file of this number and with this many elements.
    SwapOut(Vec<(u8, usize)>),
    Flush,
    Release,
}

fn step() -> impl Strategy<Value = Step> {
    let tensors = prop::collection::btree_map(0_u8..8, 0_usize..40_000, 0..6);
    prop_oneof![
        6 => tensors.prop_map(|tensors| Step::SwapOut(tensors.into_iter().collect())),
        1 => Just(Step::Flush),
        1 => Just(Step::Release),
    ]
}

fn files_hold_what_was_given_last(backend: BackendChoice, steps: &[Step]) {
    let folder = Folder::with(slow(backend), 64 * KIB, 3);
    let buffers = [64 * KIB, 40 * KIB, 50_000];
    let mut swapper = swapper(&folder, &buffers);
    let mut model: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
    let (mut seed, mut numel) = (0_u8, 0);
    let check = |model: &BTreeMap<u8, Vec<u8>>| {
        for (file, tensor) in model {
            assert_file(&folder.path(&file.to_string()), tensor);
        }
    };
    for step in steps {
        match step {
            Step::SwapOut(tensors) => {
                let tensors: Vec<(u8, Vec<u8>)> = tensors
                    .iter()
                    .map(|&(file, numel)| {
                        seed = seed.wrapping_add(1);
                        (file, pattern(numel, seed))
                    })
                    .collect();
                let bytes: Vec<TensorBytes<'_>> =
                    tensors.iter().map(|(_, bytes)| bytes.as_slice().into()).collect();
                let paths: Vec<_> = tensors.iter().map(|(file, _)| folder.path(&file.to_string())).collect();
                swapper.swap_out_tensors(&bytes, &paths).unwrap();
                let BufferStates { free, filling, writing, failed } = swapper.states();
                assert_eq!((free + filling + writing, failed), (3, 0));
                numel += bytes.iter().map(TensorBytes::numel).sum::<usize>() as u64;
                model.extend(tensors);
            }
            Step::Flush => {
                swapper.flush().unwrap();
                assert_eq!((swapper.states(), swapper.stats().numel), (states(3, 0, 0, 0), numel));
                check(&model);
            }
            Step::Release => {
                let released = swapper.release_buffers().unwrap();
                assert_eq!((released.blocks.len(), released.stats.numel), (3, numel));
                check(&model);
                numel = 0;
                drop(released);
                assert_eq!(folder.pool.leased_blocks(), 0);
                swapper.add_buffers(folder.pool.lease_all(&buffers).unwrap(), Dtype::U8).unwrap();
            }
        }
    }
    swapper.release_buffers().unwrap();
    check(&model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn files_hold_what_was_given_last_with_every_backend(steps in prop::collection::vec(step(), 1..16)) {
        for backend in BOTH {
            files_hold_what_was_given_last(backend, &steps);
        }
    }
}
