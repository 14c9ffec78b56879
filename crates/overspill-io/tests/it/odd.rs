//! Offsets and lengths that direct I/O cannot take as they are.

use std::os::unix::fs::FileExt;
use std::thread;

use overspill_io::{BackendChoice, BlockClass, EngineConfig, Failed, IoError, Priority};

use crate::rig::{KIB, MIB, Rig, assert_pattern, fill, finish};

laws! {
    any_offset_and_length_is_read_back_and_nothing_else_changes
    a_file_is_exactly_as_long_as_what_was_written
    odd_writes_side_by_side_lose_no_byte
    an_odd_write_waits_for_those_before_it_and_those_behind_wait_for_it
    an_odd_read_past_the_end_says_how_much_was_there
    a_block_given_to_an_odd_write_comes_back_as_it_was
    more_odd_operations_than_bounce_blocks_all_end
}

/// Lengths around everything that could matter: nothing, sectors, blocks, windows and chunks.
const LENGTHS: [usize; 14] = [
    0,
    1,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    128 * KIB - 1,
    128 * KIB + 1,
    MIB - 1,
    MIB,
    MIB + 1,
    2 * MIB + 4097,
];

fn any_offset_and_length_is_read_back_and_nothing_else_changes(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 3 * MIB, 1);
    let mut expected = vec![0; 5 * MIB + 77];
    fill(&mut expected, 1);
    std::fs::write(rig.path("file"), &expected).unwrap();
    let file = rig.engine.open(&rig.path("file")).unwrap();
    for (seed, length) in (2..).zip(LENGTHS) {
        for offset in [0, 1, 511, 4096, 4097, MIB - 1, 2 * MIB + 512] {
            let block = rig.write(&file, offset as u64, rig.patterned(length, seed)).unwrap();
            fill(&mut expected[offset..offset + length], seed);
            drop(block);
            let mut block = rig.pool.lease(length).unwrap();
            block.fill(0);
            assert_pattern(&rig.read(&file, offset as u64, block).unwrap(), seed);
        }
        assert!(std::fs::read(rig.path("file")).unwrap() == expected, "after writes of {length} bytes");
    }
    // Bytes that nobody wrote through the engine come at odd places too.
    for (offset, length) in [(4096 * 3 + 5, 9000), (5 * MIB - 100, 177), (3, 2 * MIB)] {
        let block = rig.read(&file, offset as u64, rig.pool.lease(length).unwrap()).unwrap();
        assert!(block[..] == expected[offset..offset + length], "{length} bytes at {offset}");
    }
}

fn a_file_is_exactly_as_long_as_what_was_written(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 3 * MIB, 1);
    for (index, length) in LENGTHS.into_iter().enumerate() {
        let file = rig.create(&format!("file-{index}"));
        drop(rig.write(&file, 0, rig.patterned(length, 1)).unwrap());
        assert_eq!(file.len().unwrap(), length as u64);
        // Inside of it, the end stays; behind it, the gap is zeros.
        drop(rig.write(&file, (length / 3) as u64, rig.patterned(length / 2, 2)).unwrap());
        assert_eq!(file.len().unwrap(), length as u64);
        let gap = length as u64 + 1000;
        drop(rig.write(&file, gap, rig.patterned(77, 3)).unwrap());
        assert_eq!(file.len().unwrap(), gap + 77);
        let whole = std::fs::read(file.path()).unwrap();
        assert_pattern(&whole[length / 3..length / 3 + length / 2], 2);
        assert!(whole[length..gap as usize].iter().all(|&byte| byte == 0));
        assert_pattern(&whole[gap as usize..], 3);
    }
}

