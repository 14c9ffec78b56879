//! Texts that come slowly, never end or are no text.

use std::io::Write;
use std::sync::{Arc, mpsc};

use proptest::prelude::*;
use rustix::fs::{CWD, Mode, mkfifoat};

use super::*;

/// Gives its bytes a few at a time, as a pipe does.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(70_001);
        Read::read(&mut self.0, &mut buffer[..count])
    }
}

/// Sets `stop` once so many bytes were taken.
struct Stopping {
    after: usize,
    taken: usize,
    stop: Arc<AtomicBool>,
}

impl Read for Stopping {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        buffer.fill(b'x');
        self.taken += buffer.len();
        assert!(self.taken <= self.after + 2 * PIECE_BYTES, "nobody looked at the flag");
        self.stop.store(self.taken >= self.after, Ordering::Relaxed);
        Ok(buffer.len())
    }
}

/// How readers of both kinds give up on a text without an end.
fn ends_of_endless_texts(bytes_max: usize) -> [DataError; 2] {
    [read_text::<Stopping>, read_jsonl::<Stopping>].map(|reader| {
        let stop = Arc::new(AtomicBool::new(false));
        let source = Stopping { after: 5 * PIECE_BYTES, taken: 0, stop: Arc::clone(&stop) };
        let limits = Limits { source: "f", bytes_max, stop: &stop };
        reader(Path::new("f"), source, &mut Encoder::new(&Tokenizer::Bytes, limits)).unwrap_err()
    })
}

#[test]
fn an_endless_text_ends_within_a_piece_of_being_interrupted() {
    for error in ends_of_endless_texts(usize::MAX) {
        assert!(matches!(error, DataError::Interrupted), "{error}");
    }
}

#[test]
fn an_endless_text_ends_within_a_piece_of_the_limit() {
    for error in ends_of_endless_texts(3 * PIECE_BYTES) {
        assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
    }
}

/// Reads a pipe in a thread of its own; its result comes in time, or the test fails.
fn read_of_pipe(path: &Path, stop: &Arc<AtomicBool>) -> impl FnOnce() -> Result<Corpus, DataError> + use<> {
    mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR).unwrap();
    let (path, stop, (tell, told)) = (path.to_owned(), Arc::clone(stop), mpsc::channel());
    std::thread::spawn(move || {
        tell.send(Corpus::read(&[path], &Tokenizer::Bytes, usize::MAX, &stop)).unwrap();
    });
    move || told.recv_timeout(Duration::from_secs(60)).expect("the read ends")
}

#[test]
fn whoever_waits_for_a_silent_pipe_can_be_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    for (name, is_written) in [("f.txt", true), ("g.txt", false), ("h.jsonl", true), ("i.jsonl", false)] {
        let stop = Arc::new(AtomicBool::new(false));
        let result = read_of_pipe(&folder.path().join(name), &stop);
        // This waits until the pipe is open at the other end.
        let mut pipe = File::options().write(true).open(folder.path().join(name)).unwrap();
        if is_written {
            pipe.write_all(b"half a line").unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        let error = result().unwrap_err();
        assert!(matches!(error, DataError::Interrupted), "{name}: {error}");
    }
    // Nobody ever opens the other end.
    let stop = Arc::new(AtomicBool::new(true));
    let error = read_of_pipe(&folder.path().join("never"), &stop)().unwrap_err();
    assert!(matches!(error, DataError::Interrupted), "{error}");
}

#[test]
fn a_pipe_is_read_to_its_end_however_slowly_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f.txt");
    let result = read_of_pipe(&path, &Arc::default());
    let text = "äöü\n".repeat(300_000);
    let mut pipe = File::options().write(true).open(&path).unwrap();
    for part in text.as_bytes().chunks(7001) {
        pipe.write_all(part).unwrap();
        std::thread::yield_now();
    }
    drop(pipe);
    let corpus = result().unwrap();
    assert!(matches!(&corpus.tokens, Tokens::Bytes(bytes) if **bytes == *text.as_bytes()));
}

fn bytes_of(content: &[u8]) -> Result<Vec<u8>, DataError> {
    let stop = AtomicBool::new(false);
    let limits = Limits { source: "f", bytes_max: usize::MAX, stop: &stop };
    let mut encoder = Encoder::new(&Tokenizer::Bytes, limits);
    read_text(Path::new("f"), Trickle(content), &mut encoder)?;
    match encoder.finish() {
        Tokens::Bytes(bytes) => Ok(bytes.into_owned()),
        Tokens::Ids(_) => unreachable!(),
    }
}

#[test]
fn a_character_across_two_pieces_is_kept_whole() {
    for shift in 0..4 {
        let mut text = "x".repeat(PIECE_BYTES - shift);
        text.push('😀');
        text.push_str(&"é\n".repeat(PIECE_BYTES));
        assert!(bytes_of(text.as_bytes()).unwrap() == text.as_bytes(), "shift {shift}");
    }
}

#[test]
fn invalid_utf8_is_found_at_its_offset_in_any_piece() {
    for at in [0, 7, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 5] {
        let mut content = "ab\n".repeat(PIECE_BYTES).into_bytes();
        content[at] = 0xFF;
        let error = bytes_of(&content).unwrap_err();
        assert!(matches!(error, DataError::InvalidUtf8 { offset, .. } if offset == at as u64), "{error}");
    }
    let error = bytes_of(b"ab\xC3").unwrap_err();
    assert!(matches!(error, DataError::InvalidUtf8 { offset: 2, .. }), "{error}");
}

proptest! {
    #[test]
    fn pieces_put_together_are_the_text(line in 1usize..5000, tail in 0usize..5000) {
        let text = format!("{}\n", "é".repeat(line)).repeat(PIECE_BYTES / line + 1) + &"ü".repeat(tail);
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let end = piece_end(rest);
            prop_assert!(end > 0 && end <= PIECE_BYTES);
            prop_assert!(end == rest.len() || rest[..end].ends_with('\n'));
            rest = &rest[end..];
        }
    }
}
