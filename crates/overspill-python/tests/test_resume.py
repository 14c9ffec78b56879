"""What is committed is what is gone on from: in one process, after kill -9, and beside another process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import overspill
from overspill.errors import (
    ArgumentError,
    CorruptionError,
    LockedError,
    MemoryBudgetError,
    OverspillError,
    StateError,
)
from support import SMALL, assert_same, pair, parameters, set_gradients

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Lion", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_goes_on_to_the_bit(name, dtype, swap_dir, backend):
    options = {**SMALL, "memory": "32MiB", "backend": backend}
    make = getattr(overspill, name)
    straight, resumed = parameters(dtype=dtype), parameters(dtype=dtype)
    first = make(straight, lr=0.01, swap_dir=swap_dir / "straight", **options)
    second = make(
        [{"params": resumed[:2], "lr": 0.01}, {"params": resumed[2:], "lr": 0.01}],
        swap_dir=swap_dir / "b",
        **options,
    )
    for step in range(4):
        set_gradients(step, straight, resumed)
        first.step()
        second.step()
    second.param_groups[0]["initial_lr"] = 0.5
    second.commit({"epoch": 3, "best": float("inf"), "text": "ä", "third": 1 / 3})
    set_gradients(99, resumed)
    second.step()
    second.close()
    with torch.no_grad():
        for p in resumed:
            p.fill_(9.0)
    groups = [{"params": resumed[:2]}, {"params": resumed[2:], "lr": 7.0}]
    third = make.resume(groups, swap_dir / "b", **options)
    assert third.extra == {"epoch": 3, "best": float("inf"), "text": "ä", "third": 1 / 3}
    assert third.param_groups[1]["lr"] == 0.01 and third.param_groups[0]["initial_lr"] == 0.5
    assert_same(straight, resumed)
    for step in range(4, 7):
        set_gradients(step, straight, resumed)
        first.step()
        third.step()
        assert_same(straight, resumed)


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


def manifest_of(path):
    """What a manifest says, behind its first line."""
    return json.loads(path.read_text().split("\n", 1)[1])


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


def test_what_cannot_be_gone_on_from_is_told(swap_dir):
    with pytest.raises(StateError, match="nothing is committed"):
        overspill.AdamW.resume(parameters(), swap_dir)
    assert not overspill.AdamW.is_committed(swap_dir)
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    with pytest.raises(ArgumentError, match="not JSON"):
        optimizer.commit({"tensor": torch.ones(1)})
    optimizer.commit()
    assert overspill.AdamW.is_committed(swap_dir)
    with pytest.raises(LockedError):
        overspill.AdamW.resume(parameters(), swap_dir)
    optimizer.close()
    with pytest.raises(StateError, match=r"overspill.AdamW.resume"):
        overspill.Adam.resume(parameters(), swap_dir)
    with pytest.raises(StateError, match="groups of"):
        overspill.AdamW.resume(parameters()[:2], swap_dir)
    with pytest.raises(StateError):
        overspill.AdamW.resume(parameters([(2,)] * 5), swap_dir)
    with pytest.raises(StateError):
        overspill.AdamW.resume(parameters(dtype=torch.bfloat16), swap_dir)
    with pytest.raises(ArgumentError, match="cannot be changed"):
        overspill.AdamW.resume(parameters(), swap_dir, moments="8bit")
    overspill.AdamW.resume(ours, swap_dir, **SMALL).close()


def test_named_parameters_in_another_order_are_told(swap_dir):
    a, b = parameters([(6,), (6,)])
    optimizer = overspill.AdamW([("a", a), ("b", b)], swap_dir=swap_dir, **SMALL)
    optimizer.commit()
    optimizer.close()
    before = [p.detach().clone() for p in (a, b)]
    with pytest.raises(StateError, match="another order"):
        overspill.AdamW.resume([("b", b), ("a", a)], swap_dir, **SMALL)
    assert_same([a, b], before)
    overspill.AdamW.resume([("x.a", a), ("x.b", b)], swap_dir, **SMALL).close()
    overspill.AdamW.resume([a, b], swap_dir, **SMALL).close()


@pytest.mark.parametrize("kind", [lambda x: torch.tensor([x]), torch.tensor, numpy.float32, numpy.float64])
def test_a_rate_of_any_kind_is_committed_as_a_number(kind, swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir, options={"lr": 0.5})
    optimizer.param_groups[0]["lr"] = kind(0.25)
    set_gradients(0, ours)
    optimizer.step()
    optimizer.commit()
    optimizer.close()
    resumed = overspill.AdamW.resume(ours, swap_dir, **SMALL)
    assert resumed.param_groups[0]["lr"] == 0.25
    resumed.step()


def test_without_durability_there_is_no_commit(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir, durability="none")
    set_gradients(0, ours)
    optimizer.step()
    with pytest.raises(StateError, match="durability"):
        optimizer.commit()
    optimizer.close()
    assert not swap_dir.exists()


def test_parameters_that_joined_and_those_that_are_frozen_are_resumed(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    joined = parameters([(20, 30), (7,)], seed=5)
    set_gradients(0, ours)
    optimizer.step()
    joined[1].requires_grad_(False)
    optimizer.add_param_group({"params": joined, "lr": 0.5})
    set_gradients(1, ours, joined[:1])
    optimizer.step()
    optimizer.commit()
    kept = [p.detach().clone() for p in (*ours, *joined)]
    set_gradients(2, ours, joined[:1])
    optimizer.step()
    optimizer.close()
    resumed = overspill.AdamW.resume([{"params": ours}, {"params": joined}], swap_dir, **SMALL)
    assert_same([*ours, *joined], kept)
    assert int(resumed.state[joined[0]]["step"]) == 1 and joined[1] not in resumed.state
    joined[1].requires_grad_(True)
    set_gradients(3, ours, joined)
    resumed.step()
    assert int(resumed.state[joined[1]]["step"]) == 1


SCRIPT = """
import json, sys
import torch
import overspill

