"""What cannot be meant is refused, before anything changes; what has no effect is taken."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

import overspill
from overspill.errors import ArgumentError, MemoryBudgetError, StateError, UnsupportedError
from support import SMALL, assert_same, pair, parameters, set_gradients


def test_what_cannot_be_updated_is_refused(swap_dir):
    for parameter, message in [
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, dtype=torch.float64), "float64"),
        (torch.zeros(3, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "dense"),
    ]:
        parameter.requires_grad_(True)
        with pytest.raises(UnsupportedError, match=message):
            overspill.AdamW([parameter], swap_dir=swap_dir)
    optimizer = overspill.AdamW(parameters([(3,)]), swap_dir=swap_dir, **SMALL)
    with pytest.raises(UnsupportedError, match="complex64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1
    assert issubclass(UnsupportedError, TypeError) and not swap_dir.exists()


def test_parameters_that_became_others_are_refused(swap_dir):
    (p,) = parameters([(6, 4)])
    optimizer = overspill.Adafactor([p], swap_dir=swap_dir, **SMALL)
    p.data = p.data.double()
    p.grad = torch.ones_like(p)
    with pytest.raises(UnsupportedError, match="float64"):
        optimizer.step()
    p.grad, p.data = None, p.data.float()
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad, p.data = None, p.data.view(4, 6)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ArgumentError, match=r"shape \(4, 6\) now"):
        optimizer.step()
    assert_same([p], [before])


def test_sparse_gradients_are_refused_before_anything_changes(swap_dir):
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    (dense,) = parameters([(5,)])
    optimizer = overspill.SGD([dense, embedding.weight], lr=0.1, swap_dir=swap_dir, **SMALL)
    before = [dense.detach().clone(), embedding.weight.detach().clone()]
    dense.grad = torch.ones(5)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        optimizer.step()
    assert_same([dense, embedding.weight], before)


def test_copies_are_refused(swap_dir):
    _, optimizer, _, _ = pair("AdamW", swap_dir)
    for copies in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UnsupportedError, match="state_dict"):
            copies(optimizer)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ArgumentError),
        ({"lr": torch.ones(2)}, ArgumentError),
        ({"betas": (1.0, 0.9)}, ArgumentError),
        ({"eps": -1.0}, ArgumentError),
        ({"weight_decay": -1.0}, ArgumentError),
        ({"foreach": True}, UnsupportedError),
        ({"capturable": True}, UnsupportedError),
        ({"differentiable": True}, UnsupportedError),
        ({"memory": "8 potatoes"}, ArgumentError),
        ({"memory": -5}, ArgumentError),
        ({"memory": True}, ArgumentError),
        ({"moments": "4bit"}, ArgumentError),
        ({"durability": "maybe"}, ArgumentError),
        ({"backend": "floppy"}, ArgumentError),
        ({"max_norm": 0.0}, ArgumentError),
        ({"depth_of_field": 1}, TypeError),
        ({"swap_dir": ""}, ArgumentError),
        ({"swap_dir": []}, ArgumentError),
        ({"swap_dir": ["a", "./a"]}, ArgumentError),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, error, swap_dir):
    with pytest.raises(error):
        overspill.AdamW(parameters([(3,)]), **{"swap_dir": swap_dir, **options})
    assert not swap_dir.exists()


def test_options_without_effect_are_taken(swap_dir):
    options = {"foreach": False, "capturable": False, "differentiable": False, "fused": True}
    (p,) = parameters([(3,)])
    optimizer = overspill.AdamW([p], swap_dir=swap_dir, **SMALL, **options)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert float(p.grad.sum()) == 0.0


def test_memory_is_told_in_any_unit():
    from overspill.optim.options import bytes_of

    for text, count in {
        "1GiB": 1 << 30,
        "8 mb": 8_000_000,
        "1.5KiB": 1536,
        "7": 7,
        "3 B": 3,
        "2TB": 2 * 10**12,
    }.items():
        assert bytes_of("memory", text) == count
    assert bytes_of("memory", 12) == 12
    for more in (1 << 70, "99999999999TiB"):
        with pytest.raises(ArgumentError, match="any machine"):
            bytes_of("memory", more)


def test_too_little_memory_names_the_least_that_would_do(swap_dir):
    (p,) = parameters([(1000, 1000)])
    p.grad = torch.ones(1000, 1000)
    with pytest.raises(MemoryBudgetError, match="would do"):
        overspill.AdamW([p], swap_dir=swap_dir, memory="64KiB").step()
    assert not swap_dir.exists()
    swap_dir.mkdir()
    with pytest.raises(MemoryBudgetError):
        overspill.AdamW([p], swap_dir=swap_dir, memory="64KiB").step()
    assert os.listdir(swap_dir) == []


def test_a_change_of_the_rule_after_the_first_step_is_refused(swap_dir):
    ours, optimizer, _, _ = pair("SGD", swap_dir, options={"lr": 0.1, "momentum": 0.9})
    set_gradients(0, ours)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.0
    before = [p.detach().clone() for p in ours]
    with pytest.raises(StateError, match="sgd_momentum"):
        optimizer.step()
    assert_same(ours, before)


def test_parameters_that_were_smuggled_into_a_group_are_refused(swap_dir):
    _, optimizer, _, _ = pair("AdamW", swap_dir)
    optimizer.param_groups[0]["params"].append(parameters([(3,)])[0])
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(3)
    with pytest.raises(StateError, match="add_param_group"):
        optimizer.step()


def test_muon_is_for_matrices(swap_dir):
    with pytest.raises(ArgumentError, match=r"shape \(5,\)"):
        overspill.Muon(parameters([(4, 4), (5,)]), swap_dir=swap_dir)
