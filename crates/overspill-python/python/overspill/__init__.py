"""Train PyTorch models whose optimizer state does not fit in memory.

What does not fit spills to fast storage and comes back in time::

    import overspill

    optimizer = overspill.AdamW(model.parameters(), lr=1e-4, swap_dir="/nvme/run", memory="4GiB")

is a ``torch.optim.Optimizer`` like any other. ``python -m overspill`` is the command line.
"""

from __future__ import annotations

from overspill import errors
from overspill._native import VERSION as __version__
from overspill.errors import OverspillError

__all__ = ["OverspillError", "__version__", "errors"]
