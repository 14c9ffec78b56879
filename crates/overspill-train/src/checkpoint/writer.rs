//! Writing a model's folder.
//!
//! [`CheckpointWriter::create`] knows every header before the first weight: it makes all files, takes their space
//! on the file system and writes the headers. Units then come in the layout's order and are appended, and
//! [`CheckpointWriter::finish`] gives the folder its name. Dropped before that, the writer removes what it made.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, FallocateFlags};
use rustix::io::Errno;

use super::plan::{self, ShardPlan};
use super::staging::{self, Staging};
use super::{Action, CONFIG, Checkpoint, CheckpointError, INDEX, header};
use crate::config::ModelConfig;
use crate::data::{Tokenizer, byte_level_files};
use crate::layout::{ModelLayout, UnitLayout};

/// The usual limit for a file of weights, in bytes.
pub const SHARD_BYTES_MAX: u64 = 4 << 30;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// What goes with a model from the folder it was read from, where it is there.
const COMPANIONS: [&str; 5] =
    [TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", "generation_config.json"];

/// A model on its way into a Hugging Face folder.
#[derive(Debug)]
pub struct CheckpointWriter {
    /// Parameters that have not come yet, in order, each with the index of its shard.
    awaited: VecDeque<(String, usize)>,
    shards: Vec<Shard>,
    staging: Staging,
}

/// A file of weights and how far it is written.
#[derive(Debug)]
struct Shard {
    file: File,
    path: PathBuf,
    written: u64,
    length: u64,
}

impl CheckpointWriter {
    /// Checks that a folder could be begun at `target`, and makes nothing.
    ///
    /// # Errors
    /// [`CheckpointError::NotEmpty`], [`CheckpointError::NoParent`], [`CheckpointError::MountPoint`],
    /// [`CheckpointError::Io`].
    pub fn check_destination(target: &Path) -> Result<(), CheckpointError> {
        let resolved = staging::resolve(target)?;
        let parent = staging::parent(&resolved);
        rustix::fs::access(parent, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|errno| Action::Write.failed(parent)(errno.into()))
    }

    /// Begins the folder `target`, which must not be there or be empty, for weights as `f32` in files of at most
    /// [`SHARD_BYTES_MAX`].
    ///
    /// The tokenizer's files are copied from where it was read, or made for [`Tokenizer::Bytes`]. Until
    /// [`CheckpointWriter::finish`] everything is in a hidden folder beside `target`, and its full size is taken.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::check_destination`], and [`CheckpointError::NoSpace`]; nothing is left behind.
    pub fn create(
        target: &Path,
        config: &ModelConfig,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
    ) -> Result<Self, CheckpointError> {
        Self::create_sharded(target, config, layout, tokenizer, SHARD_BYTES_MAX)
    }

    /// As [`CheckpointWriter::create`], for a model that was read from a folder: its `config.json` goes along with
    /// every field, and only the dtype of the weights becomes `float32`.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::create`].
    pub fn create_from(
        target: &Path,
        checkpoint: &Checkpoint,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
    ) -> Result<Self, CheckpointError> {
        Self::begin(target, &checkpoint.config_json(), layout, tokenizer, SHARD_BYTES_MAX)
    }

    /// As [`CheckpointWriter::create`], with another limit for a file's tensors, in bytes.
    ///
    /// # Errors
    /// Those of [`CheckpointWriter::create`].
    pub fn create_sharded(
        target: &Path,
        config: &ModelConfig,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
        shard_bytes_max: u64,
    ) -> Result<Self, CheckpointError> {
        Self::begin(target, &config.to_json(), layout, tokenizer, shard_bytes_max)
    }

    fn begin(
        target: &Path,
        config_json: &str,
        layout: &ModelLayout,
        tokenizer: &Tokenizer,
        shard_bytes_max: u64,
    ) -> Result<Self, CheckpointError> {
        let mut staging = Staging::begin(target)?;
        write_file(&mut staging, CONFIG, config_json.as_bytes())?;
        match tokenizer.folder() {
            Some(folder) => copy_companions(&mut staging, folder)?,
            None => {
                let files = byte_level_files();
                write_file(&mut staging, TOKENIZER, files.tokenizer.as_bytes())?;
                write_file(&mut staging, TOKENIZER_CONFIG, files.config.as_bytes())?;
            }
        }
        let plans = plan::shards(layout, shard_bytes_max);
        if let Some(index) = plan::index(&plans) {
            write_file(&mut staging, INDEX, index.as_bytes())?;
        }
        let shards: Result<Vec<_>, _> = plans.iter().map(|plan| Shard::begin(&mut staging, plan)).collect();
        let shards = shards?;
        let numbered = plans.into_iter().enumerate();
        let awaited =
            numbered.flat_map(|(shard, plan)| plan.parameters.into_iter().map(move |p| (p.name, shard)));
        Ok(Self { awaited: awaited.collect(), shards, staging })
    }

    /// Appends the weights of the next unit; padding is left out.
    ///
    /// # Errors
    /// [`CheckpointError::NoSpace`], [`CheckpointError::Io`].
    ///
    /// # Panics
    /// When the unit is not the next one of the layout, or `weights` is not as long as the unit with its padding.
    pub fn write_unit(&mut self, unit: &UnitLayout, weights: &[f32]) -> Result<(), CheckpointError> {
        assert_eq!(weights.len(), unit.padded, "length of {}", unit.unit);
        for parameter in &unit.parameters {
            let next = self.awaited.front().filter(|(name, _)| *name == parameter.name);
            let shard =
                next.map(|&(_, shard)| shard).expect("units are written once each, in the layout's order");
            self.shards[shard].append(bytemuck::cast_slice(&weights[parameter.range.clone()]))?;
            self.awaited.pop_front();
        }
        Ok(())
    }

    /// Makes the folder safe on storage and gives it its name.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; nothing is left behind. [`CheckpointError::NameNotSynced`]; the folder is there and
    /// whole, but a loss of power may still take its name away.
    ///
    /// # Panics
    /// When not every unit was written.
    pub fn finish(self) -> Result<(), CheckpointError> {
        assert!(self.awaited.is_empty(), "{} parameters were not written", self.awaited.len());
        drop(self.shards);
        self.staging.publish()
    }
}

impl Shard {
    /// Makes the file, takes its space and writes its header.
    fn begin(staging: &mut Staging, plan: &ShardPlan) -> Result<Self, CheckpointError> {
        let (file, path) = staging.create(&plan.name)?;
        let (header, data_bytes) = header::write(&plan.parameters)
            .map_err(|e| CheckpointError::Header { path: path.clone(), reason: e.to_string() })?;
        let length = header.len() as u64 + data_bytes;
        let mut shard = Self { file, path, written: 0, length };
        match rustix::fs::fallocate(&shard.file, FallocateFlags::empty(), 0, length) {
            // Where the file system cannot promise space, a full one shows later.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(errno) => return Err(shard.failed(errno.into())),
        }
        shard.append(&header)?;
        Ok(shard)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        // At its place, so that what a failed write left is no part of the file.
        self.file.write_all_at(bytes, self.written).map_err(|e| self.failed(e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn failed(&self, source: io::Error) -> CheckpointError {
        write_failed(&self.path, self.length, source)
    }
}

fn write_failed(path: &Path, needed: u64, source: io::Error) -> CheckpointError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            CheckpointError::NoSpace { path: path.to_owned(), needed }
        }
        _ => Action::Write.failed(path)(source),
    }
}

fn write_file(staging: &mut Staging, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    let (mut file, path) = staging.create(name)?;
    file.write_all(bytes).map_err(|e| write_failed(&path, bytes.len() as u64, e))
}

fn copy_companions(staging: &mut Staging, folder: &Path) -> Result<(), CheckpointError> {
    for name in COMPANIONS {
        let path = folder.join(name);
        match fs::read(&path) {
            Ok(bytes) => write_file(staging, name, &bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Action::Read.failed(&path)(e)),
        }
    }
    Ok(())
}
