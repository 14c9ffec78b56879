"""What all optimizers of the package share: :class:`SwappedOptimizer`.

:class:`~overspill.optim.core.Core` steps; here is how state leaves an optimizer and comes back: in ``torch``'s dictionaries,
and in commits on storage.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from overspill._native import Optimizer as Native
from overspill.errors import ArgumentError, StateError
from overspill.optim import record
from overspill.optim.core import Core, bump_versions
from overspill.optim.interrupt import uninterrupted
from overspill.optim.options import Bytes, Directories, directories_of, is_committed, shown
from overspill.optim.staging import Staging
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

__all__ = ["SwappedOptimizer"]

Self = TypeVar("Self", bound="SwappedOptimizer")


class SwappedOptimizer(Core):
    """The base of all optimizers of the package; it has no update rule of its own.

    Keyword arguments of every class, besides those of ``torch.optim``:

    Args:
        swap_dir: the directory of the state, or several, one per disk; they must not exist yet, or be empty, and are made
            when the first step is taken. They go when the optimizer goes, unless something was committed. What ``overspill
            tune`` has found out of the directory above is used; of several without that, the bandwidth is measured.
        memory: all the memory that the state may take, in bytes or as text (``"512MiB"``, ``"8GB"``); what it holds
            beyond the pipeline stays in memory for good.
        moments: how moments are stored: ``"float32"``, ``"bfloat16"``, or ``"8bit"``.
        stochastic_rounding: bf16 parameters have no fp32 masters, and are rounded at random.
        max_norm: all gradients together are clipped to this 2-norm, in the same pass; :attr:`grad_norm` is what it was.
        in_backward: parameters are updated while backward runs, and their gradients freed; one ``backward()`` to a
            ``step()``.
        durability: ``"step"`` to be able to commit, or ``"none"`` for half the room.
        backend: ``"auto"``, ``"io_uring"``, ``"aio"`` or ``"threads"``.
        resident: the most of the state that stays in memory, in bytes or as text; ``None`` for as much as fits.

    Parameters are dense fp32, bf16 or fp16 tensors; the latter two are their exact fp32 masters, rounded to the nearest (a
    tie goes away from zero in bf16, and to the even number in fp16). Gradients may have any of the three types. A parameter
    without a gradient is left alone, and its step is not counted. Parameters on a CUDA device are updated through copies in
    pinned memory, which has not been tested on one yet.

    ``optimizer.state`` shows the steps only; :meth:`state_dict` brings everything. A parameter of 16 bits that is changed by
    hand between two steps is overwritten from its master: ``set_state(parameter, state)`` with a state that has no
    ``"master"`` makes the parameter the master.

    Not thread-safe: one call at a time. After a fork the object belongs to the parent, and any use in the child raises
    :class:`overspill.errors.ForkError`.
    """

    # Dictionaries.

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

    # Commits.

    @property
    def extra(self) -> Any:
        """What the last :meth:`commit` or :meth:`resume` had as ``extra``."""
        return self._extra

    def commit(self, extra: Any = None) -> None:
        """Makes state, weights, groups' options and steps the next generation on storage, durably.

        Whatever happens later, :meth:`resume` goes on from here. Parameters that never had a gradient to expect are no part
        of it, nor are the buffers of modules. What else a run needs to be the same run, say the state of
        a scheduler and the number of the next batch, goes along as ``extra``: anything that JSON has.

        Raises:
            ArgumentError: for what JSON does not have, and for parameters and options with which no step would go on.
            StateError: with ``durability="none"``, after a step or a :meth:`roll_back` that failed, or when options like
                ``amsgrad`` differ from those that the state has been made with.
            DiskFullError: when there is no room; the last commit is whole.
        """
        native = self._with_places()
        self._check_shapes()
        for index, group in enumerate(self.param_groups):
            # Rates are a schedule's; what else no step would take, no commit has.
            self._hyper(group)
            self._check_rule(index, group)
        text = record.record(self, extra)
        # As JSON has it: a commit is the same before and after it was gone on from.
        extra = record.parse(text, self._directories[0], None)["extra"]
        staging = Staging()
        weights = [staging.weight(known.parameter) for known in self._by_number]
        staging.synchronize()
        native.commit(weights, text)
        self._extra = extra

    def roll_back(self) -> None:
        """Goes back to the last commit: state, weights, groups' options, steps, and :attr:`extra`.

        All of the commit is read before anything changes, every byte of it, and compared with what was stored; then what is
        needed at once is read again. When this is refused, or the commit is damaged, everything is as it was. Should
        something fail after that, a disk, say, then there is no state until another call succeeds: :meth:`step` and
        :meth:`commit` raise :class:`overspill.errors.StateError`.

        Raises:
            StateError: when nothing is committed, or parameters or groups have joined since.
            ArgumentError: when a parameter has another shape or type now.
            CorruptionError: when what is stored is not what was written.
        """
        native = self._alive()
        if native is None:
            raise StateError("nothing is committed")
        text = native.meta()
        if text == "null":
            raise StateError("nothing is committed: commit() first")
        found = record.parse(text, self._directories[0], type(self).__name__)
        have_joined = len(found["places"]) != len(self._by_number)
        if have_joined or record.counts_of(found) != [len(group["params"]) for group in self.param_groups]:
            raise StateError(
                "parameters have joined since the last commit: resume() with those of the commit"
            )
        self._check_shapes()
        with uninterrupted():
            staging = Staging()
            native.roll_back([staging.weight(known.parameter, filled=False) for known in self._by_number])
            try:
                staging.write_back()
                bump_versions([known.parameter for known in self._by_number])
            except BaseException:
                native.lose()
                raise
            self._take_up(found)

    def _check_shapes(self) -> None:
        for known in self._by_number:
            known.check_shape()

    def _take_up(self, found: Mapping[str, Any]) -> None:
        record.restore_groups(self, found, self._directories[0])
        record.restore_steps(self._known.values(), found)
        self._extra = found["extra"]

    @classmethod
    def resume(
        cls: type[Self],
        params: Any,
        swap_dir: Directories,
        *,
        snapshot: str | None = None,
        memory: Bytes = "1GiB",
        **swap: Any,
    ) -> Self:
        """Goes on from the last commit: state, weights (in place), groups' options, steps and :attr:`extra`.

        With a ``snapshot``, that is read, every byte of it, and made the last commit before, durably, as ``overspill
        restore`` does; the snapshot stays. Nothing is changed if it is damaged or of other parameters. Without one, the
        weights are read twice: the parameters stay as they are if those of the commit are damaged.

        Args:
            params: the same parameters in the same groups as were committed; their values and the groups' options do not
                matter.
            swap_dir: the same directories.
            snapshot: the name of the snapshot to go back to.
            memory: as for a new optimizer; it need not be the same.
            swap: ``max_norm``, ``in_backward``, ``durability``, ``backend``, ``resident``; the first three are as they
                were if they are not given.

        Raises:
            StateError: when nothing is committed, it is of another class or of other parameters, or there is no snapshot
                of that name.
            LockedError: when another process is using it.
            CorruptionError: when what is stored is not what was written.
            UnsupportedError: for any other keyword: options of groups are those that were committed.
        """
        # The native half follows no links.
        paths = tuple(os.path.realpath(path) for path in directories_of(swap_dir))
        snapshot = None if snapshot is None else _check_name(snapshot)
        if not is_committed(paths[0]):
            raise StateError(f"nothing is committed in {paths[0]}: make a new optimizer")
        found = record.parse(Native.committed(paths[0], snapshot), paths[0], cls.__name__)
        config = record.config(found, {"memory": memory, **swap})
        optimizer = cls(params, swap_dir=paths, _config=config)  # type: ignore[call-arg]
        try:
            optimizer._open(found, snapshot)
        except BaseException:
            optimizer.close()
            raise
        return optimizer

    def _open(self, found: Mapping[str, Any], snapshot: str | None) -> None:
        record.restore_groups(self, found, self._directories[0])
        by_position = {known.position: known for known in self._known.values()}
        names = [by_position[place].name for place in found["places"] if place in by_position]
        if names != found["names"] and sorted(names) == sorted(found["names"]):
            raise StateError(
                f"{self._directories[0]} has the same parameters in another order: give them as they were committed"
            )
        for number, (position, name) in enumerate(zip(found["places"], found["names"])):
            known = by_position.get(position)
            if known is None:
                raise StateError(
                    f"{self._directories[0]} has state of a parameter at place {position}, and there is none"
                )
            known.number, known.name, known.shape = number, name, known.parameter.shape
            self._by_number.append(known)
        specs = []
        for index, group in enumerate(self.param_groups):
            rule = self._rule(group)
            for parameter in group["params"]:
                if self._known[parameter].is_native:
                    self._rules[index] = rule
                    specs.append((self._known[parameter].number, self._spec(self._known[parameter], rule)))
        staging = Staging()
        weights = [staging.weight(known.parameter, filled=False) for known in self._by_number]
        ordered = [spec for _, spec in sorted(dict(specs).items())]
        self._native = Native.open(
            list(self._directories), ordered, weights, snapshot=snapshot, **self._native_options()
        )
        staging.write_back()
        bump_versions([known.parameter for known in self._by_number])
        self._take_up(found)

    @staticmethod
    def is_committed(swap_dir: Directories) -> bool:
        """Whether :meth:`resume` has something to go on from there."""
        return is_committed(directories_of(swap_dir)[0])

    def snapshot(self, name: str) -> None:
        """Pins the last commit under a name: later ones leave it alone.

        Raises:
            ArgumentError: for a name that is none.
            StateError: when nothing is committed.
            DiskFullError: when there is no room for the next commit beside it.
        """
        self._committed().snapshot(_check_name(name))

    def delete_snapshot(self, name: str) -> None:
        """Gives a snapshot up, and its room back.

        Raises:
            StateError: when there is none of that name.
        """
        self._committed().delete_snapshot(_check_name(name))

    def snapshots(self) -> list[str]:
        """The names of all snapshots."""
        native = self._alive()
        return [] if native is None else native.snapshots()

    def _committed(self) -> Native:
        native = self._alive()
        if native is None:
            raise StateError("nothing is committed: commit() first")
        return native


def _check_name(name: object) -> str:
    """A snapshot's name, as far as it is text; the native half knows which text."""
    if not isinstance(name, str) or not (name.isascii() and name.isprintable()):
        raise ArgumentError(f"a snapshot has a name like 'best' or 'step-1000', not {shown(name)}")
    return name


def _copied(name: object, value: Any) -> Any:
    try:
        return deepcopy(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"option {shown(name)} of the state cannot be copied: {shown(value)}") from error
