//! `overspill import`: an exported state, or the weights of a Hugging Face folder, into a new store.

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use overspill_io::BackendChoice;
use overspill_swap::Durability;
use overspill_train::ByteSize;
use overspill_train::storage::StorageNeed;
use overspill_train::transfer::{self, ImportOptions, Imported};

use crate::args::DurabilityChoice;
use crate::interrupt;
use crate::output::{self, JsonFile};
use crate::progress::Moved;
use crate::table::{Table, thousands};

#[derive(Debug, Args)]
pub(crate) struct ImportArguments {
    /// A folder that `overspill export --form state` has made, or a Hugging Face folder: its weights start a new run
    #[arg(value_name = "FROM")]
    from: PathBuf,

    /// Existing directory in which the store is made, for `train --resume` with the same --swap-dir; several share the
    /// state as they do for `train`
    #[arg(long, value_name = "DIR", value_delimiter = ',', required = true)]
    swap_dir: Vec<PathBuf>,

    /// What a crash may cost the run that goes on: the step that is under way, or everything, which takes half the storage
    #[arg(long, value_enum, value_name = "WHAT", default_value = "step")]
    durability: DurabilityChoice,

    /// How bytes are moved: auto, io_uring, aio or threads
    #[arg(long, value_name = "NAME", default_value = "auto", env = "OVERSPILL_BACKEND")]
    backend: BackendChoice,

    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(arguments: &ImportArguments) -> anyhow::Result<()> {
    let stop = interrupt::stop_flag()?;
    let json = arguments.json.as_deref().map(JsonFile::prepare).transpose()?;
    let options = ImportOptions {
        from: arguments.from.clone(),
        directories: arguments.swap_dir.clone(),
        durability: match arguments.durability {
            DurabilityChoice::Step => Durability::Step,
            DurabilityChoice::None => Durability::None,
        },
        backend: arguments.backend,
    };
    let bar = Moved::new("importing", std::io::stderr().is_terminal());
    let mut announce = |need: StorageNeed| output::say(&format!("taking {need}"));
    let result = transfer::import(&options, &stop, &mut announce, &mut |done, total| bar.show(done, total));
    bar.finish();
    let imported = result?;
    if imported.form == "state" && !imported.checked {
        output::say(
            "note: the state was exported without checksums, by an older version: nothing was compared",
        );
    }
    // Only saying so is left, and a failure of that must not be taken for one of the import.
    let is_done =
        || format!("the import is done, into {}, but its numbers are not told", imported.store.display());
    if let Some(json) = json {
        json.write(&imported).with_context(is_done)?;
    }
    output::show(&table(&imported, arguments)).with_context(is_done)
}

fn table(imported: &Imported, arguments: &ImportArguments) -> Table {
    let i = imported;
    let directories: Vec<_> = arguments.swap_dir.iter().map(|dir| dir.display().to_string()).collect();
    let resume = format!("--swap-dir {} --resume", directories.join(","));
    let mut table = Table::default();
    table.line("store", i.store.display());
    table.line("after step", i.step);
    table.line("parameters", thousands(i.parameters));
    table.line("storage", ByteSize(i.storage_bytes));
    table.line("written", format!("{} in {:.1} s", ByteSize(i.bytes_written), i.elapsed_seconds));
    table.line(
        "to go on",
        match i.form {
            "state" => format!("overspill train {resume}, and the arguments of the run"),
            _ => format!("overspill train --model {} {resume}", i.from.display()),
        },
    );
    table
}
