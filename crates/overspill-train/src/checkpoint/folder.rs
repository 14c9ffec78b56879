//! A folder of tensors in the making: every file with its room and its header first, then the tensors, piece by piece.
//!
//! Tensors may come in any order and in turns; the pieces of one come in their order. A folder that is dropped before
//! [`FolderWriter::finish`] removes what it made.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::plan::{self, ShardPlan, Stem, TensorPlan};
use super::staging::Staging;
use super::state::{self, STATE};
use super::tensors::{is_there, open_regular};
use super::{Action, CONFIG, CheckpointError, MODEL, header};
use crate::data::byte_level_files;

/// How text becomes token ids.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// What goes with a model from the folder it was read from, where it is there.
const COMPANIONS: [&str; 5] =
    [TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", "generation_config.json"];

/// Whether a folder of tensors may have a file of this name from its writer.
pub(super) fn is_made_name(name: &str) -> bool {
    [CONFIG, STATE].contains(&name)
        || COMPANIONS.contains(&name)
        || [MODEL, state::STEM].iter().any(|stem| stem.names(name))
}

/// Everything that a folder will have.
#[derive(Debug)]
pub(super) struct Contents<'a> {
    /// Small files, by name: at least `config.json`.
    pub(super) texts: Vec<(&'static str, String)>,
    /// Where the tokenizer's files are copied from; those of single bytes are made if `None`.
    pub(super) tokenizer: Option<&'a Path>,
    pub(super) stem: Stem,
    pub(super) tensors: Vec<TensorPlan>,
    /// What the header of every file says beside its tensors, if it is not of a model.
    pub(super) note: Option<(&'static str, String)>,
    pub(super) shard_bytes_max: u64,
}

/// A folder of tensors in the making.
#[derive(Debug)]
pub(super) struct FolderWriter {
    slots: HashMap<String, Slot>,
    shards: Vec<Shard>,
    staging: Staging,
}

/// Where a tensor goes, and how far it is there.
#[derive(Clone, Copy, Debug)]
struct Slot {
    shard: usize,
    start: u64,
    next: u64,
    end: u64,
}

/// Where a piece was put.
#[derive(Clone, Copy, Debug)]
pub(super) struct Appended {
    /// Its first byte within the tensor.
    pub(super) start: u64,
    /// Length of the whole tensor, in bytes.
    pub(super) length: u64,
}

/// A file of tensors.
#[derive(Debug)]
struct Shard {
    file: File,
    path: PathBuf,
    length: u64,
}

impl FolderWriter {
    /// Begins the folder `target`, which must not be there or be empty, and takes its full size.
    pub(super) fn begin(target: &Path, contents: Contents<'_>) -> Result<Self, CheckpointError> {
        let Contents { texts, tokenizer, stem, tensors, note, shard_bytes_max } = contents;
        let mut staging = Staging::begin(target)?;
        let needed = tensors.iter().map(TensorPlan::bytes).fold(0, u64::saturating_add);
        check_room(&staging.path(""), needed)?;
        for (name, text) in texts {
            write_file(&mut staging, name, text.as_bytes())?;
        }
        match tokenizer {
            Some(folder) => copy_companions(&mut staging, folder)?,
            None => {
                let files = byte_level_files();
                write_file(&mut staging, TOKENIZER, files.tokenizer.as_bytes())?;
                write_file(&mut staging, TOKENIZER_CONFIG, files.config.as_bytes())?;
            }
        }
        let plans = plan::shards(tensors, stem, shard_bytes_max);
        if let Some(index) = plan::index(&plans) {
            write_file(&mut staging, &stem.index(), index.as_bytes())?;
        }
        let (mut shards, mut slots) = (Vec::with_capacity(plans.len()), HashMap::new());
        for (shard, plan) in plans.into_iter().enumerate() {
            let (file, mut start) = Shard::begin(&mut staging, &plan, note.as_ref())?;
            shards.push(file);
            for tensor in plan.tensors {
                let end = start + tensor.bytes();
                slots.insert(tensor.name, Slot { shard, start, next: start, end });
                start = end;
            }
        }
        Ok(Self { slots, shards, staging })
    }

    /// Writes the next bytes of a tensor.
    ///
    /// # Panics
    /// When the folder has no such tensor, or it would have more bytes than were planned.
    pub(super) fn append(&mut self, tensor: &str, bytes: &[u8]) -> Result<Appended, CheckpointError> {
        let slot = self.slots.get_mut(tensor).expect("only planned tensors are written");
        let end = slot.next + bytes.len() as u64;
        assert!(end <= slot.end, "{tensor} is longer than planned");
        self.shards[slot.shard].write(slot.next, bytes)?;
        let appended = Appended { start: slot.next - slot.start, length: slot.end - slot.start };
        slot.next = end;
        Ok(appended)
    }

    /// Writes a small file anew, with a text as long as the first one, for which it has the room.
    pub(super) fn rewrite(&self, name: &str, text: &str) -> Result<(), CheckpointError> {
        let path = self.staging.path(name);
        let file = File::options().write(true).open(&path).map_err(Action::Open.failed(&path))?;
        let bytes = text.as_bytes();
        file.write_all_at(bytes, 0).map_err(|e| write_failed(&path, bytes.len() as u64, e))
    }

    /// Makes the folder safe on storage and gives it its name.
    ///
    /// # Panics
    /// When a tensor is not whole.
    pub(super) fn finish(self) -> Result<(), CheckpointError> {
        let missing = self.slots.iter().find(|(_, slot)| slot.next < slot.end);
        assert!(missing.is_none(), "not all of {missing:?} was written");
        drop(self.shards);
        self.staging.publish()
    }
}

impl Shard {
    /// Makes the file, takes its space and writes its header; says where its first tensor goes.
    fn begin(
        staging: &mut Staging,
        plan: &ShardPlan,
        note: Option<&(&'static str, String)>,
    ) -> Result<(Self, u64), CheckpointError> {
        let (file, path) = staging.create(&plan.name)?;
        let (header, data_bytes) = header::write(&plan.tensors, note)
            .map_err(|e| CheckpointError::Header { path: path.clone(), reason: e.to_string() })?;
        let data_start = header.len() as u64;
        let shard = Self { file, path, length: data_start + data_bytes };
        match rustix::fs::fallocate(&shard.file, FallocateFlags::empty(), 0, shard.length) {
            // Where the file system cannot promise space, a full one shows later.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(errno) => return Err(write_failed(&shard.path, shard.length, errno.into())),
        }
        shard.write(0, &header)?;
        Ok((shard, data_start))
    }

    /// Writes at a place of its own, so that what a failed write left is no part of the file.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write_all_at(bytes, offset).map_err(|e| write_failed(&self.path, self.length, e))
    }
}

/// Refuses what the file system has no room for before any of it is taken: a disk that is filled, and emptied again, fails
/// everybody else on it meanwhile.
fn check_room(folder: &Path, needed: u64) -> Result<(), CheckpointError> {
    let found = rustix::fs::statvfs(folder).map_err(|errno| Action::Open.failed(folder)(errno.into()))?;
    if found.f_bavail.saturating_mul(found.f_frsize) < needed {
        return Err(CheckpointError::NoSpace { path: folder.to_owned(), needed });
    }
    Ok(())
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
        if !is_there(&path)? {
            continue;
        }
        let mut bytes = Vec::new();
        open_regular(&path)?.read_to_end(&mut bytes).map_err(Action::Read.failed(&path))?;
        write_file(staging, name, &bytes)?;
    }
    Ok(())
}
