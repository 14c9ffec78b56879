//! Tensors in the safetensors files of a folder, read at their places.
//!
//! Opening parses the index and every header, and holds each against the length of its file. Elements are then read from
//! any of a tensor's on: `f32` straight into the caller's memory, half types through a buffer of [`PIECE_BYTES`].

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;

use super::plan::{self, Stem};
use super::{Action, CheckpointError, header};
use crate::regular;

/// Half types are read and widened this many bytes at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Longest `config.json` or index that is read, in bytes.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Bytes of an element of BF16 and F16.
const HALF_BYTES: usize = 2;

/// The tensors of a folder.
#[derive(Debug)]
pub(super) struct Tensors {
    folder: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Tensor>,
}

/// A file of tensors.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    note: Option<String>,
}

/// A tensor as its header describes it.
#[derive(Debug)]
pub(super) struct Tensor {
    /// Index of the shard that holds it.
    shard: usize,
    pub(super) dtype: Dtype,
    shape: Vec<usize>,
    /// Of its first byte, from the start of the file.
    offset: u64,
}

impl Tensor {
    /// Its length, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        plan::bytes(&self.shape, self.dtype)
    }
}

impl Tensors {
    /// Opens the files of this stem; of each header, what it says under the name `note` is kept.
    pub(super) fn open(folder: &Path, stem: Stem, note: &str) -> Result<Self, CheckpointError> {
        let mut tensors = Self { folder: folder.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        let (single, index) = (folder.join(stem.single()), folder.join(stem.index()));
        if is_there(&single)? {
            tensors.add_shard(single, note)?;
        } else if is_there(&index)? {
            tensors.add_indexed(&index, note)?;
        } else {
            let (single, index) = (stem.single(), stem.index());
            return Err(CheckpointError::NoWeights { folder: folder.to_owned(), single, index });
        }
        Ok(tensors)
    }

    /// Finds a tensor by name.
    pub(super) fn get(&self, name: &str) -> Result<&Tensor, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            tensor: name.to_owned(),
            path: self.folder.clone(),
        })
    }

    /// Finds a tensor by name and checks its shape.
    pub(super) fn find(&self, name: &str, shape: &[usize]) -> Result<&Tensor, CheckpointError> {
        let tensor = self.get(name)?;
        if tensor.shape != shape {
            return Err(CheckpointError::WrongShape {
                tensor: name.to_owned(),
                path: self.path(tensor).to_owned(),
                expected: shape.to_vec(),
                found: tensor.shape.clone(),
            });
        }
        Ok(tensor)
    }

    /// The file that holds a tensor.
    pub(super) fn path(&self, tensor: &Tensor) -> &Path {
        &self.shards[tensor.shard].path
    }

    /// Where in that file its bytes begin, and where they end.
    #[cfg(test)]
    pub(super) fn place_in_file(&self, tensor: &Tensor) -> (usize, usize) {
        (tensor.offset as usize, (tensor.offset + tensor.bytes()) as usize)
    }

    /// All tensors, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// What the header of each file says under the name that was asked for.
    pub(super) fn notes(&self) -> impl Iterator<Item = (&Path, Option<&str>)> {
        self.shards.iter().map(|shard| (&*shard.path, shard.note.as_deref()))
    }

    /// Reads bytes of a tensor, from `start` on; there are as many.
    pub(super) fn read_bytes(
        &self,
        tensor: &Tensor,
        start: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let Shard { path, file, .. } = &self.shards[tensor.shard];
        file.read_exact_at(out, tensor.offset + start).map_err(Action::Read.failed(path))
    }

    /// Reads elements of a tensor, from `start` on; there are as many.
    pub(super) fn read(&self, tensor: &Tensor, start: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        if tensor.dtype == Dtype::F32 {
            let start = (start * size_of::<f32>()) as u64;
            return self.read_bytes(tensor, start, bytemuck::cast_slice_mut(out));
        }
        let mut piece = vec![0; PIECE_BYTES.min(out.len() * HALF_BYTES)];
        let mut start = (start * HALF_BYTES) as u64;
        for out in out.chunks_mut(PIECE_BYTES / HALF_BYTES) {
            let bytes = &mut piece[..out.len() * HALF_BYTES];
            self.read_bytes(tensor, start, bytes)?;
            let widened = match tensor.dtype {
                Dtype::BF16 => overspill_optim::widen_bf16(bytes, out),
                _ => overspill_optim::widen_f16(bytes, out),
            };
            widened.expect("the piece was cut to the output's length");
            start += bytes.len() as u64;
        }
        Ok(())
    }

    /// Opens the shards that an index lists and checks that each holds what the index says.
    fn add_indexed(&mut self, path: &Path, note: &str) -> Result<(), CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let malformed = |reason: String| CheckpointError::Index { path: path.to_owned(), reason };
        let index: Index = serde_json::from_str(&read_text(path)?).map_err(|e| malformed(e.to_string()))?;
        if index.weight_map.is_empty() {
            return Err(malformed("weight_map is empty".to_owned()));
        }
        for name in index.weight_map.values().collect::<BTreeSet<_>>() {
            if !is_plain_file_name(name) {
                return Err(CheckpointError::ShardName { path: path.to_owned(), name: name.clone() });
            }
            self.add_shard(self.folder.join(name), note)?;
        }
        for (tensor, name) in index.weight_map {
            let listed = self.folder.join(name);
            if self.tensors.get(&tensor).is_none_or(|found| self.shards[found.shard].path != listed) {
                return Err(CheckpointError::MissingTensor { tensor, path: listed });
            }
        }
        Ok(())
    }

    /// Opens a file of tensors and takes them in.
    fn add_shard(&mut self, path: PathBuf, note: &str) -> Result<(), CheckpointError> {
        let file = open_regular(&path)?;
        let header = header::read(&file, &path)?;
        let shard = self.shards.len();
        let note = header.metadata.metadata().as_ref().and_then(|said| said.get(note)).cloned();
        self.shards.push(Shard { path, file, note });
        for (name, info) in header.metadata.tensors() {
            match self.tensors.entry(name) {
                Entry::Occupied(earlier) => {
                    return Err(CheckpointError::DuplicateTensor {
                        tensor: earlier.key().clone(),
                        first: self.shards[earlier.get().shard].path.clone(),
                        second: self.shards[shard].path.clone(),
                    });
                }
                Entry::Vacant(place) => place.insert(Tensor {
                    shard,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    offset: header.data_start + info.data_offsets.0 as u64,
                }),
            };
        }
        Ok(())
    }
}

/// Whether joining the name to a folder names a file of that folder.
fn is_plain_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

pub(super) fn is_there(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(Action::Open.failed(path))
}

/// Opens a file that has a length and places in it.
pub(super) fn open_regular(path: &Path) -> Result<File, CheckpointError> {
    let file = regular::open(path).map_err(Action::Open.failed(path))?;
    file.ok_or_else(|| CheckpointError::NotAFile { path: path.to_owned() })
}

pub(super) fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let file = open_regular(path)?;
    let found = file.metadata().map_err(Action::Open.failed(path))?.len();
    if found > TEXT_BYTES_MAX {
        return Err(CheckpointError::TooLong { path: path.to_owned(), found, limit: TEXT_BYTES_MAX });
    }
    io::read_to_string(file).map_err(Action::Read.failed(path))
}
