//! The optimizer behind the Python object: parameters in the caller's memory, their state in a store.
//!
//! It is made or opened over directories whose disks are known as well as their profiles tell; a step goes over all of it,
//! and so does a commit or a roll-back ([`commits`]); [`state`] goes over the records of some parameters. It ends by being
//! dropped, and its directories go with it unless something was committed.

mod commits;
mod state;

use std::path::Path;
use std::time::{Duration, Instant};

use overspill_io::{BackendChoice, EngineConfig, Pool};
use overspill_optim::Isa;
use overspill_swap::optimizer::{
    OptimizerError, OptimizerPlan, OptimizerSwapper, ParameterSpec, PlanOptions, TooSmall,
};
use overspill_swap::{Durability, ServedVolume, Store, Volume, VolumeSite, VolumeSites};
use serde_json::Value;

pub(crate) use self::state::Shown;
use self::state::{MASTER, begin};
use super::coefficients::{Coefficients, Group};
use super::identity::{difference, identity};
use super::recipe::{Described, Formats, Moment, Parameter};
use super::{restoring, weights};
use crate::error::Error;
use crate::tensor::Tensor;

/// What a user decides when the object is made.
#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) formats: Formats,
    pub(super) durability: Durability,
    pub(super) backend: BackendChoice,
    /// All the memory that the state may take, in bytes.
    pub(super) memory_bytes: usize,
    pub(super) resident_bytes_max: Option<usize>,
    pub(super) depth: Option<usize>,
    pub(super) tile_bytes: Option<usize>,
}

/// One parameter of a step.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) parameter: usize,
    pub(super) group: usize,
    /// Counted from 1.
    pub(super) step: u64,
    pub(super) weight: Tensor,
    pub(super) gradient: Tensor,
}

/// Swapped optimizer state, and the parameters that it is of.
#[derive(Debug)]
pub(super) struct Swapped {
    parameters: Vec<Parameter>,
    described: Vec<Described>,
    options: Options,
    isa: Isa,
    /// `None` when it was lost: while parameters were added, or between the state's and the weights' way back to a commit.
    swapper: Option<OptimizerSwapper>,
    store: Store,
    /// The generation that was compared to its end last.
    compared: Option<u64>,
    transport: Transport,
    /// Spent in steps so far.
    stepping: Duration,
}

/// What moves the bytes.
#[derive(Debug)]
struct Transport {
    /// For weights on their way.
    pool: Pool,
    volumes: Vec<ServedVolume>,
    /// What engines take beyond the first, in bytes.
    engines_bytes: usize,
}

impl Swapped {
    /// State without contents in new directories.
    pub(super) fn create(
        described: Vec<Described>,
        sites: Vec<VolumeSite>,
        options: Options,
    ) -> Result<Self, Error> {
        if sites.is_empty() {
            return Err(no_directory());
        }
        let sites = VolumeSites::to_make(sites);
        let parameters = parameters(&described, &options.formats, &[])?;
        let specs = specs(&parameters)?;
        let plan = plan(&parameters, &specs, &options, sites.memory_bytes())?;
        let transport = Transport::start(&sites, options.backend)?;
        let storage_bytes = plan.storage_bytes(options.durability);
        let store = Store::create_over(&transport.for_store(), options.durability, storage_bytes)?;
        let tiles = pool_for(&plan)?;
        let swapper = Some(OptimizerSwapper::create(&specs, plan, &store, &tiles)?);
        let (isa, compared, stepping) = (Isa::detect(), None, Duration::ZERO);
        Ok(Self { parameters, described, options, isa, swapper, store, compared, transport, stepping })
    }