fn odd_writes_side_by_side_lose_no_byte(backend: BackendChoice) {
    const LENGTH: usize = 1000;
    const WRITERS: usize = 4;
    const ROUNDS: usize = 100;
    let config = EngineConfig { backend, chunk_bytes: 4096, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: LENGTH, count: 2 * WRITERS }]);
    let file = rig.create("file");
    // Two descriptors of one file are one file.
    let again = rig.engine.open(&rig.path("file")).unwrap();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (rig, file) = (&rig, if writer % 2 == 0 { &file } else { &again });
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let place = round * WRITERS + writer;
                    let block = rig.patterned(LENGTH, place as u64);
                    drop(rig.write(file, (place * LENGTH) as u64, block).unwrap());
                }
            });
        }
    });
    let whole = std::fs::read(file.path()).unwrap();
    assert_eq!(whole.len(), WRITERS * ROUNDS * LENGTH);
    for (place, part) in (0..).zip(whole.chunks(LENGTH)) {
        assert_pattern(part, place);
    }
}

fn an_odd_write_waits_for_those_before_it_and_those_behind_wait_for_it(backend: BackendChoice) {
    let config = EngineConfig { backend, chunk_bytes: 16 * KIB, ..EngineConfig::default() };
    let rig = Rig::with(config, &[BlockClass { name: "test", block_bytes: 256 * KIB, count: 3 }]);
    let file = rig.create("file");
    for _ in 0..20 {
        let (below, odd, above) =
            (rig.patterned(256 * KIB, 1), rig.patterned(1000, 2), rig.patterned(256 * KIB, 3));
        let below = rig.engine.write(&file, 0, below, Priority::Background);
        let odd = rig.engine.write(&file, 100_100, odd, Priority::Urgent);
        let above = rig.engine.write(&file, 256 * KIB as u64, above, Priority::Urgent);
        for ticket in [below, odd, above] {
            drop(finish(ticket).unwrap());
        }
        let whole = std::fs::read(file.path()).unwrap();
        assert_eq!(whole.len(), 512 * KIB);
        let mut expected = vec![0; 256 * KIB];
        fill(&mut expected, 1);
        fill(&mut expected[100_100..101_100], 2);
        assert!(whole[..256 * KIB] == expected);
        assert_pattern(&whole[256 * KIB..], 3);
        std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(0).unwrap();
    }
}

fn an_odd_read_past_the_end_says_how_much_was_there(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    file.allocate(1).unwrap();
    let plain = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
    let mut bytes = vec![0; 300_001];
    fill(&mut bytes, 4);
    plain.write_all_at(&bytes, 0).unwrap();
    drop(rig.read(&file, 299_999, rig.pool.lease(2).unwrap()).unwrap());
    for (offset, length, done) in
        [(299_999, 3, 2), (300_001, 1, 0), (400_000, 1, 0), (1, MIB - 1, 300_000), (0, 300_002, 300_001)]
    {
        let failed = rig.read(&file, offset, rig.pool.lease(length).unwrap()).unwrap_err();
        let path = file.path().to_path_buf();
        assert_eq!(failed.error, IoError::EndOfFile { path, offset, length, done });
        assert_eq!(failed.block.unwrap().len(), length);
    }
    rig.all_blocks_are_home();
}

fn a_block_given_to_an_odd_write_comes_back_as_it_was(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    let block = rig.patterned(70_001, 5);
    let start = block.as_ptr();
    let block = rig.write(&file, 12_345, block).unwrap();
    assert_eq!(block.as_ptr(), start);
    assert_pattern(&block, 5);
    rig.engine.shutdown().unwrap();
    let Failed { error, block } = rig.write(&file, 1, block).unwrap_err();
    assert_eq!(error, IoError::EngineStopped);
    assert_pattern(&block.unwrap(), 5);
}

fn more_odd_operations_than_bounce_blocks_all_end(backend: BackendChoice) {
    const OPS: usize = 100;
    let rig = Rig::blocks(backend, 5000, OPS);
    let tickets: Vec<_> = (0..OPS)
        .map(|index| {
            let file = rig.create(&format!("file-{index}"));
            rig.engine.write(&file, 3, rig.patterned(4999, index as u64), Priority::Background)
        })
        .collect();
    for ticket in tickets {
        drop(finish(ticket).unwrap());
    }
    for index in 0..OPS {
        let whole = std::fs::read(rig.path(&format!("file-{index}"))).unwrap();
        assert_eq!((whole.len(), &whole[..3]), (5002, &[0; 3][..]));
        assert_pattern(&whole[3..], index as u64);
    }
}
