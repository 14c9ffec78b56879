//! The manifest: what the extents of the data file mean.
//!
//! One line of header, then JSON:
//!
//! ```text
//! overspill manifest 2 0123456789abcdef
//! {"store":17,"generation":7,"capacity_bytes":16777216,"bytes_written":9437184,"meta":{"step":7},
//!  "stripe_bytes":1048576,"lanes":[{"file":"data","weight":1}],
//!  "tensors":[{"name":"weights/layer 0/0","offset":0,"length":1048576,"checksum":81985529216486895}]}
//! ```
//!
//! (The body is on one line.) Offsets are those of one space of bytes that is dealt to the data files in stripes, in
//! proportion to their weights and in their order; `overspill_io::Stripes` says which byte is where. With one data
//! file, offsets are those of the file.
//!
//! The header names the format's version and the XXH3-64 checksum (16 hexadecimal digits) of everything after the
//! header's newline. A reader refuses a version that it does not know before it looks at the body. Version 1 had the
//! tensors only. A snapshot is a manifest under another name. Writing is a matter of [`crate::Store::commit`]: aside,
//! synced, renamed.

use overspill_io::Stripes;
use serde::{Deserialize, Serialize};

use crate::extent::{EXTENT_ALIGNMENT, Extent};

/// The version this code writes; it reads this one and all before it.
pub const VERSION: u32 = 2;

/// Levels of arrays and objects that [`Manifest::meta`] may have; whoever reads JSON gives up at 128.
pub(crate) const META_LEVELS_MAX: usize = 64;

pub(crate) const MAGIC: &str = "overspill manifest";

/// One generation of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Tells the store from others; its volumes know it too. 0 if its format did not know.
    pub store: u64,
    /// Number of the commit that made it, from 1; 0 if its format did not know.
    pub generation: u64,
    /// Bytes of the space that the data files make up; 0 if its format did not know.
    pub capacity_bytes: u64,
    /// Bytes written to storage for all tensors up to this generation, in all runs that committed it.
    pub bytes_written: u64,
    /// What the owner of the tensors wants to find with them, such as the number of the step.
    pub meta: serde_json::Value,
    /// Length of a stripe, in bytes.
    pub stripe_bytes: usize,
    /// The data files, to which stripes are dealt in turn.
    pub lanes: Vec<LaneRecord>,
    /// The tensors, in the order of their creation.
    pub tensors: Vec<TensorRecord>,
}

/// One data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneRecord {
    /// Its name, if it lies beside the manifest, or else its absolute path. Bytes that are no UTF-8 are replaced, and
    /// disks may be mounted elsewhere later: what is found there is compared with the store's label.
    pub file: String,
    /// Its share of the stripes.
    pub weight: u32,
}

/// Where one tensor is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRecord {
    /// Unique within the store.
    pub name: String,
    /// First byte in the space of the data files.
    pub offset: u64,
    /// Length of the tensor, in bytes; its extent is this rounded up to the alignment.
    pub length: u64,
    /// XXH3-64 of the `length` bytes.
    pub checksum: u64,
}

/// The body of the first format.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Version1 {
    tensors: Vec<TensorRecord>,
}

/// Why a manifest was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The first line is not a manifest's.
    #[error("not a manifest")]
    NotAManifest,
    /// The first line is not a manifest's any more.
    #[error("damaged: its first line is not a manifest's")]
    Header,
    /// Written by another version of the format.
    #[error("format version {found} is not known here; {VERSION} is the newest that is")]
    UnknownVersion {
        /// The version in the header.
        found: u32,
    },
    /// The checksum in the header is not that of the body.
    #[error("damaged: the checksum is {found:016x} and should be {expected:016x}")]
    Damaged {
        /// Checksum in the header.
        expected: u64,
        /// Checksum of the body.
        found: u64,
    },
    /// The body is not what this version writes.
    #[error("malformed: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
}

impl Default for Manifest {
    /// Nothing yet, in one data file.
    fn default() -> Self {
        Self {
            store: 0,
            generation: 0,
            capacity_bytes: 0,
            bytes_written: 0,
            meta: serde_json::Value::Null,
            stripe_bytes: Stripes::BYTES_DEFAULT,
            lanes: vec![LaneRecord { file: "data".to_owned(), weight: 1 }],
            tensors: Vec::new(),
        }
    }
}

impl Manifest {
    /// The bytes of the manifest file.
    pub fn encode(&self) -> Vec<u8> {
        // The header is as long whatever the checksum is, so the body is written where it stays.
        let mut file = (Self::header(VERSION, 0) + "\n").into_bytes();
        let body = file.len();
        serde_json::to_writer(&mut file, self).expect("numbers and strings always serialize");
        let header = Self::header(VERSION, checksum(&file[body..]));
        file[..header.len()].copy_from_slice(header.as_bytes());
        file
    }

