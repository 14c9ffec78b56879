//! The command as a user meets it: the binary is run, its output and what it leaves behind are looked at.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, its helpers too")]

mod bench;
mod command;
mod documents;
mod endings;
mod export;
mod full;
mod import;
mod memory;
mod recipes;
mod refusals;
mod store_commands;
mod store_commands_running;
mod train;
mod tune;
mod whole;
