//! A whole run: from what the user wants to the summary of what happened.
//!
//! Everything that can be refused is refused before anything is made: model, output folder, text, memory plan, swap
//! directories, disk space, and whose the state is that is resumed, in this order. Then come the pool, the engines, the
//! output folder with all the room it will need, and the store in directories that the run makes, and removes if they are
//! not to be kept.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use overspill_io::Pool;
use overspill_optim::Isa;
use overspill_swap::Durability;

use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::{self, ModelConfig};
use crate::data::{Batches, Corpus, Tokenizer};
use crate::error::{TrainError, check_stop};
use crate::home::{Home, IoReport, Left, MemoryHome, Site, SwappedHome};
use crate::identity::{Identity, ModelOrigin};
use crate::init::Initializer;
use crate::layout::{ModelLayout, UnitLayout};
use crate::options::{ModelChoice, Residence, RunOptions, StorageChoice};
use crate::plan::{Fixed, MemoryPlan};
use crate::report::{self, Ledger, Measured, Summary, VolumeSummary};
use crate::trainer::{Commit, Settings, StepReport, Trainer};
use crate::volumes::{Opened, Volumes};
use crate::wear::{Forecast, Place, RATE_STEPS, Rated};

/// Hears how a run gets on.
pub trait Observer {
    /// Everything was accepted; the first weights are being written.
    fn started(&mut self, run: &RunFacts<'_>);
    /// Something works, but not as well as it could: unlocked memory, buffered files.
    fn noted(&mut self, note: &str);
    /// A unit's first weights are in place.
    fn initialized(&mut self, units_done: usize, units: usize);
    /// The state after this step was found, and the run goes on from there.
    fn resumed(&mut self, step: u64);
    /// A step is done.
    fn stepped(&mut self, step: &StepReport, io: IoReport);
    /// The trained model is being written; `units_done` of `units` are.
    fn exported(&mut self, units_done: usize, units: usize);
    /// The run is over, for better or worse, and leaves this behind for a later one.
    fn left(&mut self, left: &Left);
}

/// What is known when a run starts.
#[derive(Clone, Copy, Debug)]
pub struct RunFacts<'a> {
    /// Number of parameters.
    pub parameters: usize,
    /// Bytes of weights, gradients and moments.
    pub state_bytes: u64,
    /// Memory budget, in bytes; `None` when there is none.
    pub memory_budget_bytes: Option<u64>,
    /// Tokens per step.
    pub tokens_per_step: usize,
    /// Steps of the run.
    pub steps: u64,
    /// Bytes that the state takes on storage; `None` when it is in memory.
    pub storage_bytes: Option<u64>,
    /// Bytes that the steps to come will write, and the first state; `None` when it is in memory.
    pub bytes_to_write: Option<u64>,
    /// Steps that earlier runs have finished.
    pub steps_finished: u64,
    /// Which backend moves the bytes.
    pub backend: &'a str,
    /// Why not a better one.
    pub degraded_reason: Option<&'a str>,
}

