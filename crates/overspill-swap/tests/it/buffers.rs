//! Blocks, buffers and pools of buffers, on their way to files and back.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use overspill_io::{BLOCK_ALIGNMENT, BackendChoice, Block, EngineConfig, IoError, PoolError};
use overspill_swap::buffers::{
    Alignment, BufferFailed, Dtype, Refused, Remains, SwapBuffer, SwapBufferManager, SwapBufferPool,
    SwapError, SwapTicket, TensorBytes, dump, swap_in_tensors, swap_out_tensors,
};
use proptest::prelude::*;
use rustix::io::Errno;

use crate::apart::{apart, mount};
use crate::folder::{BOTH, Folder, KIB, assert_file, pattern};

fn finish(tickets: Vec<SwapTicket>) -> Vec<Block> {
    tickets.into_iter().map(|ticket| ticket.wait().unwrap()).collect()
}

fn u8s(bytes: &[u8]) -> TensorBytes<'_> {
    TensorBytes::from(bytes)
}

fn whole(failed: BufferFailed) -> (SwapError, SwapBuffer) {
    match failed.remains {
        Remains::Whole(buffer) => (failed.error, buffer),
        Remains::Parts(parts) => panic!("{}: {} parts", failed.error, parts.len()),
    }
}

fn blocks_come_back_as_they_were_written(lengths: [usize; 3]) {
    for backend in BOTH {
        let folder = Folder::new(backend, 64 * KIB, 3);
        let paths = folder.paths(["a", "b", "c"]);
        std::fs::write(&paths[1], pattern(100 * KIB, 99)).unwrap();
        std::fs::write(&paths[2], pattern(10, 99)).unwrap();
        let blocks = (1..).zip(lengths).map(|(seed, length)| folder.block(length, seed)).collect();
        let tickets = swap_out_tensors(&folder.engine, blocks, &paths).unwrap();
        assert!(tickets.iter().map(SwapTicket::path).eq(&paths));
        let mut blocks = finish(tickets);
        for ((seed, length), path) in (1..).zip(lengths).zip(&paths) {
            assert!(std::fs::read(path).unwrap() == pattern(length, seed), "{length} bytes, and no more");
        }
        blocks.iter_mut().for_each(|block| block.fill(0));
        let blocks = finish(swap_in_tensors(&folder.engine, blocks, &paths).unwrap());
        for ((seed, length), block) in (1..).zip(lengths).zip(&blocks) {
            assert!(**block == pattern(length, seed)[..]);
        }
        let mode = std::fs::metadata(&paths[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(blocks);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn each_block_has_a_ticket_and_a_file_that_ends_where_it_does() {
    blocks_come_back_as_they_were_written([4096, 64 * KIB, 12 * KIB]);
}

#[test]
fn blocks_of_any_length_have_files_of_that_length() {
    blocks_come_back_as_they_were_written([1, 5000, 64 * KIB - 1]);
}

#[test]
fn a_longer_file_fills_a_block_with_its_start() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 1);
    std::fs::write(folder.path("long"), pattern(20 * KIB, 5)).unwrap();
    let block = folder.block(8 * KIB, 0);
    let blocks = finish(swap_in_tensors(&folder.engine, vec![block], &[folder.path("long")]).unwrap());
    assert!(*blocks[0] == pattern(8 * KIB, 5)[..]);
}

#[test]
fn a_call_that_cannot_be_carried_out_whole_does_nothing() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 2);
    let engine = &folder.engine;
    let blocks = || vec![folder.block(8 * KIB, 1), folder.block(8 * KIB, 2)];
    let nothing_happened = |refused: Refused| {
        assert_eq!(refused.blocks.len(), 2);
        assert!(
            *refused.blocks[0] == pattern(8 * KIB, 1)[..] && *refused.blocks[1] == pattern(8 * KIB, 2)[..]
        );
        refused.error
    };
    let [new, old, short, link] = folder.paths(["new", "old", "short", "link"]);
    std::fs::write(&old, pattern(20 * KIB, 3)).unwrap();
    std::fs::write(&short, pattern(8 * KIB - 1, 4)).unwrap();
    symlink(&old, &link).unwrap();
    let elsewhere = folder.path("no folder/file");

    let error = nothing_happened(swap_out_tensors(engine, blocks(), &[&new]).unwrap_err());
    assert_eq!(error, SwapError::Lists { tensors: 2, paths: 1 });
    let error = nothing_happened(swap_in_tensors(engine, blocks(), &[&old; 3]).unwrap_err());
    assert_eq!(error, SwapError::Lists { tensors: 2, paths: 3 });

    let error = nothing_happened(swap_in_tensors(engine, blocks(), &[&old, &new]).unwrap_err());
    assert_eq!((error.path(), error.errno()), (Some(&*new), Some(Errno::NOENT.raw_os_error())), "{error}");
    let error = nothing_happened(swap_in_tensors(engine, blocks(), &[&old, &short]).unwrap_err());
    let (expected, found) = (8 * KIB as u64, 8 * KIB as u64 - 1);
    assert_eq!(error, SwapError::ShortFile { path: short, expected, found });

    for (bad, errno) in [(&elsewhere, Errno::NOENT), (&link, Errno::LOOP), (&folder.path(""), Errno::ISDIR)] {
        for first in [&new, &old] {
            let error = nothing_happened(swap_out_tensors(engine, blocks(), &[first, bad]).unwrap_err());
            assert_eq!((error.path(), error.errno()), (Some(&**bad), Some(errno.raw_os_error())), "{error}");
        }
    }
    let again = folder.path("./old");
    let error = nothing_happened(swap_out_tensors(engine, blocks(), &[&old, &again]).unwrap_err());
    assert_eq!(error, SwapError::SameFile { path: again, other: old.clone() });
    let error = nothing_happened(swap_out_tensors(engine, blocks(), &[&new, &new]).unwrap_err());
    assert_eq!(error, SwapError::SameFile { path: new.clone(), other: new });

    assert_eq!(folder.names(), ["link", "old", "short"], "what was made was taken back");
    assert!(std::fs::read(&old).unwrap() == pattern(20 * KIB, 3), "what was there was not cut");
    assert_eq!(folder.pool.leased_blocks(), 0);
}

