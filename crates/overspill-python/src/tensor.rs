//! The memory of a torch tensor, for as long as native code uses it.
//!
//! A [`Tensor`] holds the storage that the Python object had when it was given, so the memory stays where it is, whatever
//! Python drops or exchanges meanwhile. Address and length are those that torch itself says, whatever a subclass does, and
//! lie within the storage. Resizing a storage that is in use is torch's own undefined behavior. Which thread may write to
//! it when is torch's own rule, that nobody writes to a tensor that somebody else is using; whoever breaks it finds mixed
//! bytes, as with torch's own kernels.

#![expect(unsafe_code, reason = "makes slices of the memory that a tensor says it has")]

use std::ops::Range;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use overspill_io::Block;
use overspill_optim::{Gradient, Weights};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::Error;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
    /// Any other; only its bytes count.
    Other,
}

impl Dtype {
    /// Bytes of an element.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Other => 1,
        }
    }
}

/// A dense tensor in the memory of the processor.
#[derive(Debug)]
pub(crate) struct Tensor {
    address: usize,
    bytes: usize,
    dtype: Dtype,
    _storage: Py<PyAny>,
}

impl Tensor {
    /// # Errors
    /// `overspill.UnsupportedError` for what is no dense, contiguous tensor in the processor's memory, all of it.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let torch = Torch::of(py)?;
        if !object.is_instance(torch.tensor.bind(py))? {
            let found = object.get_type().name()?;
            return Err(Error::Unsupported(format!("a torch.Tensor is needed, not {found}")).into());
        }
        let device: String = torch.get("device", object)?.getattr("type")?.extract()?;
        if device != "cpu" {
            return Err(
                Error::Unsupported(format!("the tensor is on {device}: copy it to the CPU first")).into()
            );
        }
        if !torch.get("layout", object)?.is(torch.strided.bind(py))
            || !torch.call("is_contiguous", object)?.extract::<bool>()?
        {
            return Err(
                Error::Unsupported("the tensor is not contiguous: call .contiguous() first".into()).into()
            );
        }
        let without_memory = || Error::Unsupported("the tensor has no memory of its own".into());
        // That of a tensor within a transform of torch.func, say, nobody can have.
        let storage = torch.call("untyped_storage", object).map_err(|error| {
            let is_refused = error.is_instance_of::<PyRuntimeError>(py);
            if is_refused { without_memory().into() } else { error }
        })?;
        let start: usize = storage.call_method0("data_ptr").map_err(|_| without_memory())?.extract()?;
        let element_bytes: usize = torch.call("element_size", object)?.extract()?;
        let offset: usize = torch.call("storage_offset", object)?.extract()?;
        let bytes = element_bytes * torch.call("numel", object)?.extract::<usize>()?;
        let storage_bytes: usize = storage.call_method0("nbytes")?.extract()?;
        let needed = element_bytes.saturating_mul(offset).saturating_add(bytes);
        if bytes > 0 && start == 0 {
            return Err(without_memory().into());
        }
        if bytes > 0 && needed > storage_bytes {
            return Err(Error::Unsupported(format!(
                "the tensor needs {needed} bytes of its storage, which has {storage_bytes}: it was resized"
            ))
            .into());
        }
        let dtype = torch.dtype(&torch.get("dtype", object)?);
        Ok(Self {
            address: if bytes > 0 { start + element_bytes * offset } else { start },
            bytes,
            dtype,
            _storage: storage.unbind(),
        })
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// The address of the first byte.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// Whether it has bytes in common with another.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.address.max(other.address) < (self.address + self.bytes).min(other.address + other.bytes)
    }

    /// The type of the elements.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The contents.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.slice()
    }

    /// The contents, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.slice_mut()
    }

    /// Number of elements.
    pub(crate) fn numel(&self) -> usize {
        self.bytes / self.dtype.bytes()
    }

    /// These elements as weights, to be changed.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another type than fp32, bf16 and fp16.
    ///
    /// # Panics
    /// When there are no such elements.
    pub(crate) fn weights_of(&mut self, elements: Range<usize>) -> Result<Weights<'_>, Error> {
        match self.dtype {
            Dtype::F32 => Ok(Weights::F32(&mut self.slice_mut()[elements])),
            Dtype::Bf16 => Ok(Weights::Bf16(&mut self.slice_mut()[elements])),
            Dtype::F16 => Ok(Weights::F16(&mut self.slice_mut()[elements])),
            Dtype::Other => Err(Error::Unsupported("parameters are fp32, bf16 or fp16".into())),
        }
    }

    /// The contents as gradients.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another type than fp32, bf16 and fp16.
    pub(crate) fn gradient(&self) -> Result<Gradient<'_>, Error> {
        self.gradient_of(0..self.numel())
    }

    /// These elements as gradients.
    ///
    /// # Errors
    /// As [`Tensor::gradient`].
    ///
    /// # Panics
    /// When there are no such elements.
    pub(crate) fn gradient_of(&self, elements: Range<usize>) -> Result<Gradient<'_>, Error> {
        match self.dtype {
            Dtype::F32 => Ok(Gradient::F32(&self.slice()[elements])),
            Dtype::Bf16 => Ok(Gradient::Bf16(&self.slice()[elements])),
            Dtype::F16 => Ok(Gradient::F16(&self.slice()[elements])),
            Dtype::Other => Err(Error::Unsupported("gradients are fp32, bf16 or fp16".into())),
        }
    }

    /// The contents in single precision.
    ///
    /// # Errors
    /// [`Error::Argument`] for another type.
    pub(crate) fn floats(&self) -> Result<&[f32], Error> {
        self.check_floats()?;
        Ok(self.slice())
    }

    /// The contents in single precision, to be changed.
    ///
    /// # Errors
    /// [`Error::Argument`] for another type.
    pub(crate) fn floats_mut(&mut self) -> Result<&mut [f32], Error> {
        self.check_floats()?;
        Ok(self.slice_mut())
    }

    fn check_floats(&self) -> Result<(), Error> {
        let message = || "state is read and set in fp32 tensors".to_owned();
        if self.dtype == Dtype::F32 { Ok(()) } else { Err(Error::Argument(message())) }
    }

    /// The bytes of `range` as a block that an engine can move; the tensor is kept until its last part is gone.
    pub(crate) fn block(self: Arc<Self>, range: Range<usize>) -> Block {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        let start = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(self.address + range.start));
        let start = start.expect("a tensor that has bytes has an address");
        // SAFETY: torch says that the tensor has these bytes, and the storage that is held, the block's owner from here on,
        // keeps them there. The block goes to an engine and nowhere else, which passes addresses on to the kernel: should
        // somebody use the bytes meanwhile, the kernel moves what it finds.
        unsafe { Block::over(start, range.len(), self) }
    }

    /// Sets the bytes from `start` on.
    pub(crate) fn copy_from(&self, start: usize, bytes: &[u8]) {
        let target = self.address_of(start, bytes.len());
        // SAFETY: `address_of` has seen that these bytes are the tensor's, and the storage that is held keeps them there.
        // No reference to them is made. A block of ours is never memory of a tensor's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Fills `bytes` with those from `start` on.
    pub(crate) fn copy_to(&self, start: usize, bytes: &mut [u8]) {
        let source = self.address_of(start, bytes.len());
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Where `bytes` bytes from `start` on are.
    fn address_of(&self, start: usize, bytes: usize) -> *mut u8 {
        let end = start.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes at {start} of {}", self.bytes);
        std::ptr::with_exposed_provenance_mut(self.address + start)
    }

    fn slice<T>(&self) -> &[T] {
        let (start, count) = self.range::<T>();
        // SAFETY: torch says that the tensor has `bytes` bytes from `address` on, initialized or plain numbers any pattern
        // of which is valid; the storage that is held keeps them there. `range` has seen to the alignment and to
        // null. Torch's rule for a tensor in use, at the head of this file, stands in for exclusion.
        unsafe { slice::from_raw_parts(start, count) }
    }

    fn slice_mut<T>(&mut self) -> &mut [T] {
        let (start, count) = self.range::<T>();
        // SAFETY: as in `slice`, and `&mut self` makes this the only slice through this handle.
        unsafe { slice::from_raw_parts_mut(start, count) }
    }

    /// Where `T`s are; the numeric types that torch has, which are aligned to their size there.
    fn range<T>(&self) -> (*mut T, usize) {
        let start = std::ptr::with_exposed_provenance_mut::<T>(self.address);
        if self.bytes == 0 {
            return (NonNull::dangling().as_ptr(), 0);
        }
        assert!(!start.is_null() && start.is_aligned(), "torch aligns elements to their size");
        (start, self.bytes / size_of::<T>())
    }
}

/// What is looked up in torch, once.
struct Torch {
    tensor: Py<PyAny>,
    strided: Py<PyAny>,
    dtypes: [(Py<PyAny>, Dtype); 3],
}

impl Torch {
    fn of(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let name = |name: &str| torch.getattr(name).map(Bound::unbind);
            Ok(Self {
                tensor: name("Tensor")?,
                strided: name("strided")?,
                dtypes: [
                    (name("float32")?, Dtype::F32),
                    (name("bfloat16")?, Dtype::Bf16),
                    (name("float16")?, Dtype::F16),
                ],
            })
        })
    }

    fn dtype(&self, object: &Bound<'_, PyAny>) -> Dtype {
        let mut known = self.dtypes.iter();
        known.find(|(known, _)| object.is(known)).map_or(Dtype::Other, |(_, dtype)| *dtype)
    }

    /// An attribute of a tensor, as `torch.Tensor` itself has it.
    fn get<'py>(&self, name: &str, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.tensor.bind(tensor.py()).getattr(name)?.call_method1("__get__", (tensor,))
    }

    /// The answer of a method of a tensor, as `torch.Tensor` itself has it.
    fn call<'py>(&self, name: &str, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.tensor.bind(tensor.py()).call_method1(name, (tensor,))
    }
}
