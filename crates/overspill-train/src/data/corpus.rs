//! All the tokens of a run, in memory.
//!
//! A file flows through a piece of [`PIECE_BYTES`] at a time: read, checked for UTF-8, encoded, appended. Bytes are
//! kept as bytes and other ids as `u32`; nothing else of the file's size is ever held. A text file is one document,
//! a JSONL file (`.jsonl`, `.ndjson`, `.json`) one per line. Documents are joined by the tokenizer's end-of-text
//! token, or by a newline where it has none. Between pieces [`Limits`] ends a read that takes too much memory or
//! that nobody waits for any longer; it ends the wait for a pipe, too.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::Value;

use super::{DataError, Tokenizer};
use crate::regular;

/// The project's own documents and sources; see the build script.
const EMBEDDED: &str = include_str!(concat!(env!("OUT_DIR"), "/corpus.txt"));

/// What the embedded corpus is called.
const EMBEDDED_NAME: &str = "embedded corpus";

/// How much text is encoded at once. A token cannot span two pieces; they end at a newline where there is one.
const PIECE_BYTES: usize = 1 << 20;

/// How often whoever waits for a pipe looks whether they still should.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The tokens of a run.
#[derive(Debug)]
pub struct Corpus {
    tokens: Tokens,
    source: String,
}

/// Token ids, as small as they are known to be.
#[derive(Debug)]
enum Tokens {
    Bytes(Cow<'static, [u8]>),
    Ids(Vec<u32>),
}

impl Corpus {
    /// The project's own documents and sources.
    ///
    /// # Errors
    /// [`DataError::NotEncodable`] when the tokenizer does not know some of the text; never for bytes.
    pub fn embedded(tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let tokens = match tokenizer {
            Tokenizer::Bytes => Tokens::Bytes(Cow::Borrowed(EMBEDDED.as_bytes())),
            Tokenizer::Json(_) => {
                let stop = AtomicBool::new(false);
                let limits = Limits { source: EMBEDDED_NAME, bytes_max: usize::MAX, stop: &stop };
                let mut encoder = Encoder::new(tokenizer, limits);
                encoder.document()?;
                encoder.append(EMBEDDED)?;
                encoder.finish()
            }
        };
        Ok(Self { tokens, source: EMBEDDED_NAME.to_owned() })
    }

    /// Reads text and JSONL files in the given order, into at most `bytes_max` bytes of memory. A path may also be that
    /// of a pipe, which is waited for. `stop` is looked at about every mebibyte, and all the while a pipe is silent.
    ///
    /// # Errors
    /// [`DataError`], naming the file and the line or offset, when a file cannot be read or is not what its
    /// extension says, and when there is no token in any of them. [`DataError::TooLarge`] as soon as the tokens, or
    /// a single line of JSONL, take more than `bytes_max`; [`DataError::Interrupted`] once `stop` is set.
    pub fn read(
        paths: &[PathBuf],
        tokenizer: &Tokenizer,
        bytes_max: usize,
        stop: &AtomicBool,
    ) -> Result<Self, DataError> {
        let source = match paths {
            [] => "no data files".to_owned(),
            [path] => path.display().to_string(),
            [first, rest @ ..] => format!("{} and {} more", first.display(), rest.len()),
        };
        let mut encoder = Encoder::new(tokenizer, Limits { source: &source, bytes_max, stop });
        for path in paths {
            let (file, length) = open(path)?;
            let file = Patient { file, stop };
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("jsonl" | "ndjson" | "json") => read_jsonl(path, file, &mut encoder)?,
                _ => {
                    encoder.expect_bytes(length)?;
                    read_text(path, file, &mut encoder)?;
                }
            }
        }
        let tokens = encoder.finish();
        let corpus = Self { tokens, source };
        if corpus.is_empty() { Err(DataError::Empty { source_name: corpus.source }) } else { Ok(corpus) }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        match &self.tokens {
            Tokens::Bytes(bytes) => bytes.len(),
            Tokens::Ids(ids) => ids.len(),
        }
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory that the tokens take, in bytes; those of the embedded corpus belong to the program.
    pub fn memory_bytes(&self) -> usize {
        match &self.tokens {
            Tokens::Bytes(Cow::Borrowed(_)) => 0,
            Tokens::Bytes(Cow::Owned(bytes)) => bytes.capacity(),
            Tokens::Ids(ids) => ids.capacity() * size_of::<u32>(),
        }
    }

    /// A checksum (XXH3-64) of all tokens.
    pub fn digest(&self) -> u64 {
        match &self.tokens {
            Tokens::Bytes(bytes) => xxhash_rust::xxh3::xxh3_64(bytes),
            Tokens::Ids(ids) => xxhash_rust::xxh3::xxh3_64(bytemuck::cast_slice(ids)),
        }
    }

