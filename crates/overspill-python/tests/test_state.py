"""States that leave an optimizer and come back: as PyTorch's, through files, one by one."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch

import overspill
from overspill.errors import ArgumentError, DiskFullError, StateError
from support import SHAPES, SMALL, assert_same, pair, parameters, set_gradients, status, twins


def moved(state):
    return {key: {name: x.clone() for name, x in own.items()} for key, own in state["state"].items()}


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad", "Lion", "Adafactor", "Muon"])
@pytest.mark.parametrize("way", ["to torch", "from torch", "to itself"])
def test_states_are_interchangeable_with_torch(name, way, tmp_path, exact_sqrt):
    shapes = [(12, 40), (30, 20)] if name == "Muon" else SHAPES
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"amsgrad": True}}.get(name, {"lr": 1e-2})
    ours, optimizer, theirs, reference = pair(name, tmp_path / "a", shapes, options, memory="32MiB")
    target_parameters, target, _, target_reference = pair(
        name, tmp_path / "b", shapes, options, memory="32MiB"
    )
    source = reference if way == "from torch" else optimizer
    model = theirs if way == "from torch" else ours
    for step in range(3):
        set_gradients(step, model)
        source.step()
    path = tmp_path / "saved.pt"
    torch.save(source.state_dict(), path)
    saved = torch.load(str(path), mmap=True, weights_only=True)
    if way == "to torch":
        target, target_parameters = target_reference, target_reference.param_groups[0]["params"]
        if name != "Lion":
            assert {k: set(v) for k, v in saved["state"].items()} == _keys(reference, theirs, saved)
    with torch.no_grad():
        for a, b in zip(target_parameters, model):
            a.copy_(b)
    target.load_state_dict(saved)
    back = target.state_dict()
    for key, own in saved["state"].items():
        for field, value in own.items():
            assert torch.equal(back["state"][key][field], value), (key, field)
    for step in range(3, 5):
        set_gradients(step, model, target_parameters)
        source.step()
        target.step()
    close = {"rtol": 1e-5, "atol": 1e-6} if name == "Adafactor" else {"rtol": 2e-2, "atol": 2e-3}
    for a, b in zip(target_parameters, model):
        if name in ("Adafactor", "Muon") and way != "to itself":
            torch.testing.assert_close(a, b, **close)
        else:
            assert_same([a], [b])


def _keys(reference, theirs, saved):
    set_gradients(0, theirs)
    reference.step()
    return {k: set(v) for k, v in reference.state_dict()["state"].items() if k in saved["state"]}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("shapes", [[(0, 3), (4, 0)], [(2, 3), (4, 2)]], ids=["without elements", "frozen"])
def test_an_optimizer_of_nothing_that_moves_does_what_torchs_does(name, shapes, swap_dir, exact_sqrt):
    options = {"lr": 0.5, **({"momentum": 0.5} if name == "SGD" else {})}
    ours, optimizer, theirs, reference = pair(name, swap_dir, shapes, options)
    for p in (*ours, *theirs):
        p.requires_grad_(p.numel() == 0)
    for step in range(2):
        if ours[0].requires_grad:
            set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        # Tensors without elements are no state: torch makes them anew.
        assert optimizer.state_dict()["state"] == {}
        optimizer.load_state_dict(reference.state_dict())
        reference.load_state_dict(optimizer.state_dict())
    optimizer.commit("here")
    optimizer.snapshot("none")
    optimizer.roll_back()
    optimizer.settle()
    optimizer.prefetch()
    optimizer.close()
    resumed = getattr(overspill, name).resume(ours, swap_dir, **SMALL)
    assert resumed.extra == "here" and resumed.snapshots() == ["none"]
    for p in (*ours, *theirs):
        p.requires_grad_(True)
    set_gradients(3, ours, theirs)
    resumed.step()
    reference.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["Adagrad", "Lion", "Adafactor", "Muon"])
def test_parameters_without_elements_are_no_trouble(name, swap_dir):
    ours = parameters([(0, 3), (4, 0)])
    optimizer = getattr(overspill, name)(ours, swap_dir=swap_dir, in_backward=True, **SMALL)
    sum(p.sum() for p in ours).backward()
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in ours] == [1, 1] and ours[0].grad is None
    optimizer.commit()
    optimizer.close()
    resumed = getattr(overspill, name).resume(ours, swap_dir, **SMALL)
    assert [int(resumed.state[p]["step"]) for p in ours] == [1, 1]


def test_options_keep_their_types(swap_dir):
    options = {
        "betas": [0.9, 0.99],
        "tags": ["a", ("b", [1, ()]), {1: [2], "c": (3,)}],
        "none": None,
        "three": [1, 2, 3],
    }
    ours, theirs = twins()
    optimizer = overspill.AdamW([{"params": ours, **options}], betas=[0.5, 0.6], swap_dir=swap_dir, **SMALL)
    reference = torch.optim.AdamW([{"params": theirs, **options}], betas=[0.5, 0.6])
    expected = reference.state_dict()["param_groups"]
    assert optimizer.state_dict()["param_groups"] == expected
    optimizer.commit()
    optimizer.roll_back()
    assert optimizer.state_dict()["param_groups"] == expected
    optimizer.load_state_dict(reference.state_dict())
    optimizer.commit()
    optimizer.close()
    resumed = overspill.AdamW.resume(ours, swap_dir, **SMALL)
    assert resumed.state_dict()["param_groups"] == expected
    assert resumed.defaults["betas"] == [0.5, 0.6]
    set_gradients(0, ours)
    resumed.step()


def test_the_groups_of_a_state_are_torchs(swap_dir):
    for name in ("AdamW", "Adam", "SGD", "Adagrad", "Adafactor", "Muon"):
        model = parameters([(3, 4)])
        ours = getattr(overspill, name)(model, swap_dir=swap_dir / name).state_dict()["param_groups"]
        assert ours == getattr(torch.optim, name)(model).state_dict()["param_groups"]


def test_a_state_with_masters_comes_back_to_the_bit(tmp_path):
    models = [parameters(dtype=torch.bfloat16) for _ in range(2)]
    first, second = (
        overspill.AdamW(m, lr=1e-3, swap_dir=tmp_path / str(i), **SMALL) for i, m in enumerate(models)
    )
    for step in range(3):
        set_gradients(step, models[0])
        first.step()
    second.load_state_dict(first.state_dict())
    assert_same(*models)
    for step in range(3, 6):
        set_gradients(step, *models)
        first.step()
        second.step()
        assert_same(*models)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_narrow_moments_come_back_as_they_were(moments, tmp_path):
    models = twins()
    first, second = (
        overspill.AdamW(m, moments=moments, swap_dir=tmp_path / str(i), **SMALL) for i, m in enumerate(models)
    )
    for step in range(3):
        set_gradients(step, models[0])
        first.step()
    with torch.no_grad():
        for a, b in zip(*models):
            b.copy_(a)
    second.load_state_dict(first.state_dict())
    for key, own in moved(first.state_dict()).items():
        for field, value in own.items():
            torch.testing.assert_close(second.state_dict()["state"][key][field], value, rtol=1e-2, atol=1e-6)


def test_loaded_options_count_and_missing_ones_stay(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    saved = torch.optim.AdamW(parameters(), lr=0.5, foreach=True, fused=False).state_dict()
    del saved["param_groups"][0]["maximize"]
    saved["param_groups"][0]["added"] = "kept"
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (
        group["lr"] == 0.5
        and group["maximize"] is False
        and group["added"] == "kept"
        and group["foreach"] is None
    )
    assert group["params"][0] is ours[0]


def test_a_loaded_state_is_all_there_is(swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    set_gradients(0, ours)
    optimizer.step()
    set_gradients(0, theirs[:2])
    reference.step()
    optimizer.load_state_dict(reference.state_dict())
    assert set(optimizer.state) == set(ours[:2]) and set(optimizer.state_dict()["state"]) == {0, 1}
    with torch.no_grad():
        for a, b in zip(ours, theirs):
            a.copy_(b)
    for step in range(1, 4):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)


def with_first(optimizer, name, value):
    """The optimizer's state, with another value in its first parameter's."""
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][name] = value
    return state


def test_a_state_that_does_not_fit_changes_nothing(swap_dir):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    before, groups = moved(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict()["param_groups"])
    wrong = copy.deepcopy(reference.state_dict())
    wrong["state"][0]["exp_avg"] = torch.zeros(3)
    wrong["param_groups"][0]["lr"] = 7.0
    other = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    set_gradients(0, other.param_groups[0]["params"])
    other.step()
    fewer = torch.optim.AdamW(parameters()[:2]).state_dict()
    for state, message in [
        (wrong, "'exp_avg' of parameter 0 has shape"),
        ({**other.state_dict(), "param_groups": reference.state_dict()["param_groups"]}, "not that of AdamW"),
        (fewer, "groups of"),
        *(
            (with_first(reference, "step", steps), "number of steps")
            for steps in (-1, math.nan, math.inf, 1e30, "x")
        ),
        (with_first(reference, "exp_avg", torch.zeros(37, 53).to_sparse()), "no dense tensor"),
        (with_first(reference, "exp_avg", torch.zeros(37, 53, dtype=torch.complex64)), "no dense tensor"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            optimizer.load_state_dict(state)
    amsgrad = copy.deepcopy(reference.state_dict())
    amsgrad["param_groups"][0]["amsgrad"] = True
    with pytest.raises(StateError, match="before the first step"):
        optimizer.load_state_dict(amsgrad)
    after = moved(optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"] == groups
    assert all(torch.equal(after[k][f], x) for k, own in before.items() for f, x in own.items())


def test_an_exported_state_takes_no_memory_and_no_name(swap_dir):
    model = parameters([(1000, 3000)] * 4)
    optimizer = overspill.AdamW(model, swap_dir=swap_dir, **SMALL)
    set_gradients(0, model)
    optimizer.step()
    optimizer.zero_grad()
    names, files = sorted(os.listdir(swap_dir)), len(os.listdir("/proc/self/fd"))
    before = status("VmRSS")
    state = optimizer.state_dict()
    total = sum(x.nbytes for own in state["state"].values() for x in own.values()) // 1024
    assert total > 90_000 and status("VmRSS") - before < total // 4
    assert sorted(os.listdir(swap_dir)) == names and len(os.listdir("/proc/self/fd")) == files
    assert optimizer.is_open
    optimizer.close()
    assert not optimizer.is_open
    # The tensors are whoever's who has them.
    assert float(state["state"][3]["exp_avg_sq"].sum()) > 0.0


def test_a_disk_without_room_for_an_exported_state_is_told(swap_dir, monkeypatch):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    set_gradients(0, ours)
    optimizer.step()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFullError) as told:
            optimizer.state_dict()
    assert told.value.errno == 28 and told.value.filename == str(swap_dir)
    assert len(optimizer.state_dict()["state"]) == len(ours)


def test_the_defaults_of_the_process_do_not_matter(swap_dir):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        state = optimizer.state_dict()["state"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for key, own in reference.state_dict()["state"].items():
        for field, value in own.items():
            assert state[key][field].dtype == value.dtype and torch.equal(state[key][field], value)


def test_the_state_of_one_parameter_can_be_had_changed_and_dropped(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    assert optimizer.get_state(ours[0]) == {}
    set_gradients(0, ours)
    optimizer.step()
    state = optimizer.get_state(ours[0])
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    state["exp_avg"].fill_(3.0)
    state["step"].fill_(7.0)
    optimizer.set_state(ours[0], state)
    assert torch.equal(optimizer.get_state(ours[0])["exp_avg"], state["exp_avg"])
    assert int(optimizer.state[ours[0]]["step"]) == 7
    optimizer.purge(ours[0])
    assert optimizer.get_state(ours[0]) == {} and ours[0] not in optimizer.state
    with pytest.raises(ArgumentError, match="not this optimizer's"):
        optimizer.get_state(parameters([(3,)])[0])


def test_the_view_of_the_state_tells_what_is_in_memory(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    assert len(optimizer.state) == 0 and optimizer.state_dict()["state"] == {} and not optimizer.is_open
    with pytest.raises(StateError, match="before the first step"):
        optimizer.report()
    set_gradients(0, ours[:2])
    optimizer.step()
    assert set(optimizer.state) == set(ours[:2]) and len(optimizer.state) == 2
    assert list(optimizer.state[ours[0]]) == ["step"]
    with pytest.raises(KeyError, match="get_state"):
        optimizer.state[ours[0]]["exp_avg"]
    with pytest.raises(KeyError):
        optimizer.state[ours[3]]
    with pytest.raises(TypeError):
        optimizer.state[ours[0]] = {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_that_was_changed_by_hand_can_be_made_the_master(dtype, swap_dir):
    (p,) = parameters([(40, 50)], dtype=dtype)
    optimizer = overspill.SGD([p], lr=0.125, momentum=0.5, swap_dir=swap_dir, **SMALL)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.get_state(p)
    del state["master"]
    with torch.no_grad():
        p.fill_(3.0)
    optimizer.set_state(p, state)
    assert torch.equal(optimizer.get_state(p)["master"], torch.full((40, 50), 3.0))
    optimizer.step()
    assert torch.equal(p, torch.full((40, 50), 3.0 - 0.125 * 1.5).to(dtype))
    optimizer.set_state(p, {})
    assert optimizer.get_state(p) == {} and p not in optimizer.state
