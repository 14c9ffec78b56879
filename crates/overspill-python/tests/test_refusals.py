"""What cannot be meant is refused, before anything changes; what has no effect is taken."""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
import signal
import types
import warnings

import pytest
import torch

import overspill
from overspill import __main__, errors
from overspill.errors import ArgumentError, MemoryBudgetError, OverspillError, StateError, UnsupportedError
from support import SMALL, assert_same, assert_same_states, pair, parameters, set_gradients


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


def test_a_group_that_is_refused_has_not_joined_in_part(swap_dir, monkeypatch):
    (mine,) = parameters([(3,)])
    optimizer = overspill.AdamW([mine], swap_dir=swap_dir, **SMALL)
    mine.grad = torch.ones(3)
    optimizer.step()
    with torch.inference_mode():
        inferred = torch.nn.Parameter(torch.ones(3))
    joining = parameters([(4,), (5,)], seed=1)
    with pytest.raises(UnsupportedError, match="inference mode"):
        optimizer.add_param_group({"params": [*joining, inferred]})

    watch = optimizer._hooks.watch

    def watch_the_first(parameter):
        if parameter is joining[1]:
            raise ZeroDivisionError
        return watch(parameter)

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(optimizer._hooks, "watch", watch_the_first)
        optimizer.add_param_group({"params": joining})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    assert not joining[0]._post_accumulate_grad_hooks
    optimizer.commit()
    optimizer.close()
    with overspill.AdamW.resume([mine], swap_dir, **SMALL) as resumed:
        resumed.add_param_group({"params": joining})
        for p in joining:
            p.grad = torch.ones_like(p)
        resumed.step()


def test_a_group_that_joins_when_a_signal_arrives_has_joined_whole(swap_dir, monkeypatch):
    optimizer = overspill.AdamW(parameters([(3,)]), swap_dir=swap_dir, **SMALL)
    joining = parameters([(4,), (5,)], seed=1)
    watch = optimizer._hooks.watch

    def interrupted(parameter):
        os.kill(os.getpid(), signal.SIGINT)
        return watch(parameter)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(optimizer._hooks, "watch", interrupted)
        optimizer.add_param_group({"params": joining})
    assert len(optimizer.param_groups) == 2
    for p in joining:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in joining] == [1, 1]


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
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is 0 or more, not -1"),
        ({"lr": math.nan}, ArgumentError, "not nan"),
        ({"lr": "0.1"}, ArgumentError, "lr is one number, not '0.1'"),
        ({"lr": torch.ones(2)}, ArgumentError, "lr is one number"),
        ({"betas": (1.0, 0.9)}, ArgumentError, "in \\[0, 1\\)"),
        ({"betas": 0.9}, ArgumentError, "betas is two numbers, not 0.9"),
        ({"betas": (0.9, 0.9, 0.9)}, ArgumentError, "two numbers"),
        ({"eps": -1.0}, ArgumentError, "eps is 0 or more"),
        ({"weight_decay": -1.0}, ArgumentError, "weight_decay is 0 or more"),
        ({"amsgrad": "no"}, ArgumentError, "amsgrad is True or False, not 'no'"),
        ({"foreach": True}, UnsupportedError, "leave it out"),
        ({"capturable": True}, UnsupportedError, "leave it out"),
        ({"differentiable": True}, UnsupportedError, "leave it out"),
        ({"memory": "8 potatoes"}, ArgumentError, "512MiB"),
        ({"memory": "nan"}, ArgumentError, "512MiB"),
        ({"memory": -5}, ArgumentError, "not -5"),
        ({"memory": True}, ArgumentError, "not True"),
        ({"memory": 10**5000}, ArgumentError, "any machine has: <int>"),
        ({"memory": "9" * 400}, ArgumentError, "any machine"),
        ({"resident": math.nan}, ArgumentError, "resident is a number of bytes"),
        ({"resident": -1}, ArgumentError, "resident is a number of bytes"),
        ({"moments": "4bit"}, ArgumentError, "8bit"),
        ({"moments": ["8bit"]}, ArgumentError, "one of float32"),
        ({"durability": "maybe"}, ArgumentError, "one of step, none"),
        ({"backend": "floppy"}, ArgumentError, "io_uring"),
        ({"max_norm": 0.0}, ArgumentError, "more than 0"),
        ({"max_norm": "1"}, ArgumentError, "max_norm is one number"),
        ({"stochastic_rounding": "false"}, ArgumentError, "True or False"),
        ({"in_backward": [True]}, ArgumentError, "True or False"),
        ({"depth_of_field": 1}, TypeError, "no 'depth_of_field': for swapping there are memory, "),
        ({"depth_of_field": 1}, UnsupportedError, "resident"),
        ({"swap_dir": ""}, ArgumentError, "swap_dir is the path of a directory"),
        ({"swap_dir": None}, ArgumentError, "not None"),
        ({"swap_dir": 3}, ArgumentError, "not 3"),
        ({"swap_dir": b"swap"}, ArgumentError, "not b'swap'"),
        ({"swap_dir": "a\0b"}, ArgumentError, "path of a directory"),
        ({"swap_dir": "\ud800"}, ArgumentError, "path of a directory"),
        ({"swap_dir": []}, ArgumentError, "path of a directory"),
        ({"swap_dir": [["a"], ["b"]]}, ArgumentError, "path of a directory"),
        ({"swap_dir": ["a", "./a"]}, ArgumentError, "twice"),
        ({"swap_dir": "/dev/null"}, StateError, "not a directory"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, error, message, swap_dir):
    with pytest.raises(error, match=message) as told:
        overspill.AdamW(parameters([(3,)]), **{"swap_dir": swap_dir, **options})
    assert isinstance(told.value, OverspillError) and len(str(told.value).splitlines()) == 1
    assert not swap_dir.exists()


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("AdamW", "betas", (0.9, 1.0), "in \\[0, 1\\)"),
        ("Adam", "betas", (-0.5, 0.9), "in \\[0, 1\\)"),
        ("Lion", "betas", (0.9, math.nan), "in \\[0, 1\\)"),
        ("Muon", "ns_steps", 100, "ns_steps is 1 to 99"),
        ("Muon", "ns_steps", 0, "ns_steps is 1 to 99"),
        ("Muon", "adjust_lr_fn", "none", "one of original"),
        ("Adafactor", "d", 0.5, "d is 1 or more"),
        ("Adafactor", "eps", (None, -1.0), "each of eps is 0 or more"),
        ("Adafactor", "beta2_decay", 0.5, "beta2_decay is 0 or less"),
    ],
)
def test_options_that_were_changed_are_looked_at_by_the_next_step(name, option, value, message, swap_dir):
    ours = parameters([(6, 4)])
    optimizer = getattr(overspill, name)(ours, swap_dir=swap_dir, **SMALL)
    set_gradients(0, ours)
    optimizer.step()
    before, (group,) = [p.detach().clone() for p in ours], optimizer.param_groups
    kept, group[option] = group[option], value
    with pytest.raises(ArgumentError, match=message):
        optimizer.step()
    assert_same(ours, before)
    group[option] = kept
    optimizer.step()
    assert not torch.equal(ours[0], before[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("param_groups"), "no 'param_groups': give what state_dict"),
        (lambda state: state.pop("state"), "no 'state': give what state_dict"),
        (lambda state: state.update(state=[1]), "no 'state'"),
        (lambda state: state.update(param_groups={}), "no 'param_groups'"),
        (
            lambda state: state["param_groups"].pop(),
            r"groups of \[\] parameters, and the optimizer has groups of \[5\]",
        ),
        (lambda state: state["param_groups"][0].pop("params"), "group 0 of the state has no list"),
        (lambda state: state["param_groups"][0].update(params=3), "group 0 of the state has no list"),
        (lambda state: state["param_groups"][0].update(lr="fast"), "lr is one number, not 'fast'"),
        (lambda state: state["param_groups"][0].update(betas=None), "betas is two numbers"),
        (lambda state: state["state"].update({0: "nothing"}), "state of parameter 0 is a dictionary"),
        (lambda state: state["state"][0].update(step="many"), "'step' of parameter 0, a number of steps"),
        (lambda state: state["state"][0].update(step=2.0**53), "less than 9007199254740992"),
        (lambda state: state["state"][0].update(exp_avg=None), "has no 'exp_avg'"),
        (lambda state: state["state"][0].update(exp_avg=[1.0]), "no dense tensor"),
        (
            lambda state: state["state"][0].update(exp_avg=torch.ones(37, 53, device="meta")),
            "no dense tensor",
        ),
        (lambda state: state["state"][0].update(step=torch.ones((), device="meta")), "a number of steps"),
    ],
)
def test_a_state_that_is_none_is_told_what_it_lacks(change, message, swap_dir):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    set_gradients(0, ours, theirs)
    optimizer.step()
    reference.step()
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(reference.state_dict())
    change(state)
    with pytest.raises(ArgumentError, match=message):
        optimizer.load_state_dict(state)
    assert_same_states(optimizer.state_dict(), before)


