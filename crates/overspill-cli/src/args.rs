//! What was typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use overspill_io::BackendChoice;
use overspill_train::ByteSize;
use overspill_train::wear::Endurance;

use crate::bench::cells::Cell;
use crate::export::ExportArguments;
use crate::gc::GcArguments;
use crate::import::ImportArguments;
use crate::inspect::InspectArguments;
use crate::restore::RestoreArguments;
use crate::snapshot::SnapshotArguments;
use crate::verify::VerifyArguments;

/// Trains neural networks that are bigger than memory: what does not fit spills to NVMe, and comes back in time.
#[derive(Debug, Parser)]
#[command(name = "overspill", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train a transformer whose parameters, gradients and optimizer state live on storage
    #[command(args_override_self = true)]
    Train(Box<TrainArguments>),
    /// Take the weights, or the whole state, of a kept run out of its store, or out of a snapshot while the run goes on
    Export(ExportArguments),
    /// Make a store that `train --resume` goes on from, out of an exported state or a Hugging Face folder
    Import(ImportArguments),
    /// Measure this machine, beside the best that is known
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Find how to get the most out of a directory's disk, in under a minute, and leave a profile there for `train`
    Tune(TuneArguments),
    /// Show what a store holds, in use or not: generations, snapshots, tensors, free space, wear
    Inspect(InspectArguments),
    /// Read every byte of a store's generations, compare it with what was stored, and name what is damaged
    Verify(VerifyArguments),
    /// Keep the committed state under a name without copying it, also while it is being trained on; or list what is kept
    Snapshot(SnapshotArguments),
    /// Go back to a snapshot, or to the generation before the last commit
    Restore(RestoreArguments),
    /// List the stores and the unfinished folders that ended processes left, and remove what nothing can be resumed from
    Gc(GcArguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Read and write speed of the engine, beside fio on the same file
    Io(BenchIoArguments),
    /// Speed of the AdamW update, beside a STREAM triad
    Adam(BenchAdamArguments),
    /// What checksums, snapshots and commits cost, beside the same bytes without them
    Store(BenchStoreArguments),
    /// An optimizer step with its state on storage, beside what the disk and the processor allow
    Step(BenchStepArguments),
    /// One side of a comparison that another program leads
    #[command(hide = true)]
    Turns(BenchTurnsArguments),
}

#[derive(Debug, Args)]
pub(crate) struct TrainArguments {
    /// Text to train on: UTF-8 files, or JSONL files with a string field `text` [default: overspill's own sources]
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,

    /// Start from this Hugging Face folder (config.json, *.safetensors, tokenizer.json)
    #[arg(long, value_name = "DIR", conflicts_with_all = ["layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "tied"])]
    pub(crate) model: Option<PathBuf>,

    /// Write the trained model to this new Hugging Face folder
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// Existing directory on a fast disk, in which the run makes its own; several, on as many disks, share the state by
    /// their speed, with the first one as its home [default: the current directory]
    #[arg(long, value_name = "DIR", value_delimiter = ',', conflicts_with = "in_memory")]
    pub(crate) swap_dir: Vec<PathBuf>,

    /// Leave the state on storage, whatever happens; with --durability none at the end only
    #[arg(long, requires = "swap_dir")]
    pub(crate) keep: bool,

    /// Go on from the last committed step of the run that was kept there; all other arguments are those of that run
    #[arg(long, requires = "swap_dir")]
    pub(crate) resume: bool,

