//! Headers of safetensors files.
//!
//! A file is a little-endian `u64` header length, that many bytes of JSON, and the tensors' bytes without a gap.
//! [`read`] takes the first two and holds them against the length of the file; the tensors' bytes are never
//! touched. [`write`] makes a header padded so that the tensors start at a multiple of [`DATA_ALIGNMENT`].

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};

use super::plan::TensorPlan;
use super::{Action, CheckpointError};

/// Length of the number that precedes the header, in bytes.
const PREFIX_BYTES: u64 = size_of::<u64>() as u64;

/// Longest header that the format allows, in bytes.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Tensors of a file written here start at a multiple of this, in bytes, so that they can be read directly.
pub(super) const DATA_ALIGNMENT: u64 = 4096;

/// A header that fits its file.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    /// Offset of the first tensor from the start of the file, in bytes.
    pub(super) data_start: u64,
}

/// Reads and checks the header of a file.
pub(super) fn read(file: &File, path: &Path) -> Result<Header, CheckpointError> {
    let malformed = |reason: String| CheckpointError::Header { path: path.to_owned(), reason };
    let found = file.metadata().map_err(Action::Open.failed(path))?.len();
    if found < PREFIX_BYTES {
        return Err(malformed(format!("the file has {found} bytes, too few for a header")));
    }
    let mut prefix = [0; PREFIX_BYTES as usize];
    file.read_exact_at(&mut prefix, 0).map_err(Action::Read.failed(path))?;
    let length = u64::from_le_bytes(prefix);
    if length > HEADER_BYTES_MAX {
        return Err(malformed(format!(
            "its length is given as {length}, at most {HEADER_BYTES_MAX} is allowed"
        )));
    }
    let data_start = PREFIX_BYTES + length;
    if data_start > found {
        return Err(CheckpointError::Length { path: path.to_owned(), expected: data_start, found });
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, PREFIX_BYTES).map_err(Action::Read.failed(path))?;
    let metadata: Metadata = serde_json::from_slice(&text).map_err(|e| malformed(e.to_string()))?;
    // The tensors follow each other without a gap or overlap: parsing has made sure of that.
    let expected = data_start.saturating_add(metadata.data_len() as u64);
    if expected != found {
        return Err(CheckpointError::Length { path: path.to_owned(), expected, found });
    }
    Ok(Header { metadata, data_start })
}

/// The first bytes of a file that holds these tensors, up to the first of them; and the length of all, in bytes. The
/// header says `note`, by name, or that the file is a model's.
pub(super) fn write(
    tensors: &[TensorPlan],
    note: Option<&(&'static str, String)>,
) -> Result<(Vec<u8>, u64), SafeTensorError> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes() as usize;
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        (tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    // One thing is said, because the order of several would differ from file to file. Releases of transformers before 5
    // refuse a model's file that does not say its format.
    let said = match note {
        Some((name, text)) => HashMap::from([((*name).to_owned(), text.clone())]),
        None => HashMap::from([("format".to_owned(), "pt".to_owned())]),
    };
    let metadata = Metadata::new(Some(said), infos.collect())?;
    let text = serde_json::to_vec(&metadata)?;
    let data_start = (PREFIX_BYTES + text.len() as u64).next_multiple_of(DATA_ALIGNMENT);
    let mut bytes = Vec::with_capacity(data_start as usize);
    bytes.extend_from_slice(&(data_start - PREFIX_BYTES).to_le_bytes());
    bytes.extend_from_slice(&text);
    // The format pads with spaces, which JSON ignores.
    bytes.resize(data_start as usize, b' ');
    Ok((bytes, end as u64))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use safetensors::Dtype;

    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> TensorPlan {
        TensorPlan { name: name.to_owned(), shape: shape.to_vec(), dtype: Dtype::F32 }
    }

    fn read_bytes(bytes: &[u8]) -> Result<Header, CheckpointError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        read(&file, Path::new("m.safetensors"))
    }

    /// A file of two tensors, `[2, 3]` and `[4]`.
    fn sound() -> Vec<u8> {
        let (mut bytes, data) = write(&[tensor("b", &[2, 3]), tensor("a", &[4])], None).unwrap();
        bytes.resize(bytes.len() + data as usize, 0);
        bytes
    }

    fn with_header(text: &str, data: usize) -> Vec<u8> {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn a_written_header_reads_back_and_the_data_is_aligned() {
        let header = read_bytes(&sound()).unwrap();
        assert!(header.data_start.is_multiple_of(DATA_ALIGNMENT));
        assert_eq!(header.metadata.info("b").unwrap().data_offsets, (0, 24));
        assert_eq!(header.metadata.info("a").unwrap().shape, [4]);
    }

    #[test]
    fn a_file_of_another_length_than_its_header_says_is_refused() {
        let sound = sound();
        let mut longer = sound.clone();
        longer.push(0);
        for bytes in [&sound[..sound.len() - 1], &sound[..4096], &sound[..100], &longer] {
            let error = read_bytes(bytes).unwrap_err();
            assert!(matches!(error, CheckpointError::Length { .. }), "{error}");
        }
    }

    #[test]
    fn malformed_headers_are_errors() {
        let tensor = |dtype: &str, shape: &str, start: u64, end: u64| {
            format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
        };
        let one = |tensor: String| with_header(&format!(r#"{{"t":{tensor}}}"#), 16);
        let mut endless = sound();
        endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        for bytes in [
            vec![],
            vec![0; 7],
            endless,
            with_header("", 0),
            with_header("[]", 0),
            with_header("{\"t\": 3}", 0),
            with_header(&"[".repeat(100_000), 0),
            one(tensor("F33", "[4]", 0, 16)),
            one(tensor("F32", "[5]", 0, 16)),
            one(tensor("F32", "[-4]", 0, 16)),
            one(tensor("F32", "[4]", 16, 0)),
            one(tensor("F32", "[3]", 4, 16)),
            one(tensor("F32", "[4294967296, 4294967296, 4294967296]", 0, 16)),
            with_header(
                &format!(r#"{{"t":{},"u":{}}}"#, tensor("F32", "[3]", 0, 12), tensor("F32", "[2]", 8, 16)),
                16,
            ),
        ] {
            let error = read_bytes(&bytes).unwrap_err();
            assert!(matches!(error, CheckpointError::Header { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_mutated_header_never_panics(
            changes in prop::collection::vec((0usize..400, any::<u8>()), 1..8),
            length in prop::option::of(0usize..5000),
        ) {
            let mut bytes = sound();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(length.unwrap_or(bytes.len()));
            if let Ok(header) = read_bytes(&bytes) {
                prop_assert_eq!(header.data_start + header.metadata.data_len() as u64, bytes.len() as u64);
            }
        }

        #[test]
        fn any_text_as_header_never_panics(text in "\\PC{0,200}", data in 0usize..64) {
            drop(read_bytes(&with_header(&text, data)));
        }
    }
}
