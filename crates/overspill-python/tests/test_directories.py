"""Where the state is, how long, and what the package takes to be imported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

import overspill
from overspill.errors import StateError
from support import SMALL, assert_same, pair, parameters, set_gradients

CLASSES = ["AdamW", "Adam", "SGD", "Adagrad", "Lion", "Adafactor", "Muon"]


def test_directories_that_are_in_use_are_refused(swap_dir):
    swap_dir.mkdir()
    (swap_dir / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(StateError, match=r"thesis.txt.*run"):
        overspill.AdamW(parameters(), swap_dir=swap_dir)
    with pytest.raises(StateError, match="not a directory"):
        overspill.AdamW(parameters(), swap_dir=swap_dir / "thesis.txt")
    _, optimizer, _, _ = pair("AdamW", swap_dir / "run")
    optimizer.commit()
    with pytest.raises(StateError, match="resume"):
        overspill.AdamW(parameters(), swap_dir=swap_dir / "run")
    assert sorted(os.listdir(swap_dir)) == ["run", "thesis.txt"]


def test_a_directory_goes_with_the_optimizer_unless_something_is_committed(swap_dir):
    for index, (commits, closes) in enumerate([(False, True), (False, False), (True, True), (True, False)]):
        path = swap_dir / "parent" / str(index)
        path.mkdir(parents=True)  # an empty one is as good as none
        ours, optimizer, _, _ = pair("AdamW", path)
        set_gradients(0, ours)
        optimizer.step()
        assert os.listdir(path)
        if commits:
            optimizer.commit()
        if closes:
            optimizer.close()
            optimizer.close()
            for use in (
                optimizer.step,
                optimizer.state_dict,
                optimizer.commit,
                optimizer.prefetch,
                optimizer.report,
            ):
                with pytest.raises(StateError, match="closed"):
                    use()
            with pytest.raises(StateError, match="closed"):
                optimizer.load_state_dict({"state": {}, "param_groups": []})
        del optimizer
        gc.collect()
        assert path.exists() == commits


def test_state_is_spread_over_directories(swap_dir, exact_sqrt):
    paths = [swap_dir / "a", str(swap_dir / "b")]
    ours, optimizer, theirs, reference = pair("AdamW", paths)
    for step in range(3):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)
    optimizer.settle()
    assert optimizer.report()["bytes_written"] > 0
    assert all((swap_dir / name / "data").stat().st_size for name in "ab")
    optimizer.commit()
    optimizer.close()
    resumed = overspill.AdamW.resume(ours, paths, **SMALL)
    assert int(resumed.state[ours[0]]["step"]) == 3


def test_an_older_graph_sees_that_parameters_changed(swap_dir):
    (p,) = parameters([(4,)])
    optimizer = overspill.SGD([p], lr=0.1, swap_dir=swap_dir, **SMALL)
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_package_is_imported_without_torch():
    code = "import sys, overspill; assert 'torch' not in sys.modules; overspill.AdamW; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(overspill, "non" + "sense")
    assert {*CLASSES} <= {*dir(overspill)}
