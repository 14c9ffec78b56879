//! What makes a committed state that of the parameters at hand (pure).

use serde_json::{Value, json};

use super::recipe::{Described, Formats};

/// What has to be equal for a state to be that of these parameters.
pub(super) fn identity(described: &[Described], formats: &Formats, begins: &[usize]) -> Value {
    let Formats { moments, stochastic, .. } = formats;
    json!({
        "parameters": described,
        "moments": format!("{moments:?}"),
        "stochastic": stochastic,
        "begins_tile": begins,
    })
}

/// In what two identities differ, in words.
pub(super) fn difference(found: &Value, expected: &Value) -> Option<String> {
    let differs = |name: &str| found[name] != expected[name];
    if differs("moments") || differs("stochastic") {
        return Some("its moments or weights are stored in another format".to_owned());
    }
    let (found, expected) = (found["parameters"].as_array()?, expected["parameters"].as_array()?);
    if found.len() != expected.len() {
        return Some(format!("it has {} parameters, and {} were given", found.len(), expected.len()));
    }
    let mut pairs = found.iter().zip(expected);
    pairs
        .find(|(found, expected)| found != expected)
        .map(|(found, expected)| format!("{found} there, {expected} here"))
}
