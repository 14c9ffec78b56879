"""State on its way out of storage and back: what ``state_dict()`` returns and ``load_state_dict()`` takes.

::

    export_state():  native read_state ─► a mapped file beside the state, which has no name any more ─► tensors
    import_state():  tensors, mapped or not ─► fp32, a batch at a time ─► native write_state

The exported tensors are fp32 and lie in files that go with them: the kernel writes their pages out and takes them out of
memory as it needs the room. A batch is :data:`BATCH_BYTES`, or one parameter if that is longer.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from overspill.errors import ArgumentError, DiskFullError, StorageError
from overspill.optim.options import number_of, shown
from overspill.optim.staging import Staging, is_plain

if TYPE_CHECKING:
    from overspill._native import Optimizer as Native
    from overspill.optim.table import Known

__all__ = [
    "BATCH_BYTES",
    "ParameterState",
    "StateView",
    "export_state",
    "fields_of",
    "halves_of",
    "import_state",
    "step_tensor",
    "steps_of",
]

BATCH_BYTES = 64 << 20
"""Bytes of fp32 state that are moved by one native call."""

_ALIGNMENT = 64
_F32_BYTES = 4
# Where numbers of double precision end to tell one step from the next.
_STEPS_END = 1 << 53

_FORM = "{'state': {…}, 'param_groups': […]}"

T = TypeVar("T")
Shape = tuple[int, ...]
Field = tuple[str, Shape]
Place = tuple[str, int, Shape]


def step_tensor(steps: int) -> Tensor:
    """A number of steps, as ``torch``'s states have it."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")


