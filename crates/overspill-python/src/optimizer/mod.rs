//! `overspill._native.Optimizer`: swapped optimizer state behind a Python object.
//!
//! The object knows nothing of gradients to come, parameter groups or schedules: each call brings what it needs, and the
//! classes in `python/overspill/optim` decide. `_native.pyi` says what a Python caller sees of it.

#![expect(clippy::needless_pass_by_value, reason = "arguments come from Python by value")]

mod coefficients;
mod identity;
mod recipe;
mod restoring;
mod swapped;
mod weights;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use overspill_optim::Isa;
use overspill_swap::{Compared, Durability, ServedVolume, VolumeSite};
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyTuple};
use serde_json::Value;

use self::coefficients::Group;
use self::recipe::{Described, Formats};
use self::swapped::{Entry, Options, Shown, Swapped};
use crate::argument;
use crate::border::{Owned, computing_threads, outside};
use crate::error::Error;
use crate::tensor::Tensor;

/// Swapped optimizer state; `_native.pyi` describes every method.
#[pyclass(module = "overspill._native", frozen)]
#[derive(Debug)]
pub(crate) struct Optimizer {
    /// `None` once it is closed. Whose it is, is asked before the lock, which another thread may have had when the process
    /// was forked.
    swapped: Owned<Mutex<Option<Swapped>>>,
}

/// `(parameter, group, step, weight, gradient)`.
type GivenEntry<'py> = (usize, usize, u64, Bound<'py, PyAny>, Bound<'py, PyAny>);
/// `(parameter, weight, {field: tensor})`.
type GivenState<'py> = (usize, Bound<'py, PyAny>, Bound<'py, PyMapping>);

/// A directory of the state; a dictionary in Python.
#[derive(IntoPyObject)]
struct VolumeReport {
    directory: OsString,
    weight: u32,
    rings: usize,
    chunk_bytes: usize,
    queue_depth: usize,
    read_gbps: Option<f64>,
    write_gbps: Option<f64>,
}

impl From<&ServedVolume> for VolumeReport {
    fn from(served: &ServedVolume) -> Self {
        Self {
            directory: served.directory().into(),
            weight: served.volume.weight,
            rings: served.volume.engines.len(),
            chunk_bytes: served.chunk_bytes,
            queue_depth: served.queue_depth,
            read_gbps: served.bandwidth.map(|known| known.read_gbps),
            write_gbps: served.bandwidth.map(|known| known.write_gbps),
        }
    }
}

