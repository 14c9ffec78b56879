//! What a run is made of, checked before anything is made, and what is said of it before it starts.
//!
//! [`Prepared::new`] goes from what was asked to what will be done: model, output folder, text, memory plan, disk space.
//! The rest are answers that follow from it: whose the state is, where first weights come from, what will be taken and
//! written.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use overspill_swap::Durability;

use super::{Observer, RunFacts, Transport, budget};
use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::{self, ModelConfig};
use crate::data::{Batches, Corpus, Tokenizer};
use crate::error::{TrainError, check_stop};
use crate::identity::{Identity, ModelOrigin};
use crate::init::Initializer;
use crate::layout::{ModelLayout, UnitLayout};
use crate::options::{ModelChoice, Residence, RunOptions, StorageChoice};
use crate::plan::{Fixed, MemoryPlan};
use crate::report;
use crate::storage::StorageNeed;
use crate::volumes::Volumes;
use crate::wear::Forecast;

/// Everything that was checked before anything was made.
pub(super) struct Prepared {
    pub(super) config: ModelConfig,
    pub(super) layout: ModelLayout,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) tokenizer: Tokenizer,
    pub(super) batches: Batches,
    pub(super) plan: MemoryPlan,
}

impl Prepared {
    /// Checks everything; `volumes` are where the state will live, if that is on storage.
    pub(super) fn new(
        options: &RunOptions,
        volumes: Option<&Volumes>,
        stop: &AtomicBool,
    ) -> Result<Self, TrainError> {
        let shape = options.shape.checked()?;
        let (config, tokenizer, checkpoint) = match &options.model {
            ModelChoice::Fresh(fresh) => (fresh.config(shape)?, Tokenizer::Bytes, None),
            ModelChoice::Folder(folder) => {
                let checkpoint = Checkpoint::open(folder)?;
                (checkpoint.config().clone(), Tokenizer::open(folder)?, Some(checkpoint))
            }
        };
        let recipe = options.optimizer.recipe(options.weights, options.moments)?;
        let layout = ModelLayout::of(&config, recipe);
        if let Some(out) = &options.out {
            CheckpointWriter::check_destination(out)?;
        }
        let (fixed, budget) = match &options.residence {
            Residence::Memory => (Fixed::depth(Some(0)), usize::MAX),
            Residence::Storage(storage) => {
                let tile_bytes = volumes.and_then(Volumes::committed).and_then(Identity::tile_bytes);
                let StorageChoice { depth, resident_bytes_max, .. } = *storage;
                (Fixed { depth, tile_bytes, resident_bytes_max }, options.memory)
            }
        };
        let engines_bytes = volumes.map_or(0, Volumes::memory_bytes);
        let plan = |held| MemoryPlan::new(&config, &layout, shape, fixed, engines_bytes + held, budget);
        // The tokenizer is in memory already, and nobody but the system knows how large it is.
        let tokenizer_bytes = match &tokenizer {
            Tokenizer::Bytes => 0,
            Tokenizer::Json(_) => held_since(options.baseline_rss_bytes),
        };
        plan(tokenizer_bytes)?;
        let held_bytes = engines_bytes + tokenizer_bytes;
        let least = MemoryPlan::least_bytes(&config, &layout, shape, fixed, held_bytes);
        let corpus = match options.data.as_slice() {
            [] => Corpus::embedded(&tokenizer)?,
            files => Corpus::read(files, &tokenizer, budget - least, stop)?,
        };
        let batches = Batches::new(corpus, config.vocab, shape.batch, options.seed)?;
        let plan = plan(tokenizer_bytes + batches.corpus().memory_bytes())?;
        if let (Some(volumes), Residence::Storage(StorageChoice { resume: false, durability, .. })) =
            (volumes, &options.residence)
        {
            volumes.check(plan.storage_bytes(&layout, *durability))?;
        }
        Ok(Self { config, layout, checkpoint, tokenizer, batches, plan })
    }

