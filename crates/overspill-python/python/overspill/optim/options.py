"""What a user says about swapping, checked and resolved before anything is made."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Union

from overspill.errors import ArgumentError, StateError, StorageError, UnsupportedError

__all__ = [
    "Bytes",
    "Directories",
    "SwapConfig",
    "SwapOptions",
    "bytes_of",
    "directories_of",
    "flag_of",
    "is_committed",
    "number_of",
    "refuse_occupied",
    "remove_empty",
    "shown",
    "storage",
]

Bytes = Union[int, str]
Directories = Union[str, "os.PathLike[str]", Sequence[Union[str, "os.PathLike[str]"]]]

_UNITS = {"": 1, "b": 1}
_UNITS.update({f"{prefix}ib": 1 << 10 * power for power, prefix in enumerate("kmgt", 1)})
_UNITS.update({f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)})
# Characters of a value in an error.
_SHOWN_MAX = 120
_CHOICES = {
    "moments": ("float32", "bfloat16", "8bit"),
    "durability": ("step", "none"),
    "backend": ("auto", "io_uring", "aio", "threads"),
}


class SwapOptions(TypedDict, total=False):
    """What every optimizer of the package takes besides ``torch``'s arguments and ``swap_dir``; by keyword only."""

    memory: Bytes
    moments: str
    stochastic_rounding: bool
    max_norm: float | None
    in_backward: bool
    durability: str
    backend: str
    resident: Bytes | None


