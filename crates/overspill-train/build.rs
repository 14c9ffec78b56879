//! Concatenates the project's own documents and sources into `$OUT_DIR/corpus.txt`, the embedded corpus.
//!
//! The list is made by looking, so that it cannot fall behind the tree: the Markdown files of the root and of
//! `docs/`, then the Rust files below `crates/*/src`, each list sorted. Where the crate stands alone, as in a
//! package, only its own sources are there and they are the corpus.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let own = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let mut files = Vec::new();
    let root = own.ancestors().nth(2).filter(|root| root.join("crates").is_dir());
    match root {
        Some(root) => {
            // A new file in the root is found by the next run; to watch the root would be to watch the build's
            // own outputs. A new crate shows in the root's manifest.
            watch(&root.join("Cargo.toml"));
            files.extend(entries(root)?.into_iter().filter(|path| has_extension(path, "md")));
            let docs = root.join("docs");
            if docs.is_dir() {
                watch(&docs);
                files.extend(entries(&docs)?.into_iter().filter(|path| has_extension(path, "md")));
            }
            for member in entries(&root.join("crates"))? {
                sources(&member.join("src"), &mut files)?;
            }
        }
        None => sources(&own.join("src"), &mut files)?,
    }

    let mut corpus = String::new();
    for path in files {
        watch(&path);
        let text = fs::read_to_string(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        corpus.push_str(text.trim_end());
        corpus.push_str("\n\n");
    }
    watch(&own.join("build.rs"));
    fs::write(PathBuf::from(variable("OUT_DIR")?).join("corpus.txt"), corpus)
}

fn variable(name: &str) -> io::Result<String> {
    env::var(name).map_err(|error| io::Error::other(format!("{name}: {error}")))
}

fn watch(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.is_file() && path.extension() == Some(OsStr::new(extension))
}

/// The paths in a folder, sorted: the order of a directory is the file system's own.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths: io::Result<Vec<_>> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths?;
    paths.sort();
    Ok(paths)
}

/// Adds the Rust files below `folder`, which need not be there.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    watch(folder);
    for path in entries(folder)? {
        if path.is_dir() {
            sources(&path, files)?;
        } else if has_extension(&path, "rs") {
            files.push(path);
        }
    }
    Ok(())
}
