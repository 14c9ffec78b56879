//! What makes a run the same run: everything that its numbers depend on.
//!
//! The state of a run is committed together with its [`Identity`] and the number of the step. A later run goes on from
//! it only if its own identity is the same, so that the losses of both together are those of one that was never
//! interrupted. The random state needs no place of its own: first weights and the order of the data are functions of
//! the seed and the step.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::TrainError;

/// What a run's numbers depend on, by name, each in words that are equal when the values are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity(BTreeMap<&'static str, String>);

impl Identity {
    /// Adds something that the numbers depend on.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &dyn ToString) -> Self {
        self.0.insert(name, value.to_string());
        self
    }

    /// What is committed with the state after `step`, which is cut into tiles of `tile_bytes`.
    pub(crate) fn meta(&self, step: u64, tile_bytes: usize) -> Value {
        json!({ "step": step, "tile_bytes": tile_bytes, "run": self.0 })
    }

    /// The tiles of the state that was committed with `meta`; `None` if it does not say.
    pub(crate) fn tile_bytes(meta: &Value) -> Option<usize> {
        usize::try_from(meta["tile_bytes"].as_u64()?).ok()
    }

    /// The step after which the state is that was committed with `meta`.
    ///
    /// # Errors
    /// [`TrainError::OtherRun`] when it is another run's, naming the first difference.
    pub(crate) fn check(&self, path: &Path, meta: &Value) -> Result<u64, TrainError> {
        let other = |what: &str, then: String, now: String| {
            let (path, what) = (path.to_owned(), what.to_owned());
            Err(TrainError::OtherRun { path, what, then, now })
        };
        let (Some(step), Some(run)) = (meta["step"].as_u64(), meta["run"].as_object()) else {
            return other("contents", "not a training state".to_owned(), "one".to_owned());
        };
        for (&name, now) in &self.0 {
            let then = run.get(name).and_then(Value::as_str).unwrap_or("not known");
            if then != now {
                return other(name, then.to_owned(), now.clone());
            }
        }
        if let Some(name) = run.keys().find(|name| !self.0.contains_key(name.as_str())) {
            return other(name, "known".to_owned(), "not".to_owned());
        }
        Ok(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_run_finds_its_step_and_another_one_what_is_different() {
        let identity = Identity::default().with("--seed", &7).with("--lr", &0.1);
        let meta: Value = serde_json::from_str(&identity.meta(41, 4096).to_string()).unwrap();
        let path = Path::new("store");
        assert_eq!(identity.check(path, &meta).unwrap(), 41);
        assert_eq!((Identity::tile_bytes(&meta), Identity::tile_bytes(&json!(3))), (Some(4096), None));
        assert!(matches!(Identity::default().check(path, &meta), Err(TrainError::OtherRun { .. })));
        let other = identity.clone().with("--seed", &8);
        let refused = other.check(path, &meta).unwrap_err();
        assert_eq!(refused.to_string(), "store is the state of another run: --seed was 7, and is 8 now");
        let more = identity.clone().with("--clip", &1);
        assert!(
            matches!(more.check(path, &meta), Err(TrainError::OtherRun { what, .. }) if what == "--clip")
        );
        for odd in [json!(null), json!({ "step": 1 }), json!({ "step": -1, "run": {} }), json!([1])] {
            assert!(matches!(identity.check(path, &odd), Err(TrainError::OtherRun { .. })), "{odd}");
        }
    }
}