    /// What a crash may cost: the step that is under way, or everything, which takes half the storage [default: step with
    /// --keep or --resume, none otherwise]
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "in_memory", help_heading = "How it runs")]
    pub(crate) durability: Option<DurabilityChoice>,

    /// All the memory the run may take
    #[arg(long, value_name = "SIZE", default_value = "88MiB")]
    pub(crate) memory: ByteSize,

    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) steps: u64,

    /// Sequences per micro-batch
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = positive)]
    pub(crate) batch: usize,

    /// Tokens per sequence
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    pub(crate) seq: usize,

    /// Micro-batches per step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub(crate) accumulate: usize,

    /// Highest learning rate; with muon that of its matrices, too, whose updates are made as long as adamw's [default: 0.002
    /// for a fresh model, 0.00001 for one of --model; a tenth of it with lion, 5 times with adagrad, 50 times with sgd
    /// and adafactor]
    #[arg(long, value_name = "RATE", value_parser = non_negative)]
    pub(crate) lr: Option<f64>,

    /// Weight decay of the matrices: beside the gradient (adamw, lion, muon, adafactor) or in it [default: 0.1 beside it, but 0
    /// with adafactor, and 0 in it]
    #[arg(long, value_name = "RATE", value_parser = non_negative)]
    pub(crate) weight_decay: Option<f64>,

    /// The rule of the update
    #[arg(long, value_enum, value_name = "NAME", default_value = "adamw", help_heading = "Optimizer")]
    pub(crate) optimizer: OptimizerChoice,

    /// How weights are stored; the model computes with them, widened
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "f32", help_heading = "Optimizer")]
    pub(crate) weights: WeightsChoice,

    /// How the optimizer's moments are stored; those of adafactor and muon in f32 only
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "f32", help_heading = "Optimizer")]
    pub(crate) moments: MomentsChoice,

    /// Decay of the first moment of adamw, adam and the adamw beside muon; what lion's update takes of it [default: 0.9]
    #[arg(long, value_name = "RATE", value_parser = below_one, help_heading = "Optimizer")]
    pub(crate) beta1: Option<f64>,

    /// Decay of the second moment of adamw, adam and the adamw beside muon, of the only one of lion [default: 0.95; 0.99 of
    /// lion]
    #[arg(long, value_name = "RATE", value_parser = below_one, help_heading = "Optimizer")]
    pub(crate) beta2: Option<f64>,

    /// What sgd keeps of its running sum of gradients, and muon of its running mean; at 0 sgd has none, and stores nothing
    /// beside the weights [default: 0 of sgd, 0.95 of muon]
    #[arg(long, value_name = "RATE", value_parser = below_one, help_heading = "Optimizer")]
    pub(crate) momentum: Option<f64>,

    /// With --weights fp16, what the loss is multiplied with at first; a step whose gradient overflows is skipped, and halves
    /// it [default: 65536]
    #[arg(long, value_name = "SCALE", value_parser = scale, help_heading = "Optimizer")]
    pub(crate) loss_scale_init: Option<f32>,

    /// With --weights fp16, steps in a row without an overflow that double the scale of the loss [default: 2000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Optimizer")]
    pub(crate) loss_scale_growth: Option<u32>,

    /// Largest norm of the gradient; 0 never clips
    #[arg(long, value_name = "NORM", default_value_t = 1.0, value_parser = non_negative)]
    pub(crate) clip: f64,

    /// Steps over which the learning rate rises [default: a tenth of all, at most 100]
    #[arg(long, value_name = "N")]
    pub(crate) warmup: Option<u64>,

    /// Seed of the first weights and of the order of the data
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Decoder layers of a fresh model
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Shape of a fresh model")]
    pub(crate) layers: usize,

    /// Width of a fresh model
    #[arg(long, value_name = "N", default_value_t = 384, help_heading = "Shape of a fresh model")]
    pub(crate) hidden: usize,

    /// Query heads of a fresh model
    #[arg(long, value_name = "N", default_value_t = 6, help_heading = "Shape of a fresh model")]
    pub(crate) heads: usize,

    /// Key and value heads of a fresh model [default: half of the query heads, or all if they are odd]
    #[arg(long, value_name = "N", help_heading = "Shape of a fresh model")]
    pub(crate) kv_heads: Option<usize>,

    /// Width of a fresh model's feed-forward part [default: 8/3 of the width, rounded up to a multiple of 64]
    #[arg(long, value_name = "N", help_heading = "Shape of a fresh model")]
    pub(crate) ffn: Option<usize>,

    /// Token ids of a fresh model; text is read byte by byte, so at least 256 [default: 256]
    #[arg(long, value_name = "N", help_heading = "Shape of a fresh model")]
    pub(crate) vocab: Option<usize>,

    /// Share the embedding's weights with the head of a fresh model
    #[arg(long, help_heading = "Shape of a fresh model")]
    pub(crate) tied: bool,

    /// Keep everything in ordinary memory: the reference that swapping is compared with
    #[arg(long, help_heading = "How it runs", conflicts_with_all = ["memory", "depth"])]
    pub(crate) in_memory: bool,

    /// Parts of the state that are loaded ahead and stored behind; 0 overlaps nothing [default: as the memory allows]
    #[arg(long, value_name = "N", help_heading = "How it runs", value_parser = depth)]
    pub(crate) depth: Option<usize>,

    /// The most of the state that may stay in memory for good [default: as much as --memory has room for]
    #[arg(long, value_name = "SIZE", help_heading = "How it runs")]
    pub(crate) resident: Option<ByteSize>,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(
        long,
        value_name = "NAME",
        default_value = "auto",
        env = "OVERSPILL_BACKEND",
        help_heading = "How it runs"
    )]
    pub(crate) backend: BackendChoice,

    /// Bytes that each drive is rated to be written, such as 600TBW: how much of its life the run uses is said then
    #[arg(long, value_name = "TBW", conflicts_with = "in_memory", help_heading = "Output")]
    pub(crate) endurance: Option<Endurance>,

    /// Write the numbers of the run to this file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) json: Option<PathBuf>,

    /// No progress bar and no table
    #[arg(long, help_heading = "Output")]
    pub(crate) quiet: bool,
}

/// What a crash may cost.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum DurabilityChoice {
    /// The step that is under way
    Step,
    /// Everything
    None,
}

