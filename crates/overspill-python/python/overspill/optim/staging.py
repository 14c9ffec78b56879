"""Copies in the processor's memory of what is not there, or not as its numbers are.

A weight or a gradient on another device is copied to pinned memory, one that is strided, not aligned, or whose signs torch
has yet to turn to a plain tensor; after the native call, weights are copied back. The copies of one native call are bounded
by :data:`STAGED_BYTES`, but for a single parameter that is longer. Parameters on a CUDA device take this way; it has been
run on processors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STAGED_BYTES", "Staging", "is_plain"]

STAGED_BYTES = 256 << 20
"""Bytes of copies after which a native call is due."""


class Staging:
    """The copies of one native call."""

    def __init__(self) -> None:
        self._bytes = 0
        self._back: list[tuple[Tensor, Tensor]] = []
        self._devices: set[torch.device] = set()

    def weight(self, parameter: Tensor, *, filled: bool = True) -> Tensor:
        """The parameter, or a copy that :meth:`write_back` copies back; not ``filled``: with any contents."""
        if is_plain(parameter):
            return parameter
        copy = self._like(parameter)
        if filled:
            copy.copy_(parameter.detach(), non_blocking=True)
        self._back.append((parameter, copy))
        return copy

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient, or a copy."""
        if is_plain(gradient):
            return gradient
        copy = self._like(gradient)
        copy.copy_(gradient.detach(), non_blocking=True)
        return copy

    def is_full(self) -> bool:
        """Whether the copies are to be used before there are more."""
        return self._bytes >= STAGED_BYTES

    def synchronize(self) -> None:
        """Waits for the copies: only then may they be read."""
        for device in self._devices:
            torch.cuda.synchronize(device)

    def write_back(self) -> None:
        """Copies the weights back, and forgets all copies."""
        with torch.no_grad():
            for parameter, copy in self._back:
                parameter.copy_(copy)
        self._back.clear()
        self._devices.clear()
        self._bytes = 0

    def _like(self, tensor: Tensor) -> Tensor:
        self._bytes += tensor.numel() * tensor.element_size()
        is_cuda = tensor.device.type == "cuda"
        if is_cuda:
            self._devices.add(tensor.device)
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cpu", pin_memory=is_cuda)


def is_plain(tensor: Tensor) -> bool:
    """Whether its bytes are its numbers, aligned and one after the other, in the processor's memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.data_ptr() % tensor.element_size() == 0
    )
