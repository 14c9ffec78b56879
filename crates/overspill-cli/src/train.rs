//! `overspill train`: what was typed becomes the options of a run; the run's numbers become a table and a file.

use std::io::IsTerminal;

use overspill_optim::{
    AdafactorConfig, AdagradConfig, AdamWConfig, LearningRateAdjustment, LionConfig, LossScalerConfig,
    MomentFormat, MuonConfig, SgdConfig, WeightFormat,
};
use overspill_swap::Durability;
use overspill_train::ByteSize;
use overspill_train::model::BatchShape;
use overspill_train::optimizer::Optimizer;
use overspill_train::options::{FreshShape, ModelChoice, Residence, RunOptions, StorageChoice};
use overspill_train::plan::StepShape;
use overspill_train::report::Summary;
use overspill_train::run;
use overspill_train::schedule::Schedule;
use overspill_train::wear::{Decimal, Endurance, lifetime};

use crate::args::{DurabilityChoice, MomentsChoice, OptimizerChoice, TrainArguments, WeightsChoice};
use crate::interrupt;
use crate::output::{self, JsonFile};
use crate::progress::Progress;
use crate::table::{Table, thousands};

pub(crate) fn run(arguments: &TrainArguments, baseline_rss_bytes: u64) -> anyhow::Result<()> {
    refuse_what_has_no_use(arguments)?;
    let stop = interrupt::stop_flag()?;
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let options = options(arguments, baseline_rss_bytes);
    let mut progress = Progress::new(arguments.quiet, std::io::stderr().is_terminal());
    let result = run::run(&options, &stop, &mut progress);
    progress.finish();
    let summary = result?;
    if let Some(json) = json {
        json.write(&summary)?;
    }
    if arguments.quiet { Ok(()) } else { output::show(&table(&summary)) }
}

/// What would not be heard is refused, so that nobody takes it for heard.
fn refuse_what_has_no_use(arguments: &TrainArguments) -> anyhow::Result<()> {
    let a = arguments;
    let has_momentum = matches!(a.optimizer, OptimizerChoice::Sgd | OptimizerChoice::Muon);
    let momentum = a.momentum.unwrap_or(0.0);
    if momentum > 0.0 && !has_momentum {
        anyhow::bail!("--momentum is for --optimizer sgd and muon only");
    }
    let has_betas = match a.optimizer {
        OptimizerChoice::AdamW | OptimizerChoice::Adam | OptimizerChoice::Lion | OptimizerChoice::Muon => {
            true
        }
        OptimizerChoice::Sgd | OptimizerChoice::Adagrad | OptimizerChoice::Adafactor => false,
    };
    let betas = [("beta1", a.beta1.is_some()), ("beta2", a.beta2.is_some())];
    if let Some((which, _)) = betas.iter().find(|(_, given)| *given)
        && !has_betas
    {
        anyhow::bail!("--{which} is for --optimizer adamw, adam, lion and muon only");
    }
    if a.optimizer == OptimizerChoice::Sgd && momentum == 0.0 && a.moments != MomentsChoice::F32 {
        anyhow::bail!("--moments is not for --optimizer sgd without --momentum, which has none");
    }
    let scales = [("init", a.loss_scale_init.is_some()), ("growth", a.loss_scale_growth.is_some())];
    if let Some((which, _)) = scales.iter().find(|(_, given)| *given)
        && a.weights != WeightsChoice::Fp16
    {
        anyhow::bail!("--loss-scale-{which} is for --weights fp16 only");
    }
    Ok(())
}

