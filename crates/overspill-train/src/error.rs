//! Everything that can end a training run, as one type.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use overspill_io::{IoError, PoolError};
use overspill_swap::StoreError;
use overspill_swap::pipeline::PipelineError;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::home::Left;
use crate::plan::TooSmall;
use crate::recipe::SingleMoments;

/// Why a training run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model's shape was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The training text was refused.
    #[error(transparent)]
    Data(DataError),
    /// A Hugging Face folder could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The optimizer does not keep its moments in the format that was asked for.
    #[error(transparent)]
    Moments(#[from] SingleMoments),
    /// The memory budget does not hold the least that training needs.
    #[error(transparent)]
    Memory(#[from] TooSmall),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Two volumes cannot be one directory.
    #[error("--swap-dir {} is given twice", directory.display())]
    SwapTwice {
        /// The directory, as it was given the second time.
        directory: PathBuf,
    },
    /// The I/O engine failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The pool of blocks failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The state on storage is not that of this run.
    #[error("{} is the state of another run: {what} was {then}, and is {now} now", path.display())]
    OtherRun {
        /// The store's home.
        path: PathBuf,
        /// What is different.
        what: String,
        /// Its value in the run that left the state.
        then: String,
        /// Its value in this run.
        now: String,
    },
    /// Nothing was said about where to resume.
    #[error("--resume needs the --swap-dir of the run to go on with")]
    ResumeWhere,
    /// The loss or the gradient is no longer a number; the weights are those before this step.
    #[error("step {step}: {what} is {value}; lower --lr or lengthen --warmup")]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// "the loss" or "the gradient norm".
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// The weights on storage are those of a model of another shape.
    #[error(
        "{} has the weights of another model than this run's: give --model the folder that they came from, or the same \
         shape (there it is {then}, here {now})",
        path.display()
    )]
    OtherModel {
        /// The store's home.
        path: PathBuf,
        /// The shape of the model on storage.
        then: String,
        /// The shape of this run's model.
        now: String,
    },
    /// The state on storage does not say what its model is.
    #[error(
        "{} was committed by an older version, without the model's configuration: resume it with this one first, \
         which adds it",
        path.display()
    )]
    NoOrigin {
        /// The store's home.
        path: PathBuf,
    },
    /// What was committed is no training state, or not all of one.
    #[error("{} is not a training state: {reason}", path.display())]
    NotAState {
        /// The store's home, or the file that describes the state.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing was committed that could be taken out.
    #[error("{} has no committed state", path.display())]
    NothingCommitted {
        /// The store's home.
        path: PathBuf,
    },
    /// The owner of the state is at work.
    #[error(
        "{path} is in use{owner}: take a snapshot (overspill snapshot {path} NAME) and export that (--snapshot NAME)",
        path = path.display(), owner = pid.map(|pid| format!(" by process {pid}")).unwrap_or_default()
    )]
    InUse {
        /// The store's home.
        path: PathBuf,
        /// The owner's process id, when it could be read.
        pid: Option<u32>,
    },
    /// The folder that the tokenizer came from has none any more.
    #[error("{} has no tokenizer.json any more: say with --tokenizer where the model's tokenizer is", folder.display())]
    TokenizerGone {
        /// The folder.
        folder: PathBuf,
    },
    /// An earlier step failed half-way, so there is no state to go on from here.
    #[error("an earlier step failed, and its state is lost: {}", after_loss(left.as_ref()))]
    Lost {
        /// What a later run can go on from.
        left: Option<Left>,
    },
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// What to do without the state of a step that failed.
fn after_loss(left: Option<&Left>) -> String {
    match left {
        Some(Left { path, step }) => {
            format!("the one after step {step} is kept in {}; go on from it with --resume", path.display())
        }
        None => "start again".to_owned(),
    }
}

/// Ends what is going on once somebody asked to stop.
///
/// # Errors
/// [`TrainError::Interrupted`] when `stop` is set.
pub fn check_stop(stop: &AtomicBool) -> Result<(), TrainError> {
    if stop.load(Ordering::Relaxed) { Err(TrainError::Interrupted) } else { Ok(()) }
}

impl From<DataError> for TrainError {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Interrupted => Self::Interrupted,
            error => Self::Data(error),
        }
    }
}

impl From<PipelineError<TrainError>> for TrainError {
    fn from(error: PipelineError<TrainError>) -> Self {
        match error {
            PipelineError::Store(error) => error.into(),
            PipelineError::Compute(error) => error,
        }
    }
}