    /// Where the tokens come from, in words for people.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Appends the `count` tokens from `start` on.
    ///
    /// # Panics
    /// When the corpus has no such tokens.
    pub fn extend_into(&self, start: usize, count: usize, out: &mut Vec<u32>) {
        let range = start..start + count;
        match &self.tokens {
            Tokens::Bytes(bytes) => out.extend(bytes[range].iter().map(|&byte| u32::from(byte))),
            Tokens::Ids(ids) => out.extend_from_slice(&ids[range]),
        }
    }

    /// The first token that is not below `vocab`, with its position.
    pub(super) fn first_outside(&self, vocab: usize) -> Option<(usize, u32)> {
        let outside = |&token: &u32| token as usize >= vocab;
        match &self.tokens {
            Tokens::Bytes(_) if vocab > usize::from(u8::MAX) => None,
            Tokens::Bytes(bytes) => {
                bytes.iter().map(|&byte| u32::from(byte)).enumerate().find(|(_, token)| outside(token))
            }
            Tokens::Ids(ids) => ids.iter().copied().enumerate().find(|(_, token)| outside(token)),
        }
    }
}

/// What ends a read before the files do.
#[derive(Clone, Copy)]
struct Limits<'a> {
    /// Where the corpus comes from.
    source: &'a str,
    /// What its tokens may take in memory, and a line on its way to them.
    bytes_max: usize,
    stop: &'a AtomicBool,
}

impl Limits<'_> {
    /// Turns what a read failed with into an error. That the wait for a pipe was given up is none of the pipe's.
    fn unreadable(&self, path: &Path) -> impl Fn(io::Error) -> DataError {
        let (path, stop) = (path.to_owned(), self.stop);
        move |source| match source.kind() {
            io::ErrorKind::WouldBlock if stop.load(Ordering::Relaxed) => DataError::Interrupted,
            _ => DataError::Unreadable { path: path.clone(), source },
        }
    }

    /// Whether a read that holds `bytes` may go on.
    fn check(&self, bytes: usize) -> Result<(), DataError> {
        if self.stop.load(Ordering::Relaxed) {
            Err(DataError::Interrupted)
        } else if bytes > self.bytes_max {
            Err(DataError::TooLarge { source_name: self.source.to_owned(), bytes_max: self.bytes_max })
        } else {
            Ok(())
        }
    }
}

/// A file whose bytes may have yet to come, as those of a pipe do, and that is open without waiting for them. A read waits
/// until there are some, or the other end is closed, or somebody asks to stop, which is an error.
struct Patient<'a> {
    file: File,
    stop: &'a AtomicBool,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let patience = Timespec::try_from(LOOK_EVERY).map_err(io::Error::other)?;
        while !self.stop.load(Ordering::Relaxed) {
            match poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&patience)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => match self.file.read(buffer) {
                    // Somebody else was faster.
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    result => return result,
                },
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// Turns pieces of text into tokens.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    limits: Limits<'a>,
    tokens: Tokens,
}

impl<'a> Encoder<'a> {
    fn new(tokenizer: &'a Tokenizer, limits: Limits<'a>) -> Self {
        let tokens = match tokenizer {
            Tokenizer::Bytes => Tokens::Bytes(Cow::Borrowed(&[])),
            Tokenizer::Json(_) => Tokens::Ids(Vec::new()),
        };
        Self { tokenizer, limits, tokens }
    }

    /// Makes room for a text of this length at once, for growth by doubling holds everything twice.
    fn expect_bytes(&mut self, length: u64) -> Result<(), DataError> {
        if let Tokens::Bytes(bytes) = &mut self.tokens {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            // Each byte will be a token, so that there is no need to read them to know.
            self.limits.check(bytes.len().saturating_add(length))?;
            // A length that cannot be had fails later, when the bytes really come.
            drop(bytes.to_mut().try_reserve_exact(length.saturating_add(1)));
        }
        Ok(())
    }

    /// Memory that the tokens take, in bytes. Room behind them was never touched and takes none.
    fn bytes(&self) -> usize {
        match &self.tokens {
            Tokens::Bytes(bytes) => bytes.len(),
            Tokens::Ids(ids) => size_of_val(ids.as_slice()),
        }
    }

    /// The tokens, without room for more.
    fn finish(mut self) -> Tokens {
        match &mut self.tokens {
            Tokens::Bytes(Cow::Borrowed(_)) => {}
            Tokens::Bytes(Cow::Owned(bytes)) => bytes.shrink_to_fit(),
            Tokens::Ids(ids) => ids.shrink_to_fit(),
        }
        self.tokens
    }

    /// Begins a document.
    fn document(&mut self) -> Result<(), DataError> {
        match (&mut self.tokens, self.tokenizer) {
            (Tokens::Bytes(bytes), _) if !bytes.is_empty() => bytes.to_mut().push(b'\n'),
            (Tokens::Ids(ids), Tokenizer::Json(json)) if !ids.is_empty() => match json.eos() {
                Some(eos) => ids.push(eos),
                None => json.encode("\n", ids)?,
            },
            _ => {}
        }
        Ok(())
    }

