"""An unmodified DeepSpeed on overspill's I/O engine.

Two lines, anywhere before ``deepspeed.initialize``, before or after DeepSpeed is imported::

    import overspill.deepspeed

    overspill.deepspeed.install()

From then on DeepSpeed's ``async_io`` op is :class:`overspill.aio_handle`, and its ``pin_memory`` op, which it loads for that,
is overspill's pinned memory. Neither is compiled any more: no compiler, no libaio. Everything else of DeepSpeed, ``gds``
included, stays as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Callable

import torch

from overspill import _native
from overspill.aio import File, aio_handle, is_pinned, pinned_tensor, unpin

__all__ = ["install", "is_installed", "uninstall"]


def install() -> None:
    """Makes DeepSpeed load overspill's handle wherever it would load its own. Does nothing the second time.

    What DeepSpeed has loaded before stays in use where it is.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
    """
    if is_installed():
        return
    if "deepspeed" not in sys.modules and importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError("DeepSpeed is not installed: pip install deepspeed", name="deepspeed")
    sys.meta_path.insert(0, _finder)
    for module in list(sys.modules.values()):
        if _BUILDERS.fullmatch(getattr(module, "__name__", None) or ""):
            _replace_builders(module)


def uninstall() -> None:
    """Makes DeepSpeed load its own ops again; handles that were made stay as they are."""
    if not is_installed():
        return
    sys.meta_path.remove(_finder)
    while _replaced:
        builder, name, original = _replaced.pop()
        if original is None:
            delattr(builder, name)
        else:
            setattr(builder, name, original)


def is_installed() -> bool:
    """Whether DeepSpeed loads overspill's handle."""
    return _finder in sys.meta_path


def _with_handle(move: Callable[[aio_handle, torch.Tensor, File, bool], int]) -> Callable[..., int]:
    """A method of a handle as the op has it without one: it moves a buffer from or to the beginning of a file."""

    def moved(
        buffer: torch.Tensor,
        filename: File,
        block_size: int,
        queue_depth: int,
        single_submit: bool,
        overlap_events: bool,
        validate: bool,
        /,
    ) -> int:
        handle = aio_handle(block_size, queue_depth, single_submit, overlap_events)
        return move(handle, buffer, filename, validate)

    return moved


def _memcpy(dest: torch.Tensor, src: torch.Tensor, /) -> int:
    """Copies ``src`` to ``dest``. Returns 0."""
    dest.detach().copy_(src.detach())
    return 0


class _PinHandle:
    """What DeepSpeed's ``pin_memory`` op offers."""

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A pinned tensor of ``num_elem`` elements of the example's type."""
        return pinned_tensor(num_elem, example_tensor.dtype)

    def free_cpu_locked_tensor(self, locked_tensor: torch.Tensor) -> bool:
        """Gives a pinned tensor up; whether it was one."""
        return unpin(locked_tensor)

    def free_cpu_locked_tensor_by_ptr(self, address: int) -> bool:
        """Gives the pinned tensor at ``address`` up; whether there was one."""
        return _native.unpin(address)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether all of ``buffer`` is pinned."""
        return is_pinned(buffer)


# What the builders load, by the name of the op.
_OPS = {
    "async_io": SimpleNamespace(
        aio_handle=aio_handle,
        aio_read=_with_handle(aio_handle.read),
        aio_write=_with_handle(aio_handle.write),
        deepspeed_memcpy=_memcpy,
    ),
    "pin_memory": SimpleNamespace(pin_handle=_PinHandle),
}

# Each accelerator has its own; installed from source, DeepSpeed has them in a package of their own.
_BUILDERS = re.compile(r"(deepspeed\.ops\.)?op_builder(\.\w+)?\.(async_io|pin_memory)")

# Builder, method, and what the builder itself had there.
_replaced: list[tuple[type, str, Any]] = []


def _replace_builders(module: ModuleType) -> None:
    """Has the builders that ``module`` defines load our ops."""
    for builder in list(vars(module).values()):
        is_builder = isinstance(builder, type) and getattr(builder, "NAME", None) in _OPS
        if is_builder and builder.__module__ == module.__name__:
            _replace(builder, "load", lambda op: op)
            _replace(builder, "is_compatible", lambda op: True)


def _replace(builder: type, name: str, answer: Any) -> None:
    """Has a builder's method answer for our ops. Builders of other ops inherit it, and keep what they had."""
    own = vars(builder).get(name)
    original = getattr(builder, name)

    def method(self: Any, verbose: bool = False) -> Any:
        op = _OPS.get(self.NAME)
        return answer(op) if op is not None else original(self, verbose)

    setattr(builder, name, method)
    _replaced.append((builder, name, own))


class _Finder(importlib.abc.MetaPathFinder):
    """Sees DeepSpeed's builders when they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _BUILDERS.fullmatch(fullname):
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module as another loader does, and replaces its builders."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        # Whoever uninstalled while it was being imported wants its builders as they are.
        if is_installed():
            _replace_builders(module)


_finder = _Finder()