fn options(arguments: &TrainArguments, baseline_rss_bytes: u64) -> RunOptions {
    let a = arguments;
    let model = match &a.model {
        Some(folder) => ModelChoice::Folder(folder.clone()),
        None => ModelChoice::Fresh(FreshShape {
            layers: a.layers,
            hidden: a.hidden,
            heads: a.heads,
            kv_heads: a.kv_heads,
            ffn: a.ffn,
            vocab: a.vocab,
            tied: a.tied,
        }),
    };
    let residence = match a.in_memory {
        true => Residence::Memory,
        false => Residence::Storage(StorageChoice {
            directories: a.swap_dir.clone(),
            keep: a.keep,
            resume: a.resume,
            durability: match a.durability {
                Some(DurabilityChoice::Step) => Durability::Step,
                Some(DurabilityChoice::None) => Durability::None,
                None if a.keep || a.resume => Durability::Step,
                None => Durability::None,
            },
            backend: a.backend,
            depth: a.depth,
            resident_bytes_max: a.resident.map(|size| usize::try_from(size.0).unwrap_or(usize::MAX)),
        }),
    };
    let learning_rate = if a.model.is_some() { LEARNING_RATE_TUNING } else { LEARNING_RATE_FRESH };
    let learning_rate = learning_rate * learning_rate_scale(a.optimizer);
    let warmup = a.warmup.unwrap_or((a.steps / 10).min(WARMUP_MAX));
    RunOptions {
        model,
        data: a.data.clone(),
        out: a.out.clone(),
        residence,
        memory: usize::try_from(a.memory.0).unwrap_or(usize::MAX),
        shape: StepShape { batch: BatchShape { batch: a.batch, seq: a.seq }, accumulate: a.accumulate },
        schedule: Schedule { peak: a.lr.unwrap_or(learning_rate), warmup, steps: a.steps },
        weight_decay: a.weight_decay.unwrap_or(match a.optimizer {
            OptimizerChoice::AdamW | OptimizerChoice::Lion | OptimizerChoice::Muon => WEIGHT_DECAY_DECOUPLED,
            OptimizerChoice::Adam | OptimizerChoice::Sgd | OptimizerChoice::Adagrad => 0.0,
            // Its steps are relative to the weights, and so long that a decay at their rate would rule.
            OptimizerChoice::Adafactor => 0.0,
        }),
        clip: (a.clip > 0.0).then_some(a.clip),
        optimizer: optimizer(a),
        weights: match a.weights {
            WeightsChoice::F32 => WeightFormat::F32,
            WeightsChoice::Bf16 => WeightFormat::Bf16WithRemainder,
            WeightsChoice::Bf16Stochastic => WeightFormat::Bf16Stochastic,
            WeightsChoice::Fp16 => WeightFormat::F16WithMaster,
        },
        moments: match a.moments {
            MomentsChoice::F32 => MomentFormat::F32,
            MomentsChoice::Bf16 => MomentFormat::Bf16,
            MomentsChoice::Blocks8 => MomentFormat::Blocks8,
        },
        loss_scaler: {
            let default = LossScalerConfig::default();
            LossScalerConfig {
                initial_scale: a.loss_scale_init.unwrap_or(default.initial_scale),
                growth_interval_steps: a.loss_scale_growth.unwrap_or(default.growth_interval_steps),
                ..default
            }
        },
        seed: a.seed,
        endurance: a.endurance,
        baseline_rss_bytes,
    }
}

fn optimizer(arguments: &TrainArguments) -> Optimizer {
    let a = arguments;
    let adam = AdamWConfig::default();
    let (beta1, beta2) = (a.beta1.unwrap_or(adam.beta1), a.beta2.unwrap_or(adam.beta2));
    let adam = AdamWConfig { beta1, beta2, ..adam };
    match a.optimizer {
        OptimizerChoice::AdamW => Optimizer::AdamW(adam),
        OptimizerChoice::Adam => Optimizer::Adam(adam),
        OptimizerChoice::Sgd => {
            Optimizer::Sgd(SgdConfig { momentum: a.momentum.unwrap_or(0.0), ..SgdConfig::default() })
        }
        OptimizerChoice::Adagrad => Optimizer::Adagrad(AdagradConfig::default()),
        OptimizerChoice::Lion => {
            let lion = LionConfig::default();
            let (beta1, beta2) = (a.beta1.unwrap_or(lion.beta1), a.beta2.unwrap_or(lion.beta2));
            Optimizer::Lion(LionConfig { beta1, beta2 })
        }
        OptimizerChoice::Adafactor => Optimizer::Adafactor(AdafactorConfig::default()),
        OptimizerChoice::Muon => {
            let default = MuonConfig::default();
            let momentum = a.momentum.unwrap_or(default.momentum);
            // One learning rate serves the matrices and the rest.
            let adjustment = LearningRateAdjustment::MatchRmsAdamW;
            Optimizer::Muon { muon: MuonConfig { momentum, adjustment, ..default }, adamw: adam }
        }
    }
}

/// How much farther than Adam the optimizer goes with one learning rate, the other way round: lion's updates are as long as
/// Adam's longest, adagrad's shrink with every step, adafactor's are relative to the weights, and sgd's are as short as the
/// gradient.
fn learning_rate_scale(optimizer: OptimizerChoice) -> f64 {
    match optimizer {
        OptimizerChoice::AdamW | OptimizerChoice::Adam | OptimizerChoice::Muon => 1.0,
        OptimizerChoice::Lion => 0.1,
        OptimizerChoice::Adagrad => 5.0,
        OptimizerChoice::Sgd | OptimizerChoice::Adafactor => 50.0,
    }
}

/// Decay of the matrices when the user does not say and the gradient has no part in it.
const WEIGHT_DECAY_DECOUPLED: f64 = 0.1;