class ParameterState(Mapping[str, Tensor]):
    """What of a parameter's state is in memory: ``step``, a copy."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __getitem__(self, name: str) -> Tensor:
        if name != "step":
            raise KeyError(f"{name!r} is not in memory: get_state(parameter) or state_dict() brings it there")
        return step_tensor(self._steps)

    def __iter__(self) -> Iterator[str]:
        return iter(("step",))

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return f"{{'step': {self._steps}, …}}"


class StateView(Mapping[Tensor, ParameterState]):
    """``optimizer.state``: of each parameter that has taken a step, what is in memory. It cannot be changed."""

    def __init__(self, known: Mapping[Tensor, Known]) -> None:
        self._known = known

    def __getitem__(self, parameter: Tensor) -> ParameterState:
        known = self._known.get(parameter)
        if known is None or known.steps == 0:
            raise KeyError("the parameter has no state: it has taken no step, or is not this optimizer's")
        return ParameterState(known.steps)

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for parameter, known in self._known.items() if known.steps)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<state of {len(self)} parameters, on storage>"


def export_state(native: Native, wanted: Iterable[Known], directory: str) -> dict[int, dict[str, Tensor]]:
    """The state of parameters, by their position, as tensors over files that were made in ``directory``.

    Raises:
        DiskFullError: when the files have no room there; nothing was changed.
        StorageError: for what cannot be read.
    """
    exported: dict[int, dict[str, Tensor]] = {}
    for batch in _batches([(known, native.fields(known.number)) for known in wanted]):
        places, length = _places([fields for _, fields in batch])
        if length == 0:
            exported.update((known.position, {}) for known, _ in batch)
            continue
        staging = Staging()
        with _unnamed_file(directory, length) as path:
            weights = [staging.weight(known.parameter) for known, _ in batch]
            staging.synchronize()
            # The mapping that is filled goes before the one that is handed out is made: no page of it stays mapped.
            filled = _mapped(path, length, places)
            native.read_state([(known.number, w, own) for (known, _), w, own in zip(batch, weights, filled)])
            del filled
            exported.update(zip((known.position for known, _ in batch), _mapped(path, length, places)))
    return exported


def _places(states: Sequence[Sequence[Field]]) -> tuple[list[list[Place]], int]:
    """Where each field begins in a file, in bytes, and how long the file is."""
    length = 0
    places: list[list[Place]] = []
    for fields in states:
        places.append([])
        for name, shape in fields:
            places[-1].append((name, length, shape))
            length += -(-math.prod(shape) * _F32_BYTES // _ALIGNMENT) * _ALIGNMENT
    return places, length


def _mapped(path: str, length: int, places: list[list[Place]]) -> list[dict[str, Tensor]]:
    # Whatever the defaults of the process are.
    whole = torch.empty(0, dtype=torch.float32, device="cpu")
    whole.set_(torch.UntypedStorage.from_file(path, True, length))  # type: ignore[arg-type]

    def tensor(start: int, shape: Shape) -> Tensor:
        start //= _F32_BYTES
        return whole[start : start + math.prod(shape)].view(shape)

    return [{name: tensor(start, shape) for name, start, shape in fields} for fields in places]


def halves_of(saved: object) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """The groups and the state of what ``state_dict()`` gave, which may have come from anywhere.

    Raises:
        ArgumentError: when it cannot have been given by ``state_dict()``.
    """
    groups, state = _half(saved, "param_groups", (list, tuple)), _half(saved, "state", Mapping)
    for index, group in enumerate(groups):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, (list, tuple)) or not all(isinstance(x, (int, str)) for x in numbers):
            raise ArgumentError(
                f"group {index} of the state has no list of parameters under 'params': give what state_dict() returned"
            )
    for number, own in state.items():
        if not isinstance(own, Mapping):
            raise ArgumentError(
                f"the state of parameter {shown(number)} is a dictionary of tensors by name, not {shown(own)}"
            )
    return list(groups), state


def _half(saved: object, name: str, kind: Any) -> Any:
    half = saved.get(name) if isinstance(saved, Mapping) else None
    if not isinstance(half, kind):
        raise ArgumentError(f"the state has no {name!r}: give what state_dict() returned, {_FORM}")
    return half


def fields_of(native: Native, known: Known, state: Mapping[str, Any], owner: str) -> dict[str, Tensor] | None:
    """The tensors of a saved state that belong to a parameter; ``None`` if there are none.

    Raises:
        ArgumentError: when one is missing, has another shape, or is sparse, complex, or without contents.
    """
    found = {}
    for name, shape in native.fields(known.number):
        value = state.get(name)
        if value is None:
            if name != "master":
                if not any(isinstance(x, Tensor) and x.dim() for x in state.values()):
                    return None
                raise ArgumentError(
                    f"the state of parameter {known.name} has no {name!r}: it is not that of {owner}"
                )
            continue
        if not _is_dense(value):
            raise ArgumentError(
                f"{name!r} of parameter {known.name} is no dense tensor of real numbers, but {shown(value)}"
            )
        if tuple(value.shape) != tuple(shape):
            raise ArgumentError(
                f"{name!r} of parameter {known.name} has shape {tuple(shape)}, and {tuple(value.shape)} was given"
            )
        found[name] = value
    return found


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_complex() or value.is_quantized or value.is_nested or value.is_meta)
    )


def steps_of(known: Known, state: Mapping[str, Any]) -> int:
    """The steps that a saved state has; 1 if it does not say.

    Raises:
        ArgumentError: when it is no number of steps.
    """
    given = state.get("step", 1)
    what = f"'step' of parameter {known.name}, a number of steps,"
    steps = number_of(what, given)
    if not 0 <= steps < _STEPS_END:
        raise ArgumentError(f"{what} is 0 or more, and less than {_STEPS_END}, not {shown(given)}")
    return int(steps)


def import_state(native: Native, given: Iterable[tuple[Known, Mapping[str, Tensor]]]) -> None:
    """Sets the state of parameters; what :func:`fields_of` found.

    Raises:
        StorageError: for what cannot be written; the state is lost then, but for the committed one.
    """
    sized = [
        ((known, state), [(name, tuple(x.shape)) for name, x in state.items()]) for known, state in given
    ]
    for batch in _batches(sized):
        staging = Staging()
        rows = [
            (known.number, staging.weight(known.parameter), {name: _as_f32(x) for name, x in state.items()})
            for (known, state), _ in batch
        ]
        staging.synchronize()
        native.write_state(rows)
        staging.write_back()


def _as_f32(x: Tensor) -> Tensor:
    x = x.detach().to(device="cpu", dtype=torch.float32)
    return x if is_plain(x) else x.clone(memory_format=torch.contiguous_format)


def _batches(sized: list[tuple[T, list[Field]]]) -> Iterator[list[tuple[T, list[Field]]]]:
    """Cuts into batches of at most :data:`BATCH_BYTES`, each one item at least."""
    batch: list[tuple[T, list[Field]]] = []
    total = 0
    for item in sized:
        length = sum(math.prod(shape) * _F32_BYTES for _, shape in item[1])
        if batch and total + length > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += length
    if batch:
        yield batch


@contextlib.contextmanager
def _unnamed_file(directory: str, length: int) -> Iterator[str]:
    """A path to a file of that length, to be opened; it is gone with its last mapping, however the process ends."""
    try:
        try:
            file = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            # A file system on which every file has had a name.
            file, path = tempfile.mkstemp(dir=directory)
            os.unlink(path)
    except OSError as error:
        text = f"no file for the exported state can be made in {directory}: {error.strerror}"
        raise StorageError(text, error.errno, directory) from error
    try:
        _reserve(file, length, directory)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def _reserve(file: int, length: int, directory: str) -> None:
    """All of it now: a page of a mapping that finds no room ends the process."""
    try:
        os.posix_fallocate(file, 0, length)
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else StorageError
        text = f"{directory} has no room for {length} bytes of the exported state: {error.strerror}"
        raise kind(text, error.errno, directory) from error
