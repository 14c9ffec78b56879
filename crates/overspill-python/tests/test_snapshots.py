"""Names for commits, and going back to them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch

import overspill
from overspill._native import Optimizer as Native
from overspill.errors import (
    ArgumentError,
    CorruptionError,
    LockedError,
    MemoryBudgetError,
    OverspillError,
    StateError,
)
from overspill.optim import base
from support import BOUND, SMALL, assert_same, manifest_of, pair, parameters, set_gradients


def test_snapshots_stay_when_commits_go_on(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    assert optimizer.snapshots() == []
    with pytest.raises(StateError, match="commit"):
        optimizer.snapshot("none")
    for step in range(3):
        set_gradients(step, ours)
        optimizer.step()
        optimizer.commit(step)
        if step < 2:
            optimizer.snapshot(f"step-{step}")
    assert sorted(optimizer.snapshots()) == ["step-0", "step-1"]
    with pytest.raises(ArgumentError):
        optimizer.snapshot("../escape")
    optimizer.delete_snapshot("step-0")
    assert optimizer.snapshots() == ["step-1"]
    with pytest.raises(OverspillError):
        optimizer.delete_snapshot("step-0")
    optimizer.close()
    resumed = overspill.AdamW.resume(ours, swap_dir, **SMALL)
    assert resumed.snapshots() == ["step-1"] and resumed.extra == 2


def trained(optimizer, model, steps):
    """The losses of some steps, to the bit."""
    losses = []
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 300), torch.nn.Tanh(), torch.nn.Linear(300, 8))


def step_of_store(directory):
    """The step that its committed generation is of, where `overspill inspect` finds it."""
    return manifest_of(directory / "manifest")["meta"]["meta"]["step"]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_a_snapshot_is_gone_on_from_with_the_losses_that_followed_it(name, swap_dir, backend):
    make, model = getattr(overspill, name), network()
    options = {**SMALL, "memory": "32MiB", "backend": backend}
    optimizer = make(model.parameters(), lr=0.01, swap_dir=swap_dir, **options)
    trained(optimizer, model, range(5))
    optimizer.commit({"step": 5})
    optimizer.snapshot("best")
    expected = trained(optimizer, model, range(5, 9))
    optimizer.param_groups[0]["lr"] = 0.5
    # The room for parameters that joined after it stays.
    late = parameters([(500,)])
    optimizer.add_param_group({"params": late})
    set_gradients(0, late)
    optimizer.step()
    optimizer.commit({"step": 9})
    assert step_of_store(swap_dir) == 9
    optimizer.close()
    for _ in range(2):
        model = network()
        resumed = make.resume(model.parameters(), swap_dir, snapshot="best", **options)
        assert resumed.extra == {"step": 5} and resumed.param_groups[0]["lr"] == 0.01
        assert resumed.snapshots() == ["best"] and step_of_store(swap_dir) == 5
        assert trained(resumed, model, range(5, 9)) == expected
        resumed.commit({"step": 9})
        resumed.close()
    model = network()
    resumed = make.resume(model.parameters(), swap_dir, **options)
    assert resumed.extra == {"step": 9} and step_of_store(swap_dir) == 9


BACK_AND_FORTH = """
import sys
import torch
import overspill

