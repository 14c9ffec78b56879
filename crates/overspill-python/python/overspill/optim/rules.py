"""The optimizers: ``torch``'s arguments and defaults, and what the native half calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

from torch import Tensor

from overspill.errors import ArgumentError
from overspill.optim.base import SwappedOptimizer
from overspill.optim.options import Directories, SwapOptions, flag_of, number_of, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "Lion", "Muon"]

Number = Union[float, Tensor]

_SPACING_OF_F32 = 2.0**-23


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ArgumentError(f"{name} is {wanted}, not {shown(value)}")


def _option(group: Mapping[str, Any], name: str) -> Any:
    if name not in group:
        raise ArgumentError(f"the group has no option {name!r}: add_param_group() gives it the default")
    return group[name]


def _number(group: Mapping[str, Any], name: str) -> float:
    # A rate may be a tensor of one element, which somebody changes in place.
    return number_of(name, _option(group, name))


def _numbers(group: Mapping[str, Any], name: str, wanted: str, count: int) -> list[float]:
    values = _option(group, name)
    _check(isinstance(values, (list, tuple)) and len(values) == count, name, values, wanted)
    return [number_of(f"each of {name}", value) for value in values]


def _flag(group: Mapping[str, Any], name: str) -> bool:
    # A state of an older torch does not have all of them.
    return flag_of(name, group.get(name))


def _check_rates(group: Mapping[str, Any], *names: str) -> None:
    for name in ("lr", "weight_decay", *names):
        _check(0.0 <= _number(group, name) < math.inf, name, group[name], "0 or more")


def _betas(group: Mapping[str, Any]) -> dict[str, float]:
    betas = _numbers(group, "betas", "two numbers", 2)
    for beta in betas:
        _check(0.0 <= beta < 1.0, "each of betas", beta, "in [0, 1)")
    return dict(zip(("beta1", "beta2"), betas))


def _common(group: Mapping[str, Any]) -> dict[str, float]:
    return {
        "lr": _number(group, "lr"),
        "weight_decay": _number(group, "weight_decay"),
        "maximize": float(_flag(group, "maximize")),
    }


class Adam(SwappedOptimizer):
    """``torch.optim.Adam`` with its state on storage.

    Arguments are those of ``torch.optim.Adam``, and those of :class:`SwappedOptimizer` by keyword.

    Example::

        optimizer = overspill.Adam(model.parameters(), lr=1e-3, swap_dir="/nvme/run", memory="4GiB")
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        swap_dir: Directories,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **swap: Unpack[SwapOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, swap_dir, **swap)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_rates(group, "eps")

    def _rule(self, group: Mapping[str, Any]) -> str:
        name = "adamw" if _flag(group, "decoupled_weight_decay") else "adam"
        return f"{name}_amsgrad" if _flag(group, "amsgrad") else name

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {**_common(group), **_betas(group), "eps": _number(group, "eps")}


class AdamW(Adam):
    """``torch.optim.AdamW`` with its state on storage.

    Arguments are those of ``torch.optim.AdamW``, and those of :class:`SwappedOptimizer` by keyword.

    Example::

        optimizer = overspill.AdamW(model.parameters(), lr=1e-4, swap_dir="/nvme/run", memory="4GiB")
        for batch in batches:
            model(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        swap_dir: Directories,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **swap: Unpack[SwapOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            swap_dir=swap_dir,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **swap,
        )

    def _rule(self, group: Mapping[str, Any]) -> str:
        # A state of an older torch does not say.
        return "adamw_amsgrad" if _flag(group, "amsgrad") else "adamw"


class SGD(SwappedOptimizer):
    """``torch.optim.SGD`` with its momentum, and the masters of bf16 and fp16 parameters, on storage.

    Arguments are those of ``torch.optim.SGD``, and those of :class:`SwappedOptimizer` by keyword. Whether there is momentum
    is decided before the first step.
    """

    _counts_steps = False

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        *,
        swap_dir: Directories,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **swap: Unpack[SwapOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, swap_dir, **swap)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_rates(group, "momentum")
        is_plain = _number(group, "momentum") > 0 and _number(group, "dampening") == 0
        if _flag(group, "nesterov") and not is_plain:
            raise ArgumentError("nesterov=True needs momentum, and no dampening")

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "sgd_momentum" if _number(group, "momentum") else "sgd"

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {
            **_common(group),
            "momentum": _number(group, "momentum"),
            "dampening": _number(group, "dampening"),
            "nesterov": float(_flag(group, "nesterov")),
        }


class Adagrad(SwappedOptimizer):
    """``torch.optim.Adagrad`` with its state on storage.

    Arguments are those of ``torch.optim.Adagrad``, and those of :class:`SwappedOptimizer` by keyword.
    ``initial_accumulator_value`` is one for all groups.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        swap_dir: Directories,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **swap: Unpack[SwapOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, swap_dir, **swap)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_rates(group, "lr_decay", "initial_accumulator_value", "eps")

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "adagrad"

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {**_common(group), "lr_decay": _number(group, "lr_decay"), "eps": _number(group, "eps")}


