//! What is read, what is refused, and that what is written is read again.

use std::path::Path;

use serde_json::{Map, Value, json};

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
    let told = matches!(&error, ConfigError::Malformed { reason, .. } if reason.contains("rope_parameters"));
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