@dataclass(frozen=True)
class SwapConfig:
    """The options, resolved."""

    memory_bytes: int
    moments: str
    stochastic: bool
    max_norm: float | None
    in_backward: bool
    durability: str
    backend: str
    resident_bytes_max: int | None

    @classmethod
    def of(cls, **given: Any) -> SwapConfig:
        """Resolves the options, those of :class:`SwapOptions`.

        Raises:
            ArgumentError: for one that cannot be meant, or two that cannot be meant together.
            UnsupportedError: for one that there is not.
        """
        refuse_unknown(given, "an optimizer takes no")
        return cls._resolved(**given)

    @classmethod
    def _resolved(
        cls,
        *,
        memory: Bytes = "1GiB",
        moments: str = "float32",
        stochastic_rounding: bool = False,
        max_norm: float | None = None,
        in_backward: bool = False,
        durability: str = "step",
        backend: str = "auto",
        resident: Bytes | None = None,
    ) -> SwapConfig:
        config = cls(
            memory_bytes=bytes_of("memory", memory),
            moments=moments,
            stochastic=flag_of("stochastic_rounding", stochastic_rounding),
            max_norm=None if max_norm is None else number_of("max_norm", max_norm),
            in_backward=flag_of("in_backward", in_backward),
            durability=durability,
            backend=backend,
            resident_bytes_max=None if resident is None else bytes_of("resident", resident),
        )
        for name, choices in _CHOICES.items():
            value = getattr(config, name)
            if not isinstance(value, str) or value not in choices:
                raise ArgumentError(f"{name} is one of {', '.join(choices)}, not {shown(value)}")
        if config.max_norm is not None and not config.max_norm > 0.0:
            raise ArgumentError(f"max_norm is a norm to clip to, more than 0, not {config.max_norm}")
        if config.in_backward and config.max_norm is not None:
            raise ArgumentError(
                "max_norm needs all gradients at once, and in_backward=True never has them: choose one of both"
            )
        return config

    def recorded(self) -> dict[str, Any]:
        """What belongs to the state, and goes with a commit; the rest belongs to the machine that runs it."""
        machine = ("memory_bytes", "backend", "resident_bytes_max")
        return {name: value for name, value in asdict(self).items() if name not in machine}

    @classmethod
    def restored(cls, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> SwapConfig:
        """The options of a commit, with those that are ``given`` in their place.

        Raises:
            ArgumentError: as :meth:`of`, and for what a committed state cannot change.
            UnsupportedError: for what is no option of swapping, but say a rate.
        """
        refuse_unknown(given, "resume() has the groups' options as they were committed, and takes no")
        options: dict[str, Any] = {
            "moments": recorded["moments"],
            "stochastic_rounding": recorded["stochastic"],
            "max_norm": recorded["max_norm"],
            "in_backward": recorded["in_backward"],
            "durability": recorded["durability"],
        }
        config = cls.of(**{**options, **given})
        for name, value in (("moments", config.moments), ("stochastic_rounding", config.stochastic)):
            if value != options[name]:
                raise ArgumentError(
                    f"the committed state has {name}={options[name]!r}, which cannot be changed"
                )
        return config


def refuse_unknown(given: Mapping[str, Any], refusal: str) -> None:
    """Sees to it that all options are known.

    Raises:
        UnsupportedError: names the first that is not, and all that are.
    """
    known = SwapOptions.__annotations__
    for name in given:
        if name not in known:
            raise UnsupportedError(f"{refusal} {shown(name)}: for swapping there are {', '.join(known)}")


def shown(value: object) -> str:
    """A value in an error: on one line, and not longer than that."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        # A number of more digits than Python writes, say: what is refused may be anything.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}…"


def number_of(name: str, value: object) -> float:
    """A number, of Python, numpy, or a tensor of one element.

    Raises:
        ArgumentError: for anything else, text included.
    """
    number = _as_number(value)
    if number is None:
        raise ArgumentError(f"{name} is one number, not {shown(value)}")
    return number


def flag_of(name: str, value: object) -> bool:
    """``True`` or ``False``, or a number that is 0 or 1; ``None`` is ``False``, as in torch.

    Raises:
        ArgumentError: for anything else: ``"false"``, say.
    """
    number = 0.0 if value is None else _as_number(value)
    if number not in (0.0, 1.0):
        raise ArgumentError(f"{name} is True or False, not {shown(value)}")
    return number == 1.0


def _as_number(value: Any) -> float | None:
    if isinstance(value, (str, bytes, bytearray)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def bytes_of(name: str, value: Bytes) -> int:
    """A number of bytes, or text like ``"512MiB"`` or ``"1.5GB"``.

    Raises:
        ArgumentError: for anything else.
    """
    count: float = -1
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if found is not None and found[2] in _UNITS:
            count = float(found[1]) * _UNITS[found[2]]
    if count < 0:
        raise ArgumentError(
            f'{name} is a number of bytes, or text like "512MiB" or "8GB", not {shown(value)}'
        )
    if count >= 1 << 63:
        raise ArgumentError(f"{name} is more than any machine has: {shown(value)}")
    return int(count)


def directories_of(swap_dir: Directories) -> tuple[str, ...]:
    """Absolute paths, one per disk.

    Raises:
        ArgumentError: when there is none, one twice, or what is no path.
        StorageError: for a relative one, when the current directory is gone.
    """
    is_one = isinstance(swap_dir, str) or not isinstance(swap_dir, Sequence)
    given: Sequence[object] = [swap_dir] if is_one else swap_dir  # type: ignore[assignment]
    paths = [_path_of(path) for path in given]
    if not paths or "" in paths:
        raise ArgumentError(
            f"swap_dir is the path of a directory, or a sequence of them, one per disk, not {shown(swap_dir)}"
        )
    with storage("find", "the current directory"):
        paths = [os.path.abspath(path) for path in paths]
    if len({os.path.realpath(path) for path in paths}) != len(paths):
        raise ArgumentError(f"swap_dir names a directory twice: {', '.join(paths)}")
    return tuple(paths)


def _path_of(path: object) -> str:
    """Text that the system takes as a path; empty for anything else."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or "\0" in text:
        return ""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return ""
    return text


@contextlib.contextmanager
def storage(action: str, path: str) -> Iterator[None]:
    """Tells what the operating system refuses as the package does.

    Raises:
        StorageError: with its ``errno``.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action} {path}: {error.strerror}", error.errno, path) from error


def is_committed(path: str) -> bool:
    """Whether a directory has a committed state to go on from."""
    return any(os.path.lexists(os.path.join(path, name)) for name in ("manifest", "manifest.previous"))


def refuse_occupied(paths: Sequence[str]) -> None:
    """Sees to it that nothing is in the way of new directories.

    Raises:
        StateError: when something is; it says what would help.
    """
    for path in paths:
        if not os.path.lexists(path):
            continue
        if not os.path.isdir(path):
            raise StateError(f"{path} is not a directory: give one that does not exist yet as swap_dir")
        with storage("list", path):
            names = os.listdir(path)
        if is_committed(path):
            raise StateError(
                f"{path} has a committed state: use resume() to go on from it, or give another directory as swap_dir"
            )
        if {"lock", "volume"} <= set(names):
            raise StateError(
                f"{path} belongs to a run that is still going (if it is this program's: close() its optimizer first), or "
                f"that ended without a commit; what is left of the latter, "
                f"`overspill gc --remove {os.path.dirname(path)}` removes"
            )
        if names:
            raise StateError(
                f"{path} is not empty ({min(names)} is in it): give a directory that does not exist yet, for "
                f"example {os.path.join(path, 'run')}"
            )


def remove_empty(path: str) -> None:
    """Removes an empty directory, to make another of the same name.

    Raises:
        StateError: when it cannot be removed: something is mounted there, say.
    """
    try:
        os.rmdir(path)
    except OSError as error:
        raise StateError(
            f"{path} cannot be replaced ({error.strerror}): give a directory in it as swap_dir, for example "
            f"{os.path.join(path, 'run')}"
        ) from error
