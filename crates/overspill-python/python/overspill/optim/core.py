"""A ``torch.optim.Optimizer`` over native state: groups, steps, and the native object's life.

A parameter gets its place in the native state when it first can have a gradient: most of them when the native object is
made, at the first step (or commit, or loaded state), and those that thaw or join later by being added. What a step does
is decided before it begins; then it is whole, whatever signals arrive.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from overspill._native import Optimizer as Native
from overspill._native import norm
from overspill.errors import ForkError, StateError, UnsupportedError
from overspill.optim.backward import InBackward
from overspill.optim.hooks import GradientHooks
from overspill.optim.interrupt import uninterrupted
from overspill.optim.options import (
    Directories,
    SwapConfig,
    directories_of,
    flag_of,
    refuse_occupied,
    remove_empty,
    storage,
)
from overspill.optim.staging import Staging, is_plain
from overspill.optim.state import StateView
from overspill.optim.table import DTYPES, Known

__all__ = ["Core", "bump_versions"]

C = TypeVar("C", bound="Core")

_MEANINGLESS = ("foreach", "capturable", "differentiable")


class Core(torch.optim.Optimizer):
    """An optimizer that steps; :class:`~overspill.optim.base.SwappedOptimizer` saves and restores, too."""

    _step_supports_amp_scaling = True
    _counts_steps = True
    """Whether the state of ``torch``'s class has a ``step``."""

    grad_norm: float | None
    """The 2-norm of all gradients of the last step, unscaled, before it was clipped; ``None`` without ``max_norm``."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        swap_dir: Directories,
        _config: SwapConfig | None = None,
        **swap: Any,
    ) -> None:
        _refuse_meaningless(defaults)
        self._config = SwapConfig.of(**swap) if _config is None else _config
        self._directories = directories_of(swap_dir)
        if _config is None:
            refuse_occupied(self._directories)
        self._native: Native | None = None
        self._closed = False
        self._known: dict[Tensor, Known] = {}
        self._by_number: list[Known] = []
        self._rules: dict[int, str] = {}
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._in_backward = InBackward(self) if self._config.in_backward else None
        self._hooks = GradientHooks(self._gradient_appeared)
        self.grad_norm = None
        self._extra: Any = None
        super().__init__(params, defaults)
        self.state = StateView(self._known)  # type: ignore[assignment]

    # What a class of this family says.

    def _rule(self, group: Mapping[str, Any]) -> str:
        """The name of the update rule, as the native half calls it."""
        raise NotImplementedError

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The hyper-parameters of a group, as the native half calls them."""
        raise NotImplementedError

    def _hyper_of(
        self, hyper: dict[str, float], parameter: Tensor, group: Mapping[str, Any]
    ) -> dict[str, float]:
        """Those of one parameter: the group's, or others."""
        return hyper

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Refuses what cannot be meant.

        Raises:
            ArgumentError: says what.
        """
        raise NotImplementedError

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, before the first step or later, with options of their own.

        Raises:
            UnsupportedError: for complex, sparse or integer parameters, those without contents, and options of ``torch``
                that have no meaning here.
            ArgumentError: for options that cannot be meant.
        """
        # It joins whole or not at all, whatever signals arrive.
        with uninterrupted(), contextlib.ExitStack() as undone:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            undone.callback(self.param_groups.pop)
            self._refuse_options(group)
            for parameter in group["params"]:
                _check_parameter(parameter)
            # As torch numbers them: a parameter that a group has twice takes two places, and has the first.
            start = sum(len(group["params"]) for group in self.param_groups[:-1])
            names = group.get("param_names") or [None] * len(group["params"])
            taken = {known.name for known in self._known.values()}
            for position, (parameter, name) in enumerate(zip(group["params"], names), start):
                if parameter in self._known:
                    continue
                # Of what cannot be written, the code: it is a name all the same.
                name = str(position if name is None else name).encode(errors="backslashreplace").decode()
                name = f"{name} ({position})" if name in taken else name
                taken.add(name)
                undone.callback(self._hooks.watch(parameter))
                self._known[parameter] = Known(parameter, position, name)
                undone.callback(self._known.pop, parameter)
            undone.pop_all()

    def _refuse_options(self, group: Mapping[str, Any]) -> None:
        _refuse_meaningless(group)
        self._check_group(group)
        # What a step will ask of it is asked now.
        self._rule(group)
        self._hyper(group)

    # Steps.

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient, in place.

        A ``KeyboardInterrupt`` or ``SIGTERM`` that arrives meanwhile takes effect when the step is whole. The last writes
        may go on when this returns; they have their own memory.

        Args:
            closure: computes the loss, and gradients, anew.

        Raises:
            UnsupportedError: for sparse gradients; nothing was changed.
            StateError: when the object is closed, or its state was lost in an earlier step that failed.
            StorageError: when the state cannot be moved; what was not committed is lost, see :meth:`roll_back`.
        """
        loss = None
        if closure is not None:
            self._refuse_in_backward("a closure")
            with torch.enable_grad():
                loss = closure()
        scale = 1.0
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None or found_inf is not None:
            self._refuse_in_backward("GradScaler")
            if found_inf is not None and float(found_inf):
                return loss
            scale = 1.0 / float(grad_scale) if grad_scale is not None else 1.0
        with self._alone():
            if self._in_backward is not None:
                self._in_backward.finish()
            else:
                self._update(None, scale)
                self.prefetch()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, as torch's. With ``in_backward=True``, what backward has not used is forgotten."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            with self._alone():
                self._in_backward.forget()

    def _alone(self) -> contextlib.AbstractContextManager[bool]:
        """The lock; in a fork, where a thread that is not there may have it, an error."""
        if os.getpid() != self._process:
            raise ForkError(
                f"this object belongs to process {self._process}, not to its fork {os.getpid()}: make it after forking, or "
                "use spawn"
            )
        return self._lock

    def _refuse_in_backward(self, what: str) -> None:
        if self._in_backward is not None:
            raise UnsupportedError(
                f"{what} needs all gradients at the end, and in_backward=True uses them up before"
            )

    def _update(self, only: set[Known] | None, scale: float = 1.0, drops_gradients: bool = False) -> None:
        """Steps those that have a gradient, of ``only`` these if it is not ``None``."""
        groups: list[dict[str, float]] = []
        work: dict[Known, tuple[int, Tensor]] = {}
        for index, group in enumerate(self.param_groups):
            hyper: dict[str, float] | None = None
            here = 0
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                known = self._known.get(parameter)
                if known is None:
                    raise StateError(f"group {index} was given parameters by hand: use add_param_group()")
                known.check_shape()
                if known in work or (only is not None and known not in only):
                    continue
                if gradient.layout is not torch.strided:
                    raise UnsupportedError(
                        f"the gradient of parameter {known.name} is sparse: use sparse=False"
                    )
                if hyper is None:
                    self._check_rule(index, group)
                    hyper, here = self._hyper(group), len(groups)
                    groups.append(hyper)
                own = self._hyper_of(hyper, parameter, group)
                if own is not hyper:
                    groups.append(own)
                work[known] = here if own is hyper else len(groups) - 1, gradient
        if not work:
            self._alive()
            return
        native = self._with_places(work)
        if self._config.max_norm is not None:
            gradients = [gradient for _, gradient in work.values()]
            scale *= self._clip_factor(gradients, scale, self._config.max_norm)
        with uninterrupted():
            self._run(native, groups, work, scale, drops_gradients)

    def _run(
        self,
        native: Native,
        groups: list[dict[str, float]],
        work: Mapping[Known, tuple[int, Tensor]],
        scale: float,
        drops_gradients: bool,
    ) -> None:
        staging = Staging()
        entries: list[tuple[int, int, int, Tensor, Tensor]] = []
        begun: list[Known] = []

        def flush() -> None:
            staging.synchronize()
            if entries:
                native.step(groups, entries, scale)
            staging.write_back()
            for known in begun:
                known.steps += 1
                if drops_gradients:
                    known.parameter.grad = None
            bump_versions([known.parameter for known in begun])
            entries.clear()
            begun.clear()

        for known, (group, gradient) in work.items():
            begun.append(known)
            if known.number < 0:
                # It has no elements.
                continue
            weight = staging.weight(known.parameter)
            entries.append((known.number, group, known.steps + 1, weight, staging.gradient(gradient)))
            if staging.is_full():
                flush()
        flush()

    def _clip_factor(self, gradients: Sequence[Tensor], scale: float, max_norm: float) -> float:
        """What clips the scaled gradients' norm, as ``torch.nn.utils.clip_grad_norm_`` has it."""
        direct, squared = [], 0.0
        for gradient in gradients:
            if is_plain(gradient):
                direct.append(gradient)
            else:
                squared += float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64)) ** 2
        self.grad_norm = (norm(direct) ** 2 + squared) ** 0.5 * scale
        factor = max_norm / (self.grad_norm + 1e-6)
        # In this order: of a gradient that is no number, all that is clipped by it is none, as in torch.
        return 1.0 if factor > 1.0 else factor

    # The native object.

    def _with_places(self, wanted: Iterable[Known] = ()) -> Native:
        """The native object, in which these and all that can have a gradient have a place."""
        native = self._alive()
        if native is None:
            trainable = {k for p, k in self._known.items() if p.requires_grad or p.grad is not None}
            wanted = trainable.union(wanted)
        places = [known for known in wanted if known.number < 0 and known.parameter.numel()]
        if native is not None and not places:
            return native
        new = sorted(places, key=lambda known: known.position)
        for known in new:
            # It may have become another since it joined.
            _check_parameter(known.parameter)
        rules: dict[Tensor, tuple[int, str]] = {}
        for index, group in enumerate(self.param_groups):
            rules.update(dict.fromkeys(group["params"], (index, self._rule(group))))
        specs = [self._spec(known, rules[known.parameter][1]) for known in new]
        with uninterrupted():
            if native is None:
                native = self._native = self._create(specs)
            else:
                native.extend(specs)
            for known in new:
                known.number, known.shape = len(self._by_number), known.parameter.shape
                self._by_number.append(known)
                self._rules.setdefault(*rules[known.parameter])
        return native

    def _alive(self) -> Native | None:
        if self._closed:
            raise StateError("the optimizer is closed: resume() goes on from what was committed")
        return self._native

    def _check_rule(self, index: int, group: Mapping[str, Any]) -> None:
        rule = self._rule(group)
        if self._rules.get(index, rule) != rule:
            raise StateError(
                f"group {index} has state of the rule {self._rules[index]}, and its options ask for {rule} now: choose "
                "before the first step"
            )

    def _spec(self, known: Known, rule: str) -> tuple[str, list[int], str, str]:
        return known.name, list(known.parameter.shape), DTYPES[str(known.parameter.dtype)], rule

    def _create(self, specs: list[tuple[str, list[int], str, str]]) -> Native:
        refuse_occupied(self._directories)
        with contextlib.ExitStack() as undone:
            for path in self._directories:
                with storage("make", os.path.dirname(path)):
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                if os.path.isdir(path):
                    # The native half makes its directories itself: nobody ever sees one of them without an owner.
                    remove_empty(path)
                    undone.callback(os.mkdir, path)
            native = Native.create(list(self._directories), specs, **self._native_options())
            undone.pop_all()
        return native

    def _native_options(self) -> dict[str, Any]:
        config = self._config
        return {
            "memory_bytes": config.memory_bytes,
            "moments": config.moments,
            "stochastic": config.stochastic,
            "initial_accumulator": float(self.defaults.get("initial_accumulator_value", 0.0)),
            "durability": config.durability,
            "backend": config.backend,
            "resident_bytes_max": config.resident_bytes_max,
        }

    def prefetch(self) -> None:
        """Begins to load what the next step needs first, as far as there is memory for it.

        Nobody needs to: the end of :meth:`step` does so, and every gradient that appears.

        Raises:
            StorageError: when a write of the last step failed; what was not committed is lost.
        """
        native = self._alive()
        if native is not None:
            native.prefetch()

    def _gradient_appeared(self, parameter: Tensor) -> None:
        if self._in_backward is not None:
            self._in_backward.arrived(parameter)
        elif self._native is not None:
            # While the last step ended, its writes had the memory for this.
            with contextlib.suppress(ForkError):
                self._native.prefetch()

    def settle(self) -> None:
        """Waits for the writes of the last step; nobody needs to, but to measure or to know now how they ended.

        Raises:
            StorageError: of the first that failed; what was not committed is lost.
        """
        native = self._alive()
        if native is not None:
            native.settle()

    @property
    def is_open(self) -> bool:
        """Whether there is state: from the first step, commit or loaded state on, until :meth:`close`."""
        return self._native is not None

    def report(self) -> dict[str, object]:
        """What the memory is spent on and what was moved: bytes, seconds, counts since the object was made.

        Keys: ``backend``, ``degraded_reason``, ``state_bytes``, ``resident_bytes``, ``memory_bytes``, ``depth``,
        ``tile_bytes``, ``bytes_read``, ``bytes_written``, ``seconds_step``, ``seconds_load``, ``seconds_compute``,
        ``seconds_store``, ``passes``, ``generation``; and ``volumes``: of each directory its share and how it is served.

        Raises:
            StateError: before the first step, when there is no state yet.
        """
        native = self._alive()
        if native is None:
            raise StateError("there is nothing to report before the first step")
        return native.report()

    def close(self) -> None:
        """Ends all I/O and releases the memory; the directories go, unless something was committed."""
        self._closed = True
        self._hooks.close()
        native, self._native = self._native, None
        if native is not None:
            native.close()

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise UnsupportedError(
            f"a swapped {type(self).__name__} cannot be pickled or copied, its state is on storage: use state_dict(), or "
            "commit() and resume()"
        )


