//! Text files and tokenizers to batches, through the public door.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use overspill_train::data::{Batches, Corpus, DataError, Tokenizer};
use overspill_train::model::BatchShape;
use overspill_train::trainer::BatchSource;
use proptest::prelude::*;
use tempfile::TempDir;

/// Words `a`, `b`, `c` and an end-of-text token with the id 7: there are gaps between the ids.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy":
    "LongestFirst", "stride": 0}, "padding": null, "added_tokens": [{"id": 7, "content": "<end>", "single_word": false,
    "lstrip": false, "rstrip": false, "normalized": false, "special": true}], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "<end>": 7}, "unk_token": "<unk>"}}"#;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn file(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

fn tokens(corpus: &Corpus) -> Vec<u32> {
    let mut tokens = Vec::new();
    corpus.extend_into(0, corpus.len(), &mut tokens);
    tokens
}

fn text(corpus: &Corpus) -> String {
    String::from_utf8(tokens(corpus).into_iter().map(|token| u8::try_from(token).unwrap()).collect()).unwrap()
}

fn read_with(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Corpus, DataError> {
    Corpus::read(paths, tokenizer, usize::MAX, &AtomicBool::new(false))
}

fn read(paths: &[PathBuf]) -> Result<Corpus, DataError> {
    read_with(paths, &Tokenizer::Bytes)
}

#[test]
fn the_embedded_corpus_holds_these_very_sources() {
    let corpus = Corpus::embedded(&Tokenizer::Bytes).unwrap();
    assert!(text(&corpus).contains("//! All the tokens of a run, in memory."));
    assert_eq!(corpus.memory_bytes(), 0);
}

#[test]
fn documents_are_joined_by_a_newline() {
    let folder = folder();
    let plain = file(&folder, "a.txt", "héllo");
    let lines = file(
        &folder,
        "b.jsonl",
        "{\"text\": \"one\"}\n\n{\"id\": 3, \"text\": \"t\\nwo\"}\n{\"text\": \"\"}\n",
    );
    let empty = file(&folder, "c.txt", "");
    assert_eq!(text(&read(&[plain, empty, lines]).unwrap()), "héllo\none\nt\nwo");
}

#[test]
fn a_text_is_held_once() {
    let folder = folder();
    let length = 5_000_000;
    let corpus = read(&[file(&folder, "a.txt", "line of text\n".repeat(length / 13))]).unwrap();
    assert!(corpus.memory_bytes() <= length + 4096, "{}", corpus.memory_bytes());
}

#[test]
fn a_text_that_just_fits_is_read_and_one_token_more_is_told_what_to_do() {
    let folder = folder();
    file(&folder, "tokenizer.json", TOKENIZER);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let bytes = [file(&folder, "1.txt", "12345"), file(&folder, "2.txt", "678")];
    let lines = [file(&folder, "3.jsonl", "{\"text\": \"abcde\"}\n".repeat(20))];
    let words = [file(&folder, "4.txt", "a b c a b")];
    for (paths, tokenizer, takes) in [
        (&bytes[..], &Tokenizer::Bytes, 9),
        (&lines, &Tokenizer::Bytes, 20 * 6 - 1),
        (&words, &tokenizer, 5 * 4),
    ] {
        let read = |bytes_max| Corpus::read(paths, tokenizer, bytes_max, &AtomicBool::new(false));
        assert_eq!(read(takes).unwrap().memory_bytes(), takes);
        let error = read(takes - 1).unwrap_err();
        let told = matches!(&error, DataError::TooLarge { bytes_max, .. } if *bytes_max == takes - 1);
        assert!(told, "{error}");
        assert!(error.to_string().contains("raise --memory or train on less"), "{error}");
    }
}

#[test]
fn a_text_larger_than_the_limit_is_refused_before_it_is_read() {
    let folder = folder();
    let path = file(&folder, "a.txt", b"\xFF");
    // No file system and no memory holds this, but a file may be sparse.
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 42).unwrap();
    let error = Corpus::read(&[path], &Tokenizer::Bytes, 1 << 20, &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
}

#[test]
fn a_read_that_nobody_waits_for_ends() {
    let folder = folder();
    for path in [file(&folder, "a.txt", "text"), file(&folder, "a.jsonl", "{\"text\": \"a\"}")] {
        let error = Corpus::read(&[path], &Tokenizer::Bytes, usize::MAX, &AtomicBool::new(true)).unwrap_err();
        assert!(matches!(error, DataError::Interrupted), "{error}");
    }
}

#[test]
fn a_tokenizer_joins_documents_with_its_end_of_text_token() {
    let folder = folder();
    file(&folder, "tokenizer.json", TOKENIZER);
    let paths =
        [file(&folder, "1.txt", "a b c a"), file(&folder, "2.jsonl", "{\"text\": \"b\"}\n{\"text\": \"c\"}")];
    file(&folder, "tokenizer_config.json", r#"{"eos_token": {"content": "<end>"}}"#);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(tokenizer.vocab(), 8);
    let corpus = read_with(&paths, &tokenizer).unwrap();
    assert_eq!(tokens(&corpus), [0, 1, 2, 0, 7, 1, 7, 2]);

    file(&folder, "tokenizer_config.json", r#"{"eos_token": null}"#);
    file(&folder, "special_tokens_map.json", r#"{"eos_token": "<end>"}"#);
    assert_eq!(tokens(&read_with(&paths, &Tokenizer::open(folder.path()).unwrap()).unwrap()).len(), 8);

    fs::remove_file(folder.path().join("special_tokens_map.json")).unwrap();
    let corpus = read_with(&paths, &Tokenizer::open(folder.path()).unwrap()).unwrap();
    assert_eq!(tokens(&corpus), [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_tokenizer_that_is_missing_or_malformed_is_an_error() {
    let folder = folder();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(matches!(error, DataError::TokenizerMissing { .. }), "{error}");
    file(&folder, "tokenizer.json", "{\"model\": 3}");
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(matches!(error, DataError::TokenizerMalformed { .. }), "{error}");
    file(&folder, "tokenizer.json", TOKENIZER);
    file(&folder, "tokenizer_config.json", "{");
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(matches!(error, DataError::TokenizerMalformed { .. }), "{error}");
}

#[test]
fn a_text_without_tokens_for_it_is_an_error() {
    let folder = folder();
    file(&folder, "tokenizer.json", TOKENIZER);
    let path = file(&folder, "1.txt", "a unheard");
    let error = read_with(&[path], &Tokenizer::open(folder.path()).unwrap()).unwrap_err();
    assert!(matches!(error, DataError::NotEncodable { .. }), "{error}");
}

#[test]
fn unreadable_paths_are_errors_of_their_own() {
    let folder = folder();
    let error = read(&[folder.path().join("none.txt")]).unwrap_err();
    assert!(matches!(&error, DataError::NotFound { path } if path.ends_with("none.txt")), "{error}");
    let error = read(&[folder.path().to_owned()]).unwrap_err();
    assert!(matches!(error, DataError::IsDirectory { .. }), "{error}");
    let error = read(&[file(&folder, "f", "x").join("below")]).unwrap_err();
    assert!(matches!(error, DataError::Unreadable { .. }), "{error}");
}

#[test]
fn invalid_utf8_is_named_by_its_offset() {
    let folder = folder();
    let error = read(&[file(&folder, "a.txt", b"abc\xFFd")]).unwrap_err();
    assert!(matches!(error, DataError::InvalidUtf8 { offset: 3, .. }), "{error}");
    let error = read(&[file(&folder, "a.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xFF\"}")]).unwrap_err();
    assert!(matches!(error, DataError::InvalidUtf8 { offset: 24, .. }), "{error}");
}

#[test]
fn a_bad_line_of_jsonl_is_named_by_its_number() {
    let folder = folder();
    let second =
        |line: &str| read(&[file(&folder, "a.jsonl", format!("{{\"text\": \"a\"}}\n{line}\n"))]).unwrap_err();
    let error = second("{\"text\": ");
    assert!(matches!(error, DataError::MalformedJson { line: 2, .. }), "{error}");
    for line in ["{}", "[\"text\"]", "3"] {
        let error = second(line);
        assert!(matches!(error, DataError::TextMissing { line: 2, .. }), "{error}");
    }
    for line in ["{\"text\": 3}", "{\"text\": null}"] {
        let error = second(line);
        assert!(matches!(error, DataError::TextNotString { line: 2, .. }), "{error}");
    }
}

#[test]
fn no_tokens_and_too_few_tokens_are_errors() {
    let folder = folder();
    for paths in
        [vec![], vec![file(&folder, "a.txt", "")], vec![file(&folder, "a.jsonl", "\n{\"text\": \"\"}")]]
    {
        let error = read(&paths).unwrap_err();
        assert!(matches!(error, DataError::Empty { .. }), "{error}");
    }
    let corpus = || read(&[file(&folder, "a.txt", "12345678")]).unwrap();
    let bind = |seq| Batches::new(corpus(), 256, BatchShape { batch: 1, seq }, 0);
    assert!(bind(7).is_ok());
    let error = bind(8).unwrap_err();
    assert!(matches!(error, DataError::TooShort { found: 8, needed: 9, .. }), "{error}");
    assert!(matches!(bind(0).unwrap_err(), DataError::EmptyBatch { .. }));
    assert!(bind(usize::MAX).is_err());
}

#[test]
fn a_token_without_an_embedding_is_an_error() {
    let folder = folder();
    let path = file(&folder, "a.txt", "ab\u{7f}");
    let bind = |vocab| {
        Batches::new(read(std::slice::from_ref(&path)).unwrap(), vocab, BatchShape { batch: 1, seq: 2 }, 0)
    };
    assert!(bind(128).is_ok());
    let error = bind(127).unwrap_err();
    let expected = matches!(error, DataError::TokenOutOfRange { token: 127, position: 2, vocab: 127, .. });
    assert!(expected, "{error}");
}

/// A corpus whose token at position `i` is `i`.
fn counting(length: u8) -> Corpus {
    let folder = folder();
    let text: Vec<u8> = (0..length).collect();
    read(&[file(&folder, "a.txt", text)]).unwrap()
}

fn draw(batches: &Batches, step: u64, micro: usize) -> (Vec<u32>, Vec<u32>) {
    let (mut inputs, mut targets) = (vec![9; 3], vec![9; 5]);
    batches.fill(step, micro, &mut inputs, &mut targets);
    (inputs, targets)
}

#[test]
fn every_window_is_reached_the_last_one_too() {
    let batches = Batches::new(counting(20), 256, BatchShape { batch: 4, seq: 5 }, 1).unwrap();
    let starts: BTreeSet<u32> =
        (0..100).flat_map(|step| draw(&batches, step, 0).0.into_iter().step_by(5)).collect();
    assert_eq!(starts, (0..=14).collect());
}

#[test]
fn seed_step_and_micro_batch_each_change_the_draw() {
    let bind = |seed| Batches::new(counting(100), 256, BatchShape { batch: 16, seq: 1 }, seed).unwrap();
    let draws = [draw(&bind(0), 0, 0), draw(&bind(1), 0, 0), draw(&bind(0), 1, 0), draw(&bind(0), 0, 1)];
    assert_eq!(draws.iter().collect::<BTreeSet<_>>().len(), draws.len());
}

proptest! {
    #[test]
    fn a_batch_is_a_pure_function_of_seed_step_and_micro_batch(
        length in 2u8..=127, seq in 1usize..130, batch in 1usize..9, seed: u64, step: u64, micro in 0usize..1000,
    ) {
        let seq = 1 + seq % (usize::from(length) - 1);
        let bind = || Batches::new(counting(length), 256, BatchShape { batch, seq }, seed).unwrap();
        let batches = bind();
        let (inputs, targets) = draw(&batches, step, micro);
        prop_assert_eq!((inputs.len(), targets.len()), (batch * seq, batch * seq));
        draw(&batches, step.wrapping_add(1), micro);
        prop_assert_eq!(&draw(&batches, step, micro), &(inputs.clone(), targets.clone()));
        prop_assert_eq!(&draw(&bind(), step, micro), &(inputs.clone(), targets.clone()));
        for (input, target) in inputs.chunks(seq).zip(targets.chunks(seq)) {
            prop_assert!(input.iter().zip(target).all(|(input, target)| input + 1 == *target));
            prop_assert!(input.windows(2).all(|pair| pair[0] + 1 == pair[1]));
            prop_assert!(target[seq - 1] < u32::from(length));
        }
    }
}

#[test]
fn a_corpus_names_its_source() {
    let folder = folder();
    let paths = ["a", "b", "c"].map(|name| file(&folder, name, "x"));
    let corpus = read(&paths).unwrap();
    assert!(corpus.source().ends_with("a and 2 more"), "{}", corpus.source());
    assert!(Path::new(read(&paths[..1]).unwrap().source()).ends_with("a"));
}
