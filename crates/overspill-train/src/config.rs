//! The shape of a Llama-family decoder, as a Hugging Face `config.json` states it.
//!
//! [`ModelConfig`] is checked once, when it is made; everything behind it may rely on its invariants. What the
//! trainer does not compute (other activations, biases, unknown rotary scalings) is refused here by name, so that
//! no model is ever trained as something it is not.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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

    /// Whether a model of the one shape computes with the weights of the other what that one does: everything is equal
    /// but what only says how it was made, or for what.
    pub(crate) fn computes_as(&self, other: &Self) -> bool {
        let Self { max_positions, initializer_range, .. } = *other;
        *other == Self { max_positions, initializer_range, ..self.clone() }
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

/// All fields of a `config.json`; `path` is named in errors.
pub(crate) fn fields(text: &str, path: &Path) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_str(text)
        .map_err(|e| ConfigError::Malformed { path: path.to_owned(), reason: e.to_string() })
}

/// A folder by a path that is good in every working directory.
pub(crate) fn absolute(folder: &Path) -> PathBuf {
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
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

/// Sizes above this overflow the arithmetic of some model; no real one comes near.
const SIZE_MAX: usize = 1 << 24;

/// What transformers calls a model of this kind.
const ARCHITECTURE: &str = "LlamaForCausalLM";

/// Deeper models than this don't exist either, and their list of parameters alone would fill memory.
const LAYERS_MAX: usize = 1 << 12;

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SMALL: &str = r#"{"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}"#;

    fn with(field: &str, value: Value) -> String {
        let mut file: Value = serde_json::from_str(SMALL).unwrap();
        file[field] = value;
        file.to_string()
    }

    fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_json(text, Path::new("m/config.json"))
    }

    #[test]
    fn a_written_config_reads_back_equal() {
        let mut config = parse(SMALL).unwrap();
        assert_eq!(parse(&config.to_json()).unwrap(), config);
        config.tied = true;
        config.rope.scaling = Some(Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        });
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (field, value) in [
            ("model_type", Value::from("mamba")),
            ("hidden_act", "gelu".into()),
            ("attention_bias", true.into()),
            ("mlp_bias", true.into()),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
            ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
            ("rope_parameters", json!({"rope_type": 3})),
            ("rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
            ("partial_rotary_factor", 0.5.into()),
            ("attention_dropout", 0.1.into()),
            ("pretraining_tp", 2.into()),
            ("sliding_window", 4096.into()),
            ("quantization_config", json!({"quant_method": "fp8"})),
        ] {
            let error = parse(&with(field, value)).unwrap_err();
            let named = if field.starts_with("rope") { "rope_type" } else { field };
            let expected = matches!(&error, ConfigError::Unsupported { field: found, .. }
                if *found == named || *found == "partial_rotary_factor");
            assert!(expected, "{field}: {error}");
        }
    }

    #[test]
    fn what_says_nothing_is_accepted() {
        for (field, value) in [
            ("partial_rotary_factor", Value::from(1.0)),
            ("attention_dropout", 0.0.into()),
            ("attention_dropout", Value::Null),
            ("pretraining_tp", 1.into()),
            ("sliding_window", Value::Null),
            ("quantization_config", Value::Null),
            ("rope_scaling", Value::Null),
            ("rope_scaling", json!({})),
        ] {
            assert_eq!(parse(&with(field, value)).unwrap(), parse(SMALL).unwrap(), "{field}");
        }
    }

    #[test]
    fn a_model_without_a_type_is_known_by_its_architecture() {
        let untyped = |architectures: Value| {
            let mut file: Map<String, Value> = serde_json::from_str(SMALL).unwrap();
            file.remove("model_type");
            file.insert("architectures".to_owned(), architectures);
            parse(&Value::Object(file).to_string())
        };
        for llama in [Value::Null, json!([]), json!(["LlamaForCausalLM"])] {
            assert_eq!(untyped(llama).unwrap(), parse(SMALL).unwrap());
        }
        for other in [json!(["MistralForCausalLM"]), json!(["LlamaForCausalLM", "Other"])] {
            let error = untyped(other).unwrap_err();
            let named = matches!(&error, ConfigError::Unsupported { field: "architectures", .. });
            assert!(named, "{error}");
        }
    }

    fn llama3(changed: &str, value: Value) -> Value {
        let mut section = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        section[changed] = value;
        section
    }

    #[test]
    fn rope_scaling_is_taken_before_rope_parameters() {
        let mut file: Value = serde_json::from_str(SMALL).unwrap();
        file["rope_theta"] = 500.0.into();
        file["rope_parameters"] = llama3("rope_theta", 700.0.into());
        assert_eq!(parse(&file.to_string()).unwrap().rope.theta, 700.0);
        file["rope_scaling"] = json!({});
        assert_eq!(parse(&file.to_string()).unwrap().rope.theta, 700.0);
        file["rope_scaling"] = llama3("factor", 2.0.into());
        let rope = parse(&file.to_string()).unwrap().rope;
        assert_eq!((rope.theta, rope.scaling.unwrap().factor), (500.0, 2.0));
        file["rope_scaling"] = json!({"rope_type": "default"});
        let error = parse(&file.to_string()).unwrap_err();
        let told =
            matches!(&error, ConfigError::Malformed { reason, .. } if reason.contains("rope_parameters"));
        assert!(told, "{error}");
    }

    #[test]
    fn constants_that_cannot_be_computed_with_are_refused() {
        for (field, value) in [
            ("rms_norm_eps", Value::from(0.0)),
            ("rms_norm_eps", (-1e-5).into()),
            ("initializer_range", (-0.02).into()),
            ("rope_theta", 0.0.into()),
            ("rope_parameters", json!({"rope_theta": "10000"})),
            ("rope_scaling", llama3("factor", 0.0.into())),
            ("rope_scaling", llama3("low_freq_factor", (-1.0).into())),
            ("rope_scaling", llama3("low_freq_factor", 4.0.into())),
            ("rope_scaling", llama3("high_freq_factor", 0.5.into())),
            ("rope_scaling", llama3("original_max_position_embeddings", 0.into())),
        ] {
            let error = parse(&with(field, value)).unwrap_err();
            assert!(matches!(error, ConfigError::Malformed { .. }), "{field}: {error}");
        }
        let sound = parse(SMALL).unwrap();
        for spoiled in [
            ModelConfig { norm_eps: f64::INFINITY, ..sound.clone() },
            ModelConfig { initializer_range: f64::NAN, ..sound.clone() },
            ModelConfig { rope: Rope { theta: f64::NAN, scaling: None }, ..sound },
        ] {
            assert!(matches!(spoiled.checked(), Err(ConfigError::OutOfRange { .. })));
        }
        assert!(ModelConfig { initializer_range: 0.0, ..sound }.checked().is_ok());
    }

    #[test]
    fn impossible_sizes_are_errors_not_panics() {
        for (field, value) in [
            ("num_attention_heads", 0usize),
            ("num_attention_heads", 7),
            ("num_key_value_heads", 3),
            ("hidden_size", 0),
            ("vocab_size", usize::MAX / 2),
            ("head_dim", 3),
        ] {
            let error = parse(&with(field, value.into())).unwrap_err();
            assert!(matches!(error, ConfigError::Malformed { .. }), "{field}: {error}");
        }
        assert!(parse("{").is_err());
        assert!(parse(&with("rope_theta", Value::from(-1.0))).is_err());
    }
}
