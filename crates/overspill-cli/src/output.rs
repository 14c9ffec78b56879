//! What leaves the process: lines and tables for people, files of numbers for other programs.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use serde::Serialize;

/// Writes a line to standard error; a reader who has gone away misses nothing.
pub(crate) fn say(line: &str) {
    drop(writeln!(io::stderr(), "{line}"));
}

/// Writes a table to standard output, unless that is where the JSON goes. A reader who has gone away is no error.
pub(crate) fn show(table: &impl Display) -> anyhow::Result<()> {
    if STDOUT_IS_FOR_JSON.load(Ordering::Relaxed) { Ok(()) } else { print(table) }
}

fn print(text: &impl Display) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Standard output is one for the whole process, and so is what it is for.
static STDOUT_IS_FOR_JSON: AtomicBool = AtomicBool::new(false);

/// The name of a file that means standard output.
const STDOUT: &str = "-";

/// A file for JSON that was found to be writable before the work began. `-` is standard output, which has no tables
/// then.
#[derive(Debug)]
pub(crate) struct JsonFile {
    /// `None` for standard output.
    path: Option<PathBuf>,
    /// Whether there was no such file before; an empty one is taken away again if there is nothing to write.
    is_new: bool,
    is_written: bool,
}

impl JsonFile {
    /// Opens the file for writing once, so that an hour's work does not end in a typing error.
    pub(crate) fn prepare(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new(STDOUT) {
            STDOUT_IS_FOR_JSON.store(true, Ordering::Relaxed);
            return Ok(Self { path: None, is_new: false, is_written: false });
        }
        let is_new = match std::fs::metadata(path) {
            // Opening it would wait for a reader.
            Ok(found) if found.file_type().is_fifo() => {
                bail!("cannot write {}: it is a pipe", path.display())
            }
            Ok(_) => false,
            Err(_) => true,
        };
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path: Some(path.to_owned()), is_new, is_written: false })
    }

    /// Writes the numbers.
    pub(crate) fn write(mut self, numbers: &impl Serialize) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(numbers).context("cannot write numbers as JSON")?;
        match &self.path {
            None => print(&(text + "\n"))?,
            Some(path) => std::fs::write(path, text + "\n")
                .with_context(|| format!("cannot write {}", path.display()))?,
        }
        self.is_written = true;
        Ok(())
    }
}

impl Drop for JsonFile {
    fn drop(&mut self) {
        if let Some(path) = self.path.as_ref().filter(|_| self.is_new && !self.is_written) {
            drop(std::fs::remove_file(path));
        }
    }
}
