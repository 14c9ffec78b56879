//! What is read and compared before anything is changed: a snapshot before it is gone back to, and the last commit.
//!
//! ```text
//! restore():  lock ─► every byte of the snapshot, compared ─► its manifest is the committed one, durably ─► open
//! glance():   as many tensors of the last commit as can be compared in a short while ─► how far it has come
//! check():    all of them, glance by glance
//! ```
//!
//! What `overspill restore` promises: a snapshot that is not whole replaces nothing, a crash leaves the committed generation
//! or the snapshot, and the snapshot stays. Nobody else has the store until it is open. Ctrl-C is heard while anything is
//! read, and nothing is changed then.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use overspill_swap::{
    Blocks, Compared, Durability, Examination, Generation, Manifest, Scope, Store, StoreError, Verdict,
    Volume,
};
use pyo3::Python;
use serde_json::Value;

use crate::error::Error;

/// How long something is read without a look at signals.
const GLANCE: Duration = Duration::from_millis(50);

/// The manifest of the last commit, or of a snapshot.
pub(super) fn manifest(home: &Path, snapshot: Option<&str>) -> Result<Manifest, Error> {
    Ok(match snapshot {
        Some(name) => Store::snapshot_of(home, name)?,
        None => Store::committed(home)?,
    })
}

/// Makes a snapshot, of which `known` is known, the committed generation if it is whole, and opens the store.
pub(super) fn restore(
    volumes: &[Volume],
    name: &str,
    known: &Manifest,
    durability: Durability,
    blocks: Blocks<'_>,
) -> Result<Store, Error> {
    let path = volumes.first().map(|home| home.directory.clone()).unwrap_or_default();
    let examination = Examination::begin(volumes)?;
    let target = Generation::Snapshot(name.to_owned());
    if let Some(found) = examination.manifest(&target) {
        same(&path, &found.meta, &known.meta)?;
    }
    let mut interrupt = None;
    let findings = examination.verify(Scope::Only(&target), blocks, |_, _| {
        interrupt = Python::attach(|py| py.check_signals()).err();
        if interrupt.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if let Some(interrupt) = interrupt {
        return Err(Error::Raised(interrupt));
    }
    let findings = findings.expect("only an interrupt breaks it off");
    if !findings.is_whole(&target) {
        let flaws = findings.verdicts.iter().filter_map(|Verdict { flaw, .. }| flaw.clone());
        let damaged = flaws.chain(findings.damaged.iter().map(ToString::to_string)).collect();
        return Err(StoreError::NotWhole { path, what: target.to_string(), damaged }.into());
    }
    Ok(examination.restore_and_open(&target, durability)?)
}

/// Whether what was looked at without a lock is what is there once nobody else can change it.
///
/// # Errors
/// [`Error::State`] when another process was faster.
pub(super) fn same(home: &Path, found: &Value, known: &Value) -> Result<(), Error> {
    if found == known {
        return Ok(());
    }
    let home = home.display();
    Err(Error::State(format!("{home} was committed to by another process just now: resume again")))
}

/// Compares tensors of the last commit, those that are `wanted`, for a short while: how far it has come, `None` when that is
/// everything. Damage is an error.
pub(super) fn glance(
    store: &Store,
    wanted: impl Fn(&str) -> bool,
    blocks: Blocks<'_>,
    compared: Compared,
) -> Result<Option<Compared>, Error> {
    // From the first tensor on: of many, looking up what there is takes its time.
    let mut deadline = None;
    let is_over = || match *deadline.get_or_insert_with(|| Instant::now() + GLANCE) {
        deadline if Instant::now() < deadline => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    Ok(store.check_committed(wanted, blocks, compared, is_over)?)
}

/// Compares them all, and looks at signals in between.
pub(super) fn check(store: &Store, wanted: impl Fn(&str) -> bool, blocks: Blocks<'_>) -> Result<(), Error> {
    let mut left = Some(Compared::default());
    while let Some(compared) = left {
        left = glance(store, &wanted, blocks, compared)?;
        Python::attach(|py| py.check_signals()).map_err(Error::Raised)?;
    }
    Ok(())
}
