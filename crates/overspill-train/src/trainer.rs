//! One optimizer step after the other: forward, head, backward, update.
//!
//! The model passes through memory twice per step, once in each direction, whatever the number of micro-batches:
//! each unit's weights are fetched, used by *all* micro-batches, and released. What a layer needs again on the way
//! back is its input, which is put away on the way forward.
//!
//! ```text
//! embedding ► layer 0 ► … ► layer n-1 ► head         weights of one unit at a time
//!              │ inputs saved   │          ▼ loss
//! embedding ◄ layer 0 ◄ … ◄ layer n-1 ◄ head         gradients of one unit at a time
//!                                                      then: norm, clipping, update of every piece
//! ```
//!
//! The trainer does not know where anything is kept; that is its [`Home`]'s matter. It adds up in one fixed order,
//! so the same seed gives the same bits in every home.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use overspill_optim::{Isa, LossScalerConfig, Outcome, add_assign, sum_of_squares};

use crate::config::ModelConfig;
use crate::error::{TrainError, check_stop};
use crate::home::{Buffer, GradientStart, Home, SavedInput, Update, Visit, has_masters};
use crate::identity::Reached;
use crate::layout::{ModelLayout, Unit, UnitLayout};
use crate::model::{Activations, Model, Weights};
use crate::optimizer::Optimizer;
use crate::plan::StepShape;
use crate::scaling::Scaling;
use crate::schedule::Schedule;

/// Where batches of token ids come from.
pub trait BatchSource {
    /// Fills one micro-batch: `batch * seq` ids, sequence by sequence, and as many targets. A pure function of the
    /// step (from 1) and the index of the micro-batch. Ids are below the model's vocabulary.
    fn fill(&self, step: u64, micro: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>);
}

/// What stays the same over a run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What a step works on.
    pub shape: StepShape,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Weight decay of matrices; gains of norms do not decay.
    pub weight_decay: f64,
    /// Largest norm of the gradient; a longer one is scaled down to it. `None` leaves gradients as they are.
    pub clip: Option<f64>,
    /// The optimizer of the layout's recipe.
    pub optimizer: Optimizer,
    /// How the scale of the loss moves; `None` leaves the loss as it is.
    pub loss_scaler: Option<LossScalerConfig>,
    /// Seed of what is rounded at random.
    pub seed: u64,
    /// Instructions to compute the update with.
    pub isa: Isa,
    /// When the state is made what a later run finds.
    pub commit: Commit,
}

/// When the state is made what a later run finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// After every step.
    EveryStep,
    /// When somebody asks for it.
    OnDemand,
}

/// Layers between two looks at what the heap holds for nothing.
const TRIM_EVERY: usize = 4;

/// What one step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Its number, from 1.
    pub step: u64,
    /// Mean loss per token, before the update.
    pub loss: f64,
    /// Norm of the gradient, without the scale of the loss, before clipping.
    pub gradient_norm: f64,
    /// Whether the scaled gradient overflowed, so that nothing was updated.
    pub skipped: bool,
    /// Learning rate.
    pub learning_rate: f64,
    /// Duration of the whole step.
    pub elapsed: Duration,
    /// Duration of the update alone.
    pub update_elapsed: Duration,
}

/// Trains a model whose state lives in `H`.
#[derive(Debug)]
pub struct Trainer<H, B> {
    model: Model,
    layout: ModelLayout,
    tied: bool,
    hidden: usize,
    settings: Settings,
    home: H,
    batches: B,
    scaling: Scaling,
    progress: Progress,
}

/// How far the training has come.
#[derive(Clone, Copy, Debug)]
enum Progress {
    /// This many steps are finished, and the state is that after the last of them.
    Finished(u64),
    /// A step failed after it had begun to change the state.
    Lost,
}

/// The tokens of one micro-batch.
struct Micro {
    ids: Vec<u32>,
    targets: Vec<u32>,
}

/// What flows through the model, of each micro-batch: the next unit's input on the way up, its gradient on the way
/// down.
type Flows = Vec<Activations>;

