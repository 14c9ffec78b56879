"""Hooks behind gradients: who wants to know that backward has computed one."""

from __future__ import annotations

import weakref
from typing import Any, Callable, cast

from torch import Tensor

__all__ = ["GradientHooks"]


class GradientHooks:
    """Calls a method whenever a parameter's gradient has appeared, as long as the method's object lives."""

    def __init__(self, method: Callable[[Tensor], None]) -> None:
        # The parameters keep the hooks: these must not keep the optimizer, whose end removes its directory.
        self._method = weakref.WeakMethod(method)
        self._handles: list[Any] = []

    def watch(self, parameter: Tensor) -> Callable[[], None]:
        """Hangs a hook behind the parameter's gradient; the answer takes it away."""
        watching = self._method

        def appeared(parameter: Tensor) -> None:
            method = watching()
            if method is not None:
                method(parameter)

        needed = parameter.requires_grad
        parameter.requires_grad_(True)
        try:
            handle = parameter.register_post_accumulate_grad_hook(appeared)  # type: ignore[no-untyped-call]
        finally:
            parameter.requires_grad_(needed)
        self._handles.append(handle)
        return cast("Callable[[], None]", handle.remove)

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    __del__ = close