    /// Reads the bytes of a manifest file.
    ///
    /// # Errors
    /// [`ManifestError`] for anything that [`Manifest::encode`] does not write, overlapping extents included.
    pub fn decode(file: &[u8]) -> Result<Self, ManifestError> {
        let newline =
            file.iter().take(HEADER_MAX).position(|&b| b == b'\n').ok_or(ManifestError::NotAManifest)?;
        let (header, body) = (&file[..newline], &file[newline + 1..]);
        let header = std::str::from_utf8(header).map_err(|_| ManifestError::NotAManifest)?;
        let mut fields =
            header.strip_prefix(MAGIC).ok_or(ManifestError::NotAManifest)?.split_ascii_whitespace();
        let version = fields.next().and_then(|v| v.parse().ok()).ok_or(ManifestError::NotAManifest)?;
        if !(1..=VERSION).contains(&version) {
            return Err(ManifestError::UnknownVersion { found: version });
        }
        let expected =
            fields.next().and_then(|c| u64::from_str_radix(c, 16).ok()).ok_or(ManifestError::NotAManifest)?;
        if header != Self::header(version, expected) {
            return Err(ManifestError::NotAManifest);
        }
        let found = checksum(body);
        if found != expected {
            return Err(ManifestError::Damaged { expected, found });
        }
        let malformed = |reason| ManifestError::Malformed { reason };
        let parsed = match version {
            1 => serde_json::from_slice(body).map(|Version1 { tensors }| Self { tensors, ..Self::default() }),
            _ => serde_json::from_slice(body),
        };
        let manifest: Self = parsed.map_err(|e| malformed(e.to_string()))?;
        manifest.check().map_err(malformed)?;
        Ok(manifest)
    }

    /// Bytes that the data files had together at least.
    pub(crate) fn capacity(&self) -> u64 {
        let ends = self.tensors.iter().filter_map(TensorRecord::extent).map(Extent::end);
        ends.fold(self.capacity_bytes, u64::max)
    }

    /// The first line, of which there is exactly one form.
    fn header(version: u32, checksum: u64) -> String {
        format!("{MAGIC} {version} {checksum:016x}")
    }

    /// Stripes can be dealt, names are unique, extents aligned and disjoint.
    fn check(&self) -> Result<(), String> {
        let weights: Vec<u32> = self.lanes.iter().map(|lane| lane.weight).collect();
        Stripes::new(self.stripe_bytes, &weights).map_err(|error| error.to_string())?;
        let capacity = self.capacity();
        if i64::try_from(capacity).is_err() || !capacity.is_multiple_of(EXTENT_ALIGNMENT) {
            return Err(format!("no data files have {capacity} bytes"));
        }
        let mut names: Vec<_> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("tensor {} is listed twice", twice[0]));
        }
        let mut extents = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            let extent =
                tensor.extent().ok_or_else(|| format!("tensor {} has an impossible extent", tensor.name))?;
            extents.push((extent, tensor.name.as_str()));
        }
        extents.sort_unstable();
        match extents.windows(2).find(|pair| pair[0].0.end() > pair[1].0.offset) {
            Some(pair) => Err(format!("tensors {} and {} overlap", pair[0].1, pair[1].1)),
            None => Ok(()),
        }
    }
}

impl TensorRecord {
    /// The tensor's extent; `None` when it is misaligned or leaves the address range.
    pub(crate) fn extent(&self) -> Option<Extent> {
        let length = self.length.max(1).checked_next_multiple_of(EXTENT_ALIGNMENT)?;
        self.offset.checked_add(length)?;
        self.offset.is_multiple_of(EXTENT_ALIGNMENT).then_some(Extent { offset: self.offset, length })
    }
}

/// Whether there are more levels of arrays and objects than `levels`.
pub(crate) fn is_deeper(value: &serde_json::Value, levels: usize) -> bool {
    let Some(below) = levels.checked_sub(1) else { return value.is_array() || value.is_object() };
    match value {
        serde_json::Value::Array(values) => values.iter().any(|value| is_deeper(value, below)),
        serde_json::Value::Object(fields) => fields.values().any(|value| is_deeper(value, below)),
        _ => false,
    }
}

/// Longest header that is looked at, in bytes.
pub(crate) const HEADER_MAX: usize = 128;