impl<H: Home, B: BatchSource> Trainer<H, B> {
    /// A trainer at step 0.
    pub fn new(config: &ModelConfig, layout: &ModelLayout, settings: Settings, home: H, batches: B) -> Self {
        Self {
            model: Model::new(config, settings.shape.batch),
            layout: layout.clone(),
            tied: config.tied,
            hidden: config.hidden,
            settings,
            home,
            batches,
            scaling: Scaling::new(settings.loss_scaler),
            progress: Progress::Finished(0),
        }
    }

    /// Goes on from the state of a run that had reached this, which the home has.
    #[must_use]
    pub fn after(mut self, reached: &Reached) -> Self {
        self.progress = Progress::Finished(reached.step);
        self.scaling = self.scaling.resume(reached.loss_scale);
        self
    }

    /// How far it has come; `None` when a step failed after it had begun to change the state.
    pub fn reached(&self) -> Option<Reached> {
        match self.progress {
            Progress::Finished(step) => Some(Reached { step, loss_scale: self.scaling.reached() }),
            Progress::Lost => None,
        }
    }

    /// Takes one optimizer step. `stop` is looked at between operations. A step whose scaled gradient overflowed is finished,
    /// too, but is no update: no byte of the state has changed.
    ///
    /// # Errors
    /// [`TrainError::Interrupted`] and [`TrainError::Diverged`] before anything was changed: the step can be taken
    /// again. Anything else, and an interruption of the update itself, leaves no state to go on from.
    pub fn step(&mut self, stop: &AtomicBool) -> Result<StepReport, TrainError> {
        let Progress::Finished(finished) = self.progress else { return Err(self.lost()) };
        let step = finished + 1;
        let started = Instant::now();
        let (loss, gradient_norm, outcome) = match self.gradient(step, stop) {
            Ok(found) => found,
            Err(error) => {
                if !matches!(error, TrainError::Interrupted | TrainError::Diverged { .. }) {
                    self.progress = Progress::Lost;
                }
                return Err(error);
            }
        };

        let update_started = Instant::now();
        let learning_rate = self.settings.schedule.learning_rate(step);
        self.progress = Progress::Lost;
        let skipped = outcome == Outcome::NonFinite;
        match outcome {
            Outcome::Updated => self.home.update(&Update {
                optimizer: self.settings.optimizer,
                learning_rate,
                weight_decay: self.settings.weight_decay,
                update: step - self.scaling.steps_skipped(),
                gradient_scale: clip_coefficient(self.settings.clip, gradient_norm) * self.scaling.unscale(),
                seed: self.settings.seed,
                isa: self.settings.isa,
                stop,
            })?,
            // What was fetched for the update has no use.
            Outcome::NonFinite => self.home.settle()?,
        }
        self.scaling.update(outcome);
        if self.settings.commit == Commit::EveryStep {
            self.home.commit(&Reached { step, loss_scale: self.scaling.reached() })?;
        }
        self.progress = Progress::Finished(step);
        Ok(StepReport {
            step,
            loss,
            gradient_norm,
            skipped,
            learning_rate,
            elapsed: started.elapsed(),
            update_elapsed: update_started.elapsed(),
        })
    }

    /// Computes and puts away the gradient of every unit; returns the loss, the norm of all of them without
    /// the scale of the loss, and whether they are good for an update.
    fn gradient(&mut self, step: u64, stop: &AtomicBool) -> Result<(f64, f64, Outcome), TrainError> {
        let mut squares = 0.0;
        self.home.announce(self.visits())?;
        let micros: Vec<Micro> =
            (0..self.settings.shape.accumulate).map(|micro| self.micro(step, micro)).collect();
        let flows = self.embed(&micros)?;
        let flows = self.forward(flows, stop)?;
        let (loss, flows) = self.head(&micros, flows, &mut squares)?;
        check_finite(step, "the loss", loss)?;
        let flows = self.backward(flows, &mut squares, stop)?;
        self.embed_backward(&micros, flows, &mut squares)?;
        let norm = squares.sqrt() * f64::from(self.scaling.unscale());
        let diverged = TrainError::Diverged { step, what: "the gradient norm", value: norm };
        let outcome = self.scaling.judge(norm).ok_or(diverged)?;
        Ok((loss, norm, outcome))
    }

