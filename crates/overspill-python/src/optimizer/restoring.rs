//! Going back to a snapshot before the store is opened.
//!
//! ```text
//! restore():  lock ─► every byte of the snapshot, compared ─► its manifest is the committed one, durably ─► unlock
//! ```
//!
//! What `overspill restore` promises: a snapshot that is not whole replaces nothing, a crash leaves the committed generation
//! or the snapshot, and the snapshot stays. Ctrl-C is heard while it is read, and nothing is changed then.

use std::ops::ControlFlow;
use std::path::Path;

use overspill_swap::{Blocks, Examination, Generation, Manifest, Scope, Store, StoreError, Verdict, Volume};
use pyo3::Python;

use crate::error::Error;

/// The manifest of the last commit, or of a snapshot.
pub(super) fn manifest(home: &Path, snapshot: Option<&str>) -> Result<Manifest, Error> {
    Ok(match snapshot {
        Some(name) => Store::snapshot_of(home, name)?,
        None => Store::committed(home)?,
    })
}

/// Makes a snapshot the committed generation, if it is whole.
pub(super) fn restore(volumes: &[Volume], name: &str, blocks: Blocks<'_>) -> Result<(), Error> {
    let examination = Examination::begin(volumes)?;
    let target = Generation::Snapshot(name.to_owned());
    let mut interrupt = None;
    let findings = examination.verify(Scope::Only(&target), blocks, |_, _| {
        interrupt = Python::attach(|py| py.check_signals()).err();
        if interrupt.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if let Some(interrupt) = interrupt {
        return Err(Error::Interrupted(interrupt));
    }
    let findings = findings.expect("only an interrupt breaks it off");
    if !findings.is_whole(&target) {
        let flaws = findings.verdicts.iter().filter_map(|Verdict { flaw, .. }| flaw.clone());
        let damaged = flaws.chain(findings.damaged.iter().map(ToString::to_string)).collect();
        let path = volumes.first().map(|home| home.directory.clone()).unwrap_or_default();
        return Err(StoreError::NotWhole { path, what: target.to_string(), damaged }.into());
    }
    examination.restore(&target)?;
    Ok(())
}
