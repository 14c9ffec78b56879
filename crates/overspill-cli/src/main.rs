//! The command `overspill`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    overspill_cli::run(std::env::args_os()).into()
}
