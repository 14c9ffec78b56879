//! The command `overspill`, for its own binary and for `python -m overspill`.
//!
//! What was typed ([`args`]) is resolved into what is meant, and run; everything that does the work is in the
//! libraries. Whatever goes wrong ends in one line on standard error and an exit status: 2 for a command line that
//! can't be understood, 128 and the signal's number for an interruption (130 for Ctrl-C), 1 for the rest.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod export;
mod gc;
mod import;
mod inspect;
mod interrupt;
mod motion;
mod output;
mod progress;
mod restore;
mod snapshot;
mod store;
mod table;
mod threads;
mod train;
mod tune;
mod verify;

use std::ffi::OsString;

use clap::Parser;
use overspill_train::{TrainError, report};

use crate::args::{Arguments, BenchCommand, Command};

/// Runs the command line `arguments`, the first of which is the program's name; the answer is the exit status.
///
/// Help, and a command line that can't be understood, end the process as they do in every program of `clap`.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    // Before anything is allocated: what the process takes without having done a thing.
    let baseline_rss_bytes = report::memory_of_process("VmHWM").unwrap_or(0);
    let arguments = Arguments::parse_from(arguments);
    let result = threads::start().and_then(|()| match arguments.command {
        Command::Train(arguments) => train::run(&arguments, baseline_rss_bytes),
        Command::Export(arguments) => export::run(&arguments),
        Command::Import(arguments) => import::run(&arguments),
        Command::Bench(BenchCommand::Io(arguments)) => bench::io::run(&arguments),
        Command::Bench(BenchCommand::Adam(arguments)) => bench::adam::run(&arguments),
        Command::Bench(BenchCommand::Step(arguments)) => bench::step::run(&arguments),
        Command::Bench(BenchCommand::Store(arguments)) => bench::store::run(&arguments),
        Command::Bench(BenchCommand::Turns(arguments)) => bench::turns::run(&arguments),
        Command::Tune(arguments) => tune::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Snapshot(arguments) => snapshot::run(&arguments),
        Command::Restore(arguments) => restore::run(&arguments),
        Command::Gc(arguments) => gc::run(&arguments),
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            output::say(&format!("overspill: {}", one_line(&error)));
            match error.downcast_ref::<TrainError>() {
                Some(TrainError::Interrupted) => interrupt::exit_status(),
                _ => 1,
            }
        }
    }
}

/// The error and its causes, each said once.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace('\n', " ")
}