#[pymethods]
impl Optimizer {
    #[staticmethod]
    #[pyo3(signature = (directories, parameters, *, memory_bytes, moments = "float32", stochastic = false,
        initial_accumulator = 0.0, durability = "step", backend = "auto", depth = None, tile_bytes = None,
        resident_bytes_max = None))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn create(
        py: Python<'_>,
        directories: Vec<PathBuf>,
        parameters: Vec<Described>,
        memory_bytes: usize,
        moments: &str,
        stochastic: bool,
        initial_accumulator: f32,
        durability: &str,
        backend: &str,
        depth: Option<usize>,
        tile_bytes: Option<usize>,
        resident_bytes_max: Option<usize>,
    ) -> PyResult<Self> {
        let options = Options {
            formats: Formats { moments: Formats::moments(moments)?, stochastic, initial_accumulator },
            durability: durability_of(durability)?,
            backend: argument::backend(backend)?,
            memory_bytes,
            resident_bytes_max,
            depth,
            tile_bytes,
        };
        let sites = sites(py, directories)?;
        outside(py, || {
            computing_threads()?;
            Swapped::create(parameters, sites, options)
        })
        .map(Self::over)
    }

    #[staticmethod]
    #[pyo3(signature = (directories, parameters, weights, meta, *, memory_bytes, moments = "float32",
        stochastic = false, initial_accumulator = 0.0, durability = "step", backend = "auto", depth = None,
        resident_bytes_max = None, snapshot = None))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn open(
        py: Python<'_>,
        directories: Vec<PathBuf>,
        parameters: Vec<Described>,
        weights: Vec<Bound<'_, PyAny>>,
        meta: &str,
        memory_bytes: usize,
        moments: &str,
        stochastic: bool,
        initial_accumulator: f32,
        durability: &str,
        backend: &str,
        depth: Option<usize>,
        resident_bytes_max: Option<usize>,
        snapshot: Option<String>,
    ) -> PyResult<Self> {
        let options = Options {
            formats: Formats { moments: Formats::moments(moments)?, stochastic, initial_accumulator },
            durability: durability_of(durability)?,
            backend: argument::backend(backend)?,
            memory_bytes,
            resident_bytes_max,
            depth,
            tile_bytes: None,
        };
        let sites = sites(py, directories)?;
        let meta = value_of(meta)?;
        let mut weights = tensors(&weights)?;
        outside(py, || {
            computing_threads()?;
            Swapped::open(parameters, &mut weights, &meta, sites, options, snapshot.as_deref())
        })
        .map(Self::over)
    }

    #[staticmethod]
    #[pyo3(signature = (directory, snapshot = None))]
    fn committed(py: Python<'_>, directory: PathBuf, snapshot: Option<String>) -> PyResult<String> {
        outside(py, || Swapped::committed(&directory, snapshot.as_deref())).map(|meta| meta.to_string())
    }

    #[pyo3(signature = (groups, entries, scale = 1.0))]
    fn step(
        &self,
        py: Python<'_>,
        groups: Vec<Group>,
        entries: Vec<GivenEntry<'_>>,
        scale: f32,
    ) -> PyResult<()> {
        let mut entries = entries
            .into_iter()
            .map(|(parameter, group, step, weight, gradient)| {
                let (weight, gradient) = (Tensor::of(&weight)?, Tensor::of(&gradient)?);
                Ok(Entry { parameter, group, step, weight, gradient })
            })
            .collect::<PyResult<Vec<_>>>()?;
        self.with(py, |swapped| swapped.step(&groups, &mut entries, scale))
    }

    fn prefetch(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, Swapped::prefetch)
    }

    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, Swapped::settle)
    }

    fn fields<'py>(
        &self,
        py: Python<'py>,
        parameter: usize,
    ) -> PyResult<Vec<(&'static str, Bound<'py, PyTuple>)>> {
        let fields = self.with(py, |swapped| swapped.fields(parameter))?;
        fields.into_iter().map(|(name, shape)| Ok((name, PyTuple::new(py, shape)?))).collect()
    }

    fn is_new(&self, py: Python<'_>, parameter: usize) -> PyResult<bool> {
        self.with(py, |swapped| swapped.is_new(parameter))
    }

    fn read_state(&self, py: Python<'_>, wanted: Vec<GivenState<'_>>) -> PyResult<()> {
        let mut wanted = shown(wanted)?;
        self.with(py, |swapped| swapped.read_state(&mut wanted))
    }

    fn write_state(&self, py: Python<'_>, given: Vec<GivenState<'_>>) -> PyResult<()> {
        let mut given = shown(given)?;
        self.with(py, |swapped| swapped.write_state(&mut given))
    }

    fn purge(&self, py: Python<'_>, parameter: usize) -> PyResult<()> {
        self.with(py, |swapped| swapped.purge(parameter))
    }

    fn extend(&self, py: Python<'_>, parameters: Vec<Described>) -> PyResult<()> {
        self.with(py, |swapped| swapped.extend(parameters))
    }

    fn commit(&self, py: Python<'_>, weights: Vec<Bound<'_, PyAny>>, meta: &str) -> PyResult<()> {
        let meta = value_of(meta)?;
        let weights = tensors(&weights)?;
        self.with(py, |swapped| swapped.commit(&weights, &meta))
    }

    fn compare(
        &self,
        py: Python<'_>,
        weights: Vec<Bound<'_, PyAny>>,
        compared: (u64, usize),
    ) -> PyResult<Option<(u64, usize)>> {
        let weights = tensors(&weights)?;
        let (generation, tensors) = compared;
        let left = self.with(py, |swapped| swapped.compare(&weights, Compared { generation, tensors }))?;
        Ok(left.map(|Compared { generation, tensors }| (generation, tensors)))
    }

    fn roll_back(&self, py: Python<'_>, weights: Vec<Bound<'_, PyAny>>) -> PyResult<bool> {
        let mut weights = tensors(&weights)?;
        self.with(py, |swapped| swapped.roll_back(&mut weights))
    }

    fn lose(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |swapped| {
            swapped.lose();
            Ok(())
        })
    }

    fn meta(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |swapped| Ok(swapped.meta().to_string()))
    }

    fn snapshot(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.with(py, |swapped| Ok(swapped.store().snapshot(name)?))
    }

    fn delete_snapshot(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.with(py, |swapped| Ok(swapped.store().delete_snapshot(name)?))
    }

    fn snapshots(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.with(py, |swapped| Ok(swapped.store().snapshots()))
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (volumes, engines, stats, generation, phases, stepping, sizes) = self.with(py, |swapped| {
            let swapper = swapped.swapper()?;
            let plan = swapper.plan();
            let sizes = [
                ("state_bytes", plan.state_bytes()),
                ("resident_bytes", plan.kept_bytes()),
                ("memory_bytes", swapped.memory_bytes()?),
                ("depth", plan.depth()),
                ("tile_bytes", plan.tile_bytes()),
            ];
            let (store, served) = (swapped.store(), swapped.volumes());
            let volumes: Vec<_> = served.iter().map(VolumeReport::from).collect();
            let engines: Vec<_> = served.iter().map(ServedVolume::report).collect();
            let (generation, phases) = (store.generation(), swapper.phases());
            Ok((volumes, engines, store.stats(), generation, phases, swapped.stepping(), sizes))
        })?;
        let told = PyDict::new(py);
        told.set_item("backend", engines[0].backend.to_string())?;
        told.set_item("degraded_reason", engines.into_iter().find_map(|report| report.degraded))?;
        for (name, size) in sizes {
            told.set_item(name, size)?;
        }
        told.set_item("bytes_read", stats.bytes_read)?;
        told.set_item("bytes_written", stats.bytes_written)?;
        told.set_item("seconds_step", stepping.as_secs_f64())?;
        told.set_item("seconds_load", phases.swap_in.as_secs_f64())?;
        told.set_item("seconds_compute", phases.compute.as_secs_f64())?;
        told.set_item("seconds_store", phases.swap_out.as_secs_f64())?;
        told.set_item("passes", phases.passes)?;
        told.set_item("generation", generation)?;
        told.set_item("volumes", volumes)?;
        Ok(told)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        outside(py, || {
            let closed = self.swapped.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(closed);
            Ok::<_, Error>(())
        })
    }
}

