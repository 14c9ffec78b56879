//! Which tensor goes into which file: arithmetic only, done before anything is written.

use safetensors::Dtype;
use serde_json::json;

use crate::layout::Parameter;

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to the nearest number that has half of the bits, to the even one of two.
    Bf16,
}

impl Precision {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<half::bf16>(),
        }
    }

    /// Its name in torch.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// A tensor that will be written, or must be there.
#[derive(Clone, Debug)]
pub(crate) struct TensorPlan {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
}

impl TensorPlan {
    /// A parameter under its own name.
    pub(super) fn of(parameter: &Parameter, precision: Precision) -> Self {
        let (name, shape) = (parameter.name.clone(), parameter.shape.clone());
        Self { name, shape, dtype: precision.dtype() }
    }

    /// Its length, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        bytes(&self.shape, self.dtype)
    }
}

/// Length of a tensor, in bytes.
pub(super) fn bytes(shape: &[usize], dtype: Dtype) -> u64 {
    (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64
}

/// A file of tensors that will be written.
#[derive(Debug)]
pub(super) struct ShardPlan {
    pub(super) name: String,
    pub(super) tensors: Vec<TensorPlan>,
}

/// Names of the files that tensors are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stem(pub(super) &'static str);

impl Stem {
    /// Where all tensors are, unless they are in shards.
    pub(super) fn single(self) -> String {
        format!("{}.safetensors", self.0)
    }

    /// Which shard holds which tensor.
    pub(super) fn index(self) -> String {
        format!("{}.safetensors.index.json", self.0)
    }

    /// One of several files that tensors are in, from 0.
    fn shard(self, index: usize, count: usize) -> String {
        format!("{}-{:05}-of-{count:05}.safetensors", self.0, index + 1)
    }

    /// Whether a file of this name is one of those.
    pub(super) fn names(self, name: &str) -> bool {
        let is_shard = || {
            let numbers = name.strip_prefix(self.0)?.strip_prefix('-')?.strip_suffix(".safetensors")?;
            let (number, count) = numbers.split_once("-of-")?;
            let (number, count): (usize, usize) = (number.parse().ok()?, count.parse().ok()?);
            Some(name == self.shard(number.checked_sub(1)?, count))
        };
        name == self.single() || name == self.index() || is_shard() == Some(true)
    }
}

/// Deals tensors, in their order, to files whose tensors take `shard_bytes_max` at most; a single one that is larger
/// has a file of its own.
pub(super) fn shards(
    tensors: impl IntoIterator<Item = TensorPlan>,
    stem: Stem,
    shard_bytes_max: u64,
) -> Vec<ShardPlan> {
    let mut groups: Vec<Vec<TensorPlan>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        if filled > 0 && filled + bytes > shard_bytes_max {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        groups.last_mut().expect("there is a first group").push(tensor);
    }
    let count = groups.len();
    let name = |index: usize| match count {
        1 => stem.single(),
        _ => stem.shard(index, count),
    };
    groups.into_iter().enumerate().map(|(index, tensors)| ShardPlan { name: name(index), tensors }).collect()
}

/// The text of the index; `None` when one file holds everything.
pub(super) fn index(shards: &[ShardPlan]) -> Option<String> {
    if let [_] = shards {
        return None;
    }
    let tensors = || shards.iter().flat_map(|shard| shard.tensors.iter().map(move |t| (t, &shard.name)));
    let total_size: u64 = tensors().map(|(tensor, _)| tensor.bytes()).sum();
    let weight_map: serde_json::Map<_, _> =
        tensors().map(|(tensor, shard)| (tensor.name.clone(), shard.as_str().into())).collect();
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    Some(format!("{index:#}\n"))
}