    /// Hands the weights of every unit that the model computes with to `each`, in forward order.
    ///
    /// # Errors
    /// [`TrainError::Lost`], or what the home or `each` failed with.
    pub fn weights(
        &mut self,
        mut each: impl FnMut(&UnitLayout, &[f32]) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        if matches!(self.progress, Progress::Lost) {
            return Err(self.lost());
        }
        let units: Vec<Unit> = self.layout.units().iter().map(|layout| layout.unit).collect();
        self.home.announce(units.iter().map(|&unit| Visit::Weights(unit)).collect())?;
        for unit in units {
            let bytes = self.home.weights(unit)?;
            each(self.layout.unit(unit), bytemuck::cast_slice(&bytes))?;
        }
        Ok(())
    }

    /// Hands the exact weights of every unit to `each`, in forward order and in pieces, each with its first element.
    ///
    /// # Errors
    /// As [`Trainer::weights`].
    pub fn masters(
        &mut self,
        mut each: impl FnMut(&UnitLayout, usize, &[f32]) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        if !has_masters(self.layout.weight_format()) {
            return self.weights(|unit, weights| each(unit, 0, weights));
        }
        if matches!(self.progress, Progress::Lost) {
            return Err(self.lost());
        }
        for unit in self.layout.units() {
            self.home.masters(unit.unit, &mut |start, values| each(unit, start, values))?;
        }
        Ok(())
    }

    fn lost(&self) -> TrainError {
        TrainError::Lost { left: self.home.left() }
    }

    /// Where the state lives.
    pub fn home(&mut self) -> &mut H {
        &mut self.home
    }

    /// What a step will ask its home for, in order.
    fn visits(&self) -> Vec<Visit> {
        let layers = self.layout.units().len() - 2;
        let mut visits = vec![Visit::Weights(Unit::Embedding)];
        visits.extend((0..layers).map(|layer| Visit::Weights(Unit::Layer(layer))));
        visits.push(Visit::Weights(Unit::Head));
        if self.tied {
            visits.push(Visit::Weights(Unit::Embedding));
        }
        for layer in (0..layers).rev() {
            visits.push(Visit::Weights(Unit::Layer(layer)));
            let inputs = (0..self.settings.shape.accumulate).map(|micro| SavedInput { layer, micro });
            visits.extend(inputs.map(Visit::Input));
        }
        visits
    }

    fn layers(&self) -> impl DoubleEndedIterator<Item = usize> + use<H, B> {
        0..self.layout.units().len() - 2
    }

    fn micro(&self, step: u64, micro: usize) -> Micro {
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        self.batches.fill(step, micro, &mut ids, &mut targets);
        Micro { ids, targets }
    }

    fn embed(&mut self, micros: &[Micro]) -> Result<Flows, TrainError> {
        let bytes = self.home.weights(Unit::Embedding)?;
        let weights = Weights::new(self.layout.unit(Unit::Embedding), bytes);
        Ok(micros.iter().map(|micro| self.model.embed(&weights, &micro.ids)).collect())
    }

    fn forward(&mut self, mut flows: Flows, stop: &AtomicBool) -> Result<Flows, TrainError> {
        for layer in self.layers() {
            check_stop(stop)?;
            let unit = Unit::Layer(layer);
            let weights = Weights::new(self.layout.unit(unit), self.home.weights(unit)?);
            for (micro, flow) in flows.iter_mut().enumerate() {
                self.home.save_input(SavedInput { layer, micro }, flow.as_slice())?;
                *flow = self.model.layer_forward(&weights, flow);
            }
        }
        Ok(flows)
    }

