//! `overspill._native`: what the Python package `overspill` is made of.
//!
//! ```text
//! python/overspill/*.py        what a PyTorch user sees: classes, docstrings, types
//!        │ tensors, numbers, names
//! border.rs                    the one way in: releases the GIL, catches panics, tells errors as the package's exceptions
//! argument.rs                  numbers and names that cannot be meant, refused in one line
//! tensor.rs                    the memory of a tensor, for as long as it is used: all the unsafe code there is
//! handle/  optimizer/          the engine and the swapped state behind an object each
//! ```
//!
//! A native object belongs to the process that made it. A fork takes a copy along whose threads do not exist: using it
//! is refused, and dropping it does nothing.

mod argument;
mod border;
mod error;
mod handle;
mod optimizer;
mod tensor;

use pyo3::prelude::*;

/// The native half of the package.
#[pymodule]
mod _native {
    /// The package's version.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use crate::handle::Handle;
    #[pymodule_export]
    use crate::handle::pinned::{Pinned, is_pinned, unpin};

    #[pymodule_export]
    use crate::optimizer::{Optimizer, norm};
    #[cfg(feature = "command-line")]
    #[pymodule_export]
    use crate::run;
}

/// Runs the command line; the answer is its exit status.
#[cfg(feature = "command-line")]
#[pyfunction]
fn run(py: Python<'_>, arguments: Vec<std::ffi::OsString>) -> PyResult<u8> {
    border::outside(py, || Ok::<_, error::Error>(overspill_cli::run(arguments)))
}
