//! Why text did not become batches.

use std::io;
use std::path::PathBuf;

/// Why text did not become batches; each names the place of the trouble.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// There is nothing at the path.
    #[error("{path}: no such file", path = path.display())]
    NotFound {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The path is a directory where a file is needed.
    #[error("{path}: is a directory; name the files in it", path = path.display())]
    IsDirectory {
        /// The path as it was given.
        path: PathBuf,
    },
    /// Something else than a regular file is where one is needed.
    #[error("{path}: not a regular file", path = path.display())]
    NotAFile {
        /// What is there.
        path: PathBuf,
    },
    /// The system refused to open or read the file.
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's answer, with its errno.
        source: io::Error,
    },
    /// The file is not UTF-8.
    #[error("{path}: invalid UTF-8 at byte {offset}", path = path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first byte that does not belong, from the file's start.
        offset: u64,
    },
    /// A line of a JSONL file is not JSON.
    #[error("{path}: line {line}, column {column}: malformed JSON", path = path.display())]
    MalformedJson {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The column at which the parser gave up, from 1.
        column: usize,
    },
    /// A line of a JSONL file is no object with a `text`.
    #[error("{path}: line {line}: no field \"text\"", path = path.display())]
    TextMissing {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// The `text` of a line of a JSONL file is something else than a string.
    #[error("{path}: line {line}: the field \"text\" is not a string", path = path.display())]
    TextNotString {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// The tokens take more memory than is left for them.
    #[error(
        "{source_name}: the text takes more than the {bytes_max} bytes that --memory leaves for it; raise --memory \
         or train on less"
    )]
    TooLarge {
        /// Where the corpus comes from.
        source_name: String,
        /// What the tokens may take, in bytes.
        bytes_max: usize,
    },
    /// Somebody asked to stop while the text was read.
    #[error("interrupted")]
    Interrupted,
    /// There is no token to train on.
    #[error("{source_name}: the corpus is empty")]
    Empty {
        /// Where the corpus comes from.
        source_name: String,
    },
    /// The corpus is shorter than one window.
    #[error(
        "{source_name}: the corpus has {found} tokens, and a window of the sequence length needs {needed}"
    )]
    TooShort {
        /// Where the corpus comes from.
        source_name: String,
        /// Tokens there.
        found: usize,
        /// Tokens that one window needs: the sequence length and one more.
        needed: usize,
    },
    /// A batch without a window, or windows without a token, were asked for.
    #[error("a batch of {batch} windows of {seq} tokens: both must be at least 1")]
    EmptyBatch {
        /// Windows of a batch.
        batch: usize,
        /// Tokens of a window.
        seq: usize,
    },
    /// The corpus holds a token that the model has no embedding for.
    #[error(
        "{source_name}: token {token} at position {position} is outside of the model's vocabulary of {vocab}"
    )]
    TokenOutOfRange {
        /// Where the corpus comes from.
        source_name: String,
        /// The token id.
        token: u32,
        /// Its index in the corpus.
        position: usize,
        /// The model's number of token ids.
        vocab: usize,
    },
    /// The folder has no `tokenizer.json`.
    #[error("{path}: no such file; the tokenizer is read from it", path = path.display())]
    TokenizerMissing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A tokenizer's file is not what its name says.
    #[error("{path}: not a tokenizer: {reason}", path = path.display())]
    TokenizerMalformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer has no answer for a piece of text.
    #[error("the tokenizer refuses a text: {reason}")]
    NotEncodable {
        /// Why, in the tokenizer's words.
        reason: String,
    },
}