swap_dir, log, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 300), torch.nn.Tanh(), torch.nn.Linear(300, 8)).to(torch.bfloat16)
options = {"swap_dir": swap_dir, "memory": "8MiB", "resident": 0}
if overspill.AdamW.is_committed(swap_dir):
    optimizer = overspill.AdamW.resume(model.parameters(), **options)
else:
    optimizer = overspill.AdamW(model.parameters(), lr=1e-2, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    optimizer.commit({"step": 0, "scheduler": scheduler.state_dict()})
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
scheduler.load_state_dict(optimizer.extra["scheduler"])
for group, lr in zip(optimizer.param_groups, scheduler._last_lr):
    group["lr"] = lr
for step in range(optimizer.extra["step"], steps):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 32, generator=generator).to(torch.bfloat16)
    optimizer.zero_grad()
    loss = (model(x).float() - x.float()[:, :8]).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    with open(log, "a") as file:
        print(json.dumps([step, loss.item().hex()]), file=file, flush=True)
    if step % 3 == 2:
        optimizer.commit({"step": step + 1, "scheduler": scheduler.state_dict()})
optimizer.commit({"step": steps, "scheduler": scheduler.state_dict()})
"""


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_script_that_is_killed_again_and_again_has_the_losses_of_one_that_is_not(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    steps = 24

    def start(name):
        arguments = [
            sys.executable,
            str(script),
            str(tmp_path / name),
            str(tmp_path / f"{name}.log"),
            str(steps),
        ]
        return subprocess.Popen(arguments)

    assert start("straight").wait(timeout=60) == 0
    chosen = random.Random(7)
    kills = sorted(chosen.sample(range(1, steps), 2))
    log = tmp_path / "killed.log"
    for kill in kills:
        process = start("killed")
        # Some steps, and then whatever it is doing at that moment.
        while process.poll() is None and not any(step >= kill for step, _ in lines(log)):
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert start("killed").wait(timeout=60) == 0
    expected = dict(map(tuple, lines(tmp_path / "straight.log")))
    assert len(expected) == steps
    found = lines(log)
    assert {step for step, _ in found} == set(range(steps)) and len(found) > steps
    assert all(expected[step] == loss for step, loss in found), "also what was computed twice"


def test_the_example_trains_and_goes_on(tmp_path):
    def run(steps):
        command = [
            sys.executable,
            str(EXAMPLES / "finetune.py"),
            "--swap-dir",
            str(tmp_path / "swap"),
            "--steps",
            str(steps),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        return [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]

    first = run(50)
    then = run(100)
    assert len(first) == len(then) == 1 and then[0] < first[0]
