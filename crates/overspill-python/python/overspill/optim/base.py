"""What all optimizers of the package share: :class:`SwappedOptimizer`.

:class:`~overspill.optim.core.Core` steps, and :class:`~overspill.optim.dictionaries.Dictionaries` has the state come and go
in ``torch``'s dictionaries; here it is committed on storage, and gone back to and on from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from overspill._native import Optimizer as Native
from overspill.errors import ArgumentError, StateError
from overspill.optim import record
from overspill.optim.core import bump_versions
from overspill.optim.dictionaries import Dictionaries
from overspill.optim.interrupt import uninterrupted
from overspill.optim.options import Bytes, Directories, directories_of, is_committed, shown
from overspill.optim.staging import Staging

__all__ = ["SwappedOptimizer"]

Self = TypeVar("Self", bound="SwappedOptimizer")


class SwappedOptimizer(Dictionaries):
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
        needed at once is read again. When this is refused, or interrupted while it compares, or the commit is damaged,
        everything is as it was. Should something fail after that, a disk, say, then there is no state until another call
        succeeds: :meth:`step` and :meth:`commit` raise :class:`overspill.errors.StateError`. With ``in_backward=True``,
        gradients that backward has not used are dropped.

        Raises:
            StateError: when nothing is committed, or parameters or groups have joined since.
            ArgumentError: when a parameter has another shape or type now.
            CorruptionError: when what is stored is not what was written.
        """
        native = self._committed()
        self._last_record(native)
        staging = Staging()
        weights = [staging.weight(known.parameter, filled=False) for known in self._by_number]
        # A handler may commit: then that is compared, too.
        while not self._went_back(native, staging, weights):
            pass

    def _went_back(self, native: Native, staging: Staging, weights: list[Tensor]) -> bool:
        """Compares the last commit and goes back to it, unless there is another one by then."""
        # As long as nothing is changed, signals are handled: between two of these.
        left: tuple[int, int] | None = (0, 0)
        while left is not None:
            left = native.compare(weights, left)
        with uninterrupted():
            found = self._last_record(native)
            if not native.roll_back(weights):
                return False
            try:
                staging.write_back()
                bump_versions([known.parameter for known in self._by_number])
            except BaseException:
                native.lose()
                raise
            self._take_up(found)
            if self._in_backward is not None:
                self._in_backward.drop()
            return True

    def _last_record(self, native: Native) -> dict[str, Any]:
        """What went with the last commit, which is one of the parameters and groups as they are."""
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
        return found

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
            StateError: when nothing is committed, it is of another class or of other parameters, there is no snapshot of
                that name, or another process has committed while this began.
            LockedError: when another process is using it.
            CorruptionError: when what is stored is not what was written.
            UnsupportedError: for any other keyword: options of groups are those that were committed.
        """
        # The native half follows no links.
        paths = tuple(os.path.realpath(path) for path in directories_of(swap_dir))
        snapshot = None if snapshot is None else _check_name(snapshot)
        if not is_committed(paths[0]):
            raise StateError(f"nothing is committed in {paths[0]}: make a new optimizer")
        meta = Native.committed(paths[0], snapshot)
        found = record.parse(meta, paths[0], cls.__name__)
        config = record.config(found, {"memory": memory, **swap})
        optimizer = cls(params, swap_dir=paths, _config=config)  # type: ignore[call-arg]
        try:
            optimizer._open(found, meta, snapshot)
        except BaseException:
            optimizer.close()
            raise
        return optimizer

    def _open(self, found: Mapping[str, Any], meta: str, snapshot: str | None) -> None:
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
            list(self._directories), ordered, weights, meta, snapshot=snapshot, **self._native_options()
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