/// The checksum of everything overspill stores: XXH3-64, seed 0.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(name: &str, offset: u64, length: u64) -> TensorRecord {
        TensorRecord { name: name.to_owned(), offset, length, checksum: offset ^ length }
    }

    fn manifest(tensors: Vec<TensorRecord>) -> Manifest {
        let lane = |file: &str, weight| LaneRecord { file: file.to_owned(), weight };
        let lanes = vec![lane("data", 3), lane("/disk/data", 1)];
        Manifest { stripe_bytes: 1 << 20, lanes, tensors, ..Manifest::default() }
    }

    fn sealed(body: &str) -> Vec<u8> {
        format!("{}\n{body}", Manifest::header(VERSION, checksum(body.as_bytes()))).into_bytes()
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_equal(lengths in prop::collection::vec((1u64..100_000, any::<u64>(), ".{0,8}"), 0..20)) {
            let mut offset = 0;
            let tensors = lengths.into_iter().enumerate().map(|(i, (length, checksum, name))| {
                let record = TensorRecord { name: format!("{i}/{name}"), offset, length, checksum };
                offset += length.next_multiple_of(EXTENT_ALIGNMENT);
                record
            }).collect();
            let meta = serde_json::json!({ "step": offset, "name": [null, 1.5, "ü"] });
            let manifest = Manifest { generation: offset, capacity_bytes: 2 * offset, bytes_written: 1, meta, ..manifest(tensors) };
            prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
        }

        #[test]
        fn any_flipped_bit_is_refused(position in any::<prop::sample::Index>(), bit in 0u8..8) {
            let manifest = manifest(vec![record("a", 0, 10), record("b", EXTENT_ALIGNMENT, 5000)]);
            let mut file = manifest.encode();
            let at = position.index(file.len());
            file[at] ^= 1 << bit;
            prop_assert!(Manifest::decode(&file).is_err());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(file in prop::collection::vec(any::<u8>(), 0..300), body in ".{0,200}") {
            let _unused = Manifest::decode(&file);
            prop_assert!(Manifest::decode(&sealed(&body)).is_err() || body.contains("tensors"));
        }
    }

    #[test]
    fn a_newer_version_is_refused_before_its_body_is_read() {
        let file = format!("{MAGIC} 3 whatever comes\nbinary?");
        assert_eq!(Manifest::decode(file.as_bytes()), Err(ManifestError::UnknownVersion { found: 3 }));
        let file = format!("{MAGIC} 0 0000000000000000\n");
        assert_eq!(Manifest::decode(file.as_bytes()), Err(ManifestError::UnknownVersion { found: 0 }));
    }

    #[test]
    fn stripes_that_cannot_be_dealt_are_refused() {
        let sound = manifest(Vec::new());
        let lane = |weight| LaneRecord { file: "data".to_owned(), weight };
        for wrong in [
            Manifest { stripe_bytes: 1000, ..sound.clone() },
            Manifest { lanes: Vec::new(), ..sound.clone() },
            Manifest { lanes: vec![lane(0)], ..sound.clone() },
            Manifest { lanes: vec![lane(u32::MAX), lane(1)], ..sound.clone() },
        ] {
            assert!(matches!(Manifest::decode(&wrong.encode()), Err(ManifestError::Malformed { .. })));
        }
        assert_eq!(Manifest::decode(&sound.encode()), Ok(sound));
    }

    #[test]
    fn what_may_go_with_a_commit_is_read_again_however_it_is_nested() {
        let mut meta = serde_json::json!(1);
        for level in 0..=META_LEVELS_MAX {
            assert_eq!(is_deeper(&meta, META_LEVELS_MAX), level > META_LEVELS_MAX);
            let manifest = Manifest { meta: meta.clone(), ..manifest(Vec::new()) };
            assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
            meta = if level % 2 == 0 {
                serde_json::json!([meta])
            } else {
                serde_json::json!({ "deeper": meta })
            };
        }
        assert!(is_deeper(&meta, META_LEVELS_MAX));
    }

    #[test]
    fn the_first_format_is_still_read() {
        let body = r#"{"tensors":[{"name":"a","offset":0,"length":3,"checksum":7}]}"#;
        let file = format!("{}\n{body}", Manifest::header(1, checksum(body.as_bytes())));
        let tensors = vec![TensorRecord { name: "a".to_owned(), offset: 0, length: 3, checksum: 7 }];
        let expected = Manifest { tensors, ..Manifest::default() };
        assert_eq!(Manifest::decode(file.as_bytes()), Ok(expected));
    }

    #[test]
    fn overlaps_duplicates_and_impossible_extents_are_refused() {
        for tensors in [
            vec![record("a", 0, 5000), record("b", EXTENT_ALIGNMENT, 1)],
            vec![record("a", 0, 1), record("a", EXTENT_ALIGNMENT, 1)],
            vec![record("a", 1, 1)],
            vec![record("a", 0, u64::MAX)],
        ] {
            let file = manifest(tensors).encode();
            assert!(matches!(Manifest::decode(&file), Err(ManifestError::Malformed { .. })));
        }
        assert!(matches!(Manifest::decode(b"ELF"), Err(ManifestError::NotAManifest)));
        assert!(matches!(Manifest::decode(&sealed("{}")), Err(ManifestError::Malformed { .. })));
    }
}
