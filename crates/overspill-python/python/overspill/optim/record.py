"""What goes with a commit besides state and weights: class, options, groups, steps, and what the user gave.

It is JSON, in which the Python half is one text: its numbers come back to the bit, infinities too, whoever reads and
writes the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Callable

from torch import Tensor

from overspill.errors import ArgumentError, StateError
from overspill.optim.options import SwapConfig

if TYPE_CHECKING:
    from overspill.optim.core import Core
    from overspill.optim.table import Known

__all__ = ["config", "counts_of", "parse", "record", "restore_groups", "restore_steps"]

_VERSION = 1


def record(optimizer: Core, extra: Any) -> str:
    """The record of an optimizer as it is.

    Raises:
        ArgumentError: for options and extras that JSON does not have.
    """
    places = optimizer._by_number
    steps = [[known.position, known.steps] for known in optimizer._known.values() if known.steps]
    inner = {
        "config": optimizer._config.recorded(),
        "defaults": _plain("default", optimizer.defaults),
        "groups": [
            {
                "count": len(group["params"]),
                "options": _plain(f"group {index}", {k: v for k, v in group.items() if k not in _OWN}),
            }
            for index, group in enumerate(optimizer.param_groups)
        ],
        "places": [known.position for known in places],
        "names": [known.name for known in places],
        "steps": steps,
        "extra": _checked("extra", extra),
    }
    outer = {
        "python": _VERSION,
        "class": type(optimizer).__name__,
        # What `overspill inspect` shows.
        "step": max((count for _, count in steps), default=0),
        "record": json.dumps(inner),
    }
    return json.dumps(outer)


_OWN = ("params", "param_names")


def parse(text: str, directory: str, wanted: str | None) -> dict[str, Any]:
    """Reads a record of the class ``wanted``, of any if that is ``None``.

    Raises:
        StateError: for one of another class, or of something else than this package's optimizers.
    """
    outer = json.loads(text)
    if not isinstance(outer, dict) or outer.get("python") != _VERSION:
        raise StateError(f"{directory} was not committed by an optimizer of this version's Python package")
    if wanted is not None and outer["class"] != wanted:
        raise StateError(
            f"{directory} has the state of {outer['class']}: use overspill.{outer['class']}.resume()"
        )
    found: dict[str, Any] = json.loads(outer["record"])
    return found


def counts_of(found: Mapping[str, Any]) -> list[int]:
    """How many parameters each group has."""
    return [group["count"] for group in found["groups"]]


def restore_groups(optimizer: Core, found: Mapping[str, Any], directory: str) -> None:
    """Gives the groups the options of a record.

    Raises:
        StateError: when the groups are others; nothing was changed.
    """
    counts = [len(group["params"]) for group in optimizer.param_groups]
    committed = counts_of(found)
    if counts != committed:
        raise StateError(
            f"{directory} has groups of {committed} parameters, and groups of {counts} were given: give the same, in the "
            "same order"
        )
    defaults, options = _typed(found["defaults"]), [_typed(group["options"]) for group in found["groups"]]
    optimizer.defaults.update(defaults)
    for group, restored in zip(optimizer.param_groups, options):
        own = {name: group[name] for name in _OWN if name in group}
        group.clear()
        group.update({**own, **restored})


def restore_steps(known: Iterable[Known], found: Mapping[str, Any]) -> None:
    """Gives the parameters the steps of a record."""
    steps = dict(found["steps"])
    for parameter in known:
        parameter.steps = steps.get(parameter.position, 0)


def config(found: Mapping[str, Any], given: Mapping[str, Any]) -> SwapConfig:
    """The options of a record, with those that are given in their place."""
    return SwapConfig.restored(found["config"], given)


def _plain(what: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _checked(f"{what}: {name}", value, _plain_value) for name, value in options.items()}


def _plain_value(value: Any) -> Any:
    """What JSON has for it: numbers of torch and numpy are Python's, and what is no tuple among its lists says so."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, tuple):
        return [_plain_value(x) for x in value]
    if isinstance(value, list):
        return {"list": [_plain_value(x) for x in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain_value(k), _plain_value(v)] for k, v in value.items()]}
    return value


def _typed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _typed_value(value) for name, value in options.items()}


def _typed_value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_typed_value(x) for x in value)
    if isinstance(value, dict) and "list" in value:
        return [_typed_value(x) for x in value["list"]]
    if isinstance(value, dict):
        return {_typed_value(k): _typed_value(v) for k, v in value["dict"]}
    return value


def _checked(what: str, value: Any, plain: Callable[[Any], Any] = lambda value: value) -> Any:
    try:
        value = plain(value)
        json.dumps(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{what} cannot be committed, it is not JSON: {error}") from error
    return value
