//! Out of a store: the weights as a Hugging Face folder, or the whole state as one of its own kind.
//!
//! A snapshot is read without a lock, beside the run that goes on. Without one it is the committed state of a store that
//! nobody has open. Either way every checksum is compared. The folder takes its full size first, is written aside, and
//! gets its name at the end.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use overspill_io::{BLOCK_ALIGNMENT, BackendChoice, Pool};
use overspill_swap::{Manifest, Store, StoreError, View, ViewLoading};
use serde::Serialize;

use super::folder::Folder;
use super::{Progress, Tile, TileKind, classes, lease, tiles, tiles_in_motion};
use crate::checkpoint::{CheckpointWriter, Precision};
use crate::error::{TrainError, check_stop};
use crate::home::{moments_name, weights_name};
use crate::identity::{Identity, ModelOrigin};
use crate::layout::ModelLayout;
use crate::path;
use crate::plan;
use crate::reading;
use crate::report;

/// What is to be taken out, and where to.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// What the run had as `--swap-dir`, or the stores in them, in the same order. Volumes that are not given are where
    /// the manifest says.
    pub directories: Vec<PathBuf>,
    /// The snapshot; the committed state of a store that nobody has open if `None`.
    pub snapshot: Option<String>,
    /// The folder to make.
    pub out: PathBuf,
    /// What it will have.
    pub form: Form,
    /// Where the tokenizer's files are, if they are not where they came from any more.
    pub tokenizer: Option<PathBuf>,
    /// How bytes are moved.
    pub backend: BackendChoice,
}

/// What is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The weights, as `transformers` reads them.
    Weights(Precision),
    /// Everything that the optimizer keeps, as it is stored, to go on with.
    State,
}

/// What was taken out.
#[derive(Clone, Debug, Serialize)]
pub struct Exported {
    /// The store's home.
    #[serde(serialize_with = "path::lossy")]
    pub store: PathBuf,
    /// All its directories that were read, the home first.
    #[serde(serialize_with = "path::lossy_each")]
    pub directories: Vec<PathBuf>,
    /// The snapshot, if it was one.
    pub snapshot: Option<String>,
    /// The folder that was made.
    #[serde(serialize_with = "path::lossy")]
    pub out: PathBuf,
    /// `weights` or `state`.
    pub form: &'static str,
    /// Of the weights in the folder, in torch's words.
    pub dtype: &'static str,
    /// The step after which the state is.
    pub step: u64,
    /// Number of the commit.
    pub generation: u64,
    /// Number of parameters; shared ones count once.
    pub parameters: u64,
    /// Bytes read from the store.
    pub bytes_read: u64,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// How long it took.
    pub elapsed_seconds: f64,
}

impl ExportOptions {
    /// Weights as they are, of the committed state.
    pub fn new(directory: PathBuf, out: PathBuf) -> Self {
        Self {
            directories: vec![directory],
            snapshot: None,
            out,
            form: Form::Weights(Precision::F32),
            tokenizer: None,
            backend: BackendChoice::default(),
        }
    }
}

