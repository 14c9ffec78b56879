"""Optimizers whose state is on storage: ``torch.optim`` with a ``swap_dir``.

::

    backward ─ gradients ─► step(): collect, scale, one native pass ─► weights in place; state: load, update, store
                            commit(): state, weights, hyper-parameters, steps, extra ─► the next generation on storage
    state_dict() ─ a mapped file beside the state ─► torch.save        torch.load ─► load_state_dict(): batch by batch

``rules`` has the classes; ``core`` steps, ``base`` saves and restores. Each class is a ``torch.optim.Optimizer``; the
arithmetic is PyTorch's.
"""

from __future__ import annotations

from overspill.optim.base import SwappedOptimizer
from overspill.optim.rules import SGD, Adafactor, Adagrad, Adam, AdamW, Lion, Muon

__all__ = ["SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "Lion", "Muon", "SwappedOptimizer"]