    /// Takes up what was committed, or a snapshot, and fills `weights`, which are read before, too: damage leaves them as
    /// they are. What went with it is `user`, or another process was faster.
    pub(super) fn open(
        described: Vec<Described>,
        weights: &mut [Tensor],
        user: &Value,
        sites: Vec<VolumeSite>,
        options: Options,
        snapshot: Option<&str>,
    ) -> Result<Self, Error> {
        let home = sites.first().ok_or_else(no_directory)?.store.clone();
        let committed = restoring::manifest(&home, snapshot)?;
        let found = &committed.meta["meta"];
        restoring::same(&home, &found["user"], user)?;
        let begins: Vec<usize> = serde_json::from_value(found["begins_tile"].clone())
            .map_err(|_| Error::State(format!("{} has no state of this kind", home.display())))?;
        let expected = identity(&described, &options.formats, &begins);
        if let Some(difference) = difference(found, &expected) {
            return Err(Error::State(format!(
                "{} has the state of another optimizer: {difference}",
                home.display()
            )));
        }
        let parameters = parameters(&described, &options.formats, &begins)?;
        let specs = specs(&parameters)?;
        let tile_bytes = OptimizerSwapper::tile_bytes(&committed.meta);
        let options = Options { tile_bytes, ..options };
        let sites = VolumeSites::to_open(sites, committed.clone());
        let plan = plan(&parameters, &specs, &options, sites.memory_bytes())?;
        let transport = Transport::start(&sites, options.backend)?;
        let volumes = transport.for_store();
        let (durability, blocks) = (options.durability, weights::blocks(&transport.pool));
        let store = match snapshot {
            Some(name) => restoring::restore(&volumes, name, &committed, durability, blocks)?,
            None => Store::open_over(&volumes, durability)?,
        };
        restoring::same(&home, &store.meta(), &committed.meta)?;
        let tiles = pool_for(&plan)?;
        let swapper = Some(OptimizerSwapper::open(&specs, plan, &store, &tiles)?);
        let (isa, compared, stepping) = (Isa::detect(), None, Duration::ZERO);
        let opened =
            Self { parameters, described, options, isa, swapper, store, compared, transport, stepping };
        opened.check_weights(weights)?;
        if snapshot.is_none() {
            let is_weight = |tensor: &str| tensor.starts_with(weights::PREFIX);
            restoring::check(&opened.store, is_weight, weights::blocks(&opened.transport.pool))?;
        }
        weights::load(&opened.store, &opened.transport.pool, weights)?;
        Ok(opened)
    }

    /// What went with the last commit in a directory, or with a snapshot.
    pub(super) fn committed(directory: &Path, snapshot: Option<&str>) -> Result<Value, Error> {
        Ok(restoring::manifest(directory, snapshot)?.meta["meta"]["user"].clone())
    }

    /// Adds parameters behind those that are there.
    pub(super) fn extend(&mut self, described: Vec<Described>) -> Result<(), Error> {
        let mut begins = self.begins_tile();
        if !described.is_empty() {
            begins.push(self.parameters.len());
        }
        let all: Vec<_> = self.described.iter().cloned().chain(described).collect();
        let parameters = parameters(&all, &self.options.formats, &begins)?;
        let specs = specs(&parameters)?;
        let swapper = self.swapper.as_ref().ok_or(OptimizerError::Lost)?;
        self.options.tile_bytes = Some(swapper.plan().tile_bytes());
        let plan = plan(&parameters, &specs, &self.options, self.transport.engines_bytes)?;
        // Those of an earlier commit have their room in the store, too.
        let weights = weights::storage_bytes(self.options.durability, weight_bytes(&parameters));
        self.store.provide(plan.storage_bytes(self.options.durability) + weights)?;
        let swapper = self.swapper.take().ok_or(OptimizerError::Lost)?;
        self.swapper = Some(swapper.extend(&specs, plan)?);
        (self.parameters, self.described) = (parameters, all);
        Ok(())
    }

    /// Updates the parameters of `entries`; every gradient is multiplied by `scale`.
    pub(super) fn step(&mut self, groups: &[Group], entries: &mut [Entry], scale: f32) -> Result<(), Error> {
        let started = Instant::now();
        let stepped = self.update(groups, entries, scale);
        self.stepping += started.elapsed();
        stepped
    }