/// Highest learning rates when the user does not say: a fresh model has everything to learn, a trained one to lose.
const LEARNING_RATE_FRESH: f64 = 2e-3;
const LEARNING_RATE_TUNING: f64 = 1e-5;

/// Longest warm-up when the user does not say, in steps.
const WARMUP_MAX: u64 = 100;

fn table(summary: &Summary) -> Table {
    let s = summary;
    let size = |bytes| ByteSize(bytes).to_string();
    let per_parameter_step = |bytes: u64| bytes as f64 / (s.parameters as f64 * s.steps.max(1) as f64);
    let mut table = Table::default();
    table.line("parameters", thousands(s.parameters));
    table.line("optimizer", format!("{}, weights {}, moments {}", s.optimizer, s.weights, s.moments));
    table.line("training state", size(s.state_bytes));
    if let (Some(budget), Some(planned)) = (s.memory_budget_bytes, s.memory_planned_bytes) {
        table.line("memory budget", format!("{} ({} planned)", size(budget), size(planned)));
    }
    table.line(
        "peak resident memory",
        format!("{} ({} before the run)", size(s.peak_rss_bytes), size(s.baseline_rss_bytes)),
    );
    let (Some(loss_first), Some(loss_last)) = (s.loss_first, s.loss_last) else {
        let steps = s.first_step.saturating_sub(1);
        table.line("steps", format!("nothing left to do: all {steps} steps were done"));
        return table;
    };
    if s.memory_budget_bytes.is_some() {
        table.line(
            "moved per parameter and step",
            format!(
                "{:.1} bytes ({:.1} read, {:.1} written)",
                s.bytes_per_parameter_step,
                per_parameter_step(s.bytes_read),
                per_parameter_step(s.bytes_written)
            ),
        );
        table
            .line("storage", format!("{:.2} GB/s read, {:.2} GB/s written", s.io_read_gbps, s.io_write_gbps));
        table.line("written", written(s));
        if let Some(life) = life(s) {
            table.line("life of the drive", life);
        }
        table.line("hidden behind computation", format!("{:.0} % of the I/O", 100.0 * s.io_hidden_fraction));
        table.line("in memory for good", size(s.resident_bytes.unwrap_or(0)));
        table.line("backend", backend(s));
        if s.volumes.len() > 1 {
            let weights: Vec<String> = s.volumes.iter().map(|volume| volume.weight.to_string()).collect();
            table.line("volumes", format!("{}, by weights {}", s.volumes.len(), weights.join(" : ")));
        }
    }
    table.line(
        "step",
        format!("{:.3} s, of which the update {:.3} s", s.step_seconds_median, s.update_seconds_median),
    );
    table.line("speed", format!("{:.0} tokens/s", s.tokens_per_second));
    if let Some(scale) = s.loss_scale {
        let skipped = format!("{} of {} steps skipped", s.steps_skipped, s.steps);
        let scale = if scale < 1e9 { scale.to_string() } else { format!("{scale:.2e}") };
        table.line("loss scale", format!("{scale} at the end, {skipped}"));
    }
    table.line("loss", format!("{:.3} → {:.3} in {} steps", loss_first, loss_last, s.steps));
    table
}

fn written(summary: &Summary) -> String {
    let s = summary;
    let run = s.bytes_written_initially + s.bytes_written;
    let written = format!("{} per step, {} in all", Decimal(s.bytes_written_per_step), Decimal(run));
    // A state that went through several runs has more.
    match s.bytes_written_lifetime > run {
        true => format!("{written}, {} with the runs before", Decimal(s.bytes_written_lifetime)),
        false => written,
    }
}

fn life(summary: &Summary) -> Option<String> {
    let used = summary.life_used_fraction?;
    let rating = Endurance::from_bytes(summary.endurance_bytes?)?;
    let mut life = format!("{} of {rating} used", percent(used));
    if let Some(days) = summary.days_to_wear_out {
        life += &format!(", {} at this rate", lifetime(days));
    }
    match &summary.endurance_directory {
        Some(directory) => Some(format!("{life} (the drive of {directory}, which takes the most)")),
        None => Some(life),
    }
}

/// A share of which two digits can be seen, however small it is.
fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    let digits = if percent > 0.0 { (1.0 - percent.log10().floor()).clamp(0.0, 12.0) as usize } else { 0 };
    format!("{percent:.digits$} %")
}

fn backend(summary: &Summary) -> String {
    match &summary.degraded_reason {
        Some(reason) => format!("{} ({reason})", summary.backend),
        None => summary.backend.clone(),
    }
}