    /// Appends text to the document; of a long text, a piece at a time.
    fn append(&mut self, mut text: &str) -> Result<(), DataError> {
        while !text.is_empty() {
            let (piece, rest) = text.split_at(piece_end(text));
            match (&mut self.tokens, self.tokenizer) {
                (Tokens::Ids(ids), Tokenizer::Json(json)) => json.encode(piece, ids)?,
                (Tokens::Bytes(bytes), _) => bytes.to_mut().extend_from_slice(piece.as_bytes()),
                (Tokens::Ids(_), Tokenizer::Bytes) => unreachable!("tokens are made for their tokenizer"),
            }
            self.limits.check(self.bytes())?;
            text = rest;
        }
        Ok(())
    }
}

/// Where to cut a text whose first piece is wanted: behind the last newline that the piece can hold.
fn piece_end(text: &str) -> usize {
    if text.len() <= PIECE_BYTES {
        return text.len();
    }
    let limit = text.floor_char_boundary(PIECE_BYTES);
    text[..limit].rfind('\n').map_or(limit, |newline| newline + 1)
}

/// Opens a file for reading and tells its length; zero for what has none, as a pipe.
fn open(path: &Path) -> Result<(File, u64), DataError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => DataError::NotFound { path: path.to_owned() },
        _ => DataError::Unreadable { path: path.to_owned(), source },
    };
    let file = regular::open_at_once(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        Err(DataError::IsDirectory { path: path.to_owned() })
    } else {
        Ok((file, metadata.len()))
    }
}

fn read_text<R: Read>(path: &Path, mut source: R, encoder: &mut Encoder<'_>) -> Result<(), DataError> {
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    let mut offset = 0;
    loop {
        let wanted = PIECE_BYTES - piece.len();
        let read = source
            .by_ref()
            .take(wanted as u64)
            .read_to_end(&mut piece)
            .map_err(encoder.limits.unreadable(path))?;
        let last = read < wanted;
        let text = match str::from_utf8(&piece) {
            Ok(text) => text,
            // The piece may have cut a character; the file's end may not.
            Err(e) if e.error_len().is_none() && !last => valid_prefix(&piece, e.valid_up_to()),
            Err(e) => {
                let offset = offset + e.valid_up_to() as u64;
                return Err(DataError::InvalidUtf8 { path: path.to_owned(), offset });
            }
        };
        let end = if last { text.len() } else { text.rfind('\n').map_or(text.len(), |newline| newline + 1) };
        if offset == 0 && end > 0 {
            encoder.document()?;
        }
        encoder.append(&text[..end])?;
        if last {
            return Ok(());
        }
        offset += end as u64;
        piece.drain(..end);
    }
}

fn valid_prefix(bytes: &[u8], valid: usize) -> &str {
    str::from_utf8(&bytes[..valid]).expect("these bytes were just found valid")
}

fn read_jsonl<R: Read>(path: &Path, source: R, encoder: &mut Encoder<'_>) -> Result<(), DataError> {
    let mut source = BufReader::with_capacity(PIECE_BYTES, source);
    let mut bytes = Vec::new();
    let mut offset = 0;
    for line in 1.. {
        bytes.clear();
        read_line(path, &mut source, &mut bytes, &encoder.limits)?;
        if bytes.is_empty() {
            break;
        }
        let text = str::from_utf8(&bytes).map_err(|e| DataError::InvalidUtf8 {
            path: path.to_owned(),
            offset: offset + e.valid_up_to() as u64,
        })?;
        offset += bytes.len() as u64;
        if text.trim().is_empty() {
            continue;
        }
        let document: Value = serde_json::from_str(text).map_err(|e| DataError::MalformedJson {
            path: path.to_owned(),
            line,
            column: e.column(),
        })?;
        match document.get("text") {
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => {
                encoder.document()?;
                encoder.append(text)?;
            }
            Some(_) => return Err(DataError::TextNotString { path: path.to_owned(), line }),
            None => return Err(DataError::TextMissing { path: path.to_owned(), line }),
        }
    }
    Ok(())
}

/// Appends a line with its newline to `line`; nothing at the file's end.
fn read_line(
    path: &Path,
    source: &mut impl BufRead,
    line: &mut Vec<u8>,
    limits: &Limits<'_>,
) -> Result<(), DataError> {
    loop {
        let read = source
            .by_ref()
            .take(PIECE_BYTES as u64)
            .read_until(b'\n', line)
            .map_err(limits.unreadable(path))?;
        // The tokens that are there already count when those of this line come to them.
        limits.check(line.len())?;
        if read == 0 || line.ends_with(b"\n") {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
