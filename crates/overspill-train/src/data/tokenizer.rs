//! Text to token ids: single bytes, or what a `tokenizer.json` says.
//!
//! The byte-level tokenizer needs no file to be read, and [`byte_level_files`] writes it down in the words of the
//! `tokenizers` library, so that a model trained on bytes is loaded with its tokenizer by others.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::DataError;
use crate::regular;

/// How text becomes token ids.
#[derive(Debug)]
pub enum Tokenizer {
    /// The id of a token is the value of a byte of UTF-8.
    Bytes,
    /// What a `tokenizer.json` says.
    Json(Box<JsonTokenizer>),
}

/// A tokenizer of the `tokenizers` library, with the folder it came from.
#[derive(Debug)]
pub struct JsonTokenizer {
    inner: tokenizers::Tokenizer,
    vocab: usize,
    eos: Option<u32>,
    folder: PathBuf,
}

/// Number of token ids of [`Tokenizer::Bytes`].
const BYTES: usize = 256;

impl Tokenizer {
    /// Reads the `tokenizer.json` of a folder; its end-of-text token is the one that `tokenizer_config.json` or
    /// `special_tokens_map.json` names, when one does.
    ///
    /// # Errors
    /// [`DataError::TokenizerMissing`], [`DataError::TokenizerMalformed`], [`DataError::NotAFile`],
    /// [`DataError::Unreadable`].
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join("tokenizer.json");
        let Some(text) = read_if_there(&path)? else { return Err(DataError::TokenizerMissing { path }) };
        let malformed = |e: tokenizers::Error| DataError::TokenizerMalformed {
            path: path.clone(),
            reason: e.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(text).map_err(malformed)?;
        // Both are meant for a model's inputs at inference; here they would cut and fill the corpus.
        inner.with_truncation(None).map_err(malformed)?;
        inner.with_padding(None);
        // Ids may have gaps, so that their number is no bound.
        let vocab = inner.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1);
        let eos = end_of_text(folder)?.and_then(|token| inner.token_to_id(&token));
        Ok(Self::Json(Box::new(JsonTokenizer { inner, vocab, eos, folder: folder.to_owned() })))
    }

    /// Number of token ids: one more than the largest.
    pub fn vocab(&self) -> usize {
        match self {
            Self::Bytes => BYTES,
            Self::Json(json) => json.vocab,
        }
    }

    /// The folder that the tokenizer was read from.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Bytes => None,
            Self::Json(json) => Some(&json.folder),
        }
    }
}

impl JsonTokenizer {
    /// The token that ends a document, if the tokenizer has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Appends the ids of `text`, without the special tokens that would frame it.
    ///
    /// # Errors
    /// [`DataError::NotEncodable`] when a piece of the text has no token and there is none for unknown text.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| DataError::NotEncodable { reason: e.to_string() })?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// The texts of the files that describe [`Tokenizer::Bytes`] to the `transformers` library.
#[derive(Clone, Debug, PartialEq)]
pub struct ByteLevelFiles {
    /// Of `tokenizer.json`.
    pub tokenizer: String,
    /// Of `tokenizer_config.json`.
    pub config: String,
}

/// Describes [`Tokenizer::Bytes`] as a byte-level BPE without merges and without special tokens.
pub fn byte_level_files() -> ByteLevelFiles {
    let vocab: Map<String, Value> =
        byte_alphabet().into_iter().zip(0u32..).map(|(name, id)| (name.to_string(), id.into())).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocab,
            "merges": [],
        },
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
    });
    ByteLevelFiles { tokenizer: format!("{tokenizer:#}\n"), config: format!("{config:#}\n") }
}

/// The character by which byte-level BPE writes each byte: itself where it prints, else the next one from U+0100.
fn byte_alphabet() -> [char; BYTES] {
    let mut stand_ins = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        printing @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(printing),
        _ => stand_ins.next().expect("the stand-ins go on to U+10FFFF"),
    })
}

/// The end-of-text token that the files beside a `tokenizer.json` name.
fn end_of_text(folder: &Path) -> Result<Option<String>, DataError> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(name);
        let Some(text) = read_if_there(&path)? else { continue };
        let file: Value = serde_json::from_slice(&text)
            .map_err(|e| DataError::TokenizerMalformed { path, reason: e.to_string() })?;
        let token = &file["eos_token"];
        // Either the token itself, or an object that tells also how to strip around it.
        if let Some(token) = token.as_str().or_else(|| token["content"].as_str()) {
            return Ok(Some(token.to_owned()));
        }
    }
    Ok(None)
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, DataError> {
    let unreadable = |source| DataError::Unreadable { path: path.to_owned(), source };
    let file = match regular::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(unreadable)?,
    };
    let mut file = file.ok_or_else(|| DataError::NotAFile { path: path.to_owned() })?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written_byte_level() -> tokenizers::Tokenizer {
        tokenizers::Tokenizer::from_bytes(byte_level_files().tokenizer).unwrap()
    }

    #[test]
    fn every_byte_has_its_own_character() {
        let mut alphabet = byte_alphabet().to_vec();
        assert_eq!((alphabet[b'A' as usize], alphabet[b' ' as usize]), ('A', '\u{120}'));
        alphabet.sort_unstable();
        alphabet.dedup();
        assert_eq!(alphabet.len(), BYTES);
    }

    proptest! {
        #[test]
        fn the_written_tokenizer_encodes_text_to_its_bytes(text in "\\PC*|[\\x00-\\x20é€😀]*") {
            let tokenizer = written_byte_level();
            let encoding = tokenizer.encode_fast(text.as_str(), true).unwrap();
            let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(encoding.get_ids(), &bytes[..]);
            prop_assert_eq!(tokenizer.decode(&bytes, false).unwrap(), text);
        }
    }
}
