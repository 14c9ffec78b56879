"""Going back to the last commit: all of it or nothing, and damage is told before."""

from __future__ import annotations

import signal

import pytest
import torch

import overspill
from overspill.errors import (
    ArgumentError,
    CorruptionError,
    StateError,
)
from overspill.optim import base
from overspill.optim.staging import Staging
from support import SMALL, assert_same, manifest_of, pair, parameters, set_gradients


def test_rolling_back_takes_everything_back(swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    with pytest.raises(StateError, match="nothing is committed"):
        optimizer.roll_back()
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit([1, 2])
    kept = [p.detach().clone() for p in ours]
    set_gradients(5, ours)
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.step()
    loss = ours[0].square().sum()
    optimizer.roll_back()
    assert_same(ours, kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert optimizer.extra == [1, 2] and int(optimizer.state[ours[0]]["step"]) == 1
    set_gradients(1, ours, theirs)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)


BLOCKS = [(700, 1000), (900, 1000), (3,)]
"""Weights of seven blocks, and some more."""


def offset_of(directory, name):
    """Where a tensor of the committed generation begins."""
    tensors = manifest_of(directory / "manifest")["tensors"]
    (offset,) = (tensor["offset"] for tensor in tensors if tensor["name"] == name)
    return offset


def damage(directory, name):
    """Flips a bit of a tensor of the committed generation; the same again repairs it."""
    offset = offset_of(directory, name)
    with open(directory / "data", "r+b") as data:
        data.seek(offset)
        byte = data.read(1)
        data.seek(offset)
        data.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("damaged", ["weights/4", "state/0"])
@pytest.mark.parametrize("resident", [0, None])
def test_a_commit_that_is_damaged_replaces_nothing(damaged, resident, swap_dir, backend):
    options = {"memory": "64MiB", "resident": resident, "backend": backend}
    ours, optimizer, theirs, reference = pair("SGD", swap_dir, BLOCKS, {"momentum": 0.5}, **options)
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit("first")
    set_gradients(1, ours, theirs)
    optimizer.step()
    reference.step()
    damage(swap_dir, damaged)
    optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.5
    with pytest.raises(CorruptionError, match=damaged):
        optimizer.roll_back()
    assert_same(ours, theirs)
    assert optimizer.param_groups[0]["lr"] == 0.5
    set_gradients(2, ours, theirs)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)
    optimizer.commit("second")
    optimizer.close()
    resumed = overspill.SGD.resume(parameters(BLOCKS, seed=1), swap_dir, **options)
    assert_same(resumed.param_groups[0]["params"], theirs)
    assert resumed.extra == "second"


def test_parameters_stay_as_they_are_when_the_weights_of_a_commit_are_damaged(swap_dir, backend):
    ours, optimizer, _, _ = pair("SGD", swap_dir, BLOCKS, backend=backend)
    optimizer.commit()
    optimizer.close()
    others, before = parameters(BLOCKS, seed=1), parameters(BLOCKS, seed=1)
    damage(swap_dir, "weights/4")
    with pytest.raises(CorruptionError, match="weights/4"):
        overspill.SGD.resume(others, swap_dir, **SMALL, backend=backend)
    assert_same(others, before)
    damage(swap_dir, "weights/4")
    overspill.SGD.resume(others, swap_dir, **SMALL, backend=backend).close()
    assert_same(others, ours)


def over_file(path, offset, like):
    """A tensor whose memory is a part of a file."""
    length = offset + like.numel() * like.element_size()
    storage = torch.UntypedStorage.from_file(str(path), True, length)
    return torch.empty(0, dtype=like.dtype).set_(storage, offset // like.element_size(), like.shape)


@pytest.mark.parametrize("resident", [0, None])
def test_weights_that_come_back_in_part_are_stepped_and_committed_by_nobody(resident, swap_dir, backend):
    shapes = [(1 << 18,), *BLOCKS]
    options = {"memory": "64MiB", "resident": resident, "backend": backend}
    ours, optimizer, theirs, reference = pair("SGD", swap_dir, shapes, {"momentum": 0.5}, **options)
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit()
    set_gradients(5, ours)
    optimizer.step()
    # What fills the first parameter is written over the last block, which was whole when it was compared.
    offset, memory = offset_of(swap_dir, "weights/7"), ours[0].data
    ours[0].data = over_file(swap_dir / "data", offset, memory)
    kept = ours[0].data.clone()
    with pytest.raises(CorruptionError, match="weights/7"):
        optimizer.roll_back()
    assert torch.equal(ours[0], theirs[0])
    set_gradients(1, ours)
    ours[3].square().sum().backward()
    for refused in (optimizer.step, optimizer.commit, optimizer.state_dict, optimizer.settle):
        with pytest.raises(StateError, match="a roll back failed: roll back"):
            refused()
    with pytest.raises(CorruptionError, match="weights/7"):
        optimizer.roll_back()
    ours[0].data.copy_(kept)
    ours[0].data = memory
    optimizer.roll_back()
    for step in (1, 2):
        assert_same(ours, theirs)
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)
    optimizer.commit()


