"""What a user says about swapping, checked and resolved before anything is made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Union

from overspill.errors import ArgumentError, StateError

__all__ = [
    "Bytes",
    "Directories",
    "SwapConfig",
    "SwapOptions",
    "bytes_of",
    "directories_of",
    "is_committed",
    "refuse_occupied",
]

Bytes = Union[int, str]
Directories = Union[str, "os.PathLike[str]", Sequence[Union[str, "os.PathLike[str]"]]]

_UNITS = {"": 1, "b": 1}
_UNITS.update({f"{prefix}ib": 1 << 10 * power for power, prefix in enumerate("kmgt", 1)})
_UNITS.update({f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)})
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
    def of(
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
        """Resolves the options.

        Raises:
            ArgumentError: for one that cannot be meant, or two that cannot be meant together.
        """
        config = cls(
            memory_bytes=bytes_of("memory", memory),
            moments=moments,
            stochastic=bool(stochastic_rounding),
            max_norm=None if max_norm is None else float(max_norm),
            in_backward=bool(in_backward),
            durability=durability,
            backend=backend,
            resident_bytes_max=None if resident is None else bytes_of("resident", resident),
        )
        for name, choices in _CHOICES.items():
            if getattr(config, name) not in choices:
                raise ArgumentError(f"{name} is one of {', '.join(choices)}, not {getattr(config, name)!r}")
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
    def restored(cls, recorded: Mapping[str, Any], given: SwapOptions) -> SwapConfig:
        """The options of a commit, with those that are ``given`` in their place.

        Raises:
            ArgumentError: as :meth:`of`.
        """
        options: dict[str, Any] = {
            "moments": recorded["moments"],
            "stochastic_rounding": recorded["stochastic"],
            "max_norm": recorded["max_norm"],
            "in_backward": recorded["in_backward"],
            "durability": recorded["durability"],
        }
        for name in ("moments", "stochastic_rounding"):
            if name in given and given[name] != options[name]:
                raise ArgumentError(
                    f"the committed state has {name}={options[name]!r}, which cannot be changed"
                )
        return cls.of(**{**options, **given})


def bytes_of(name: str, value: Bytes) -> int:
    """A number of bytes, or text like ``"512MiB"`` or ``"1.5GB"``.

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return _within(name, value, value)
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    )
    if found is None or found[2] not in _UNITS:
        raise ArgumentError(f'{name} is a number of bytes, or text like "512MiB" or "8GB", not {value!r}')
    return _within(name, value, int(float(found[1]) * _UNITS[found[2]]))


def _within(name: str, value: Bytes, count: int) -> int:
    if count >= 1 << 63:
        raise ArgumentError(f"{name} is more than any machine has: {value!r}")
    return count


def directories_of(swap_dir: Directories) -> tuple[str, ...]:
    """Absolute paths, one per disk.

    Raises:
        ArgumentError: when there is none, or one twice.
    """
    given = [swap_dir] if isinstance(swap_dir, (str, os.PathLike)) else list(swap_dir)
    paths = tuple(os.path.abspath(os.fspath(path)) for path in given if os.fspath(path))
    if not paths or len(paths) != len(given):
        raise ArgumentError(f"swap_dir is a directory, or a sequence of them, one per disk, not {swap_dir!r}")
    if len({os.path.realpath(path) for path in paths}) != len(paths):
        raise ArgumentError(f"swap_dir names a directory twice: {', '.join(paths)}")
    return paths


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
