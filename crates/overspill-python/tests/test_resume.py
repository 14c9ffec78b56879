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
    LockedError,
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


def test_a_link_to_a_committed_directory_is_followed(tmp_path, swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    optimizer.commit("here")
    optimizer.close()
    link = tmp_path / "link"
    link.symlink_to(swap_dir.name)
    others = parameters(seed=1)
    with overspill.AdamW.resume(others, link, **SMALL) as resumed:
        assert resumed.extra == "here"
        resumed.commit("there")
        with pytest.raises(LockedError):
            overspill.AdamW.resume(parameters(), swap_dir, **SMALL)
    assert_same(others, ours)
    with overspill.AdamW.resume(others, swap_dir, **SMALL) as resumed:
        assert resumed.extra == "there" and link.is_symlink()


def test_what_no_step_would_go_on_with_is_not_committed(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    set_gradients(0, ours)
    optimizer.step()
    optimizer.commit("good")
    (group,) = optimizer.param_groups
    for change, error, message in [
        ({"amsgrad": True}, StateError, "has state of the rule adamw"),
        ({"betas": (0.9, 1.5)}, ArgumentError, "in \\[0, 1\\)"),
        ({"lr": "fast"}, ArgumentError, "one number"),
    ]:
        before = {name: group[name] for name in change}
        group.update(change)
        with pytest.raises(error, match=message):
            optimizer.commit("bad")
        group.update(before)
    kept, ours[4].data = ours[4].data, ours[4].data.view(300, 400)
    with pytest.raises(ArgumentError, match=r"shape \(300, 400\) now"):
        optimizer.commit("bad")
    ours[4].data = kept
    assert optimizer.extra == "good"
    # What schedules make of a rate at their very end.
    group["lr"] = -1e-20
    optimizer.commit("last")
    optimizer.close()
    assert overspill.AdamW.resume(ours, swap_dir, **SMALL).param_groups[0]["lr"] == -1e-20


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