impl Optimizer {
    fn over(swapped: Swapped) -> Self {
        Self { swapped: Owned::new(Mutex::new(Some(swapped))) }
    }

    /// Does `work` with the GIL released, alone.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Swapped) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        outside(py, || {
            let mut swapped = self.swapped.get()?.lock().map_err(|_| {
                Error::State("an earlier call ended in a bug: make the optimizer anew".to_owned())
            })?;
            let swapped =
                swapped.as_mut().ok_or_else(|| Error::State("the optimizer is closed".to_owned()))?;
            work(swapped)
        })
    }
}

/// The global 2-norm of gradients.
#[pyfunction]
pub(crate) fn norm(py: Python<'_>, gradients: Vec<Bound<'_, PyAny>>) -> PyResult<f64> {
    let gradients = tensors(&gradients)?;
    outside(py, || {
        computing_threads()?;
        let isa = Isa::detect();
        let squares = gradients.iter().map(|gradient| Ok(gradient.gradient()?.sum_of_squares(isa)));
        Ok::<_, Error>(squares.sum::<Result<f64, Error>>()?.sqrt())
    })
}

/// The places of `directories`, absolute paths, with what is known of their disks. A profile that cannot be used is told as
/// a warning: nothing depends on it but speed.
fn sites(py: Python<'_>, directories: Vec<PathBuf>) -> PyResult<Vec<VolumeSite>> {
    let site = |store: PathBuf| {
        let directory = store.parent().unwrap_or(&store).to_owned();
        let site = outside(py, || Ok::<_, Error>(VolumeSite::find(directory, store)))?;
        if let Some(flaw) = &site.flaw {
            let category = py.get_type::<PyRuntimeWarning>();
            py.import("warnings")?.call_method1("warn", (flaw, category))?;
        }
        Ok(site)
    };
    directories.into_iter().map(site).collect()
}

fn value_of(meta: &str) -> Result<Value, Error> {
    serde_json::from_str(meta).map_err(|error| Error::Argument(format!("meta: {error}")))
}

fn tensors(objects: &[Bound<'_, PyAny>]) -> PyResult<Vec<Tensor>> {
    objects.iter().map(Tensor::of).collect()
}

fn shown(given: Vec<GivenState<'_>>) -> PyResult<Vec<Shown>> {
    let field = |item: Bound<'_, PyAny>| {
        let (name, tensor): (String, Bound<'_, PyAny>) = item.extract()?;
        Ok((name, Tensor::of(&tensor)?))
    };
    let one = |(parameter, weight, fields): GivenState<'_>| {
        let fields = fields.items()?.iter().map(field).collect::<PyResult<Vec<_>>>()?;
        Ok(Shown { parameter, weight: Tensor::of(&weight)?, fields })
    };
    given.into_iter().map(one).collect()
}

fn durability_of(name: &str) -> Result<Durability, Error> {
    match name {
        "step" => Ok(Durability::Step),
        "none" => Ok(Durability::None),
        _ => Err(Error::Argument(format!("durability is {name:?}, but must be 'step' or 'none'"))),
    }
}
