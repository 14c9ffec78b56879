//! `overspill export`: a state, or its weights, out of a store and into a folder.

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use overspill_io::BackendChoice;
use overspill_train::ByteSize;
use overspill_train::checkpoint::Precision;
use overspill_train::transfer::{self, ExportOptions, Exported, Form};

use crate::interrupt;
use crate::output::{self, JsonFile};
use crate::progress::Moved;
use crate::table::{Table, thousands};

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// What the run had as --swap-dir, or the store in it; of several, the first one is enough while the others are
    /// where they were
    #[arg(value_name = "DIR", value_delimiter = ',', num_args = 1, required = true)]
    dir: Vec<PathBuf>,

    /// The folder to make
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Take this snapshot, beside a run that may go on, rather than the committed state of a run that has ended
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,

    /// What to take
    #[arg(long, value_name = "FORM", value_enum, default_value = "weights")]
    form: FormChoice,

    /// Numbers of the weights: bf16 (rounded to the nearest) or fp32; not of a state, which goes as it is stored
    /// [default: bf16]
    #[arg(long, value_name = "DTYPE", value_enum)]
    dtype: Option<DtypeChoice>,

    /// Take the tokenizer's files from this folder [default: the run's --model]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    backend: BackendChoice,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum FormChoice {
    /// A Hugging Face folder
    Weights,
    /// Everything that the optimizer keeps, as it is stored, for `overspill import`
    State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum DtypeChoice {
    Bf16,
    Fp32,
}

pub(crate) fn run(arguments: &ExportArguments) -> anyhow::Result<()> {
    let stop = interrupt::stop_flag()?;
    let options = options(arguments)?;
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let bar = Moved::new("exporting", std::io::stderr().is_terminal());
    let result = transfer::export(&options, &stop, &mut |done, total| bar.show(done, total));
    bar.finish();
    let exported = result?;
    // Only saying so is left, and a failure of that must not be taken for one of the export.
    let is_done =
        || format!("the export is done, into {}, but its numbers are not told", exported.out.display());
    if let Some(json) = json {
        json.write(&exported).with_context(is_done)?;
    }
    output::show(&table(&exported)).with_context(is_done)
}

fn options(arguments: &ExportArguments) -> anyhow::Result<ExportOptions> {
    let a = arguments;
    let form = match (a.form, a.dtype) {
        (FormChoice::Weights, None | Some(DtypeChoice::Bf16)) => Form::Weights(Precision::Bf16),
        (FormChoice::Weights, Some(DtypeChoice::Fp32)) => Form::Weights(Precision::F32),
        (FormChoice::State, dtype) => {
            ensure!(dtype.is_none(), "--dtype is for weights: a state goes as it is stored");
            Form::State
        }
    };
    Ok(ExportOptions {
        directories: a.dir.clone(),
        snapshot: a.snapshot.clone(),
        out: a.out.clone(),
        form,
        tokenizer: a.tokenizer.clone(),
        backend: a.backend,
    })
}

fn table(exported: &Exported) -> Table {
    let e = exported;
    let mut table = Table::default();
    for (index, directory) in e.directories.iter().enumerate() {
        table.line(if index == 0 { "store" } else { "  and" }, directory.display());
    }
    table.line("folder", e.out.display());
    table.line(
        "contents",
        match e.form {
            "state" => format!("state, with weights as {}", e.dtype),
            form => format!("{form} as {}", e.dtype),
        },
    );
    if let Some(snapshot) = &e.snapshot {
        table.line("snapshot", snapshot);
    }
    table.line("after step", e.step);
    table.line("parameters", thousands(e.parameters));
    table.line("read", format!("{} in {:.1} s", ByteSize(e.bytes_read), e.elapsed_seconds));
    table
}