/// The rule of the update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OptimizerChoice {
    /// Adam with decoupled weight decay: two moments
    #[value(name = "adamw")]
    AdamW,
    /// Adam with the weight decay in the gradient: two moments
    Adam,
    /// Stochastic gradient descent: one moment with --momentum, none without
    Sgd,
    /// The root of the sum of all squared gradients: one moment
    Adagrad,
    /// The sign of the interpolated momentum: one moment
    Lion,
    /// A second moment by rows and columns: next to nothing; a parameter is loaded and updated as a whole
    Adafactor,
    /// For the matrices of the layers, momentum made orthogonal: one moment; each is loaded and updated as a whole. Embedding,
    /// head and norms go by adamw beside it
    Muon,
}

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WeightsChoice {
    /// Single precision: 4 bytes
    F32,
    /// bf16 for the model, and what it lacks of the exact weight for the optimizer: 2 bytes and 2
    Bf16,
    /// bf16 alone, rounded at random: 2 bytes
    Bf16Stochastic,
    /// fp16 for the model, and the exact weight for the optimizer: 2 bytes and 4; the loss is scaled, and steps that
    /// overflow are skipped
    Fp16,
}

/// How moments are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MomentsChoice {
    /// Single precision: 4 bytes each
    F32,
    /// bf16, rounded at random: 2 bytes each
    Bf16,
    /// 8 bits, rounded at random, with a scale for 256 of them: 1 byte each
    #[value(name = "8bit")]
    Blocks8,
}

#[derive(Debug, Args)]
pub(crate) struct BenchIoArguments {
    /// Existing directory on the disk to measure
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,

    /// Size of the file, or of all sixteen together
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) size: ByteSize,

    /// What to measure [default: everything]
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    pub(crate) cells: Vec<Cell>,

    /// How many times each side is measured, in turns
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = positive)]
    pub(crate) pairs: usize,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    pub(crate) backend: BackendChoice,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchAdamArguments {
    /// Number of parameters
    #[arg(long, value_name = "N", default_value_t = 100_000_000, value_parser = positive)]
    pub(crate) parameters: usize,

    /// How many times each side is measured, in turns
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = positive)]
    pub(crate) pairs: usize,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchStepArguments {
    /// Existing directory on the disk to measure
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,

    /// Number of parameters; each has 10 bytes of state on storage, and 4 bytes of weights and gradients in memory
    #[arg(long, value_name = "N", default_value_t = 220_000_000, value_parser = positive)]
    pub(crate) parameters: usize,

    /// All the memory that moving the state may take
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub(crate) memory: ByteSize,

    /// Tiles that are loaded ahead and stored behind [default: as the memory allows]
    #[arg(long, value_name = "N", value_parser = depth)]
    pub(crate) depth: Option<usize>,

    /// Bytes of a tile [default: as the memory allows]
    #[arg(long, value_name = "SIZE")]
    pub(crate) tile: Option<ByteSize>,

    /// What a crash may cost: with step every step is committed, and measured beside steps that are not
    #[arg(long, value_enum, value_name = "WHAT", default_value = "none")]
    pub(crate) durability: DurabilityChoice,

    /// Percents of the state that stay in memory, beside --memory: measures a step with each, as 0,25,50,75,100, and
    /// nothing else
    #[arg(long, value_name = "P,...", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(..=100))]
    pub(crate) resident: Vec<u8>,

    /// How many times each side is measured, in turns
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = positive)]
    pub(crate) pairs: usize,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    pub(crate) backend: BackendChoice,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchStoreArguments {
    /// Existing directory on the disk to measure
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,

    /// Size of the state
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) size: ByteSize,

    /// How many times each side is measured, in turns
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = positive)]
    pub(crate) pairs: usize,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    pub(crate) backend: BackendChoice,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchTurnsArguments {
    /// Existing directory for the files
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,

    /// Size of all files together
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) size: ByteSize,

    /// Number of files
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub(crate) files: usize,

    /// Bytes that are moved at a time
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    pub(crate) block: ByteSize,

    /// How many blocks are with the kernel at a time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive)]
    pub(crate) depth: usize,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    pub(crate) backend: BackendChoice,
}

#[derive(Debug, Args)]
pub(crate) struct TuneArguments {
    /// Existing directory on the disk to tune for; its profile counts for all directories in it, too
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) dir: PathBuf,

    /// About how long it may take
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    pub(crate) backend: BackendChoice,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// A pipeline deeper than this holds more memory than it can hide latency.
const DEPTH_MAX: usize = 64;

fn depth(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(depth) if depth <= DEPTH_MAX => Ok(depth),
        _ => Err(format!("must be a whole number up to {DEPTH_MAX}")),
    }
}

fn non_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("must be a number, not negative".to_owned()),
    }
}

fn scale(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if number.is_normal() && number > 0.0 => Ok(number),
        _ => Err(format!("must be a number from {:e} to {:e}", f32::MIN_POSITIVE, f32::MAX)),
    }
}

fn below_one(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("must be a number from 0 up to, but not including, 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