    /// Everything that the numbers of the run depend on.
    pub(super) fn identity(&self, options: &RunOptions) -> Identity {
        let RunOptions { shape, schedule, weight_decay, clip, optimizer, seed, .. } = options;
        let (rule, constants) = optimizer.constants();
        let digest = format!("{:016x}", self.batches.corpus().digest());
        let config = match &self.checkpoint {
            Some(checkpoint) => checkpoint.config_fields().clone(),
            None => self.config.to_fields(),
        };
        // Whoever takes the state out may be somewhere else then.
        let tokenizer = self.tokenizer.folder().map(config::absolute);
        let start = if self.checkpoint.is_some() { "a folder's weights" } else { "fresh weights" };
        let identity = match options.loss_scaler() {
            Some(scaler) => {
                let what = "the loss scale (--loss-scale-init, --loss-scale-growth)";
                Identity::default().with(what, &format!("{scaler:?}"))
            }
            None => Identity::default(),
        };
        identity
            .with("the model", &format!("{:?}", self.config))
            .with("--model", &start)
            .with("the text", &digest)
            .with("--batch", &shape.batch.batch)
            .with("--seq", &shape.batch.seq)
            .with("--accumulate", &shape.accumulate)
            .with("the schedule (--lr, --warmup, --steps)", &format!("{schedule:?}"))
            .with("--weight-decay", weight_decay)
            .with("--clip", &format!("{clip:?}"))
            .with(rule, &constants)
            .with("--seed", seed)
            .of_model(ModelOrigin { config, tokenizer })
    }

    /// The output folder, with all the room it will need, so that no run ends on a full disk.
    pub(super) fn out(&self, options: &RunOptions) -> Result<Option<CheckpointWriter>, TrainError> {
        let create = |out: &PathBuf| match &self.checkpoint {
            Some(source) => CheckpointWriter::create_from(out, source, &self.layout, &self.tokenizer),
            None => CheckpointWriter::create(out, &self.config, &self.layout, &self.tokenizer),
        };
        Ok(options.out.as_ref().map(create).transpose()?)
    }

    /// Where first weights come from.
    pub(super) fn source<'a>(
        &'a self,
        options: &RunOptions,
        stop: &'a AtomicBool,
        observer: &'a mut dyn Observer,
    ) -> impl FnMut(&UnitLayout, &mut [f32]) -> Result<(), TrainError> + use<'a> {
        let initializer = Initializer::new(&self.config, &self.layout, options.seed);
        let units = self.layout.units().len();
        let mut done = 0;
        move |unit, weights| {
            check_stop(stop)?;
            match &self.checkpoint {
                Some(checkpoint) => checkpoint.read_unit(unit, weights)?,
                None => initializer.fill(unit, weights),
            }
            done += 1;
            observer.initialized(done, units);
            Ok(())
        }
    }

    /// Weights, gradients and the optimizer's records.
    pub(super) fn state_bytes(&self) -> u64 {
        self.layout.state_bytes(self.plan.tile_elements()) as u64
    }

    /// Says what is about to happen, after what was `committed`.
    pub(super) fn announce(
        &self,
        options: &RunOptions,
        transport: &Transport,
        committed: Option<&serde_json::Value>,
        observer: &mut dyn Observer,
    ) {
        let steps = options.schedule.steps;
        let steps_finished = committed.and_then(|meta| meta["step"].as_u64()).unwrap_or(0);
        let forecast = self.forecast(options);
        let bytes_to_write = match committed {
            Some(_) => forecast.steps(steps.saturating_sub(steps_finished)),
            None => forecast.run(steps),
        };
        observer.started(&RunFacts {
            parameters: self.layout.numel(),
            state_bytes: self.state_bytes(),
            memory_budget_bytes: budget(options),
            tokens_per_step: options.shape.tokens(),
            steps,
            steps_finished,
            bytes_to_write: budget(options).map(|_| bytes_to_write),
            storage: match &options.residence {
                Residence::Memory => None,
                Residence::Storage(storage) => Some(self.storage(storage.durability)),
            },
            backend: &transport.name,
            degraded_reason: transport.degraded.as_deref(),
        });
        for note in &transport.notes {
            observer.noted(note);
        }
    }

    fn storage(&self, durability: Durability) -> StorageNeed {
        StorageNeed::new(durability, |durability| self.plan.storage_bytes(&self.layout, durability))
    }

    pub(super) fn forecast(&self, options: &RunOptions) -> Forecast {
        let durability = match &options.residence {
            Residence::Memory => Durability::None,
            Residence::Storage(storage) => storage.durability,
        };
        Forecast::new(&self.layout, &self.plan, durability)
    }
}

/// Resident memory that came since the process began, in whole MiB.
fn held_since(baseline_rss_bytes: u64) -> usize {
    let resident = report::memory_of_process("VmRSS").unwrap_or(0);
    (resident.saturating_sub(baseline_rss_bytes) as usize).next_multiple_of(1 << 20)
}