def test_steps_may_be_as_many_as_can_be_told_apart(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    set_gradients(0, ours)
    optimizer.step()
    state = {**optimizer.get_state(ours[0]), "step": (1 << 53) - 1}
    optimizer.set_state(ours[0], state)
    optimizer.step()
    assert optimizer._known[ours[0]].steps == 1 << 53
    assert all(bool(p.isfinite().all()) for p in ours)


def test_resume_takes_no_options_of_groups(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    optimizer.commit()
    optimizer.close()
    for option in ("lr", "betas", "nonsense", "foreach"):
        with pytest.raises(
            UnsupportedError, match=f"as they were committed, and takes no '{option}'"
        ) as told:
            overspill.AdamW.resume(ours, swap_dir, **{**SMALL, option: 0.1})
        assert isinstance(told.value, TypeError)
    overspill.AdamW.resume(ours, swap_dir, **SMALL).close()


def test_the_system_is_quoted_with_its_number(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    (p,) = parameters([(3,)])
    p.grad = torch.ones(3)
    for swap_dir, number in ((blocked / "below" / "swap", 20), (tmp_path / ("x" * 300), 36)):
        with warnings.catch_warnings(), pytest.raises(errors.StorageError) as told:
            # Nothing is said before: the error is what there is to say.
            warnings.simplefilter("error")
            overspill.AdamW([p], swap_dir=swap_dir, **SMALL).step()
        assert told.value.errno == number and told.value.filename
    assert os.listdir(tmp_path) == ["file"]
    with overspill.AdamW([p], swap_dir=[tmp_path / "a", tmp_path / "b"], **SMALL) as optimizer:
        optimizer.commit()
    with pytest.raises(errors.StorageError, match="Not a directory") as told:
        overspill.AdamW.resume([p], [tmp_path / "a", blocked], **SMALL)
    assert told.value.errno == errno.ENOTDIR and told.value.filename == str(blocked)
    with pytest.raises(errors.EndOfFileError) as told:
        overspill.aio_handle().sync_pread(torch.empty(100), blocked)
    assert told.value.errno == errno.ENODATA and told.value.filename == str(blocked)


def test_a_build_without_the_command_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(overspill, "_native", types.SimpleNamespace())
    assert __main__.main() == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "no command line" in told.err


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