/// Trains a model.
///
/// # Errors
/// [`TrainError`], in one line that says what happened, where, and what to do. Nothing is left behind but the state that is
/// to be kept.
pub fn run(
    options: &RunOptions,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Summary, TrainError> {
    match &options.residence {
        Residence::Memory => Prepared::new(options, None, stop)?.in_memory(options, stop, observer),
        Residence::Storage(storage) => {
            let volumes = Volumes::find(storage)?;
            let prepared = Prepared::new(options, Some(&volumes), stop)?;
            prepared.on_storage(options, storage, &volumes, stop, observer)
        }
    }
}

/// How the bytes are moved, in the words of the report.
struct Transport {
    name: String,
    degraded: Option<String>,
    notes: Vec<String>,
    volumes: Vec<VolumeSummary>,
}

impl Transport {
    fn in_memory() -> Self {
        Self { name: "memory".to_owned(), degraded: None, notes: Vec::new(), volumes: Vec::new() }
    }

    /// Of several volumes, each backend is named once, and the first reason with its volume.
    fn over(volumes: Vec<VolumeSummary>, notes: Vec<String>) -> Self {
        let mut names: Vec<&str> = volumes.iter().map(|volume| volume.backend.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let name = names.join(" and ");
        let reason = |volume: &VolumeSummary| {
            let reason = volume.degraded_reason.clone()?;
            let VolumeSummary { directory, .. } = volume;
            Some(if volumes.len() > 1 { format!("volume {directory}: {reason}") } else { reason })
        };
        let degraded = volumes.iter().find_map(reason);
        Self { name, degraded, notes, volumes }
    }
}

/// From where a run goes on, and what it leaves on the way.
#[derive(Clone, Copy)]
struct Course {
    /// Steps that earlier runs have finished.
    finished: u64,
    commit: Commit,
}

/// Everything that was checked before anything was made.
struct Prepared {
    config: ModelConfig,
    layout: ModelLayout,
    checkpoint: Option<Checkpoint>,
    tokenizer: Tokenizer,
    batches: Batches,
    plan: MemoryPlan,
}

impl Prepared {
    /// Checks everything; `volumes` are where the state will live, if that is on storage.
    fn new(options: &RunOptions, volumes: Option<&Volumes>, stop: &AtomicBool) -> Result<Self, TrainError> {
        let shape = options.shape.checked()?;
        let (config, tokenizer, checkpoint) = match &options.model {
            ModelChoice::Fresh(fresh) => (fresh.config(shape)?, Tokenizer::Bytes, None),
            ModelChoice::Folder(folder) => {
                let checkpoint = Checkpoint::open(folder)?;
                (checkpoint.config().clone(), Tokenizer::open(folder)?, Some(checkpoint))
            }
        };
        let layout = ModelLayout::new(&config);
        if let Some(out) = &options.out {
            CheckpointWriter::check_destination(out)?;
        }
        let (fixed, budget) = match &options.residence {
            Residence::Memory => (Fixed::depth(Some(0)), usize::MAX),
            Residence::Storage(storage) => {
                let tile_bytes = volumes.and_then(Volumes::committed).and_then(Identity::tile_bytes);
                {
                    let resident_bytes_max = storage.resident_bytes_max;
                    (Fixed { depth: storage.depth, tile_bytes, resident_bytes_max }, options.memory)
                }
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

    fn in_memory(
        self,
        options: &RunOptions,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<Summary, TrainError> {
        let transport = Transport::in_memory();
        let out = self.out(options)?;
        self.announce(options, &transport, None, observer);
        let home = MemoryHome::new(&self.layout, &mut self.source(options, stop, observer))?;
        let course = Course { finished: 0, commit: Commit::OnDemand };
        self.train(options, home, course, &transport, out, |_, _| Ok(()), stop, observer)
    }

    fn on_storage(
        self,
        options: &RunOptions,
        storage: &StorageChoice,
        volumes: &Volumes,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<Summary, TrainError> {
        let identity = self.identity(options);
        let check_finished = |path: &Path, finished: u64| match finished > options.schedule.steps {
            false => Ok(()),
            true => {
                let (then, now) = (finished.to_string(), format!("at most {}", options.schedule.steps));
                let (path, what) = (path.to_owned(), "the step".to_owned());
                Err(TrainError::OtherRun { path, what, then, now })
            }
        };
        if let Some(meta) = volumes.committed() {
            check_finished(volumes.home(), identity.check(volumes.home(), meta)?)?;
        }
        let pool = Pool::new(&self.plan.classes())?;
        let committed = volumes.committed().cloned();
        let Opened { volumes, summaries, notes } = volumes.open(storage, &pool)?;
        let transport = Transport::over(summaries, notes);
        let out = self.out(options)?;
        self.announce(options, &transport, committed.as_ref(), observer);
        let site = Site { volumes: &volumes, durability: storage.durability, identity: &identity };
        let (mut home, finished) = match storage.resume {
            true => SwappedHome::open(&self.layout, &self.plan, site, &pool)?,
            false => {
                let mut source = self.source(options, stop, observer);
                (SwappedHome::create(&self.layout, &self.plan, site, &pool, &mut source)?, 0)
            }
        };
        if let Some(note) = home.note() {
            observer.noted(&note);
        }
        let commit = match storage.durability {
            Durability::Step => Commit::EveryStep,
            Durability::None => Commit::OnDemand,
        };
        check_finished(home.path(), finished)?;
        if storage.resume {
            observer.resumed(finished);
        } else if commit == Commit::EveryStep {
            home.commit(0)?;
        }
        // From here on there is something worth keeping, whatever happens.
        if storage.keep && commit == Commit::EveryStep {
            home.keep();
        }
        let finish = |home: &mut SwappedHome, step| {
            if (storage.keep || storage.resume) && commit == Commit::OnDemand {
                home.commit(step)?;
                home.keep();
            }
            Ok(())
        };
        let course = Course { finished, commit };
        self.train(options, home, course, &transport, out, finish, stop, observer)
    }

    /// Everything that the numbers of the run depend on.
    fn identity(&self, options: &RunOptions) -> Identity {
        let RunOptions { shape, schedule, weight_decay, clip, adamw, seed, .. } = options;
        let digest = format!("{:016x}", self.batches.corpus().digest());
        let config = match &self.checkpoint {
            Some(checkpoint) => checkpoint.config_fields().clone(),
            None => self.config.to_fields(),
        };
        // Whoever takes the state out may be somewhere else then.
        let tokenizer = self.tokenizer.folder().map(config::absolute);
        let start = if self.checkpoint.is_some() { "a folder's weights" } else { "fresh weights" };
        Identity::default()
            .with("the model", &format!("{:?}", self.config))
            .with("--model", &start)
            .with("the text", &digest)
            .with("--batch", &shape.batch.batch)
            .with("--seq", &shape.batch.seq)
            .with("--accumulate", &shape.accumulate)
            .with("the schedule (--lr, --warmup, --steps)", &format!("{schedule:?}"))
            .with("--weight-decay", weight_decay)
            .with("--clip", &format!("{clip:?}"))
            .with("AdamW", &format!("{adamw:?}"))
            .with("--seed", seed)
            .of_model(ModelOrigin { config, tokenizer })
    }

    /// The output folder, with all the room it will need, so that no run ends on a full disk.
    fn out(&self, options: &RunOptions) -> Result<Option<CheckpointWriter>, TrainError> {
        let create = |out: &PathBuf| match &self.checkpoint {
            Some(source) => CheckpointWriter::create_from(out, source, &self.layout, &self.tokenizer),
            None => CheckpointWriter::create(out, &self.config, &self.layout, &self.tokenizer),
        };
        Ok(options.out.as_ref().map(create).transpose()?)
    }

    /// Where first weights come from.
    fn source<'a>(
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

    /// Weights, gradients and both moments.
    fn state_bytes(&self) -> u64 {
        4 * self.layout.padded_bytes() as u64
    }

    /// Says what is about to happen, after what was `committed`.
    fn announce(
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
            storage_bytes: match &options.residence {
                Residence::Memory => None,
                Residence::Storage(storage) => {
                    Some(self.plan.storage_bytes(&self.layout, storage.durability))
                }
            },
            backend: &transport.name,
            degraded_reason: transport.degraded.as_deref(),
        });
        for note in &transport.notes {
            observer.noted(note);
        }
    }

    fn forecast(&self, options: &RunOptions) -> Forecast {
        let durability = match &options.residence {
            Residence::Memory => Durability::None,
            Residence::Storage(storage) => storage.durability,
        };
        Forecast::new(&self.config, &self.layout, &self.plan, durability)
    }

    #[expect(clippy::too_many_arguments, reason = "all that was made for the run, to be used up")]
    fn train<H: Home>(
        self,
        options: &RunOptions,
        home: H,
        course: Course,
        transport: &Transport,
        out: Option<CheckpointWriter>,
        finish: impl FnOnce(&mut H, u64) -> Result<(), TrainError>,
        stop: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Result<Summary, TrainError> {
        let state_bytes = self.state_bytes();
        let planned = budget(options).map_or(0, |_| self.forecast(options).step_bytes);
        let settings = Settings {
            shape: options.shape,
            schedule: options.schedule,
            weight_decay: options.weight_decay,
            clip: options.clip,
            adamw: options.adamw,
            isa: Isa::detect(),
            commit: course.commit,
        };
        let trainer = Trainer::new(&self.config, &self.layout, settings, home, self.batches);
        let mut trainer = trainer.after(course.finished);
        let io_before = trainer.home().io().unwrap_or_default();
        let mut ledger = Ledger::default();
        let rated =
            options.endurance.and_then(|endurance| Rated::busiest(endurance, &places(&transport.volumes)));
        let warn = |bytes, elapsed, observer: &mut dyn Observer| {
            let warning = rated.as_ref().and_then(|rated| rated.warning(rated.wear(bytes, bytes, elapsed)));
            warning.into_iter().for_each(|warning| observer.noted(&warning));
        };
        let go_through = || {
            for _ in course.finished..options.schedule.steps {
                let step = trainer.step(stop)?;
                ledger.record(&step);
                let io = trainer.home().io().unwrap_or_default().since(&io_before);
                observer.stepped(&step, io);
                let (steps, elapsed) = ledger.so_far();
                if steps == RATE_STEPS && step.step < options.schedule.steps {
                    warn(io.bytes_written, elapsed, observer);
                }
            }
            trainer.home().settle()?;
            let io_after = trainer.home().io().unwrap_or_default();
            warn(io_after.since(&io_before).bytes_written, ledger.so_far().1, observer);
            // Before the export, which may fail: what was trained is worth keeping.
            finish(trainer.home(), options.schedule.steps)?;
            let units = self.layout.units().len();
            let written = out.map(|mut out| {
                let mut done = 0;
                trainer.weights(|unit, weights| {
                    check_stop(stop)?;
                    out.write_unit(unit, weights)?;
                    done += 1;
                    observer.exported(done, units);
                    Ok(())
                })?;
                Ok::<_, TrainError>(out)
            });
            Ok::<_, TrainError>((io_after, written.transpose()?))
        };
        let gone_through = go_through();
        let left = trainer.home().left();
        // The store goes before the folder comes: it may stand in its way.
        drop(trainer);
        if let Some(left) = left {
            observer.left(&left);
        }
        let (io_after, written) = gone_through?;
        if let Some(written) = written {
            written.finish()?;
        }
        let mut summary = Summary {
            parameters: self.layout.numel() as u64,
            state_bytes,
            memory_budget_bytes: budget(options),
            memory_planned_bytes: budget(options).map(|_| self.plan.total_bytes() as u64),
            baseline_rss_bytes: options.baseline_rss_bytes,
            backend: transport.name.clone(),
            degraded_reason: transport.degraded.clone(),
            depth: self.plan.depth(),
            resident_bytes: budget(options).map(|_| self.plan.resident_bytes() as u64),
            tile_bytes: self.plan.tile_bytes(),
            volumes: transport.volumes.clone(),
            first_step: course.finished.saturating_add(1),
            bytes_written_per_step_planned: planned,
            ..Summary::default()
        };
        let measured = Measured {
            io_before,
            io_after,
            tokens_per_step: options.shape.tokens(),
            parameters: self.layout.numel(),
            rated,
        };
        ledger.summarize(&measured, &mut summary);
        Ok(summary)
    }
}

/// The volumes, as far as wear is concerned. One whose file system cannot be told is a drive of its own.
fn places(volumes: &[VolumeSummary]) -> Vec<Place> {
    let place = |(index, volume): (u64, &VolumeSummary)| {
        let device = std::fs::metadata(&volume.directory).map_or(u64::MAX - index, |found| found.dev());
        Place { directory: volume.directory.clone(), device, weight: volume.weight }
    };
    (0..).zip(volumes).map(place).collect()
}

/// The memory budget, when there is one.
fn budget(options: &RunOptions) -> Option<u64> {
    matches!(options.residence, Residence::Storage(_)).then_some(options.memory as u64)
}

/// Resident memory that came since the process began, in whole MiB.
fn held_since(baseline_rss_bytes: u64) -> usize {
    let resident = report::memory_of_process("VmRSS").unwrap_or(0);
    (resident.saturating_sub(baseline_rss_bytes) as usize).next_multiple_of(1 << 20)
}