class Lion(SwappedOptimizer):
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023) with its state on storage.

    Args:
        params: parameters, named ones, or groups of them.
        lr: the size of every element's step.
        betas: what the update, and the momentum, keep of the momentum.
        weight_decay: decoupled, as in AdamW.
        maximize: climbs instead of descending.
        swap_dir: and the other keywords, see :class:`SwappedOptimizer`.
    """

    _counts_steps = False

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        swap_dir: Directories,
        maximize: bool = False,
        **swap: Unpack[SwapOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, swap_dir, **swap)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_rates(group)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "lion"

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {**_common(group), **_betas(group)}


class Adafactor(SwappedOptimizer):
    """``torch.optim.Adafactor`` with its state on storage.

    Arguments are those of ``torch.optim.Adafactor``, and those of :class:`SwappedOptimizer` by keyword. The update is
    computed in fp32 whatever the parameter's type, and the first ``eps`` is fp32's spacing if it is ``None``. Each parameter
    is updated as a whole, so memory holds the longest at least.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        swap_dir: Directories,
        foreach: bool | None = None,
        maximize: bool = False,
        **swap: Unpack[SwapOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, swap_dir, **swap)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_rates(group)

    def _eps(self, group: Mapping[str, Any]) -> list[float]:
        eps = _option(group, "eps")
        if isinstance(eps, (list, tuple)) and eps and eps[0] is None:
            eps = (_SPACING_OF_F32, *eps[1:])
        numbers = _numbers({"eps": eps}, "eps", "two numbers, or None and a number", 2)
        _check(all(number >= 0.0 for number in numbers), "each of eps", group["eps"], "0 or more")
        return numbers

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "adafactor"

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        eps1, eps2 = self._eps(group)
        beta2_decay, d = _number(group, "beta2_decay"), _number(group, "d")
        _check(beta2_decay <= 0.0, "beta2_decay", group["beta2_decay"], "0 or less")
        _check(d >= 1.0, "d", group["d"], "1 or more")
        return {**_common(group), "beta2_decay": beta2_decay, "eps1": eps1, "eps2": eps2, "d": d}


class Muon(SwappedOptimizer):
    """``torch.optim.Muon`` with its state on storage, for matrices.

    Arguments are those of ``torch.optim.Muon``, and those of :class:`SwappedOptimizer` by keyword. The iteration is computed
    in fp32, ``torch``'s in bf16. Each parameter is updated as a whole, so memory holds the longest at least.
    """

    _counts_steps = False

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        swap_dir: Directories,
        **swap: Unpack[SwapOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults, swap_dir, **swap)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_rates(group, "momentum", "eps")
        for parameter in group["params"]:
            self._sides(parameter)

    @staticmethod
    def _sides(parameter: Tensor) -> tuple[int, int]:
        if parameter.dim() != 2:
            raise ArgumentError(
                f"Muon is for matrices, not for a parameter of shape {tuple(parameter.shape)}"
            )
        rows, columns = parameter.shape
        return rows, columns

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "muon"

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, float]:
        a, b, c = _numbers(group, "ns_coefficients", "three numbers", 3)
        ns_steps, how = _number(group, "ns_steps"), _option(group, "adjust_lr_fn")
        _check(ns_steps in range(1, 100), "ns_steps", group["ns_steps"], "1 to 99")
        known = ("original", "match_rms_adamw", "spectral_unclamped")
        is_known = how is None or (isinstance(how, str) and how in known)
        _check(is_known, "adjust_lr_fn", how, f"None or one of {', '.join(known)}")
        return {
            **_common(group),
            "momentum": _number(group, "momentum"),
            "nesterov": float(_flag(group, "nesterov")),
            "ns_a": a,
            "ns_b": b,
            "ns_c": c,
            "ns_steps": ns_steps,
            "eps": _number(group, "eps"),
            "match_rms_adamw": float(how == "match_rms_adamw"),
        }

    def _hyper_of(
        self, hyper: dict[str, float], parameter: Tensor, group: Mapping[str, Any]
    ) -> dict[str, float]:
        rows, columns = self._sides(parameter)
        if group["adjust_lr_fn"] != "spectral_unclamped" or rows >= columns:
            return hyper
        # The rate that the native half leaves as it is, because the matrix is wide; decay is by rate and factor together.
        ratio = math.sqrt(rows / columns)
        return {**hyper, "lr": hyper["lr"] * ratio, "weight_decay": hyper["weight_decay"] / ratio}
