"""Steps while backward runs: gradients leave memory as they appear.

The hooks behind the gradients tell which parameters have one; as soon as their state is worth a pass of a few tiles, one
native step updates them and drops their gradients. ``step()`` finishes what is left. A second gradient before that is
refused: how many updates it would be depended on what fits in a pass.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from overspill.errors import StateError

if TYPE_CHECKING:
    from overspill.optim.core import Core
    from overspill.optim.table import Known

__all__ = ["TILES", "InBackward"]

TILES = 4
"""Tiles of state that are worth a pass."""

_MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "8bit": 1}


class InBackward:
    """The parameters whose gradients have appeared, and are not used yet."""

    def __init__(self, optimizer: Core) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._pending: set[Known] = set()
        self._pending_bytes = 0
        self._arrived_since_step: set[Known] = set()
        self._due_bytes: int | None = None
        self._sizes: dict[Known, int] = {}

    def finish(self) -> None:
        """Updates all that have a gradient, and drops it."""
        try:
            self._step(None)
        finally:
            self.forget()

    def drop(self) -> None:
        """Drops the gradients that have arrived and are not used yet."""
        for known in self._arrived_since_step:
            known.parameter.grad = None
        self.forget()

    def forget(self) -> None:
        """Begins anew: nothing has arrived."""
        self._pending, self._pending_bytes = set(), 0
        self._arrived_since_step = set()

    def arrived(self, parameter: Tensor) -> None:
        """Takes note of a gradient, and steps when enough of them have appeared."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        with optimizer._alone():
            known = optimizer._known[parameter]
            if known in self._arrived_since_step:
                raise StateError(
                    f"a second gradient of parameter {known.name} has arrived before step(): with in_backward=True each "
                    "backward() is followed by step(), and gradients cannot be accumulated"
                )
            self._arrived_since_step.add(known)
            self._pending.add(known)
            self._pending_bytes += self._size(optimizer, known)
            if self._due_bytes is None:
                optimizer._with_places()
                self._due_bytes = TILES * int(optimizer.report()["tile_bytes"])  # type: ignore[call-overload]
            if self._pending_bytes >= self._due_bytes:
                self._step(self._pending)

    def _step(self, only: set[Known] | None) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        try:
            optimizer._update(only, drops_gradients=True)
        finally:
            self._pending, self._pending_bytes = set(), 0

    def _size(self, optimizer: Core, known: Known) -> int:
        """Bytes of a parameter's state, about."""
        if known not in self._sizes:
            native = optimizer._with_places([known])
            fields = native.fields(known.number) if known.is_native else []
            cells = sum(math.prod(shape) for _, shape in fields)
            self._sizes[known] = cells * _MOMENT_BYTES[optimizer._config.moments]
        return self._sizes[known]