    fn update(&mut self, groups: &[Group], entries: &mut [Entry], scale: f32) -> Result<(), Error> {
        let mut entry_of = vec![None; self.parameters.len()];
        for (index, entry) in entries.iter().enumerate() {
            let parameter = self.check_weight(entry.parameter, &entry.weight)?;
            let name = &parameter.name;
            let elements = entry.gradient.gradient()?.len();
            if elements != parameter.numel {
                let numel = parameter.numel;
                let message =
                    format!("the gradient of {name} has {elements} elements, the parameter {numel}");
                return Err(Error::Argument(message));
            }
            if entry.gradient.overlaps(&entry.weight) {
                let message = format!("the gradient of {name} is memory of the parameter itself: clone it");
                return Err(Error::Argument(message));
            }
            if groups.get(entry.group).is_none() {
                return Err(Error::Argument(format!(
                    "{name} is in group {}, which was not given",
                    entry.group
                )));
            }
            if entry_of[entry.parameter].replace(index).is_some() {
                return Err(Error::Argument(format!("{name} was given twice")));
            }
        }
        let (parameters, isa) = (&self.parameters, self.isa);
        let swapper = self.swapper.as_mut().ok_or(OptimizerError::Lost)?;
        let wants = |parameter: usize| entry_of[parameter].is_some();
        swapper.step(wants, |mut part| {
            let Some(index) = entry_of[part.parameter] else { return Ok(()) };
            let Entry { group, step, weight, gradient, .. } = &mut entries[index];
            let parameter = &parameters[part.parameter];
            let elements = part.elements.clone();
            if part.is_new {
                begin(isa, parameter, &mut part, weight)?;
            }
            let coefficients = Coefficients::new(&groups[*group], *step, scale);
            let gradient = gradient.gradient_of(elements.clone())?;
            parameter.apply(isa, &coefficients, &mut part, weight.weights_of(elements)?, gradient)
        })?;
        Ok(())
    }

    /// Begins to load what the next step needs first. Of a state that was lost there is nothing: the step says so.
    pub(super) fn prefetch(&mut self) -> Result<(), Error> {
        let prefetched = self.swapper.as_mut().map(OptimizerSwapper::prefetch);
        prefetched.transpose()?;
        Ok(())
    }

    /// Waits for every write; what is being loaded for the next step stays under way.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        Ok(self.swapper.as_mut().ok_or(OptimizerError::Lost)?.pre_backward()?)
    }

    /// The moments of a parameter, and whether it has a master.
    pub(super) fn fields(&self, parameter: usize) -> Result<Vec<Moment>, Error> {
        let shape = &self.described.get(parameter).ok_or_else(|| self.no_parameter(parameter))?.1;
        let found = &self.parameters[parameter];
        let mut fields = found.moments(shape);
        if found.has_master() {
            fields.insert(0, (MASTER, shape.clone()));
        }
        Ok(fields)
    }

    /// Whether a parameter has no state yet.
    pub(super) fn is_new(&self, parameter: usize) -> Result<bool, Error> {
        Ok(self.swapper.as_ref().ok_or(OptimizerError::Lost)?.is_new(parameter)?)
    }

    /// Drops the state of a parameter.
    pub(super) fn purge(&mut self, parameter: usize) -> Result<(), Error> {
        Ok(self.swapper.as_mut().ok_or(OptimizerError::Lost)?.purge(parameter)?)
    }

    /// Time spent in steps so far.
    pub(super) fn stepping(&self) -> Duration {
        self.stepping
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn swapper(&self) -> Result<&OptimizerSwapper, Error> {
        Ok(self.swapper.as_ref().ok_or(OptimizerError::Lost)?)
    }

    /// Who serves the directories, and how.
    pub(super) fn volumes(&self) -> &[ServedVolume] {
        &self.transport.volumes
    }

    /// What the state takes in memory now, in bytes.
    pub(super) fn memory_bytes(&self) -> Result<usize, Error> {
        Ok(self.swapper()?.plan().total_bytes() + besides(&self.parameters, self.transport.engines_bytes))
    }

    fn begins_tile(&self) -> Vec<usize> {
        let parameters = self.parameters.iter().enumerate();
        parameters.filter(|(_, parameter)| parameter.begins_tile).map(|(index, _)| index).collect()
    }

    fn no_parameter(&self, parameter: usize) -> Error {
        OptimizerError::NoParameter { parameter, count: self.parameters.len() }.into()
    }

    fn check_weight(&self, index: usize, weight: &Tensor) -> Result<&Parameter, Error> {
        let parameter = self.parameters.get(index).ok_or_else(|| self.no_parameter(index))?;
        if weight.dtype() != parameter.dtype || weight.numel() != parameter.numel {
            let message =
                format!("parameter {} has another type or another number of elements now", parameter.name);
            return Err(Error::Argument(message));
        }
        Ok(parameter)
    }

    fn check_weights(&self, weights: &[Tensor]) -> Result<(), Error> {
        if weights.len() != self.parameters.len() {
            let (found, expected) = (weights.len(), self.parameters.len());
            return Err(Error::Argument(format!("{found} weights were given for {expected} parameters")));
        }
        weights.iter().enumerate().try_for_each(|(index, weight)| self.check_weight(index, weight).map(drop))
    }
}