/// Takes a state, or its weights, out of a store.
///
/// # Errors
/// [`TrainError`], in one line; nothing is left behind.
pub fn export(
    options: &ExportOptions,
    stop: &AtomicBool,
    progress: &mut Progress<'_>,
) -> Result<Exported, TrainError> {
    let started = Instant::now();
    CheckpointWriter::check_destination(&options.out)?;
    let homes = reading::stores_in(&options.directories);
    let home = homes.first().ok_or(TrainError::ResumeWhere)?;
    let manifest = found(home, options.snapshot.as_deref())?;
    let layout = layout_of(home, &manifest.meta)?;
    let tile_bytes = tile_bytes(home, &manifest.meta, &layout)?;

    let ahead = tiles_in_motion(&layout, tile_bytes);
    // One of weights waits for its record.
    let pool = Pool::new(&classes(&layout, tile_bytes, ahead + 1))?;
    let volumes = reading::volumes(&homes, options.backend, &pool)?;
    let view = match &options.snapshot {
        Some(name) => View::of_snapshot(&volumes, name)?,
        None => View::open(&volumes).map_err(in_use)?,
    };
    // Its owner may have committed once more before it ended.
    let meta = view.meta();
    let origin = ModelOrigin::of(home, meta)?;
    let step = Identity::step(meta).ok_or_else(|| not_a_state(home, "it does not say its step"))?;
    let layout = layout_of(home, meta)?;
    let kinds = options.form.kinds(layout.weight_format());
    check_tiles(&view, &layout, tile_bytes, kinds)?;

    let mut folder = Folder::begin(options, &origin, meta, &layout)?;
    let total: u64 = tiles(&layout, tile_bytes, kinds).map(|tile| tile.bytes as u64).sum();
    let mut done = 0;
    let mut upcoming = tiles(&layout, tile_bytes, kinds);
    let mut loading: VecDeque<(Tile<'_>, ViewLoading<'_>)> = VecDeque::with_capacity(ahead);
    progress(0, total);
    loop {
        while loading.len() < ahead
            && let Some(tile) = upcoming.next()
        {
            loading.push_back((tile, load(&view, &pool, tile)?));
        }
        let Some((tile, arriving)) = loading.pop_front() else { break };
        check_stop(stop)?;
        folder.take(tile, arriving.wait()?)?;
        done += tile.bytes as u64;
        progress(done, total);
    }
    folder.finish()?;
    Ok(Exported {
        store: home.clone(),
        directories: volumes.iter().map(|volume| volume.directory.clone()).collect(),
        snapshot: options.snapshot.clone(),
        out: options.out.clone(),
        form: options.form.name(),
        dtype: options.form.dtype(layout.weight_format()),
        step,
        generation: view.generation(),
        parameters: layout.numel() as u64,
        bytes_read: total,
        peak_rss_bytes: report::memory_of_process("VmHWM").unwrap_or(0),
        elapsed_seconds: started.elapsed().as_secs_f64(),
    })
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Weights(_) => "weights",
            Self::State => "state",
        }
    }
}

/// What is to be taken out, as it is at the moment.
fn found(home: &Path, snapshot: Option<&str>) -> Result<Manifest, TrainError> {
    let found = match snapshot {
        Some(name) => Store::snapshot_of(home, name),
        None => Store::committed(home),
    };
    found.map_err(|error| match error {
        StoreError::NothingCommitted { path } => TrainError::NothingCommitted { path },
        error => error.into(),
    })
}

fn in_use(error: StoreError) -> TrainError {
    match error {
        StoreError::Locked { path, pid } => TrainError::InUse { path, pid },
        error => error.into(),
    }
}

fn not_a_state(path: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::NotAState { path: path.to_owned(), reason: reason.into() }
}

/// The layout of the state that was committed with `meta`.
fn layout_of(home: &Path, meta: &serde_json::Value) -> Result<ModelLayout, TrainError> {
    let config = ModelOrigin::of(home, meta)?.shape(home)?;
    let recipe =
        Identity::state_recipe(meta).ok_or_else(|| not_a_state(home, "its recipe is not known here"))?;
    Ok(ModelLayout::of(&config, recipe))
}

/// The tiles that the state is cut into.
fn tile_bytes(home: &Path, meta: &serde_json::Value, layout: &ModelLayout) -> Result<usize, TrainError> {
    let tile_bytes = Identity::tile_bytes(meta).unwrap_or(0);
    let is_sound = tile_bytes.is_multiple_of(BLOCK_ALIGNMENT) && plan::has_tiles_of(layout, tile_bytes);
    if is_sound { Ok(tile_bytes) } else { Err(not_a_state(home, format!("tiles of {tile_bytes} bytes"))) }
}

/// Proves that the state has every tile of the model, each of its length, before anything is made.
fn check_tiles(
    view: &View,
    layout: &ModelLayout,
    tile_bytes: usize,
    kinds: &[TileKind],
) -> Result<(), TrainError> {
    for tile in tiles(layout, tile_bytes, kinds) {
        let (tensor, expected) = (name(tile), tile.bytes);
        let found = view.bytes(&tensor)?;
        if found != expected {
            return Err(StoreError::WrongLength { tensor, expected: found, found: expected }.into());
        }
    }
    Ok(())
}

fn load<'a>(view: &'a View, pool: &Pool, tile: Tile<'_>) -> Result<ViewLoading<'a>, TrainError> {
    Ok(view.load(&name(tile), lease(pool, tile)?)?)
}

/// What the tile is called in the store.
fn name(tile: Tile<'_>) -> String {
    let array = match tile.kind {
        TileKind::Weights => weights_name(tile.unit.unit),
        TileKind::Moments => moments_name(tile.unit.unit),
    };
    overspill_swap::tiles::tile_name(&array, tile.index)
}
