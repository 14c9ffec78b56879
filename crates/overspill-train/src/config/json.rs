//! `config.json`, as Hugging Face's libraries write and read it.
//!
//! What the trainer does not compute (other activations, biases, unknown rotary scalings) is refused here by name, so that
//! no model is ever trained as something it is not. What is written reads back equal, and releases of transformers before
//! and after 5 understand it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{ConfigError, Llama3Scaling, ModelConfig, Rope};

impl ModelConfig {
    /// Reads the text of a `config.json`; `path` is named in errors.
    ///
    /// # Errors
    /// [`ConfigError`] when the text is not JSON, lacks a field, or describes a model that is not computed here.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let malformed = |reason: String| ConfigError::Malformed { path: path.to_owned(), reason };
        let file: ConfigFile = serde_json::from_str(text).map_err(|e| malformed(e.to_string()))?;
        file.refuse_the_unsupported(path)?;
        let head_dim = match file.head_dim {
            Some(head_dim) => head_dim,
            None => Self::head_dim_of(file.hidden_size, file.num_attention_heads)
                .map_err(|e| malformed(e.to_string()))?,
        };
        let rope = file.rope(path)?;
        let config = Self {
            vocab: file.vocab_size,
            hidden: file.hidden_size,
            layers: file.num_hidden_layers,
            heads: file.num_attention_heads,
            kv_heads: file.num_key_value_heads.unwrap_or(file.num_attention_heads),
            head_dim,
            ffn: file.intermediate_size,
            norm_eps: file.rms_norm_eps,
            rope,
            tied: file.tie_word_embeddings,
            max_positions: file.max_position_embeddings,
            initializer_range: file.initializer_range,
        };
        config.checked().map_err(|e| malformed(e.to_string()))
    }

    /// The text of a `config.json` that the `transformers` library reads.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(self.to_fields()))
    }

    /// The fields of that text.
    pub(crate) fn to_fields(&self) -> Map<String, Value> {
        let mut rope = Map::new();
        rope.insert("rope_theta".into(), self.rope.theta.into());
        rope.insert(
            "rope_type".into(),
            if self.rope.scaling.is_some() { "llama3" } else { "default" }.into(),
        );
        if let Some(Ok(Value::Object(scaling))) = self.rope.scaling.as_ref().map(serde_json::to_value) {
            rope.extend(scaling);
        }
        let mut file = serde_json::json!({
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope.theta,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.initializer_range,
            "attention_bias": false,
            "mlp_bias": false,
            "torch_dtype": DTYPE,
            "bos_token_id": null,
            "eos_token_id": null,
        });
        if self.rope.scaling.is_some() {
            // Releases of transformers before 5 read the scaling under its older name.
            file["rope_scaling"] = file["rope_parameters"].clone();
        }
        let Value::Object(fields) = file else { unreachable!("it was made as an object") };
        fields
    }
}

/// All fields of a `config.json`; `path` is named in errors.
pub(crate) fn fields(text: &str, path: &Path) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_str(text)
        .map_err(|e| ConfigError::Malformed { path: path.to_owned(), reason: e.to_string() })
}

/// The text of a `config.json` with these fields, but for weights of this dtype, in torch's words.
pub(crate) fn with_dtype(mut fields: Map<String, Value>, dtype: &str) -> String {
    // Releases of transformers before 5 know the older name only; newer ones prefer the newer name.
    fields.insert("torch_dtype".to_owned(), dtype.into());
    if let Some(newer) = fields.get_mut("dtype") {
        *newer = dtype.into();
    }
    format!("{:#}\n", Value::Object(fields))
}

/// The dtype of weights that are written.
const DTYPE: &str = "float32";

/// What transformers calls a model of this kind.
const ARCHITECTURE: &str = "LlamaForCausalLM";

/// The fields of `config.json` that matter here.
#[derive(Deserialize)]
struct ConfigFile {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "norm_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "max_positions")]
    max_position_embeddings: usize,
    #[serde(default = "initializer_range")]
    initializer_range: f64,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    attention_dropout: Option<f64>,
    pretraining_tp: Option<u64>,
    sliding_window: Option<Value>,
    quantization_config: Option<Value>,
}

