"""State that leaves an optimizer and comes back in ``torch``'s dictionaries: all of it, or that of one parameter.

What comes in is looked at before anything changes; then it is written in one pass over the records that it is of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from overspill.errors import ArgumentError
from overspill.optim.core import Core, bump_versions
from overspill.optim.interrupt import uninterrupted
from overspill.optim.options import shown
from overspill.optim.state import (
    export_state,
    fields_of,
    halves_of,
    import_state,
    step_tensor,
    steps_of,
)

if TYPE_CHECKING:
    from overspill.optim.table import Known

__all__ = ["Dictionaries"]


class Dictionaries(Core):
    """An optimizer whose state can be read and set; :class:`~overspill.optim.base.SwappedOptimizer` commits, too."""

    def state_dict(self) -> dict[str, Any]:
        """The state as ``torch``'s class of the same name has it, which can load it.

        ``{"state": {position: {"step": …, "exp_avg": …}}, "param_groups": […]}``: tensors are fp32, of the parameter's
        shape but for those of Adafactor; bf16 and fp16 parameters have a ``"master"``, too. They lie in unnamed files in
        the first directory of ``swap_dir``, as large as the state in fp32, which go with the tensors; what is read of them
        the kernel can take out of memory again. ``torch.save`` writes them as they are.

        Raises:
            DiskFullError: when there is no room for them.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        positions = {id(p): known.position for p, known in self._known.items()}
        groups = [
            {
                **{k: v for k, v in group.items() if k != "params"},
                "params": [positions[id(p)] for p in group["params"]],
            }
            for group in self.param_groups
        ]
        saved: dict[str, Any] = {"state": self._exported(), "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    def _exported(self) -> dict[int, dict[str, Tensor]]:
        native = self._alive()
        if native is None:
            return {}
        wanted = [known for known in self._by_number if not native.is_new(known.number)]
        state = export_state(native, sorted(wanted, key=lambda known: known.position), self._directories[0])
        if self._counts_steps:
            steps = {known.position: known.steps for known in wanted}
            state = {
                position: {"step": step_tensor(steps[position]), **own} for position, own in state.items()
            }
        return {position: own for position, own in state.items() if own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over groups' options and state; what :meth:`state_dict` or ``torch``'s class of the same name gave.

        Tensors are read one batch at a time: give those of ``torch.load(…, mmap=True)`` for a state that is larger than
        memory. A ``"master"`` sets its parameter, too; without one, the master is the parameter as it is.

        Raises:
            ArgumentError: for the state of other parameters, or of another class; nothing was changed.
            StateError: when options like ``amsgrad`` differ from those that the state has been made with.
        """
        self._alive()
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved_groups, saved_state = halves_of(state_dict)
        counts = [len(group["params"]) for group in self.param_groups]
        saved_counts = [len(group["params"]) for group in saved_groups]
        if counts != saved_counts:
            raise ArgumentError(
                f"the state has groups of {shown(saved_counts)} parameters, and the optimizer has groups of {shown(counts)}"
            )
        before = [dict(group) for group in self.param_groups]
        try:
            given = self._taken_over(saved_groups, saved_state)
        except BaseException:
            for group, options in zip(self.param_groups, before):
                group.clear()
                group.update(options)
            raise
        native = self._alive()
        with uninterrupted():
            kept = {known.position for known, _, _ in given}
            for known in self._known.values():
                if known.position not in kept:
                    known.steps = 0
                    if native is not None and known.is_native:
                        native.purge(known.number)
            if native is not None:
                import_state(native, [(known, fields) for known, fields, _ in given if known.is_native])
            for known, _, steps in given:
                known.steps = steps
            bump_versions([known.parameter for known, fields, _ in given if "master" in fields])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _taken_over(
        self, saved_groups: Sequence[Mapping[str, Any]], saved_state: Mapping[Any, Mapping[str, Any]]
    ) -> list[tuple[Known, dict[str, Tensor], int]]:
        """Takes over the groups' options; the answer is the state that belongs to parameters, and their steps."""
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups)):
            options = {name: _copied(name, value) for name, value in saved.items() if name != "params"}
            # How torch computes says nothing about how the state is swapped.
            options.update(
                {name: group[name] for name in ("foreach", "capturable", "differentiable") if name in group}
            )
            own = {
                "params": group["params"],
                **({"param_names": group["param_names"]} if "param_names" in group else {}),
            }
            missing = {name: value for name, value in group.items() if name not in options}
            group.clear()
            group.update({**own, **missing, **options})
            self._refuse_options(group)
            self._check_rule(index, group)
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        theirs = chain.from_iterable(group["params"] for group in saved_groups)
        pairs = {number: self._known[parameter] for number, parameter in zip(theirs, ours)}
        wanted = {pairs[number]: state for number, state in saved_state.items() if number in pairs and state}
        if not wanted:
            return []
        native = self._with_places(wanted)
        given = []
        for known, state in wanted.items():
            fields: dict[str, Tensor] | None
            fields = fields_of(native, known, state, type(self).__name__) if known.is_native else {}
            if fields is not None:
                given.append((known, fields, steps_of(known, state)))
        return given

    def get_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of one parameter: fp32 copies, and ``step``. Empty if it has none.

        Raises:
            ArgumentError: when the parameter is not this optimizer's.
        """
        known = self._of(parameter)
        native = self._alive()
        if native is None or not known.is_native or native.is_new(known.number):
            return {}
        state = export_state(native, [known], self._directories[0])[known.position]
        return {"step": step_tensor(known.steps), **{name: x.clone() for name, x in state.items()}}

    def set_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Writes the state of one parameter back; what :meth:`get_state` gave, changed. An empty one is dropped.

        A ``"master"`` sets the parameter, too; without one, the master is the parameter as it is.

        Raises:
            ArgumentError: when something is missing, or has another shape.
        """
        known = self._of(parameter)
        if not isinstance(state, Mapping):
            raise ArgumentError(f"a state is a dictionary, as get_state() returns it, not {shown(state)}")
        native = self._with_places([known])
        fields = fields_of(native, known, state, type(self).__name__) if known.is_native else {}
        if fields is None:
            self.purge(parameter)
            return
        steps = steps_of(known, state)
        with uninterrupted():
            if known.is_native:
                import_state(native, [(known, fields)])
                bump_versions([parameter])
            known.steps = steps

    def purge(self, parameter: Tensor) -> None:
        """Drops the state of one parameter: its next step is its first."""
        known = self._of(parameter)
        native = self._alive()
        with uninterrupted():
            if native is not None and known.is_native:
                native.purge(known.number)
            known.steps = 0

    def _of(self, parameter: Tensor) -> Known:
        known = self._known.get(parameter) if isinstance(parameter, Tensor) else None
        if known is None:
            raise ArgumentError("the parameter is not this optimizer's")
        return known


def _copied(name: object, value: Any) -> Any:
    try:
        return deepcopy(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"option {shown(name)} of the state cannot be copied: {shown(value)}") from error