#[test]
fn a_failed_transfer_names_its_file_and_hands_its_block_back() {
    for backend in BOTH {
        let folder = Folder::new(backend, 8 * KIB, 2);
        let paths = [PathBuf::from("/dev/full"), folder.path("file")];
        let blocks = vec![folder.block(8 * KIB, 1), folder.block(8 * KIB, 2)];
        let mut tickets = swap_out_tensors(&folder.engine, blocks, &paths).unwrap().into_iter();
        let failed = tickets.next().unwrap().wait().unwrap_err();
        assert_eq!(
            (failed.error.path(), failed.error.errno()),
            (Some(&*paths[0]), Some(Errno::NOSPC.raw_os_error()))
        );
        assert!(*failed.block.unwrap() == pattern(8 * KIB, 1)[..]);
        let block = tickets.next().unwrap().wait().unwrap();

        folder.engine.shutdown().unwrap();
        let mut tickets = swap_out_tensors(&folder.engine, vec![block], &paths[1..]).unwrap();
        let failed = tickets.pop().unwrap().wait().unwrap_err();
        assert!(failed.to_string().contains(paths[1].to_str().unwrap()), "{failed}");
        assert!(matches!(failed.error, SwapError::Io { source: IoError::EngineStopped, .. }));
        assert!(*failed.block.unwrap() == pattern(8 * KIB, 2)[..]);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn the_alignment_of_a_folder_is_probed_and_nothing_is_left_there() {
    let folder = Folder::new(BackendChoice::Auto, 4096, 1);
    let probed = Alignment::probe(&folder.engine, folder.folder.path()).unwrap();
    assert!(folder.names().is_empty());
    let file = folder.engine.create(&folder.path("file")).unwrap();
    assert_eq!(Alignment::of(&file), Ok(probed));
    assert_eq!(probed.bytes(), file.alignment());
    let error = Alignment::probe(&folder.engine, &folder.path("nowhere")).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOENT.raw_os_error()));
}

