//! The shape of a Llama-family decoder.
//!
//! [`ModelConfig`] is checked once, when it is made; everything behind it may rely on its invariants. How a Hugging Face
//! `config.json` states it is the matter of `json.rs`.

mod json;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) use self::json::{fields, with_dtype};

/// A decoder with RMSNorm, rotary embedding, grouped-query attention and SwiGLU.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding: number of distinct token ids.
    pub vocab: usize,
    /// Width of the residual stream, in elements.
    pub hidden: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; even, because the rotary embedding turns pairs.
    pub head_dim: usize,
    /// Width of the feed-forward part (`intermediate_size`), in elements.
    pub ffn: usize,
    /// Added to the mean square inside RMSNorm.
    pub norm_eps: f64,
    /// The rotary embedding's base and scaling.
    pub rope: Rope,
    /// Whether the head shares the embedding's weights.
    pub tied: bool,
    /// Longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// Standard deviation of freshly drawn matrices.
    pub initializer_range: f64,
}

/// Rotary embedding parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric sequence of wave lengths.
    pub theta: f64,
    /// Stretching of the long wave lengths, as in Llama 3.1.
    pub scaling: Option<Llama3Scaling>,
}

/// The `llama3` rotary scaling: long waves are stretched by `factor`, short ones kept, those between blended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Llama3Scaling {
    /// How far long waves are stretched.
    pub factor: f64,
    /// Waves longer than `original_max_position_embeddings / low_freq_factor` are stretched fully.
    pub low_freq_factor: f64,
    /// Waves shorter than `original_max_position_embeddings / high_freq_factor` are kept.
    pub high_freq_factor: f64,
    /// The context length before stretching, in tokens.
    pub original_max_position_embeddings: usize,
}

/// Why a model shape was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A size is zero, does not divide another, or is otherwise impossible.
    #[error("{field} = {value}: {reason}")]
    Impossible {
        /// The field, in the words of the command line.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What it would have to be.
        reason: String,
    },
    /// A constant is not in the range in which the model can be computed.
    #[error("{field} = {value}: must be {range}")]
    OutOfRange {
        /// The field, in the words of `config.json`.
        field: &'static str,
        /// Its value.
        value: f64,
        /// Where it would have to be.
        range: &'static str,
    },
    /// The file is not the JSON of a model configuration.
    #[error("{path}: not a model configuration: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file describes a model that this trainer does not compute.
    #[error("{path}: {field} = {value} is not supported; {supported}", path = path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field that says so.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is supported instead.
        supported: &'static str,
    },
}

impl ModelConfig {
    /// Elements of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Checks that the sizes fit each other and that the constants can be computed with; returns the configuration.
    ///
    /// # Errors
    /// [`ConfigError::Impossible`], [`ConfigError::OutOfRange`].
    pub fn checked(self) -> Result<Self, ConfigError> {
        if self.layers == 0 || self.layers > LAYERS_MAX {
            let reason = format!("must be between 1 and {LAYERS_MAX}");
            return Err(ConfigError::Impossible { field: "layers", value: self.layers, reason });
        }
        let sizes = [
            ("vocab", self.vocab),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("head-dim", self.head_dim),
            ("ffn", self.ffn),
            ("heads times head-dim", self.heads.saturating_mul(self.head_dim)),
        ];
        for (field, value) in sizes {
            if value == 0 || value > SIZE_MAX {
                let reason = format!("must be between 1 and {SIZE_MAX}");
                return Err(ConfigError::Impossible { field, value, reason });
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let reason = format!("must divide heads = {}", self.heads);
            return Err(ConfigError::Impossible { field: "kv-heads", value: self.kv_heads, reason });
        }
        if !self.head_dim.is_multiple_of(2) {
            let reason = "must be even: the rotary embedding turns pairs of elements".to_owned();
            return Err(ConfigError::Impossible { field: "head-dim", value: self.head_dim, reason });
        }
        positive("rms_norm_eps", self.norm_eps)?;
        self.rope.check()?;
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            let range = "finite and not negative";
            let value = self.initializer_range;
            return Err(ConfigError::OutOfRange { field: "initializer_range", value, range });
        }
        Ok(self)
    }

    /// The head size that `hidden` and `heads` imply.
    ///
    /// # Errors
    /// [`ConfigError::Impossible`] when `heads` does not divide `hidden`.
    pub fn head_dim_of(hidden: usize, heads: usize) -> Result<usize, ConfigError> {
        if heads == 0 || !hidden.is_multiple_of(heads) {
            let reason = format!("must divide hidden = {hidden}");
            return Err(ConfigError::Impossible { field: "heads", value: heads, reason });
        }
        Ok(hidden / heads)
    }

    /// Whether a model of the one shape computes with the weights of the other what that one does: everything is equal
    /// but what only says how it was made, or for what.
    pub(crate) fn computes_as(&self, other: &Self) -> bool {
        let Self { max_positions, initializer_range, .. } = *other;
        *other == Self { max_positions, initializer_range, ..self.clone() }
    }
}

impl Rope {
    fn check(&self) -> Result<(), ConfigError> {
        positive("rope_theta", self.theta)?;
        let Some(scaling) = &self.scaling else { return Ok(()) };
        positive("factor", scaling.factor)?;
        positive("low_freq_factor", scaling.low_freq_factor)?;
        positive("high_freq_factor", scaling.high_freq_factor)?;
        if scaling.low_freq_factor >= scaling.high_freq_factor {
            let range = "less than high_freq_factor";
            let value = scaling.low_freq_factor;
            return Err(ConfigError::OutOfRange { field: "low_freq_factor", value, range });
        }
        positive("original_max_position_embeddings", scaling.original_max_position_embeddings as f64)
    }
}

fn positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { field, value, range: "finite and positive" })
    }
}

/// A folder by a path that is good in every working directory.
pub(crate) fn absolute(folder: &Path) -> PathBuf {
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

/// Sizes above this overflow the arithmetic of some model; no real one comes near.
const SIZE_MAX: usize = 1 << 24;

/// Deeper models than this don't exist either, and their list of parameters alone would fill memory.
const LAYERS_MAX: usize = 1 << 12;

#[cfg(test)]
mod tests;
