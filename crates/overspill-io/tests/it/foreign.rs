//! Files that somebody else has opened, and callers that do not wait.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc;

use overspill_io::{BackendChoice, Direction, IoError, Priority};
use rustix::fs::OFlags;

use crate::rig::{BOUND, KIB, MIB, Rig, assert_pattern};

laws! {
    an_adopted_file_is_written_where_it_is_asked_for_whatever_its_flags
    what_has_no_places_is_not_adopted
    a_call_is_made_with_the_block_or_with_the_error_and_the_block
    a_call_is_made_though_the_engine_has_stopped
}

fn an_adopted_file_is_written_where_it_is_asked_for_whatever_its_flags(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let path = rig.path("file");
    std::fs::write(&path, vec![0; 3 * 4096]).unwrap();
    let flags = (OFlags::APPEND | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).unwrap();
    let file = rig.engine.adopt(file, &path).unwrap();
    drop(rig.write(&file, 4096, rig.patterned(4096, 1)).unwrap());
    drop(rig.write(&file, 100, rig.patterned(77, 2)).unwrap());
    let content = std::fs::read(&path).unwrap();
    assert_eq!(content.len(), 3 * 4096);
    assert_pattern(&content[4096..8192], 1);
    assert_pattern(&content[100..177], 2);
}

fn what_has_no_places_is_not_adopted(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    for path in [rig.folder.path(), "/dev/null".as_ref()] {
        let file = std::fs::File::open(path).unwrap();
        let is_folder = path == rig.folder.path();
        let adopted = rig.engine.adopt(file, path);
        assert_eq!(matches!(adopted, Err(IoError::NotAFile { .. })), is_folder, "{}", path.display());
    }
}

fn a_call_is_made_with_the_block_or_with_the_error_and_the_block(backend: BackendChoice) {
    let rig = Rig::blocks(backend, MIB, 1);
    let file = rig.create("file");
    let (sender, answers) = mpsc::channel();
    for (direction, offset, works) in
        [(Direction::Write, 0, true), (Direction::Read, 0, true), (Direction::Read, MIB as u64, false)]
    {
        let block = rig.patterned(100 * KIB, 7);
        let sender = sender.clone();
        rig.engine.call(direction, &file, offset, block, Priority::Urgent, move |answer| {
            sender.send(answer).unwrap();
        });
        match answers.recv_timeout(BOUND).unwrap() {
            Ok(block) => {
                assert!(works);
                assert_pattern(&block, 7);
            }
            Err(failed) => {
                assert!(!works && matches!(failed.error, IoError::EndOfFile { .. }), "{failed}");
                assert_eq!(failed.block.map(|block| block.len()), Some(100 * KIB));
            }
        }
    }
}

fn a_call_is_made_though_the_engine_has_stopped(backend: BackendChoice) {
    let rig = Rig::blocks(backend, 4096, 1);
    let file = rig.create("file");
    rig.engine.shutdown().unwrap();
    let (sender, answers) = mpsc::channel();
    let block = rig.patterned(4096, 1);
    rig.engine.call(Direction::Write, &file, 0, block, Priority::Urgent, move |answer| {
        sender.send(answer.map_err(|failed| failed.error)).unwrap();
    });
    assert_eq!(answers.recv_timeout(BOUND).unwrap().unwrap_err(), IoError::EngineStopped);
}
