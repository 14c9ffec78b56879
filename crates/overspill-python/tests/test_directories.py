"""Where the state is, how long, and what the package takes to be imported."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import warnings

import pytest

import overspill
from overspill.errors import MemoryBudgetError, StateError
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
    volumes = optimizer.report()["volumes"]
    assert [volume["directory"] for volume in volumes] == [str(swap_dir / "a"), str(swap_dir / "b")]
    assert all(volume["read_gbps"] > 0 and volume["write_gbps"] > 0 for volume in volumes), (
        "both were measured"
    )
    assert sorted(os.listdir(swap_dir)) == ["a", "b"], "nothing is left beside them"
    optimizer.commit()
    optimizer.close()
    resumed = overspill.AdamW.resume(ours, paths, **SMALL)
    assert int(resumed.state[ours[0]]["step"]) == 3


PROFILE = {
    "version": 1,
    "chunk_bytes": 1 << 16,
    "queue_depth": 8,
    "rings": 2,
    "read_gbps": 1.0,
    "write_gbps": 1.0,
}


def leave_profile(directory, **changes):
    """What `overspill tune` leaves in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "overspill-tune.json").write_text(json.dumps({**PROFILE, **changes}))


def test_what_tune_has_found_out_is_used_and_what_was_made_stays_so(swap_dir, exact_sqrt):
    slow, fast = swap_dir / "slow", swap_dir / "fast"
    leave_profile(slow)
    leave_profile(fast, rings=1, read_gbps=4.0, write_gbps=2.4)
    paths = [slow / "below" / "run", fast / "run"]
    ours, optimizer, theirs, reference = pair("AdamW", paths, [(2000, 1000)])

    def one_step(step, optimizer):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)

    def volumes(optimizer, *names):
        return [tuple(volume[name] for name in names) for volume in optimizer.report()["volumes"]]

    one_step(0, optimizer)
    settings = volumes(optimizer, "weight", "rings", "chunk_bytes", "queue_depth")
    assert settings == [(1, 2, 1 << 16, 8), (3, 1, 1 << 16, 8)]
    assert volumes(optimizer, "read_gbps", "write_gbps") == [(1.0, 1.0), (4.0, 2.4)]
    lengths = [(paths[0] / "data").stat().st_size, (paths[0] / "data.1").stat().st_size]
    assert (paths[1] / "data").stat().st_size > 2 * sum(lengths) and all(lengths)
    optimizer.commit()
    optimizer.close()
    (slow / "overspill-tune.json").unlink()
    leave_profile(fast, rings=5, chunk_bytes=1 << 17)
    resumed = overspill.AdamW.resume(ours, paths, **SMALL)
    assert volumes(resumed, "rings", "chunk_bytes", "queue_depth") == [(2, 1 << 20, 32), (1, 1 << 17, 8)]
    (first,), (second,) = volumes(resumed, "weight")
    assert second == 3 * first
    one_step(1, resumed)


def test_one_directory_is_not_measured(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir / "run")
    set_gradients(0, ours)
    optimizer.step()
    (volume,) = optimizer.report()["volumes"]
    assert (volume["weight"], volume["rings"], volume["read_gbps"], volume["write_gbps"]) == (
        1,
        1,
        None,
        None,
    )


def test_engines_beyond_the_first_are_part_of_the_memory(swap_dir):
    def least_bytes():
        ours, optimizer, _, _ = pair("AdamW", swap_dir / "run", memory="1MiB")
        set_gradients(0, ours)
        with pytest.raises(MemoryBudgetError) as caught:
            optimizer.step()
        return int(re.search(r"(\d+) would do", str(caught.value))[1])

    before = least_bytes()
    leave_profile(swap_dir, rings=16, queue_depth=4096)
    after = least_bytes()
    assert after - before == 16 * ((512 << 10) + 4096 * 512) - ((512 << 10) + 32 * 512)
    ours, optimizer, _, _ = pair("AdamW", swap_dir / "run", memory=after)
    set_gradients(0, ours)
    optimizer.step()
    assert before < optimizer.report()["memory_bytes"] <= after


def test_a_damaged_profile_is_told_and_not_used(swap_dir):
    leave_profile(swap_dir)
    (swap_dir / "overspill-tune.json").write_text("{")
    ours, optimizer, _, _ = pair("AdamW", swap_dir / "run")
    set_gradients(0, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            optimizer.step()
    assert os.listdir(swap_dir) == ["overspill-tune.json"]
    with pytest.warns(
        RuntimeWarning, match="overspill-tune.json is not a profile.*`overspill tune` again"
    ) as told:
        optimizer.step()
    assert len(told) == 1 and str(told[0].message).isprintable()
    (volume,) = optimizer.report()["volumes"]
    assert (volume["rings"], volume["chunk_bytes"], volume["queue_depth"]) == (1, 1 << 20, 32)
    optimizer.commit()
    optimizer.close()
    with pytest.warns(RuntimeWarning, match="is not a profile"):
        overspill.AdamW.resume(ours, swap_dir / "run", **SMALL).close()


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
