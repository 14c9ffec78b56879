//! A whole run: from what the user wants to the summary of what happened.
//!
//! Everything that can be refused is refused before anything is made: model, output folder, text, memory plan, swap
//! directories, disk space, and whose the state is that is resumed, in this order. Then come the pool, the engines, the
//! output folder with all the room it will need, and the store in directories that the run makes, and removes if they are
//! not to be kept.

mod prepared;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use overspill_io::Pool;
use overspill_optim::Isa;
use overspill_swap::Durability;

use self::prepared::Prepared;
use crate::checkpoint::CheckpointWriter;
use crate::error::{TrainError, check_stop};
use crate::home::{Home, IoReport, Left, MemoryHome, Site, SwappedHome};
use crate::identity::Reached;
use crate::optimizer::Names;
use crate::options::{Residence, RunOptions, StorageChoice};
use crate::report::{Ledger, Measured, Summary, VolumeSummary};
use crate::storage::StorageNeed;
use crate::trainer::{Commit, Settings, StepReport, Trainer};
use crate::volumes::{Opened, Volumes};
use crate::wear::{Place, RATE_STEPS, Rated};

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
    /// Bytes of weights, gradients and the optimizer's records.
    pub state_bytes: u64,
    /// Memory budget, in bytes; `None` when there is none.
    pub memory_budget_bytes: Option<u64>,
    /// Tokens per step.
    pub tokens_per_step: usize,
    /// Steps of the run.
    pub steps: u64,
    /// What the state takes on storage; `None` when it is in memory.
    pub storage: Option<StorageNeed>,
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
    /// What earlier runs have reached.
    reached: Reached,
    commit: Commit,
}

impl Prepared {
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
        let course = Course { reached: Reached::default(), commit: Commit::OnDemand };
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
        let check_finished = |path: &Path, reached: &Reached| match reached.step > options.schedule.steps {
            false => Ok(()),
            true => {
                let (then, now) = (reached.step.to_string(), format!("at most {}", options.schedule.steps));
                let (path, what) = (path.to_owned(), "the step".to_owned());
                Err(TrainError::OtherRun { path, what, then, now })
            }
        };
        if let Some(meta) = volumes.committed() {
            let reached = identity.check(volumes.home(), meta, self.layout.state_recipe())?;
            check_finished(volumes.home(), &reached)?;
        }
        let pool = Pool::new(&self.plan.classes())?;
        let committed = volumes.committed().cloned();
        let Opened { volumes, summaries, notes } = volumes.open(storage, &pool)?;
        let transport = Transport::over(summaries, notes);
        let out = self.out(options)?;
        self.announce(options, &transport, committed.as_ref(), observer);
        let site = Site { volumes: &volumes, durability: storage.durability, identity: &identity };
        let (mut home, reached) = match storage.resume {
            true => SwappedHome::open(&self.layout, &self.plan, site, &pool)?,
            false => {
                let mut source = self.source(options, stop, observer);
                let home = SwappedHome::create(&self.layout, &self.plan, site, &pool, &mut source)?;
                (home, Reached::default())
            }
        };
        if let Some(note) = home.note() {
            observer.noted(&note);
        }
        let commit = match storage.durability {
            Durability::Step => Commit::EveryStep,
            Durability::None => Commit::OnDemand,
        };
        check_finished(home.path(), &reached)?;
        if storage.resume {
            observer.resumed(reached.step);
        } else if commit == Commit::EveryStep {
            home.commit(&reached)?;
        }
        // From here on there is something worth keeping, whatever happens.
        if storage.keep && commit == Commit::EveryStep {
            home.keep();
        }
        let finish = |home: &mut SwappedHome, reached: &Reached| {
            if (storage.keep || storage.resume) && commit == Commit::OnDemand {
                // Before it is committed: if that fails half way, the state may be there all the same.
                home.keep();
                home.commit(reached)?;
            }
            Ok(())
        };
        let course = Course { reached, commit };
        self.train(options, home, course, &transport, out, finish, stop, observer)
    }

    #[expect(clippy::too_many_arguments, reason = "all that was made for the run, to be used up")]
    fn train<H: Home>(
        self,
        options: &RunOptions,
        home: H,
        course: Course,
        transport: &Transport,
        out: Option<CheckpointWriter>,
        finish: impl FnOnce(&mut H, &Reached) -> Result<(), TrainError>,
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
            optimizer: options.optimizer,
            loss_scaler: options.loss_scaler(),
            seed: options.seed,
            isa: Isa::detect(),
            commit: course.commit,
        };
        let trainer = Trainer::new(&self.config, &self.layout, settings, home, self.batches);
        let mut trainer = trainer.after(&course.reached);
        let io_before = trainer.home().io().unwrap_or_default();
        let mut ledger = Ledger::default();
        let rated =
            options.endurance.and_then(|endurance| Rated::busiest(endurance, &places(&transport.volumes)));
        let warn = |bytes, elapsed, observer: &mut dyn Observer| {
            let warning = rated.as_ref().and_then(|rated| rated.warning(rated.wear(bytes, bytes, elapsed)));
            warning.into_iter().for_each(|warning| observer.noted(&warning));
        };
        let go_through = || {
            for _ in course.reached.step..options.schedule.steps {
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
            // Before the export, which may fail: what was trained is worth keeping. The export is tried if this fails: it
            // may be all that is left then.
            let reached = trainer.reached().unwrap_or_default();
            let finished = finish(trainer.home(), &reached);
            let units = self.layout.units().len();
            let written = out.map(|mut out| {
                let mut done = 0;
                trainer.masters(|unit, start, weights| {
                    check_stop(stop)?;
                    out.write_part(unit, start, weights)?;
                    if start + weights.len() == unit.padded {
                        done += 1;
                        observer.exported(done, units);
                    }
                    Ok(())
                })?;
                Ok::<_, TrainError>(out)
            });
            Ok::<_, TrainError>((io_after, reached, finished, written.transpose()))
        };
        let gone_through = go_through();
        let left = trainer.home().left();
        // The store goes before the folder comes: it may stand in its way.
        drop(trainer);
        if let Some(left) = left {
            observer.left(&left);
        }
        let (io_after, reached, finished, written) = gone_through?;
        let written = written.and_then(|out| Ok(out.map(CheckpointWriter::finish).transpose()?));
        finished?;
        written?;
        let names = Names::of(self.layout.state_recipe());
        let mut summary = Summary {
            parameters: self.layout.numel() as u64,
            optimizer: names.optimizer,
            weights: names.weights,
            moments: names.moments,
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
            loss_scale: reached.loss_scale.map(|found| f64::from(found.scale)),
            first_step: course.reached.step.saturating_add(1),
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