impl Transport {
    /// Starts the engines, with the memory for weights.
    fn start(sites: &VolumeSites, backend: BackendChoice) -> Result<Self, Error> {
        let pool = Pool::new(&[weights::CLASS])?;
        let volumes = sites.open(&EngineConfig { backend, ..EngineConfig::default() }, &pool)?;
        Ok(Self { pool, volumes, engines_bytes: sites.memory_bytes() })
    }

    fn for_store(&self) -> Vec<Volume> {
        self.volumes.iter().map(|served| served.volume.clone()).collect()
    }
}

fn parameters(described: &[Described], formats: &Formats, begins: &[usize]) -> Result<Vec<Parameter>, Error> {
    let mut parameters =
        described.iter().map(|one| Parameter::new(one, formats)).collect::<Result<Vec<_>, _>>()?;
    for index in begins {
        let parameter = parameters.get_mut(*index);
        parameter.ok_or_else(|| Error::State("the state is of more parameters".to_owned()))?.begins_tile =
            true;
    }
    Ok(parameters)
}

fn weight_bytes(parameters: &[Parameter]) -> usize {
    parameters.iter().map(|parameter| parameter.numel * parameter.dtype.bytes()).sum()
}

fn specs(parameters: &[Parameter]) -> Result<Vec<ParameterSpec>, Error> {
    parameters.iter().map(Parameter::spec).collect()
}

/// What is no state's, in bytes: what moves weights, the workspace of an update, and engines beyond the first.
fn besides(parameters: &[Parameter], engines_bytes: usize) -> usize {
    let workspace = parameters.iter().map(Parameter::workspace_bytes).max().unwrap_or(0);
    weights::MEMORY_BYTES + workspace + engines_bytes
}

/// Plans the memory: what is no state's comes off first.
fn plan(
    parameters: &[Parameter],
    specs: &[ParameterSpec],
    options: &Options,
    engines_bytes: usize,
) -> Result<OptimizerPlan, Error> {
    let besides = besides(parameters, engines_bytes);
    let plan_options = PlanOptions {
        memory_bytes: options.memory_bytes.saturating_sub(besides),
        kept_bytes_max: options.resident_bytes_max,
        depth: options.depth,
        tile_bytes: options.tile_bytes,
        gradient_bytes: None,
    };
    OptimizerPlan::new(specs, &plan_options).map_err(|error| {
        let least_bytes = error.least_bytes.saturating_add(besides);
        TooSmall { memory_bytes: options.memory_bytes, least_bytes }.into()
    })
}

/// The memory that tiles are in.
fn pool_for(plan: &OptimizerPlan) -> Result<Pool, Error> {
    let classes = plan.classes();
    // Parameters may all be frozen yet: a pool is of something even then.
    Ok(Pool::new(if classes.is_empty() { &[weights::CLASS] } else { &classes })?)
}

fn no_directory() -> Error {
    Error::Argument("at least one directory is needed".to_owned())
}
