"""What is known of each parameter."""

from __future__ import annotations

from torch import Tensor

from overspill.errors import ArgumentError

__all__ = ["DTYPES", "Known"]

DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
"""The types of parameters, as the native half calls them."""


class Known:
    """A parameter, its places, and its steps."""

    __slots__ = ("name", "number", "parameter", "position", "shape", "steps")

    def __init__(self, parameter: Tensor, position: int, name: str) -> None:
        self.parameter = parameter
        self.position = position
        """Its id in a ``state_dict()``."""
        self.name = name
        self.number: int = -1
        """Its number on the native side; -1 until it has one, which it gets when it first can have a gradient."""
        self.shape: tuple[int, ...] | None = None
        """The shape that its state was made for; ``None`` until it has a place."""
        self.steps = 0

    @property
    def is_native(self) -> bool:
        """Whether there is a place for its state."""
        return self.number >= 0

    def check_shape(self) -> None:
        """Sees to it that the state is of the parameter as it is.

        Raises:
            ArgumentError: when it has become another.
        """
        if self.shape is not None and self.parameter.shape != self.shape:
            raise ArgumentError(
                f"parameter {self.name} has shape {tuple(self.parameter.shape)} now, and its state is for "
                f"{tuple(self.shape)}"
            )
