//! What is seen while a run goes on: a bar on a terminal, a line now and then elsewhere, nothing if so wished.

use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use overspill_train::ByteSize;
use overspill_train::home::{IoReport, Left};
use overspill_train::run::{Observer, RunFacts};
use overspill_train::trainer::StepReport;
use overspill_train::wear::Decimal;

use crate::output;
use crate::table::thousands;

/// Shows a run's progress on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    display: Display,
    started: Instant,
    tokens_per_step: usize,
    steps: u64,
    /// Steps of earlier runs.
    finished: u64,
}

#[derive(Debug)]
enum Display {
    Nothing,
    /// Lines, at most one per [`LINE_EVERY`].
    Lines {
        last: Option<Instant>,
    },
    Bar(ProgressBar),
}

const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    pub(crate) fn new(quiet: bool, terminal: bool) -> Self {
        let display = match (quiet, terminal) {
            (true, _) => Display::Nothing,
            (false, false) => Display::Lines { last: None },
            (false, true) => Display::Bar(ProgressBar::no_length()),
        };
        Self { display, started: Instant::now(), tokens_per_step: 0, steps: 0, finished: 0 }
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(&self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }

    fn say(&self, text: &str) {
        if !matches!(self.display, Display::Nothing) {
            self.say_anyway(text);
        }
    }

    fn say_anyway(&self, text: &str) {
        match &self.display {
            Display::Nothing | Display::Lines { .. } => output::say(text),
            Display::Bar(bar) => bar.suspend(|| output::say(text)),
        }
    }

    /// Shows a stage that goes unit by unit.
    fn units(&self, what: &'static str, done: usize, units: usize) {
        if let Display::Bar(bar) = &self.display {
            if done <= 1 {
                bar.set_style(style("{msg} [{bar:30}] {pos}/{len}"));
                bar.set_message(what);
                bar.set_length(units as u64);
            }
            bar.set_position(done as u64);
        }
    }
}

impl Observer for Progress {
    fn started(&mut self, run: &RunFacts<'_>) {
        self.tokens_per_step = run.tokens_per_step;
        self.steps = run.steps;
        let memory = match run.memory_budget_bytes {
            Some(budget) => format!("in {} of memory, by {}", ByteSize(budget), run.backend),
            None => "in ordinary memory".to_owned(),
        };
        let (parameters, state) = (thousands(run.parameters as u64), ByteSize(run.state_bytes));
        self.say(&format!("training {parameters} parameters ({state} of state) {memory}"));
        if let Some(storage) = run.storage {
            let steps = run.steps.saturating_sub(run.steps_finished);
            let written = Decimal(run.bytes_to_write.unwrap_or(0));
            self.say(&format!("taking {storage}; will write about {written} in {steps} steps"));
        }
        if let Some(reason) = run.degraded_reason {
            self.noted(reason);
        }
    }

    fn noted(&mut self, note: &str) {
        self.say(&format!("note: {note}"));
    }

    fn initialized(&mut self, units_done: usize, units: usize) {
        self.units("writing the first state", units_done, units);
    }

    fn resumed(&mut self, step: u64) {
        self.finished = step;
        self.say(&format!("resuming after step {step}"));
    }

    fn stepped(&mut self, step: &StepReport, io: IoReport) {
        let is_first = step.step == self.finished + 1;
        if is_first {
            self.started = Instant::now() - step.elapsed;
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let tokens_per_second = (self.tokens_per_step as u64 * (step.step - self.finished)) as f64 / seconds;
        let gbps = (io.bytes_read + io.bytes_written) as f64 / 1e9 / seconds;
        let speed = format!("{tokens_per_second:.0} tokens/s  {gbps:.2} GB/s");
        match &mut self.display {
            Display::Nothing => {}
            Display::Bar(bar) => {
                if is_first {
                    bar.reset();
                    bar.set_style(style("step {pos}/{len} [{bar:30}] {msg}"));
                    bar.set_length(self.steps);
                }
                bar.set_position(step.step);
                let steps = (step.step - self.finished, self.steps - step.step);
                let left = HumanDuration(time_left(self.started.elapsed(), steps));
                bar.set_message(format!("loss {:.3}  {speed}  {left:#} left", step.loss));
            }
            Display::Lines { last } => {
                let due = last.is_none_or(|last| last.elapsed() >= LINE_EVERY) || step.step == self.steps;
                if due {
                    *last = Some(Instant::now());
                    output::say(&format!(
                        "step {}/{}  loss {:.3}  {speed}",
                        step.step, self.steps, step.loss
                    ));
                }
            }
        }
    }

    fn exported(&mut self, units_done: usize, units: usize) {
        self.units("writing the model", units_done, units);
    }

    fn left(&mut self, left: &Left) {
        let Left { path, step } = left;
        let path = path.display();
        match *step >= self.steps {
            true => self.say(&format!(
                "the state after the last step, {step}, is kept in {path}; overspill export {path} FOLDER takes it out"
            )),
            // Not even a quiet run that was interrupted keeps this to itself.
            false => self.say_anyway(&format!(
                "the state after step {step} of {} is kept in {path}; go on with the same arguments and --resume",
                self.steps
            )),
        }
    }
}

/// A bar for work that is so many steps of one kind, on a terminal only.
#[derive(Debug)]
pub(crate) struct Steps(ProgressBar);

impl Steps {
    pub(crate) fn new(steps: usize, terminal: bool) -> Self {
        let bar = if terminal { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
        Self(bar.with_style(style("[{bar:30}] {pos}/{len}  {msg}")))
    }

    /// Says what is being done.
    pub(crate) fn say(&self, what: &str) {
        self.0.set_message(what.to_owned());
    }

    pub(crate) fn advance(&self) {
        self.0.inc(1);
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A bar for work that moves so many bytes, on a terminal only.
#[derive(Debug)]
pub(crate) struct Moved(ProgressBar);

impl Moved {
    pub(crate) fn new(what: &'static str, terminal: bool) -> Self {
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let template =
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
        let bar = bar.with_style(style(template));
        bar.set_message(what);
        Self(bar)
    }

    /// So many bytes of so many are done.
    pub(crate) fn show(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.expect("the templates in this file are well-formed").progress_chars("=> ")
}

/// Nobody waits longer: a hundred years.
const FOREVER_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;

/// The time that the steps to come will take, if each takes as long as those of this run did.
fn time_left(elapsed: Duration, (done, to_come): (u64, u64)) -> Duration {
    let seconds = elapsed.as_secs_f64() / done.max(1) as f64 * to_come as f64;
    Duration::from_secs_f64(seconds.min(FOREVER_SECONDS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_earlier_runs_are_not_taken_for_fast_ones() {
        // Resumed after step 90 of 100; two steps took four seconds.
        assert_eq!(time_left(Duration::from_secs(4), (92 - 90, 100 - 92)), Duration::from_secs(16));
        assert_eq!(time_left(Duration::from_secs(4), (2, 0)), Duration::ZERO);
        assert_eq!(time_left(Duration::ZERO, (0, 5)), Duration::ZERO);
        assert!(time_left(Duration::from_secs(9), (1, u64::MAX)) < Duration::MAX, "no step count overflows");
    }
}