#[test]
fn tensors_of_a_buffer_come_back_element_by_element() {
    for backend in BOTH {
        let folder = Folder::new(backend, 64 * KIB, 1);
        let [a, b, empty] = folder.paths(["a", "b", "empty"]);
        let alignment = Alignment::new(512).unwrap();
        let mut block = folder.block(64 * KIB, 7);
        block.fill(0xff);
        let mut buffer = SwapBuffer::new(block, Dtype::F32, alignment);
        let values: Vec<f32> = (0..1100).map(|i| i as f32).collect();
        assert!(
            buffer.insert(values.as_slice().into(), &a).unwrap().as_view().elements::<f32>().unwrap()
                == values
        );
        assert_eq!(buffer.insert((&[0.0_f32; 0][..]).into(), &empty).unwrap().as_view().aligned_numel(), 0);
        let mut view = buffer.allocate(3, &b).unwrap();
        assert_eq!((view.as_view().numel(), view.as_view().aligned_numel()), (3, 128));
        assert!(view.as_view().swap()[12..].iter().all(|&byte| byte == 0), "padding is zeroed");
        view.elements::<f32>().unwrap().copy_from_slice(&[1.0, 2.0, 3.0]);
        assert!(matches!(view.elements::<i32>(), Err(SwapError::WrongDtype { .. })));

        let buffer = buffer.swap_out(&folder.engine).unwrap().wait().unwrap();
        assert_file(&a, bytemuck::cast_slice(&values));
        assert_file(&b, bytemuck::cast_slice(&[1.0_f32, 2.0, 3.0]));
        assert_file(&empty, &[]);

        let mut buffer = SwapBuffer::new(buffer.into_block(), Dtype::F32, alignment);
        // Longer than what was written as `b`, but not longer than its file.
        buffer.allocate(1024, &b).unwrap();
        buffer.allocate(1100, &a).unwrap();
        buffer.allocate(0, &empty).unwrap();
        let buffer = buffer.swap_in(&folder.engine).unwrap().wait().unwrap();
        let offsets: Vec<_> = buffer.views().map(|view| view.offset()).collect();
        assert_eq!(offsets, [0, 4096, 12288]);
        let b = buffer.view_at(0).unwrap().elements::<f32>().unwrap();
        assert_eq!((b.len(), &b[..4]), (1024, &[1.0, 2.0, 3.0, 0.0][..]));
        assert!(buffer.view_at(4096).unwrap().elements::<f32>().unwrap() == values);
        drop(buffer);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn what_a_file_brings_along_behind_its_tensor_is_not_kept() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 1);
    std::fs::write(folder.path("foreign"), [0xff; 4096]).unwrap();
    let mut buffer = SwapBuffer::new(folder.block(8 * KIB, 1), Dtype::U8, Alignment::MAX);
    buffer.allocate(100, &folder.path("foreign")).unwrap();
    let buffer = buffer.swap_in(&folder.engine).unwrap().wait().unwrap();
    let view = buffer.view_at(0).unwrap();
    assert!(
        view.compute().iter().all(|&byte| byte == 0xff) && view.swap()[100..].iter().all(|&byte| byte == 0)
    );
    let buffer = buffer.swap_out(&folder.engine).unwrap().wait().unwrap();
    assert_file(&folder.path("foreign"), &[0xff; 100]);
    drop(buffer);
}

#[test]
fn what_does_not_fit_in_a_buffer_is_refused_and_nothing_changes() {
    let folder = Folder::new(BackendChoice::Auto, 12 * KIB, 1);
    let mut buffer = SwapBuffer::new(folder.block(12 * KIB, 1), Dtype::U8, Alignment::MAX);
    let path = Path::new;
    buffer.insert(u8s(&pattern(5000, 2)), path("a")).unwrap();
    let error = buffer.allocate(12 * KIB + 1, path("b")).unwrap_err();
    assert!(matches!(error, SwapError::TooLarge { numel_max, .. } if numel_max == 12 * KIB), "{error}");
    assert!(buffer.has_space(4096) && !buffer.has_space(4097));
    let error = buffer.allocate(4097, path("b")).unwrap_err();
    assert!(matches!(error, SwapError::NoRoom { bytes_free: 4096, .. }), "{error}");
    assert_eq!(buffer.allocate(1, path("a")).unwrap_err(), SwapError::Held { path: "a".into() });
    let error = buffer.insert([1.0_f32].as_slice().into(), path("b")).unwrap_err();
    assert_eq!(error, SwapError::WrongDtype { path: "b".into(), expected: Dtype::U8, found: Dtype::F32 });
    assert_eq!((buffer.len(), buffer.numel(), buffer.bytes_used()), (1, 5000, 8192));
    assert!(buffer.paths().eq([path("a")]));
    assert!(buffer.view_at(0).unwrap().compute() == pattern(5000, 2));
    buffer.reset();
    assert!(buffer.is_empty() && buffer.has_space(12 * KIB) && buffer.view_at(0).is_none());
}

