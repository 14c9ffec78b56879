//! The files that are measured on: made, preallocated, and removed by name on every way out.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use overspill_io::{Engine, File};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files of one size in one directory, cut into blocks of one size. They are removed when this is dropped.
#[derive(Debug)]
pub(crate) struct FileSet {
    directory: PathBuf,
    stem: String,
    shape: Shape,
    files: Vec<File>,
    /// Which write of all was the last one to each block, 0 for none; what it holds follows from that.
    versions: Vec<u64>,
    /// Blocks written so far, by all shapes that the set has had.
    writes: u64,
}

/// How many files of how many blocks of how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) files: usize,
    pub(crate) blocks_per_file: usize,
    pub(crate) block_bytes: usize,
}

/// Descriptors that a process needs beside the files it measures on.
const OTHER_DESCRIPTORS: u64 = 64;

impl Shape {
    pub(crate) fn file_bytes(&self) -> u64 {
        self.blocks_per_file as u64 * self.block_bytes as u64
    }

    pub(crate) fn blocks(&self) -> usize {
        self.files * self.blocks_per_file
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.files as u64 * self.file_bytes()
    }
}

impl FileSet {
    /// Makes the files `<stem>.0`, `<stem>.1` and so on. Nothing was written to them yet.
    pub(crate) fn create(
        engine: &Engine,
        directory: &Path,
        stem: String,
        shape: Shape,
    ) -> anyhow::Result<Self> {
        ensure!(directory.is_dir(), "{} is not a directory", directory.display());
        allow_open_files(shape.files as u64 + OTHER_DESCRIPTORS)?;
        let versions = vec![0; shape.blocks()];
        let mut set =
            Self { directory: directory.to_owned(), stem, shape, files: Vec::new(), versions, writes: 0 };
        set.make(engine)?;
        Ok(set)
    }

    /// Removes the files and makes them anew.
    pub(crate) fn renew(&mut self, engine: &Engine) -> anyhow::Result<()> {
        self.remove();
        self.make(engine)
    }

    /// Opens the files with another engine.
    pub(crate) fn reopen(&mut self, engine: &Engine) -> anyhow::Result<()> {
        for file in &mut self.files {
            *file = engine.open(file.path())?;
        }
        Ok(())
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What all the files' names begin with, up to the dot.
    pub(crate) fn stem(&self) -> &str {
        &self.stem
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(File::path)
    }

    /// The file that a block is in, and its first byte there.
    pub(crate) fn place(&self, block: usize) -> (&File, u64) {
        let (file, block) = (block / self.shape.blocks_per_file, block % self.shape.blocks_per_file);
        (&self.files[file], block as u64 * self.shape.block_bytes as u64)
    }

    /// Which write of all was the last one to a block.
    pub(crate) fn version(&self, block: usize) -> u64 {
        self.versions[block]
    }

    /// Counts one more write, to this block; returns how many that makes.
    pub(crate) fn next_version(&mut self, block: usize) -> u64 {
        self.writes += 1;
        self.versions[block] = self.writes;
        self.writes
    }

    /// How many blocks from the first on were written since the set has its shape.
    pub(crate) fn blocks_written(&self) -> usize {
        self.versions.iter().take_while(|&&version| version > 0).count()
    }

    /// Cuts the same files into blocks of another length, which divides theirs. Nothing is known of what they hold.
    pub(crate) fn reshape(&mut self, block_bytes: usize) {
        let blocks_per_file = (self.shape.file_bytes() / block_bytes as u64) as usize;
        self.shape = Shape { blocks_per_file, block_bytes, ..self.shape };
        self.versions = vec![0; self.shape.blocks()];
    }

    fn make(&mut self, engine: &Engine) -> anyhow::Result<()> {
        for number in 0..self.shape.files {
            let path = self.directory.join(format!("{}.{number}", self.stem));
            let file = engine.create(&path)?;
            let note = file.note().map(str::to_owned);
            self.files.push(file);
            if let Some(reason) = note {
                bail!("{} is not written directly, and the figures would mislead: {reason}", path.display());
            }
            self.files[number].allocate(self.shape.file_bytes())?;
        }
        // What the file system still has to do for this, or for the files before, is not to be measured.
        match self.files.last() {
            Some(file) => Ok(file.sync()?),
            None => Ok(()),
        }
    }

    fn remove(&mut self) {
        for file in self.files.drain(..) {
            // A ring may hold on to a file for a while after everybody has let go of it, and its space would be freed
            // while something else is measured.
            let _refused = rustix::fs::ftruncate(&file, 0);
            drop(std::fs::remove_file(file.path()));
        }
    }
}

impl Drop for FileSet {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Raises the limit of open files, for this process and those it starts, if it must.
fn allow_open_files(needed: u64) -> anyhow::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    let raised = Rlimit { current: Some(needed), maximum };
    setrlimit(Resource::Nofile, raised)
        .with_context(|| format!("cannot have {needed} files open at a time: raise the limit, `ulimit -n`"))
}
