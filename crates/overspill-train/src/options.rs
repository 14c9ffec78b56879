//! What a user may say about a run.

use std::path::PathBuf;

use overspill_io::BackendChoice;
use overspill_optim::{LossScalerConfig, MomentFormat, WeightFormat};
use overspill_swap::Durability;

use crate::config::{ConfigError, ModelConfig, Rope};
use crate::data::Tokenizer;
use crate::optimizer::Optimizer;
use crate::plan::StepShape;
use crate::schedule::Schedule;
use crate::wear::Endurance;

/// What to train.
#[derive(Clone, Debug)]
pub enum ModelChoice {
    /// A model of this shape with weights drawn from the seed; text is read byte by byte.
    Fresh(FreshShape),
    /// The model and the tokenizer of a Hugging Face folder.
    Folder(PathBuf),
}

/// The shape of a fresh model; what is `None` follows from the rest.
#[derive(Clone, Debug)]
pub struct FreshShape {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; half of the query heads, or all of them when they are odd.
    pub kv_heads: Option<usize>,
    /// Width of the feed-forward part; 8/3 of `hidden`, rounded up to a multiple of 64.
    pub ffn: Option<usize>,
    /// Token ids; as many as the tokenizer has.
    pub vocab: Option<usize>,
    /// Whether the head shares the embedding's weights.
    pub tied: bool,
}

/// Where the training state lives.
#[derive(Clone, Debug)]
pub enum Residence {
    /// In ordinary memory, whatever the budget says.
    Memory,
    /// On storage.
    Storage(StorageChoice),
}

/// How the state lives on storage.
#[derive(Clone, Debug)]
pub struct StorageChoice {
    /// Existing directories, in each of which the run makes its own, to share the state; the first one is the home.
    /// The current directory, with a name of its own, if empty.
    pub directories: Vec<PathBuf>,
    /// Whether the state stays there at the end.
    pub keep: bool,
    /// Whether to go on from the state that an earlier run left there; then it stays, too.
    pub resume: bool,
    /// What a crash may cost.
    pub durability: Durability,
    /// How bytes are moved.
    pub backend: BackendChoice,
    /// Depth of the pipeline; as the memory allows if `None`.
    pub depth: Option<usize>,
    /// The most of the state that may stay in memory for good, in bytes; as much as fits if `None`.
    pub resident_bytes_max: Option<usize>,
}

/// Everything that a user may say about a run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// What to train.
    pub model: ModelChoice,
    /// Files to train on; overspill's own documents and sources if empty.
    pub data: Vec<PathBuf>,
    /// Hugging Face folder to write at the end.
    pub out: Option<PathBuf>,
    /// Where the state lives.
    pub residence: Residence,
    /// Memory budget, in bytes.
    pub memory: usize,
    /// What a step works on.
    pub shape: StepShape,
    /// Learning rate by step; its `steps` are the run's.
    pub schedule: Schedule,
    /// Weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient.
    pub clip: Option<f64>,
    /// The rule of the update and its constants.
    pub optimizer: Optimizer,
    /// How weights are stored, and what the model computes with.
    pub weights: WeightFormat,
    /// How the optimizer's moments are stored.
    pub moments: MomentFormat,
    /// How the scale of the loss moves; weights in fp16 have one, and no others.
    pub loss_scaler: LossScalerConfig,
    /// Seed of first weights, of data order, and of what is rounded at random.
    pub seed: u64,
    /// What each drive is rated to be written, if the user knows.
    pub endurance: Option<Endurance>,
    /// Resident memory of the process before it did anything, in bytes.
    pub baseline_rss_bytes: u64,
}

impl RunOptions {
    /// How the scale of the loss moves, if there is one.
    pub fn loss_scaler(&self) -> Option<LossScalerConfig> {
        (self.weights == WeightFormat::F16WithMaster).then_some(self.loss_scaler)
    }
}

impl FreshShape {
    /// The configuration of the model.
    ///
    /// # Errors
    /// [`ConfigError::Impossible`] when the sizes don't fit each other, or the vocabulary does not hold all bytes.
    pub fn config(&self, shape: StepShape) -> Result<ModelConfig, ConfigError> {
        let vocab = self.vocab.unwrap_or(Tokenizer::Bytes.vocab());
        if vocab < Tokenizer::Bytes.vocab() {
            let reason = "text is read byte by byte, which takes at least 256".to_owned();
            return Err(ConfigError::Impossible { field: "vocab", value: vocab, reason });
        }
        let kv_heads =
            self.kv_heads.unwrap_or(if self.heads.is_multiple_of(2) { self.heads / 2 } else { self.heads });
        let ffn = self.ffn.unwrap_or_else(|| (self.hidden.saturating_mul(8) / 3).next_multiple_of(64));
        ModelConfig {
            vocab,
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            kv_heads,
            head_dim: ModelConfig::head_dim_of(self.hidden, self.heads)?,
            ffn,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: None },
            tied: self.tied,
            max_positions: shape.batch.seq.max(2048),
            initializer_range: 0.02,
        }
        .checked()
    }
}