def _refuse_meaningless(options: Mapping[str, Any]) -> None:
    for name in _MEANINGLESS:
        if flag_of(name, options.get(name)):
            raise UnsupportedError(f"{name}=True has no meaning for swapped state: leave it out")


def _check_parameter(parameter: Tensor) -> None:
    if str(parameter.dtype) not in DTYPES:
        raise UnsupportedError(
            f"parameters are fp32, bf16 or fp16, not {str(parameter.dtype).replace('torch.', '')}"
        )
    if parameter.device.type == "meta":
        raise UnsupportedError("a parameter on the meta device has no contents: materialize it first")
    if parameter.is_inference():
        raise UnsupportedError(
            "a parameter made in inference mode cannot be trained: make it, or clone it, outside"
        )
    if parameter.layout is not torch.strided or is_traceable_wrapper_subclass(parameter):
        raise UnsupportedError(
            f"parameters are dense tensors of their own memory, not {type(parameter).__name__}"
        )


def bump_versions(parameters: Sequence[Tensor]) -> None:
    """Lets autograd see that the parameters have changed: a graph from before must not be used with them."""
    increment = getattr(torch.autograd.graph, "increment_version", None)
    if increment is not None:
        # An older torch takes one at a time only.
        for parameter in parameters:
            increment(parameter)