    /// The loss, and the first gradients.
    fn head(
        &mut self,
        micros: &[Micro],
        mut flows: Flows,
        squares: &mut f64,
    ) -> Result<(f64, Flows), TrainError> {
        let weights = Weights::new(self.layout.unit(Unit::Head), self.home.weights(Unit::Head)?);
        let embedding = match self.tied {
            true => {
                Some(Weights::new(self.layout.unit(Unit::Embedding), self.home.weights(Unit::Embedding)?))
            }
            false => None,
        };
        let mut gradient = self.home.gradient(Unit::Head, GradientStart::Zero)?;
        let mut embedding_gradient = match self.tied {
            true => Some(self.home.gradient(Unit::Embedding, GradientStart::Zero)?),
            false => None,
        };
        let tokens = self.settings.shape.tokens() as f64;
        let scale = (f64::from(self.scaling.scale()) / tokens) as f32;
        let isa = self.settings.isa;
        let mut loss = 0.0;
        for (micro, flow) in micros.iter().zip(&mut flows) {
            let (sum, gradient_of_flow) = self.model.head_backward(
                &weights,
                embedding.as_ref(),
                flow,
                &micro.targets,
                scale,
                &mut |unit, range, part| {
                    let whole = match (unit, &mut embedding_gradient) {
                        (Unit::Embedding, Some(gradient)) => gradient,
                        _ => &mut gradient,
                    };
                    add(isa, &mut whole[range], part);
                },
            );
            loss += sum;
            *flow = gradient_of_flow;
        }
        drop((weights, embedding));
        self.put_final(Unit::Head, gradient, squares)?;
        if let Some(gradient) = embedding_gradient {
            self.home.put_gradient(Unit::Embedding, gradient)?;
        }
        Ok((loss / tokens, flows))
    }

    fn backward(
        &mut self,
        mut flows: Flows,
        squares: &mut f64,
        stop: &AtomicBool,
    ) -> Result<Flows, TrainError> {
        let isa = self.settings.isa;
        for layer in self.layers().rev() {
            check_stop(stop)?;
            let unit = Unit::Layer(layer);
            let weights = Weights::new(self.layout.unit(unit), self.home.weights(unit)?);
            let mut gradient = self.home.gradient(unit, GradientStart::Zero)?;
            let mut sink = |_, range: Range<usize>, part: &[f32]| add(isa, &mut gradient[range], part);
            let mut next = Flows::with_capacity(flows.len());
            for (micro, flow) in flows.into_iter().enumerate() {
                let input = self.home.saved_input(SavedInput { layer, micro })?;
                let input = Activations::from_bytes(input, self.hidden);
                next.push(self.model.layer_backward(&weights, &input, flow, &mut sink));
            }
            flows = next;
            drop(weights);
            self.put_final(unit, gradient, squares)?;
            // Pages that are given back have to be had again, so not after every layer.
            if layer.is_multiple_of(TRIM_EVERY) {
                overspill_io::trim_heap();
            }
        }
        Ok(flows)
    }

    fn embed_backward(
        &mut self,
        micros: &[Micro],
        flows: Flows,
        squares: &mut f64,
    ) -> Result<(), TrainError> {
        // A tied head has put its share of this gradient away.
        let start = if self.tied { GradientStart::Resume } else { GradientStart::Zero };
        let mut gradient = self.home.gradient(Unit::Embedding, start)?;
        for (micro, flow) in micros.iter().zip(flows) {
            self.model.embed_backward(&micro.ids, &flow, &mut gradient);
        }
        self.put_final(Unit::Embedding, gradient, squares)
    }

    /// Puts a gradient away that nothing will be added to any more.
    fn put_final(&mut self, unit: Unit, gradient: Buffer, squares: &mut f64) -> Result<(), TrainError> {
        *squares += sum_of_squares(self.settings.isa, &gradient);
        self.home.put_gradient(unit, gradient)
    }
}

fn add(isa: Isa, whole: &mut [f32], part: &[f32]) {
    add_assign(isa, whole, part).expect("the model names a range of the part's length");
}

fn check_finite(step: u64, what: &'static str, value: f64) -> Result<(), TrainError> {
    if value.is_finite() { Ok(()) } else { Err(TrainError::Diverged { step, what, value }) }
}

/// What gradients of this norm are multiplied by, in torch's form.
fn clip_coefficient(clip: Option<f64>, norm: f64) -> f32 {
    clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0) as f32)
}
