//! The documents say what is true: every behavior is listed, and every test that a document names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All identifiers of the specification: a letter for the area, and how many there are.
fn identifiers() -> BTreeSet<String> {
    let areas = [('B', 9), ('A', 5), ('O', 12), ('P', 7), ('F', 11), ('E', 6), ('X', 11)];
    areas.iter().flat_map(|&(area, count)| (1..=count).map(move |n| format!("{area}{n}"))).collect()
}

/// Names of all `#[test]` functions below a folder, of the laws that a `laws!` list makes into tests, and of the functions
/// that pytest runs.
fn tests_below(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "py") {
            let text = fs::read_to_string(&path).unwrap();
            let after = text.split("\ndef ").skip(1).filter(|rest| rest.starts_with("test_"));
            names.extend(after.filter_map(|rest| rest.split('(').next().map(str::to_owned)));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let after = text.split("#[test]").skip(1);
            let lists = text.split("\nlaws! {").skip(1).filter_map(|rest| rest.split('}').next());
            names.extend(lists.flat_map(str::split_whitespace).map(str::to_owned));
            names.extend(after.filter_map(|rest| {
                let (_, signature) = rest.split_once("fn ")?;
                signature.split(['(', '<']).next().map(str::to_owned)
            }));
        }
    }
}

#[test]
fn every_behavior_is_listed_once_and_every_test_it_names_exists() {
    let text = fs::read_to_string(root().join("docs/behaviours.md")).unwrap();
    let mut missing = identifiers();
    let mut unknown = Vec::new();
    for row in text.lines().filter_map(|line| line.strip_prefix("| ")) {
        let cells: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
        let [id, _behavior, proof] = cells[..] else { panic!("three cells: {row}") };
        if ["id", "---"].contains(&id) {
            continue;
        }
        assert!(missing.remove(id), "{id} is listed twice or is no behavior");
        let named: Vec<&str> = proof.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty() || proof.starts_with("not built yet"), "{id} has no proof: {proof}");
        for test in named {
            let (package, name) =
                test.rsplit_once("::").unwrap_or_else(|| panic!("{id}: {test} names no package"));
            let mut names = BTreeSet::new();
            tests_below(&root().join("crates").join(package), &mut names);
            if !names.contains(name) {
                unknown.push(format!("{id}: {test}"));
            }
        }
    }
    assert!(missing.is_empty(), "behaviors that docs/behaviours.md does not list: {missing:?}");
    assert!(unknown.is_empty(), "tests that do not exist: {unknown:#?}");
}

#[test]
fn every_dependency_has_its_reason_in_the_architecture() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let table = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let names = table.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name);
    let architecture = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let without: Vec<&str> = names
        .filter(|name| !name.starts_with('#') && !architecture.contains(&format!("| `{name}` |")))
        .filter(|name| !name.starts_with("overspill-"))
        .collect();
    assert!(without.is_empty(), "dependencies without a reason in ARCHITECTURE.md: {without:?}");
}
