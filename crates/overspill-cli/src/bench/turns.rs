//! `overspill bench turns`: our side of a comparison that another program leads, such as `bench/peers/run`.
//!
//! It makes files, says where they are, and then does what each line of standard input asks for, until there are no more:
//!
//! ```text
//! → {"backend":"io_uring","paths":["/data/overspill-turns-17.0"]}
//! write
//! → {"gbps":6.1}
//! read
//! → {"gbps":3.4}
//! check
//! → {"gbps":null}
//! ```
//!
//! `write` puts known blocks into the files, `read` takes them back and compares their ends, `check` compares every
//! byte, and takes no time. The leader may move the files' bytes in between, but `read` finds only what `write` wrote.
//! The files are removed at the end.

use std::io::{self, BufRead, Write};

use anyhow::{Context, bail, ensure};
use overspill_io::{Direction, EngineConfig};
use serde::Serialize;

use crate::args::BenchTurnsArguments;
use crate::interrupt;
use crate::motion::files::{FileSet, Shape};
use crate::motion::mover::{Look, Mover};

/// The first answer.
#[derive(Serialize)]
struct Ready<'a> {
    backend: String,
    paths: Vec<&'a std::path::Path>,
}

/// Every later one; the rate is in 10⁹ bytes per second.
#[derive(Serialize)]
struct Done {
    gbps: Option<f64>,
}

pub(crate) fn run(arguments: &BenchTurnsArguments) -> anyhow::Result<()> {
    let bytes = arguments.size.0 / arguments.files as u64;
    let block_bytes = usize::try_from(arguments.block.0).unwrap_or(usize::MAX);
    let blocks_per_file = usize::try_from(bytes / arguments.block.0.max(1)).unwrap_or(usize::MAX);
    ensure!(blocks_per_file > 0, "--size {} is less than one block per file", arguments.size);
    let shape = Shape { files: arguments.files, blocks_per_file, block_bytes };
    let config = EngineConfig {
        backend: arguments.backend,
        chunk_bytes: block_bytes,
        queue_depth: arguments.depth,
        bytes_in_flight_max: block_bytes.saturating_mul(arguments.depth),
        ..EngineConfig::default()
    };
    let mover = Mover::start(config, &[block_bytes], interrupt::stop_flag()?)?;
    let stem = format!("overspill-turns-{}", std::process::id());
    let mut set = FileSet::create(mover.engine(), &arguments.dir, stem, shape)?;
    mover.fill(&mut set)?;
    answer(&Ready { backend: mover.engine().report().backend.to_string(), paths: set.paths().collect() })?;
    for line in io::stdin().lock().lines() {
        let line = line.context("cannot read standard input")?;
        let gbps = match line.trim() {
            "write" => Some(mover.pass(&mut set, Direction::Write, Look::Ends)?.gbps()),
            "read" => Some(mover.pass(&mut set, Direction::Read, Look::Ends)?.gbps()),
            "check" => mover.check(&mut set).map(|()| None)?,
            other => bail!("{other:?} is not one of write, read and check"),
        };
        answer(&Done { gbps })?;
    }
    Ok(())
}

/// Writes one line of JSON. A leader who has gone away is an error: nobody takes turns with us.
fn answer(answer: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string(answer).context("cannot write JSON")?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).context("cannot write to standard output")
}