#[test]
fn a_buffer_that_cannot_move_stays_as_it_is() {
    let folder = Folder::new(BackendChoice::Auto, 16 * KIB, 1);
    let mut buffer = SwapBuffer::new(folder.block(16 * KIB, 1), Dtype::U8, Alignment::MAX);
    let [a, missing] = folder.paths(["a", "no folder/b"]);
    buffer.insert(u8s(&pattern(10, 2)), &a).unwrap();
    buffer.insert(u8s(&pattern(5000, 3)), &missing).unwrap();
    for _ in 0..2 {
        let (error, same) = whole(buffer.swap_out(&folder.engine).unwrap_err());
        assert_eq!(error.path(), Some(&*missing));
        assert!(same.view_at(4096).unwrap().compute() == pattern(5000, 3));
        buffer = same;
    }
    assert!(folder.names().is_empty());
    let (error, _) = whole(buffer.swap_in(&folder.engine).unwrap_err());
    assert_eq!(error.path(), Some(&*a));
}

#[test]
fn a_buffer_with_a_failed_tensor_comes_home_whole() {
    for backend in BOTH {
        let folder = Folder::new(backend, 32 * KIB, 1);
        let mut buffer = SwapBuffer::new(folder.block(32 * KIB, 1), Dtype::U8, Alignment::MAX);
        let (a, full, b) = (folder.path("a"), PathBuf::from("/dev/full"), folder.path("b"));
        for (seed, path) in [(2, &a), (3, &full), (4, &b)] {
            buffer.insert(u8s(&pattern(5000, seed)), path).unwrap();
        }
        let (error, buffer) = whole(buffer.swap_out(&folder.engine).unwrap().wait().unwrap_err());
        assert_eq!((error.path(), error.errno()), (Some(&*full), Some(Errno::NOSPC.raw_os_error())));
        for (seed, view) in (2..).zip(buffer.views()) {
            assert!(view.compute() == pattern(5000, seed));
        }
        assert_file(&a, &pattern(5000, 2));
        assert_file(&b, &pattern(5000, 4));
        assert_eq!(buffer.into_block().len(), 32 * KIB);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_file_cut_short_behind_our_back_is_an_error_that_names_it() {
    let folder = Folder::new(BackendChoice::Auto, 16 * KIB, 1);
    let mut buffer = SwapBuffer::new(folder.block(16 * KIB, 1), Dtype::U8, Alignment::MAX);
    let [a, b] = folder.paths(["a", "b"]);
    for path in [&a, &b] {
        buffer.insert(u8s(&pattern(8 * KIB, 3)), path).unwrap();
    }
    let buffer = buffer.swap_out(&folder.engine).unwrap().wait().unwrap();
    std::fs::File::options().write(true).open(&b).unwrap().set_len(4096).unwrap();
    let (error, buffer) = whole(buffer.swap_in(&folder.engine).unwrap_err());
    assert_eq!(error, SwapError::ShortFile { path: b, expected: 8192, found: 4096 });
    assert_eq!(buffer.len(), 2);
}

#[test]
fn memory_that_the_kernel_keeps_is_told_and_the_rest_comes_home() {
    let drain_patience = Duration::from_millis(50);
    let config = EngineConfig { backend: BackendChoice::Uring, drain_patience, ..EngineConfig::default() };
    let folder = Folder::with(config, 256 * KIB, 1);
    let pipe = folder.pipe("pipe");
    let mut buffer = SwapBuffer::new(folder.block(256 * KIB, 1), Dtype::U8, Alignment::MAX);
    // More than a pipe holds.
    buffer.allocate(128 * KIB, &pipe.path).unwrap();
    buffer.insert(u8s(&pattern(5000, 2)), &folder.path("file")).unwrap();
    let flight = buffer.swap_out(&folder.engine).unwrap();
    assert!(matches!(folder.engine.shutdown(), Err(IoError::DrainTimeout { leaked_blocks: 1, .. })));
    let BufferFailed { error, remains } = flight.wait().unwrap_err();
    assert_eq!(error.path(), Some(&*pipe.path), "{error}");
    assert_eq!(remains.paths(), [pipe.path.clone(), folder.path("file")]);
    let Remains::Parts(parts) = remains else { panic!("the pipe's part is with the kernel") };
    assert!(parts[0].block.is_none());
    assert_eq!((parts[1].numel, parts[1].dtype), (5000, Dtype::U8));
    assert!(parts[1].block.as_ref().unwrap()[..5000] == pattern(5000, 2)[..]);
    drop(parts);
    assert_eq!(folder.pool.leased_blocks(), 1, "what the kernel may touch is leased to nobody else");
}

fn pool_of(folder: &Folder, bytes: &[usize]) -> SwapBufferPool {
    let blocks = folder.pool.lease_all(bytes).unwrap();
    SwapBufferPool::new(blocks, Dtype::U8, Alignment::MAX).unwrap()
}

#[test]
fn a_full_buffer_makes_the_pool_move_on_to_the_next() {
    for backend in BOTH {
        let folder = Folder::new(backend, 8 * KIB, 3);
        let mut pool = pool_of(&folder, &[8 * KIB; 3]);
        let tensors: Vec<(PathBuf, Vec<u8>)> = (0..4_u8)
            .map(|seed| {
                (folder.path(&seed.to_string()), pattern([4096, 100, 5000, 8192][usize::from(seed)], seed))
            })
            .collect();
        for (path, tensor) in &tensors {
            pool.insert(u8s(tensor), path).unwrap();
        }
        let counts: Vec<_> = pool.buffers().iter().map(SwapBuffer::len).collect();
        assert_eq!((counts, pool.numel()), (vec![2, 1, 1], 4096 + 100 + 5000 + 8192));
        assert!(!pool.has_space(1));
        let error = pool.allocate(1, Path::new("more")).unwrap_err();
        assert!(matches!(error, SwapError::NoRoom { bytes_free: 0, .. }), "{error}");
        let error = pool.allocate(8193, Path::new("more")).unwrap_err();
        assert!(matches!(error, SwapError::TooLarge { numel_max: 8192, .. }), "{error}");
        assert_eq!(
            pool.allocate(0, &tensors[0].0).unwrap_err(),
            SwapError::Held { path: tensors[0].0.clone() }
        );

        let flight = pool.swap_out(&folder.engine).unwrap();
        let mut pool = flight.wait().unwrap();
        for (path, tensor) in &tensors {
            assert_file(path, tensor);
        }
        pool.reset();
        assert_eq!((pool.numel(), pool.paths().count()), (0, 0));
        for (path, tensor) in tensors.iter().rev() {
            pool.allocate(tensor.len(), path).unwrap().compute().fill(0);
        }
        let pool = pool.swap_in_and_wait(&folder.engine).unwrap();
        for (view, (path, tensor)) in pool.views().zip(tensors.iter().rev()) {
            assert_eq!(view.path(), path);
            assert!(view.compute() == tensor);
        }
        assert_eq!(pool.into_blocks().len(), 3);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_refusal_does_not_make_the_pool_move_on() {
    let folder = Folder::new(BackendChoice::Auto, 16 * KIB, 2);
    let mut pool = pool_of(&folder, &[8 * KIB, 16 * KIB]);
    pool.allocate(12 * KIB, Path::new("large")).unwrap();
    assert_eq!(pool.buffers()[1].len(), 1, "only the second buffer has room");
    assert!(pool.allocate(8 * KIB, Path::new("no room")).is_err());
    pool.allocate(4 * KIB, Path::new("small")).unwrap();
    assert_eq!(pool.buffers()[1].len(), 2);
}

#[test]
fn a_pool_in_trouble_comes_home_with_everything() {
    for backend in BOTH {
        let folder = Folder::new(backend, 8 * KIB, 2);
        let mut pool = pool_of(&folder, &[8 * KIB; 2]);
        let [file, missing] = folder.paths(["file", "no folder/file"]);
        pool.insert(u8s(&pattern(8192, 1)), &file).unwrap();
        pool.insert(u8s(&pattern(100, 2)), &missing).unwrap();
        let failed = pool.swap_out_and_wait(&folder.engine).unwrap_err();
        assert_eq!((failed.error.path(), folder.names().len()), (Some(&*missing), 0));
        assert_eq!(failed.pool.numel(), 8292);

        let mut pool = failed.pool;
        pool.reset();
        let full = Path::new("/dev/full");
        pool.insert(u8s(&pattern(8192, 1)), full).unwrap();
        pool.insert(u8s(&pattern(100, 2)), &file).unwrap();
        let failed = pool.swap_out(&folder.engine).unwrap().wait().unwrap_err();
        assert_eq!((failed.error.path(), failed.parts.len()), (Some(full), 0));
        assert_file(&file, &pattern(100, 2));
        let tensors: Vec<_> = failed.pool.views().map(|view| view.compute().to_vec()).collect();
        assert!(tensors == [pattern(8192, 1), pattern(100, 2)]);
        drop(failed);
        assert_eq!(folder.pool.leased_blocks(), 0);
    }
}

#[test]
fn a_pool_needs_buffers_that_hold_something() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 2);
    let refused = SwapBufferPool::new(Vec::new(), Dtype::F32, Alignment::MAX).unwrap_err();
    assert_eq!(refused.error, SwapError::NoBuffers);
    let blocks = folder.pool.lease_all(&[8 * KIB, BLOCK_ALIGNMENT - 1]).unwrap();
    let refused = SwapBufferPool::new(blocks, Dtype::F32, Alignment::MAX).unwrap_err();
    assert_eq!((refused.error, refused.blocks.len()), (SwapError::TinyBuffer { bytes: 4095 }, 2));
}

#[test]
fn a_manager_hands_out_all_that_is_asked_or_nothing() {
    let manager = SwapBufferManager::new(3, 5000, Dtype::F32).unwrap();
    assert_eq!(manager.total_bytes(), 3 * 20480, "the sum of what blocks take, not a power of two");
    let two = manager.allocate(2, 4999).unwrap();
    assert!(two.iter().all(|block| block.len() == 4 * 4999));
    for wanted in [2, 4, usize::MAX] {
        let error = manager.allocate(wanted, 1).unwrap_err();
        assert!(
            matches!(error, SwapError::Pool(PoolError::Exhausted { leased: 2, count: 3, wanted: w, .. }) if w == wanted)
        );
        assert_eq!(manager.free(), 1);
    }
    for long in [5001, usize::MAX] {
        let error = SwapError::LongView { numel: long, dtype: Dtype::F32, bytes: 20000 };
        assert_eq!(manager.allocate(1, long).unwrap_err(), error);
        assert_eq!(manager.allocate_all(long).unwrap_err(), error);
    }
    let rest = manager.allocate_all(5000).unwrap();
    assert_eq!((rest.len(), rest[0].len(), manager.free()), (1, 20000, 0));
    assert!(matches!(manager.allocate_all(1), Err(SwapError::Pool(PoolError::Exhausted { .. }))));
    drop(two);
    assert_eq!(manager.free(), 2);
    let again = manager.allocate_all(1).unwrap();
    assert_eq!((again.len(), manager.free()), (2, 0));
    drop((rest, again));
    assert_eq!(manager.free(), 3);

    assert!(matches!(
        SwapBufferManager::new(0, 1, Dtype::F32),
        Err(SwapError::Pool(PoolError::EmptyClass { .. }))
    ));
    let beyond = SwapBufferManager::new(1, usize::MAX, Dtype::F32).unwrap_err();
    assert!(matches!(beyond, SwapError::TooManyBytes { .. }), "{beyond}");
}

#[test]
fn a_dump_shows_what_is_not_left_out_and_only_on_the_first_rank() {
    let folder = Folder::new(BackendChoice::Auto, 8 * KIB, 1);
    let mut pool = pool_of(&folder, &[8 * KIB]);
    pool.allocate(5, Path::new("weight")).unwrap();
    let all = dump(&pool).to_string();
    assert!(
        all.starts_with("SwapBufferPool\n  dtype: uint8\n") && all.contains("\n  paths: [\"weight\"]"),
        "{all}"
    );
    let some = dump(&pool).without(&["paths", "no such field"]).to_string();
    assert!(!some.contains("weight") && some.contains("\n  numel: 5"), "{some}");
    assert!(dump(&pool.buffers()[0]).to_string().contains("\n  bytes_used: 4096\n"));
    let manager = SwapBufferManager::new(2, 1024, Dtype::F32).unwrap();
    assert!(dump(&manager).to_string().contains("\n  total_bytes: 8192"));
    assert_eq!(dump(&manager).on_rank(0).map(|dump| dump.to_string()), Some(dump(&manager).to_string()));
    assert!(dump(&manager).on_rank(1).is_none());
}

#[test]
fn a_full_disk_leaves_the_tensors_in_the_buffer() {
    apart("buffers::a_full_disk_leaves_the_tensors_in_the_buffer_here");
}

#[test]
#[ignore = "mounts; run in a name space of its own by a_full_disk_leaves_the_tensors_in_the_buffer"]
fn a_full_disk_leaves_the_tensors_in_the_buffer_here() {
    for backend in BOTH {
        let folder = Folder::new(backend, 2048 * KIB, 1);
        mount(folder.folder.path(), "size=1m");
        let mut buffer = SwapBuffer::new(folder.block(2048 * KIB, 1), Dtype::U8, Alignment::MAX);
        let [small, large] = folder.paths(["small", "large"]);
        buffer.insert(u8s(&pattern(5000, 2)), &small).unwrap();
        buffer.insert(u8s(&pattern(1500 * KIB, 3)), &large).unwrap();
        let (error, buffer) = whole(buffer.swap_out(&folder.engine).unwrap().wait().unwrap_err());
        assert_eq!(error.errno(), Some(Errno::NOSPC.raw_os_error()), "{error}");
        assert!(
            buffer.views().map(|view| view.compute().to_vec()).eq([pattern(5000, 2), pattern(1500 * KIB, 3)])
        );

        mount(folder.folder.path(), "size=4m");
        std::fs::write(&small, b"old").unwrap();
        mount(folder.folder.path(), "remount,ro");
        let (error, buffer) = whole(buffer.swap_out(&folder.engine).unwrap_err());
        assert_eq!(
            (error.path(), error.errno()),
            (Some(&*small), Some(Errno::ROFS.raw_os_error())),
            "{error}"
        );
        mount(folder.folder.path(), "remount,rw");
        drop(buffer.swap_out(&folder.engine).unwrap().wait().unwrap());
        assert_file(&small, &pattern(5000, 2));
        assert_file(&large, &pattern(1500 * KIB, 3));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn packed_tensors_keep_their_bytes_and_their_distance(
        power in 0_u32..=12,
        numels in prop::collection::vec(0_usize..5_000, 0..12),
    ) {
        let alignment = Alignment::new(1 << power).unwrap();
        let folder = Folder::new(BackendChoice::Threads, 64 * KIB, 1);
        let mut buffer = SwapBuffer::new(folder.block(64 * KIB, 200), Dtype::Bf16, alignment);
        let mut model: Vec<Vec<u8>> = Vec::new();
        for (seed, &numel) in (0_u8..).zip(&numels) {
            let bytes = pattern(2 * numel, seed);
            let tensor = TensorBytes::new(Dtype::Bf16, &bytes).unwrap();
            let fits = buffer.has_space(numel);
            prop_assert_eq!(buffer.insert(tensor, Path::new(&seed.to_string())).is_ok(), fits);
            if fits {
                model.push(bytes);
            }
        }
        prop_assert_eq!(buffer.numel(), model.iter().map(|bytes| bytes.len() / 2).sum::<usize>());
        prop_assert_eq!(buffer.len(), model.len());
        let mut end = 0;
        for (view, bytes) in buffer.views().zip(&model) {
            prop_assert!(view.offset() >= end, "views overlap");
            prop_assert!(view.swap().as_ptr().addr().is_multiple_of(BLOCK_ALIGNMENT));
            prop_assert!(view.swap().len().is_multiple_of(alignment.bytes()));
            prop_assert_eq!(view.compute(), &bytes[..]);
            prop_assert!(view.swap()[bytes.len()..].iter().all(|&byte| byte == 0));
            end = view.offset() + view.swap().len();
        }
        prop_assert!(end <= 64 * KIB);
        // Filling each tensor through its own view changes no other.
        for (tag, mut view) in (1_u8..).zip(buffer.views_mut()) {
            view.compute().fill(tag);
        }
        for (tag, view) in (1_u8..).zip(buffer.views()) {
            prop_assert!(view.compute().iter().all(|&byte| byte == tag));
        }
    }
}
