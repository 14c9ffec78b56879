//! What a kernel's answer means.
//!
//! Every backend reports a transfer as io_uring does: a number of bytes, or a negated errno. [`classify`] is the one
//! place where that number gets a meaning, so no answer is ever taken for a success unread.

use rustix::io::Errno;

/// The meaning of one answer to a transfer of at least one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// Nothing happened; the same request may be made again.
    Retry,
    /// The request was taken back before it did anything.
    Cancelled,
    /// The request failed for good.
    Error(i32),
    /// No byte moved: the end of the file for a read, and nothing sensible for a write.
    Zero,
    /// This many bytes moved, at most as many as wanted.
    Positive(usize),
}

/// Reads `result`, the answer to a request to move `wanted` bytes.
pub(crate) fn classify(result: i32, wanted: usize) -> Completion {
    match usize::try_from(result) {
        Ok(0) => Completion::Zero,
        Ok(moved) if moved <= wanted => Completion::Positive(moved),
        // Moving more than asked for would mean that memory outside of the request was touched.
        Ok(_) => Completion::Error(Errno::IO.raw_os_error()),
        Err(_) => match result.saturating_neg() {
            errno if errno == Errno::INTR.raw_os_error() => Completion::Retry,
            errno if errno == Errno::AGAIN.raw_os_error() => Completion::Retry,
            errno if errno == Errno::CANCELED.raw_os_error() => Completion::Cancelled,
            errno => Completion::Error(errno),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_of_answer_has_its_meaning() {
        assert_eq!(classify(4096, 4096), Completion::Positive(4096));
        assert_eq!(classify(1, 4096), Completion::Positive(1));
        assert_eq!(classify(0, 4096), Completion::Zero);
        assert_eq!(classify(-libc::EINTR, 4096), Completion::Retry);
        assert_eq!(classify(-libc::EAGAIN, 4096), Completion::Retry);
        assert_eq!(classify(-libc::ECANCELED, 4096), Completion::Cancelled);
        assert_eq!(classify(-libc::ENOSPC, 4096), Completion::Error(libc::ENOSPC));
        assert_eq!(classify(-libc::EIO, 4096), Completion::Error(libc::EIO));
    }

    #[test]
    fn more_than_wanted_is_an_error() {
        assert_eq!(classify(4097, 4096), Completion::Error(libc::EIO));
    }

    proptest! {
        #[test]
        fn no_answer_panics_or_counts_more_than_wanted(result: i32, wanted in 1_usize..1 << 30) {
            match classify(result, wanted) {
                Completion::Positive(moved) => prop_assert!(moved as i64 == i64::from(result) && moved <= wanted),
                Completion::Error(errno) => prop_assert!(errno > 0),
                Completion::Zero => prop_assert_eq!(result, 0),
                Completion::Retry | Completion::Cancelled => prop_assert!(result < 0),
            }
        }
    }
}