p = torch.nn.Parameter(torch.zeros(400, 300))
while True:
    optimizer = overspill.Lion.resume([p], sys.argv[1], snapshot="best", memory="8MiB", resident=0)
    print(optimizer.extra, flush=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.commit("later")
    optimizer.close()
"""


def test_whoever_is_killed_while_going_back_leaves_the_snapshot_or_the_last_commit(swap_dir):
    p = torch.nn.Parameter(torch.zeros(400, 300))
    p.grad = torch.ones_like(p)
    optimizer = overspill.Lion([p], lr=1.0, swap_dir=swap_dir, **SMALL)
    optimizer.step()
    optimizer.commit("best")
    optimizer.snapshot("best")
    optimizer.step()
    optimizer.commit("later")
    optimizer.close()
    chosen = random.Random(3)
    for _ in range(2):
        command = [sys.executable, "-c", BACK_AND_FORTH, str(swap_dir)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(chosen.randint(1, 9)):
                assert process.stdout.readline() == "best\n"
            # And then whatever it is doing at that moment.
            for _ in range(chosen.randint(0, 5000)):
                os.sched_yield()
            process.kill()
        resumed = overspill.Lion.resume([p], swap_dir, **SMALL)
        steps = {"best": 1, "later": 2}[resumed.extra]
        assert_same([p], [torch.full_like(p, -steps)])
        assert int(resumed.state[p]["step"]) == steps and resumed.snapshots() == ["best"]
        resumed.close()


def committed_twice(swap_dir):
    """A directory with the snapshot `best` of one step and a commit of two."""
    p = torch.nn.Parameter(torch.zeros(30))
    p.grad = torch.ones_like(p)
    optimizer = overspill.Lion([p], lr=1.0, swap_dir=swap_dir, **SMALL)
    optimizer.step()
    optimizer.commit("best")
    optimizer.snapshot("best")
    optimizer.step()
    optimizer.commit("later")
    optimizer.close()
    return p


def test_nobody_gets_the_store_while_a_snapshot_is_gone_back_to(swap_dir):
    p = committed_twice(swap_dir)

    class Opening:
        """The native half, whose store somebody else wants from when it is locked until it is open."""

        committed = staticmethod(Native.committed)

        @staticmethod
        def open(*arguments, **options):
            over, had = threading.Event(), []

            def contend():
                is_held = False
                with open(swap_dir / "lock") as lock:
                    while not over.is_set():
                        try:
                            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        except BlockingIOError:
                            is_held = True
                            continue
                        if is_held:
                            had.append("the lock")
                        fcntl.flock(lock, fcntl.LOCK_UN)

            contender = threading.Thread(target=contend)
            contender.start()
            try:
                return Native.open(*arguments, **options)
            finally:
                over.set()
                contender.join(BOUND)
                assert not had

    for _ in range(20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "Native", Opening)
            with overspill.Lion.resume([p], swap_dir, snapshot="best", **SMALL) as resumed:
                assert resumed.extra == "best"


@pytest.mark.parametrize("name", [None, "best"])
def test_a_commit_of_somebody_else_just_before_the_store_is_locked_is_told(name, swap_dir):
    p = committed_twice(swap_dir)
    other = torch.nn.Parameter(torch.zeros(30))
    other.grad = torch.ones_like(other)

    def overtaken(directory, snapshot):
        found = Native.committed(directory, snapshot)
        patch.undo()
        with overspill.Lion.resume([other], swap_dir, **SMALL) as faster:
            faster.step()
            faster.commit("faster")
            if snapshot is not None:
                faster.delete_snapshot(snapshot)
                faster.snapshot(snapshot)
        return found

    before = p.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "Native", types.SimpleNamespace(committed=overtaken, open=Native.open))
        with pytest.raises(StateError, match="committed to by another process just now: resume again"):
            overspill.Lion.resume([p], swap_dir, snapshot=name, **SMALL)
    assert_same([p], [before])
    with overspill.Lion.resume([p], swap_dir, snapshot=name, **SMALL) as resumed:
        assert resumed.extra == "faster" and int(resumed.state[p]["step"]) == 3
        assert_same([p], [other])


@pytest.mark.parametrize("name", [None, "best"])
def test_ctrl_c_is_heard_while_what_is_resumed_is_read_and_changes_nothing(name, swap_dir, monkeypatch):
    p = committed_twice(swap_dir)
    p.data.fill_(9.0)
    manifest = (swap_dir / "manifest").read_bytes()
    # It arrives in the place of a warning, by a call of C: no other code of Python's runs before the reading that handles it.
    profile = swap_dir.with_name("overspill-tune.json")
    profile.write_text("{")
    made = ctypes.PYFUNCTYPE(None, ctypes.py_object, ctypes.py_object)
    monkeypatch.setattr(warnings, "warn", made(("PyErr_SetInterrupt", ctypes.pythonapi)))
    with pytest.raises(KeyboardInterrupt):
        overspill.Lion.resume([p], swap_dir, snapshot=name, **SMALL)
    monkeypatch.undo()
    assert_same([p], [torch.full_like(p, 9.0)])
    assert (swap_dir / "manifest").read_bytes() == manifest
    profile.unlink()
    with overspill.Lion.resume([p], swap_dir, snapshot=name, **SMALL) as resumed:
        assert resumed.extra == (name or "later")


def test_a_snapshot_that_cannot_be_gone_on_from_replaces_nothing(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    for step in range(3):
        set_gradients(step, ours)
        optimizer.step()
        optimizer.commit(step)
        if step < 2:
            optimizer.snapshot(f"step-{step}")
    with pytest.raises(LockedError):
        overspill.AdamW.resume(parameters(), swap_dir, snapshot="step-0")
    optimizer.close()
    kept = [p.detach().clone() for p in ours]
    manifest = (swap_dir / "manifest").read_bytes()
    for model, name, error, message in [
        (ours, "step-7", StateError, "no snapshot step-7; it has step-0, step-1"),
        (ours, "../manifest", ArgumentError, "no name for a snapshot"),
        (ours, "a\nb", ArgumentError, "a snapshot has a name like"),
        (ours, 7, ArgumentError, "a snapshot has a name like"),
        (parameters()[:2], "step-0", StateError, "groups of"),
        (parameters([(2,)] * 5), "step-0", StateError, "another optimizer"),
    ]:
        with pytest.raises(error, match=message):
            overspill.AdamW.resume(model, swap_dir, snapshot=name, **SMALL)
    with pytest.raises(StateError, match=r"overspill.AdamW.resume"):
        overspill.Adam.resume(parameters(), swap_dir, snapshot="step-0")
    with pytest.raises(MemoryBudgetError):
        overspill.AdamW.resume(parameters(), swap_dir, snapshot="step-0", memory="64KiB")
    with pytest.raises(StateError, match="nothing is committed"):
        overspill.AdamW.resume(parameters(), swap_dir / "none", snapshot="step-0")
    pinned, committed = (
        {tensor["offset"] for tensor in manifest_of(swap_dir / name)["tensors"]}
        for name in ("snapshot.step-0", "manifest")
    )
    with open(swap_dir / "data", "r+b") as data:
        data.seek(min(pinned - committed))
        byte = data.read(1)
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptionError, match="snapshot step-0 is not whole, so nothing was restored"):
        overspill.AdamW.resume(parameters(), swap_dir, snapshot="step-0", **SMALL)
    assert (swap_dir / "manifest").read_bytes() == manifest
    resumed = overspill.AdamW.resume(ours, swap_dir, **SMALL)
    assert resumed.extra == 2 and sorted(resumed.snapshots()) == ["step-0", "step-1"]
    assert_same(ours, kept)
