//! Where the numbers of an import come from, tile by tile.
//!
//! A whole state comes as it was stored, by the recipe that its description names: any other would need other numbers.
//! Exact weights of which the recipe keeps only remainders are split again, and must round to the stored ones beside them.
//! The weights of a Hugging Face folder begin a run of AdamW in single precision.

use std::path::Path;

use overspill_optim::{WeightFormat, split_remainders};
use serde_json::Value;

use super::pieces::{self, Array, Piece, pieces};
use super::{Tile, TileKind};
use crate::checkpoint::{Checkpoint, CheckpointError, Naming, StateFolder};
use crate::config;
use crate::error::TrainError;
use crate::home::floats_mut;
use crate::identity::{Identity, ModelOrigin};
use crate::layout::ModelLayout;
use crate::optimizer::single_precision_adamw;
use crate::plan;

/// A folder that is read.
pub(super) enum Source {
    Weights { checkpoint: Checkpoint, origin: ModelOrigin },
    State(State),
}

/// A folder of a whole state.
pub(super) struct State {
    folder: StateFolder,
    meta: Value,
    step: u64,
    layout: ModelLayout,
    /// Of the last tile, if remainders follow, as bits; and exact ones that are split.
    weights: Vec<u16>,
    rounded: Vec<u16>,
    masters: Vec<f32>,
}

impl Source {
    pub(super) fn open(from: &Path) -> Result<Self, TrainError> {
        if StateFolder::is_one(from)? {
            return State::open(from).map(Self::State);
        }
        let checkpoint = Checkpoint::open(from)?;
        let config = checkpoint.config_fields().clone();
        let origin = ModelOrigin { config, tokenizer: Some(config::absolute(from)) };
        Ok(Self::Weights { checkpoint, origin })
    }

    /// The layout of the state that comes of it.
    pub(super) fn layout(&self) -> ModelLayout {
        match self {
            Self::Weights { checkpoint, .. } => ModelLayout::new(checkpoint.config()),
            Self::State(state) => state.layout.clone(),
        }
    }

    /// The tiles of the run that the state is of, so that it takes no more memory than before.
    pub(super) fn tile_bytes(&self, layout: &ModelLayout) -> usize {
        let known = match self {
            Self::Weights { .. } => None,
            Self::State(state) => Identity::tile_bytes(&state.meta),
        };
        let usable = known.filter(|&tile_bytes| plan::has_tiles_of(layout, tile_bytes));
        usable.unwrap_or_else(|| plan::tile_bytes_for_any(layout))
    }

    /// Fills a tile; the record of weights comes right after them. Padding becomes zero.
    pub(super) fn read(
        &mut self,
        layout: &ModelLayout,
        tile: Tile<'_>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        match (self, tile.kind) {
            (Self::Weights { checkpoint, .. }, TileKind::Weights) => {
                checkpoint.read_part(tile.unit, tile.start, floats_mut(out))
            }
            (Self::Weights { .. }, TileKind::Moments) => {
                out.fill(0);
                Ok(())
            }
            (Self::State(state), _) => state.read(layout, tile, out),
        }
    }

    /// What is committed with the state.
    pub(super) fn meta(&self, tile_bytes: usize) -> Value {
        match self {
            Self::Weights { origin, .. } => origin.untouched(tile_bytes, &single_precision_adamw()),
            Self::State(state) => Identity::with_tile_bytes(state.meta.clone(), tile_bytes),
        }
    }

    pub(super) fn step(&self) -> u64 {
        match self {
            Self::Weights { .. } => 0,
            Self::State(state) => state.step,
        }
    }

    pub(super) fn is_checked(&self) -> bool {
        match self {
            Self::Weights { .. } => false,
            Self::State(state) => state.folder.has_checksums(),
        }
    }

    pub(super) fn form(&self) -> &'static str {
        match self {
            Self::Weights { .. } => "weights",
            Self::State(_) => "state",
        }
    }
}

impl State {
    fn open(from: &Path) -> Result<Self, TrainError> {
        let path = StateFolder::path(from);
        let mut layout = None;
        let folder = StateFolder::open(from, |meta, config, naming| {
            let recipe = Identity::state_recipe(meta).ok_or("its recipe is not known here")?;
            if naming == Naming::ArrayFirst && recipe != single_precision_adamw().into() {
                return Err("before version 3 there were states of adamw in single precision only".to_owned());
            }
            Ok(pieces::tensors(layout.insert(ModelLayout::of(config, recipe)), naming))
        })?;
        let layout = layout.expect("it was asked for before the folder was found to be sound");
        let malformed =
            |reason: &str| TrainError::NotAState { path: path.clone(), reason: reason.to_owned() };
        let step = Identity::step(folder.meta()).ok_or_else(|| malformed("it does not say its step"))?;
        let is_run = |run: &Value| run.as_object().is_some_and(|run| run.values().all(Value::is_string));
        match folder.meta().get("run") {
            Some(Value::Null) if step == 0 => {}
            Some(run) if is_run(run) => {}
            _ => return Err(malformed("it does not say of which run it is")),
        }
        let mut meta = folder.meta().clone();
        if let Some(meta) = meta.as_object_mut() {
            meta.remove("version");
            // The folder that the tokenizer came from may be on another machine; its files came along.
            if meta.get("tokenizer").is_some_and(Value::is_string) {
                meta.insert("tokenizer".to_owned(), config::absolute(from).to_string_lossy().into());
            }
        }
        let (weights, rounded, masters) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { folder, meta, step, layout, weights, rounded, masters })
    }

    fn read(&mut self, layout: &ModelLayout, tile: Tile<'_>, out: &mut [u8]) -> Result<(), CheckpointError> {
        out.fill(0);
        for piece in pieces(layout, tile) {
            let bytes = &mut out[piece.bytes.clone()];
            if piece.array == Array::Joined {
                self.split(&piece, bytemuck::cast_slice_mut(bytes))?;
            } else {
                self.folder.read(&piece.tensor(self.folder.naming()), piece.start, bytes)?;
            }
        }
        if tile.kind == TileKind::Weights && layout.weight_format() == WeightFormat::Bf16WithRemainder {
            self.weights.clear();
            self.weights.extend_from_slice(bytemuck::cast_slice(out));
        }
        Ok(())
    }

    /// The remainders of a piece, out of its exact weights.
    fn split(&mut self, piece: &Piece<'_>, remainders: &mut [u16]) -> Result<(), CheckpointError> {
        let naming = self.folder.naming();
        let masters = piece.tensor(naming);
        self.masters.resize(remainders.len(), 0.0);
        self.folder.read(&masters, piece.start, bytemuck::cast_slice_mut(&mut self.masters))?;
        self.rounded.resize(remainders.len(), 0);
        split_remainders(&self.masters, &mut self.rounded, remainders).expect("all are of one length");
        if self.rounded == self.weights[piece.elements.clone()] {
            return Ok(());
        }
        let tensor = piece.weights_tensor(naming);
        let path = self.folder.file_of(&tensor)?.to_owned();
        Err(CheckpointError::NotRounded { tensor, masters, path })
    }
}
