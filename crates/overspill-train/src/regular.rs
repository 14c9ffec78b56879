//! Regular files: what the folders of models and tokenizers are made of.
//!
//! Whoever opens a pipe waits until somebody writes to it, and nothing ends that wait. A file is opened without waiting,
//! therefore, and looked at before it is read.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens for reading, without waiting for anybody: a pipe that nobody writes to is open at once.
pub(crate) fn open_at_once(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)
}

/// Opens a file that has a length and places in it; `None` for anything else.
pub(crate) fn open(path: &Path) -> io::Result<Option<File>> {
    let file = match open_at_once(path) {
        // So the kernel answers for a socket.
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => return Ok(None),
        file => file?,
    };
    let is_regular = file.metadata()?.is_file();
    Ok(is_regular.then_some(file))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let [plain, link, pipe, socket] =
            ["plain", "link", "pipe", "socket"].map(|name| folder.path().join(name));
        std::fs::write(&plain, "text").unwrap();
        std::os::unix::fs::symlink(&plain, &link).unwrap();
        mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&plain, &link] {
            let file = open(path).unwrap().unwrap();
            assert_eq!(io::read_to_string(file).unwrap(), "text");
        }
        for path in [&pipe, &socket, folder.path(), Path::new("/dev/null")] {
            assert!(open(path).unwrap().is_none(), "{}", path.display());
        }
        assert_eq!(open(&folder.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
