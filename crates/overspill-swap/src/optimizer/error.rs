//! What can go wrong in an optimizer swapper.

use crate::error::StoreError;
use crate::pipeline::PipelineError;

/// Why a swapper refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// Something could not be moved. A pass that fails leaves no state to go on from, but the committed one.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An earlier pass, or a return to the committed state, has failed in its middle.
    #[error(
        "the optimizer's state was lost when a step or a roll back failed: roll back, or go on from the last commit"
    )]
    Lost,
    /// There is no such parameter.
    #[error("there is no parameter {parameter}; there are {count}")]
    NoParameter {
        /// Its index.
        parameter: usize,
        /// Number of parameters.
        count: usize,
    },
    /// A piece of a gradient does not lie in its parameter.
    #[error(
        "gradient of {parameter}: {length} bytes from element {offset} on are not a part of {numel} elements of \
         {element_bytes} bytes"
    )]
    GradientRange {
        /// Name of the parameter.
        parameter: String,
        /// First element of the piece.
        offset: usize,
        /// Length of the piece, in bytes.
        length: usize,
        /// Elements of the parameter.
        numel: usize,
        /// Bytes of an element of a gradient.
        element_bytes: usize,
    },
    /// The plan was made for gradients that stay where they are.
    #[error("gradients are not swapped by this plan")]
    GradientsStay,
    /// The committed state is that of other parameters.
    #[error("the state is of other parameters: {reason}")]
    OtherParameters {
        /// The first difference.
        reason: String,
    },
}

/// Why a pass over the state stopped.
#[derive(Debug, thiserror::Error)]
pub enum PassError<E> {
    /// The swapper's own reason.
    #[error(transparent)]
    Swapper(#[from] OptimizerError),
    /// The computation refused.
    #[error("{0}")]
    Compute(E),
}

impl<E> From<StoreError> for PassError<E> {
    fn from(error: StoreError) -> Self {
        Self::Swapper(error.into())
    }
}

impl<E> From<PipelineError<E>> for PassError<E> {
    fn from(error: PipelineError<E>) -> Self {
        match error {
            PipelineError::Store(error) => error.into(),
            PipelineError::Compute(error) => Self::Compute(error),
        }
    }
}
