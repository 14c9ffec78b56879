//! Paths in reports. A path is bytes and JSON is text, so that what is no UTF-8 in a path becomes U+FFFD there: a report
//! about work that is done must not fail over a name.

use std::path::{Path, PathBuf};

use serde::Serializer;

/// Serializes a path, for `serialize_with`.
///
/// # Errors
/// Those of the serializer.
pub fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Serializes paths, for `serialize_with`.
///
/// # Errors
/// Those of the serializer.
pub fn lossy_each<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use serde::Serialize;

    use super::*;

    #[derive(Serialize)]
    struct Report {
        #[serde(serialize_with = "lossy")]
        one: PathBuf,
        #[serde(serialize_with = "lossy_each")]
        many: Vec<PathBuf>,
    }

    #[test]
    fn a_report_does_not_fail_over_a_name() {
        let odd = PathBuf::from(OsStr::from_bytes(b"a\xffb"));
        let text = serde_json::to_string(&Report { one: odd.clone(), many: vec![odd, "c".into()] }).unwrap();
        assert_eq!(text, "{\"one\":\"a\u{fffd}b\",\"many\":[\"a\u{fffd}b\",\"c\"]}");
    }
}
