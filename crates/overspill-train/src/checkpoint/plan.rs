//! Which parameter goes into which file: arithmetic only, done before anything is written.

use serde_json::json;

use super::SINGLE;
use crate::layout::{ModelLayout, Parameter};

/// A file of weights that will be written.
#[derive(Debug)]
pub(super) struct ShardPlan {
    pub(super) name: String,
    /// In the order of the layout.
    pub(super) parameters: Vec<Parameter>,
}

/// Cuts a model into files whose tensors take `shard_bytes_max` at most; a single parameter that is larger has a
/// file of its own.
pub(super) fn shards(layout: &ModelLayout, shard_bytes_max: u64) -> Vec<ShardPlan> {
    let mut groups: Vec<Vec<Parameter>> = vec![Vec::new()];
    let mut filled = 0;
    for parameter in layout.units().iter().flat_map(|unit| &unit.parameters) {
        let bytes = bytes(parameter);
        if filled > 0 && filled + bytes > shard_bytes_max {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        groups.last_mut().expect("there is a first group").push(parameter.clone());
    }
    let count = groups.len();
    let name = |index: usize| match count {
        1 => SINGLE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    groups
        .into_iter()
        .enumerate()
        .map(|(index, parameters)| ShardPlan { name: name(index), parameters })
        .collect()
}

/// The text of the index; `None` when one file holds everything.
pub(super) fn index(shards: &[ShardPlan]) -> Option<String> {
    if let [_] = shards {
        return None;
    }
    let parameters =
        || shards.iter().flat_map(|shard| shard.parameters.iter().map(move |p| (p, &shard.name)));
    let total_size: u64 = parameters().map(|(parameter, _)| bytes(parameter)).sum();
    let weight_map: serde_json::Map<_, _> =
        parameters().map(|(parameter, shard)| (parameter.name.clone(), shard.as_str().into())).collect();
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    Some(format!("{index:#}\n"))
}

/// Length of a parameter as `f32`, in bytes.
fn bytes(parameter: &Parameter) -> u64 {
    (parameter.range.len() * size_of::<f32>()) as u64
}
