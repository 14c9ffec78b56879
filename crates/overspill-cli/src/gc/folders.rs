//! Folders that a process was writing when it died: the output of `train --out` and of `export`.

use std::time::SystemTime;

use overspill_train::checkpoint::{Unfinished, Writer, unfinished};

use super::{DirectoryReport, GcArguments, Report};

/// Lists them among what the arguments name, and removes them if so told.
pub(super) fn sweep(
    arguments: &GcArguments,
    report: &mut Report,
    failures: &mut Vec<String>,
) -> anyhow::Result<()> {
    for folder in unfinished(&arguments.directories)? {
        let mut entry = entry(&folder);
        if arguments.remove && !entry.in_use {
            match folder.remove() {
                Ok(()) => {
                    entry.removed = true;
                    report.removed_bytes = report.removed_bytes.saturating_add(folder.bytes_on_disk);
                }
                Err(error) => {
                    failures.push(error.to_string());
                    entry.stays_because = Some(error.to_string());
                }
            }
        }
        report.directories.push(entry);
    }
    Ok(())
}

fn entry(folder: &Unfinished) -> DirectoryReport {
    let (in_use, owner_pid) = match folder.writer {
        Writer::Dead => (false, None),
        Writer::Process { pid } => (true, pid),
    };
    let holds = match owner_pid {
        Some(pid) => format!("being written by process {pid}"),
        None if in_use => "being written".to_owned(),
        None => "a folder that was not finished".to_owned(),
    };
    let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
    DirectoryReport {
        path: folder.path.clone(),
        in_use,
        owner_pid,
        remains: "unfinished_folder",
        may_hold_state: false,
        step: None,
        snapshots: Vec::new(),
        bytes_on_disk: folder.bytes_on_disk,
        last_used_unix_seconds: folder.last_used.and_then(since_1970).map(|since| since.as_secs()),
        removed: false,
        stays_because: None,
        holds,
    }
}