// The defaults of transformers' LlamaConfig, for files that leave a field out.
fn silu() -> String {
    "silu".to_owned()
}
fn norm_eps() -> f64 {
    1e-6
}
fn max_positions() -> usize {
    2048
}
fn initializer_range() -> f64 {
    0.02
}
const ROPE_THETA: f64 = 10_000.0;

impl ConfigFile {
    fn refuse_the_unsupported(&self, path: &Path) -> Result<(), ConfigError> {
        let refuse = |field, value: String, supported| {
            Err(ConfigError::Unsupported { path: path.to_owned(), field, value, supported })
        };
        match (self.model_type.as_deref(), self.architectures.as_deref()) {
            (Some("llama"), _) | (None, None | Some([])) => {}
            (None, Some([only])) if only == ARCHITECTURE => {}
            (None, Some(others)) => {
                return refuse("architectures", others.join(", "), "LlamaForCausalLM is");
            }
            (Some(other), _) => return refuse("model_type", other.to_owned(), "llama is"),
        }
        if !matches!(self.hidden_act.as_str(), "silu" | "swish") {
            return refuse("hidden_act", self.hidden_act.clone(), "silu is");
        }
        if self.attention_bias {
            return refuse("attention_bias", "true".to_owned(), "attention without biases is");
        }
        if self.mlp_bias {
            return refuse("mlp_bias", "true".to_owned(), "a feed-forward part without biases is");
        }
        if let Some(dropout) = self.attention_dropout.filter(|&dropout| dropout != 0.0) {
            return refuse("attention_dropout", dropout.to_string(), "0 is");
        }
        if let Some(ranks) = self.pretraining_tp.filter(|&ranks| ranks > 1) {
            return refuse("pretraining_tp", ranks.to_string(), "1 is");
        }
        if let Some(window) = &self.sliding_window {
            return refuse("sliding_window", window.to_string(), "attention to everything before is");
        }
        if let Some(quantization) = &self.quantization_config {
            return refuse("quantization_config", quantization.to_string(), "F32, BF16 and F16 weights are");
        }
        Ok(())
    }

    /// Newer files keep everything rotary under `rope_parameters`; older ones spread it over two fields. As in
    /// transformers, a `rope_scaling` that says something is taken instead of `rope_parameters`, not beside it.
    fn rope(&self, path: &Path) -> Result<Rope, ConfigError> {
        let malformed = |reason: String| ConfigError::Malformed { path: path.to_owned(), reason };
        let telling = |section: &Option<Map<String, Value>>| section.clone().filter(|s| !s.is_empty());
        let (older, newer) = (telling(&self.rope_scaling), telling(&self.rope_parameters));
        if let (Some(older), Some(newer)) = (&older, &newer) {
            let (older, newer) = (rope_type(older), rope_type(newer));
            if older != newer {
                return Err(malformed(format!(
                    "rope_scaling is of type {older} and rope_parameters of type {newer}"
                )));
            }
        }
        let section = older.or(newer).unwrap_or_default();
        let number = |field| match section.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(malformed(format!("{field} = {value} is not a number"))),
            },
        };
        let theta = number("rope_theta")?.or(self.rope_theta).unwrap_or(ROPE_THETA);
        let refuse = |field, value: String, supported| {
            Err(ConfigError::Unsupported { path: path.to_owned(), field, value, supported })
        };
        for factor in [number("partial_rotary_factor")?, self.partial_rotary_factor].into_iter().flatten() {
            if factor != 1.0 {
                return refuse("partial_rotary_factor", factor.to_string(), "1 is");
            }
        }
        let scaling = match rope_type(&section) {
            Value::String(kind) if kind == "default" => None,
            Value::String(kind) if kind == "llama3" => {
                let mut scaling: Llama3Scaling = serde_json::from_value(Value::Object(section))
                    .map_err(|e| malformed(format!("llama3 rotary scaling: {e}")))?;
                if let Some(length) = self.original_max_position_embeddings {
                    scaling.original_max_position_embeddings = length;
                }
                Some(scaling)
            }
            Value::String(kind) => return refuse("rope_type", kind, "default and llama3 are"),
            other => return refuse("rope_type", other.to_string(), "default and llama3 are"),
        };
        Ok(Rope { theta, scaling })
    }
}

/// The type of a rotary section; `type` is the older name of the field.
fn rope_type(section: &Map<String, Value>) -> Value {
    section.get("rope_type").or_else(|| section.get("type")).cloned().unwrap_or_else(|| "default".into())
}
