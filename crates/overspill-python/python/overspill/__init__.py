"""Train PyTorch models whose optimizer state does not fit in memory.

What does not fit spills to fast storage and comes back in time::

    import overspill

    optimizer = overspill.AdamW(model.parameters(), lr=1e-4, swap_dir="/nvme/run", memory="4GiB")

is a ``torch.optim.Optimizer`` like any other. ``python -m overspill`` is the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from overspill import errors
from overspill._native import VERSION as __version__  # noqa: N811
from overspill.errors import OverspillError

if TYPE_CHECKING:
    from overspill import deepspeed
    from overspill.aio import aio_handle
    from overspill.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Lion, Muon

# What needs torch is imported when it is asked for: the command line works without.
_MODULES = {
    **dict.fromkeys(("SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "Lion", "Muon"), "overspill.optim"),
    "aio_handle": "overspill.aio",
    "deepspeed": "overspill.deepspeed",
}

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Muon",
    "OverspillError",
    "__version__",
    "aio_handle",
    "deepspeed",
    "errors",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'overspill' has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    value = getattr(module, name, module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
