"""What can go wrong.

Every exception of the package is an :class:`OverspillError`, and its message is one line that says what happened, to what,
and what to do. What the operating system refused is an :class:`OSError` too, with its ``errno`` and ``filename``.
"""

from __future__ import annotations

import os

__all__ = [
    "ArgumentError",
    "CorruptionError",
    "DiskFullError",
    "EndOfFileError",
    "EngineError",
    "ForkError",
    "InternalError",
    "LockedError",
    "MemoryBudgetError",
    "OverspillError",
    "StateError",
    "StorageError",
    "UnsupportedError",
]


class OverspillError(Exception):
    """Anything that overspill refuses or fails at.

    Args:
        message: one line for the user.
        errno: the error number of the operating system, if it gave one.
        filename: the file or directory that is meant, if there is one.
    """

    def __init__(self, message: str, errno: int | None = None, filename: str | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.filename = filename
        self.strerror = os.strerror(errno) if errno is not None else None
        self.message = message

    def __str__(self) -> str:
        return self.message


class ArgumentError(OverspillError, ValueError):
    """An argument that cannot be meant: a negative rate, a name with a slash, a length that does not fit."""


class UnsupportedError(OverspillError, TypeError):
    """What is not supported, and never will be half-way: sparse gradients, complex parameters, pickling, unknown options."""


class StateError(OverspillError, RuntimeError):
    """The object or the directory is not in a state in which this can be done; the message says what would help."""


class MemoryBudgetError(OverspillError, MemoryError):
    """The memory that was given is too small; the message says the least that would do."""


class LockedError(OverspillError):
    """The directory is in use by another process."""


class ForkError(OverspillError, RuntimeError):
    """An object of the parent process was used in a fork, which has none of its threads."""


class InternalError(OverspillError, RuntimeError):
    """A bug in overspill. Nothing is known of the object that was used; make another."""


class CorruptionError(OverspillError):
    """What is stored is not what was written: a checksum, a length or a manifest is wrong."""


class StorageError(OverspillError, OSError):
    """The operating system refused a file or a transfer; ``errno`` says why, ``filename`` where."""


class DiskFullError(StorageError):
    """There is no room; what was asked for is not stored, and what was stored before is whole."""


class EndOfFileError(StorageError, EOFError):
    """The file ends before the last byte that was asked for; ``errno`` is ``ENODATA``."""


class EngineError(StorageError, RuntimeError):
    """The I/O engine did not start, or has stopped."""
