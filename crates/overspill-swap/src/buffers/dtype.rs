//! What the elements of a tensor are.
//!
//! Rust code has slices of [`Element`]s; a binding has bytes and the name of a type. Both become [`TensorBytes`],
//! which is always a whole number of elements.

use std::fmt;
use std::str::FromStr;

use super::error::SwapError;

/// The type of a tensor's elements, under the name that PyTorch gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// `float64`.
    F64,
    /// `float32`.
    F32,
    /// `float16`: IEEE 754 binary16.
    F16,
    /// `bfloat16`: the upper half of a `float32`.
    Bf16,
    /// `int64`.
    I64,
    /// `int32`.
    I32,
    /// `int16`.
    I16,
    /// `int8`.
    I8,
    /// `uint8`.
    U8,
}

/// A name that is not that of a [`Dtype`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype `{name}`; known are {}", Dtype::ALL.map(|dtype| dtype.to_string()).join(", "))]
pub struct UnknownDtype {
    /// The name.
    pub name: String,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Dtype; 9] = [
        Dtype::F64,
        Dtype::F32,
        Dtype::F16,
        Dtype::Bf16,
        Dtype::I64,
        Dtype::I32,
        Dtype::I16,
        Dtype::I8,
        Dtype::U8,
    ];

    /// Size of one element, in bytes: a power of two, at most 8.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::Bf16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F64 => "float64",
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::I64 => "int64",
            Dtype::I32 => "int32",
            Dtype::I16 => "int16",
            Dtype::I8 => "int8",
            Dtype::U8 => "uint8",
        })
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Dtype, UnknownDtype> {
        let found = Dtype::ALL.into_iter().find(|dtype| dtype.to_string() == name);
        found.ok_or_else(|| UnknownDtype { name: name.to_owned() })
    }
}

/// A Rust type that is the element of some [`Dtype`]: any bytes are a value of it, and it has no padding.
pub trait Element: bytemuck::Pod {
    /// Its dtype, which has the same size.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($element:ty => $dtype:ident),* $(,)?) => {
        $(
            impl Element for $element {
                const DTYPE: Dtype = Dtype::$dtype;
            }
            const _: () = assert!(size_of::<$element>() == Dtype::$dtype.bytes());
        )*
    };
}

elements! {
    f64 => F64, f32 => F32, half::f16 => F16, half::bf16 => Bf16,
    i64 => I64, i32 => I32, i16 => I16, i8 => I8, u8 => U8,
}

/// A tensor in somebody's memory: its elements' type, and their bytes in the order of the machine.
#[derive(Clone, Copy, Debug)]
pub struct TensorBytes<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> TensorBytes<'a> {
    /// A tensor of `bytes.len() / dtype.bytes()` elements. `bytes` need not be aligned.
    ///
    /// # Errors
    ///
    /// [`SwapError::Ragged`] if the last element is not whole.
    pub fn new(dtype: Dtype, bytes: &'a [u8]) -> Result<TensorBytes<'a>, SwapError> {
        if bytes.len().is_multiple_of(dtype.bytes()) {
            Ok(TensorBytes { dtype, bytes })
        } else {
            Err(SwapError::Ragged { bytes: bytes.len(), dtype })
        }
    }

    /// What the elements are.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// All elements.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl<'a, T: Element> From<&'a [T]> for TensorBytes<'a> {
    fn from(elements: &'a [T]) -> TensorBytes<'a> {
        TensorBytes { dtype: T::DTYPE, bytes: bytemuck::cast_slice(elements) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_are_read_as_they_are_written() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
            assert!(dtype.bytes().is_power_of_two() && dtype.bytes() <= 8);
        }
        let unknown = "complex64".parse::<Dtype>().unwrap_err();
        assert_eq!(unknown.name, "complex64");
        assert!(unknown.to_string().contains("bfloat16"), "{unknown}");
    }

    #[test]
    fn a_tensor_is_a_whole_number_of_elements() {
        let bytes = [0; 12];
        assert_eq!(TensorBytes::new(Dtype::F32, &bytes).unwrap().numel(), 3);
        let refused = TensorBytes::new(Dtype::F64, &bytes).unwrap_err();
        assert_eq!(refused, SwapError::Ragged { bytes: 12, dtype: Dtype::F64 });
        let tensor = TensorBytes::from([half::bf16::ONE; 5].as_slice());
        assert_eq!((tensor.dtype(), tensor.numel(), tensor.bytes().len()), (Dtype::Bf16, 5, 10));
    }
}
