//! The steps of what has to survive a crash, for those who crash there.
//!
//! With the feature `sim` somebody can watch them, and stop the process at one for good. Without it nothing is left of
//! this.

/// What is about to be done.
#[cfg_attr(
    not(feature = "sim"),
    expect(unreachable_pub, reason = "only those who watch have to know the steps")
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The data files are flushed.
    FlushData,
    /// The data files grow.
    Grow,
    /// The data files have grown, and nobody uses it yet.
    Grown,
    /// A file is made.
    Create,
    /// It gets its bytes.
    Write,
    /// It is flushed.
    Flush,
    /// A file gets one more name.
    Link,
    /// A file gets another name.
    Rename,
    /// A name goes.
    Remove,
    /// The names of a directory are flushed.
    FlushNames,
}

#[cfg(feature = "sim")]
static WATCHER: std::sync::OnceLock<Box<dyn Fn(Step) + Send + Sync>> = std::sync::OnceLock::new();

/// Calls `watcher` before each step of every store of the process; the first caller's only.
#[cfg(feature = "sim")]
pub fn watch_steps(watcher: impl Fn(Step) + Send + Sync + 'static) {
    drop(WATCHER.set(Box::new(watcher)));
}

/// Says what is about to be done.
pub(crate) fn step(step: Step) {
    #[cfg(feature = "sim")]
    if let Some(watcher) = WATCHER.get() {
        watcher(step);
    }
    let _nobody_watches = step;
}
