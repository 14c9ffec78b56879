//! Into a store: a whole state that was taken out, or the weights of a Hugging Face folder as the start of a run.
//!
//! The store is made where `train --swap-dir` makes its own, filled tile by tile, and committed when all is there. Until
//! then there is nothing that could be resumed: a process that is killed leaves a directory without a committed state, and
//! so does a state whose numbers are not those that were exported.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use overspill_io::{BackendChoice, Pool};
use overspill_swap::{Durability, Slot, Store, Worth};
use serde::Serialize;

use super::source::Source;
use super::{BOTH_KINDS, Progress, TileKind, classes, lease, tiles, tiles_in_motion, tiles_of};
use crate::error::{TrainError, check_stop};
use crate::home::Array;
use crate::options::StorageChoice;
use crate::path;
use crate::report;
use crate::storage::StorageNeed;
use crate::volumes::{Opened, Volumes};

/// What is to be taken in, and where to.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// A folder that an export has made, or a Hugging Face folder.
    pub from: PathBuf,
    /// Existing directories, in each of which a store is made, as by `train --swap-dir`.
    pub directories: Vec<PathBuf>,
    /// What a crash may cost the run that goes on: it decides how much room is taken.
    pub durability: Durability,
    /// How bytes are moved.
    pub backend: BackendChoice,
}

/// What was taken in.
#[derive(Clone, Debug, Serialize)]
pub struct Imported {
    /// The folder that was read.
    #[serde(serialize_with = "path::lossy")]
    pub from: PathBuf,
    /// `weights` or `state`.
    pub form: &'static str,
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    pub store: PathBuf,
    /// The step after which the state is.
    pub step: u64,
    /// Number of parameters; shared ones count once.
    pub parameters: u64,
    /// Whether every number was compared with the checksum that was exported with it. A Hugging Face folder has none, and
    /// neither has a state that was exported before there were any.
    pub checked: bool,
    /// Bytes that the store takes; the run that goes on takes more, for gradients and saved inputs.
    pub storage_bytes: u64,
    /// Bytes written to the store.
    pub bytes_written: u64,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// How long it took.
    pub elapsed_seconds: f64,
}

/// Makes a store with a state that `train --resume` goes on from. What it takes on storage is announced before it is taken.
///
/// # Errors
/// [`TrainError`], in one line; nothing is left behind.
pub fn import(
    options: &ImportOptions,
    stop: &AtomicBool,
    announce: &mut dyn FnMut(StorageNeed),
    progress: &mut Progress<'_>,
) -> Result<Imported, TrainError> {
    let started = Instant::now();
    let storage = StorageChoice {
        directories: options.directories.clone(),
        keep: true,
        resume: false,
        durability: options.durability,
        backend: options.backend,
        depth: None,
        resident_bytes_max: Some(0),
    };
    if storage.directories.is_empty() {
        return Err(TrainError::ResumeWhere);
    }
    let mut source = Source::open(&options.from)?;
    let layout = source.layout();
    let tile_bytes = source.tile_bytes(&layout);
    let tile_elements = tile_bytes / size_of::<f32>();
    let lengths = || tiles(&layout, tile_bytes, BOTH_KINDS).map(|tile| tile.bytes);
    let need = StorageNeed::new(options.durability, |durability| {
        Store::capacity_for(durability, Worth::State, lengths())
    });
    let capacity = need.bytes();
    let volumes = Volumes::find(&storage)?;
    announce(need);
    volumes.check(capacity)?;

    let ahead = tiles_in_motion(&layout, tile_bytes);
    let pool = Pool::new(&classes(&layout, tile_bytes, ahead))?;
    let Opened { volumes, .. } = volumes.open(&storage, &pool)?;
    let store = Store::create_over(&volumes, options.durability, capacity)?;
    let total: u64 = lengths().map(|bytes| bytes as u64).sum();
    let mut done = 0;
    let mut storing: VecDeque<Slot> = VecDeque::with_capacity(2 * ahead);
    progress(0, total);
    for unit in layout.units() {
        let weights = Array::weights(&layout, unit, tile_elements).reserve(&store, Worth::State)?;
        let moments = Array::moments(&layout, unit, tile_elements).reserve(&store, Worth::State)?;
        let (mut weights, mut moments) = (weights.into_iter(), moments.into_iter());
        for tile in tiles_of(&layout, unit, tile_bytes, BOTH_KINDS) {
            check_stop(stop)?;
            let slot = match tile.kind {
                TileKind::Weights => weights.next(),
                TileKind::Moments => moments.next(),
            };
            let slot = slot.expect("both are cut at the same places");
            if storing.len() == 2 * ahead
                && let Some(oldest) = storing.pop_front()
            {
                drop(oldest.settle()?);
            }
            let mut block = lease(&pool, tile)?;
            source.read(&layout, tile, &mut block)?;
            storing.extend(overspill_swap::tiles::store(vec![slot], block)?);
            done += tile.bytes as u64;
            progress(done, total);
        }
    }
    for last in storing {
        drop(last.settle()?);
    }
    store.commit(source.meta(tile_bytes))?;
    store.keep();
    Ok(Imported {
        from: options.from.clone(),
        form: source.form(),
        store: store.path().to_owned(),
        step: source.step(),
        checked: source.is_checked(),
        parameters: layout.numel() as u64,
        storage_bytes: capacity,
        bytes_written: total,
        peak_rss_bytes: report::memory_of_process("VmHWM").unwrap_or(0),
        elapsed_seconds: started.elapsed().as_secs_f64(),
    })
}