@pytest.mark.parametrize("resident", [0, None])
def test_a_roll_back_that_fails_in_its_middle_leaves_no_state_until_one_succeeds(
    resident, swap_dir, monkeypatch, exact_sqrt
):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, resident=resident)
    for model in (ours, theirs):
        # Strided: it is filled through a copy.
        model[4].data = model[4].data.t().contiguous().t()
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit()
    set_gradients(5, ours)
    optimizer.step()

    def fail(_):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as failing:
        failing.setattr(Staging, "write_back", fail)
        with pytest.raises(RuntimeError, match="device is gone"):
            optimizer.roll_back()
    for refused in (optimizer.step, optimizer.commit, optimizer.state_dict, optimizer.settle):
        with pytest.raises(StateError, match="a roll back failed: roll back"):
            refused()
    optimizer.roll_back()
    assert_same(ours, theirs)
    for step in (1, 2):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)
    optimizer.commit()


class Signalled:
    """The native half of an optimizer, with a signal before and after each part of a commit that is compared."""

    def __init__(self, native):
        self._native = native

    def compare(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        left = self._native.compare(*arguments)
        signal.raise_signal(signal.SIGINT)
        return left

    def __getattr__(self, name):
        return getattr(self._native, name)


@pytest.fixture
def handler():
    """Sets what handles Ctrl-C; the former handler is back in the end."""
    former = signal.getsignal(signal.SIGINT)
    yield lambda handle: signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGINT, former)


def test_ctrl_c_is_heard_while_a_commit_is_compared_and_changes_nothing(swap_dir, handler):
    ours, optimizer, theirs, reference = pair("SGD", swap_dir, BLOCKS, {"momentum": 0.5})
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit("first")
    set_gradients(1, ours, theirs)
    optimizer.step()
    reference.step()
    whole, optimizer._native = optimizer._native, Signalled(optimizer._native)
    for heard in (0, 1):
        signals = []

        def handle(*_, signals=signals, heard=heard):
            signals.append("SIGINT")
            if len(signals) > heard:
                raise KeyboardInterrupt

        handler(handle)
        with pytest.raises(KeyboardInterrupt):
            optimizer.roll_back()
        assert len(signals) == heard + 1
        assert_same(ours, theirs)
        assert [int(optimizer.state[p]["step"]) for p in ours] == [2] * 3
    optimizer._native = whole
    set_gradients(2, ours, theirs)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)


def test_a_handler_that_commits_while_a_commit_is_compared_has_its_own_gone_back_to(swap_dir, handler):
    ours, optimizer, theirs, reference = pair("SGD", swap_dir, BLOCKS, {"momentum": 0.5})
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit("first")
    set_gradients(1, ours, theirs)
    optimizer.step()
    reference.step()
    whole, optimizer._native = optimizer._native, Signalled(optimizer._native)

    def commit(*_):
        handler(signal.SIG_IGN)
        optimizer.commit("second")
        set_gradients(5, ours)
        optimizer.step()

    handler(commit)
    optimizer.roll_back()
    optimizer._native = whole
    assert_same(ours, theirs)
    assert optimizer.extra == "second" and int(optimizer.state[ours[0]]["step"]) == 2
    set_gradients(2, ours, theirs)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)


def test_what_is_committed_just_before_it_is_gone_back_to_is_compared_too(swap_dir, monkeypatch):
    ours, optimizer, theirs, reference = pair("SGD", swap_dir, BLOCKS, {"momentum": 0.5})
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit("first")
    uninterrupted, calls = base.uninterrupted, []

    def late():
        calls.append(len(calls))
        if len(calls) == 1:
            set_gradients(1, ours, theirs)
            optimizer.step()
            reference.step()
            optimizer.commit("second")
            damage(swap_dir, "weights/0")
        return uninterrupted()

    monkeypatch.setattr(base, "uninterrupted", late)
    with pytest.raises(CorruptionError, match="weights/0"):
        optimizer.roll_back()
    assert_same(ours, theirs)
    set_gradients(2, ours, theirs)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)


def test_a_roll_back_that_is_refused_changes_nothing(swap_dir):
    ours, optimizer, theirs, reference = pair("SGD", swap_dir, options={"momentum": 0.5})
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    optimizer.commit(1)
    set_gradients(1, ours, theirs)
    optimizer.step()
    reference.step()
    shape, ours[0].data = ours[0].shape, ours[0].data.view(53, 37)
    with pytest.raises(ArgumentError, match=r"shape \(53, 37\) now"):
        optimizer.roll_back()
    ours[0].data = ours[0].data.view(shape)
    whole, ours[3].data = ours[3].data, ours[3].data.half()
    with pytest.raises(ArgumentError, match="another type"):
        optimizer.roll_back()
    ours[3].data = whole
    joined = parameters([(3,)])
    joined[0].requires_grad_(False)
    optimizer.add_param_group({"params": joined})
    with pytest.raises(StateError, match="joined since the last commit"):
        optimizer.roll_back()
    assert_same(ours, theirs)
    assert [int(optimizer.state[p]["step"]) for p in ours] == [2] * 5
    set_gradients(2, ours, theirs)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)
