"""Any value in any place of options and states: it is taken, or refused in one line, and changes nothing then."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import overspill
from overspill.errors import OverspillError
from overspill.optim.options import SwapOptions
from support import SMALL, assert_same_states, parameters, set_gradients

CLASSES = ["AdamW", "Adam", "SGD", "Adagrad", "Lion", "Adafactor", "Muon"]


class Nameless:
    """What has no text."""

    def __repr__(self):
        raise RuntimeError("there is none")


with warnings.catch_warnings():
    # Torch warns of these themselves.
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.ones(5)] * 4)

ABSURD = [
    *(None, True, -1, 0, 3, 1 << 62, 1 << 64, 10**5000, 1.5, -0.5, 1e300, math.nan, math.inf, 1j),
    *("", "x", "1GiB", "-1GiB", "9" * 400, "\0", "\ud800", "a\tb", b"", b"x", bytearray(b"1")),
    *([], [[]], [0.5], [0.9, 0.9], (0.5,) * 3, (None, 0.1), ("a", "b"), {}, {"a": 1}, {1}, range(3)),
    *(
        object(),
        Nameless(),
        print,
        int,
        Path("/dev/null"),
        Path("/dev/null/x"),
        "/proc/none/there",
    ),
    *(numpy.ones(3), numpy.float32(0.5), numpy.bool_(True), torch.ones(2), torch.tensor([0.25])),
    *(torch.ones(4, 5, dtype=torch.int8), torch.ones(4, 5).to_sparse(), torch.ones(4, 5, device="meta")),
    *(torch.ones(4, 5, dtype=torch.complex64), NESTED),
]
"""Values of every kind, of which an option has one at most."""


def options_of(name):
    """The options of a class, and one that there is not."""
    signature = inspect.signature(getattr(overspill, name)).parameters
    return [*(set(signature) - {"params", "swap"}), *SwapOptions.__annotations__, "nonsense"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Relative paths are those of a directory of the test."""
    monkeypatch.chdir(tmp_path)


def told_well(call):
    """Calls; whether it was refused, which is done in one line, by an exception of the package."""
    try:
        call()
    except OverspillError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return True
    return False


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(CLASSES), value=st.sampled_from(ABSURD), data=st.data())
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(
    name, value, data, tmp_path_factory, elsewhere
):
    option = data.draw(st.sampled_from(sorted(options_of(name))))
    (p,) = parameters([(4, 5)])
    p.grad = torch.ones(4, 5)
    options = {"swap_dir": tmp_path_factory.mktemp("absurd") / "swap", **SMALL, option: value}
    made = []

    def use():
        made.append(getattr(overspill, name)([p], **options))
        made[0].step()
        made[0].state_dict()
        made[0].commit(value)
        made[0].snapshot(value)

    told_well(use)
    for optimizer in made:
        optimizer.param_groups[0][option] = value
        told_well(optimizer.step)
        optimizer.close()
    if option != "swap_dir":
        told_well(lambda: getattr(overspill, name).resume([p], **options).close())


ABSENT = object()
"""In the place of a value: there is none."""


@pytest.fixture(scope="module", params=["AdamW", "Adafactor"])
def stepped(request, tmp_path_factory):
    """An optimizer with a state, and the state."""
    model = [*parameters([(4, 5)]), *parameters([(4, 5)], dtype=torch.bfloat16)]
    place = tmp_path_factory.mktemp("stepped") / "swap"
    optimizer = getattr(overspill, request.param)(model, swap_dir=place, **SMALL)
    set_gradients(0, model)
    optimizer.step()
    yield optimizer, copy.deepcopy(optimizer.state_dict())
    optimizer.close()


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=st.sampled_from([*ABSURD, ABSENT]), data=st.data())
def test_any_state_is_taken_or_refused_in_one_line_and_changes_nothing_then(value, data, stepped):
    optimizer, good = stepped
    state = {
        "state": {number: dict(own) for number, own in good["state"].items()},
        "param_groups": [{**group, "params": list(group["params"])} for group in good["param_groups"]],
    }
    at, key = state, data.draw(st.sampled_from(["state", "param_groups"]))
    while isinstance(at[key], (dict, list)) and at[key] and data.draw(st.integers(0, 3)):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    if value is ABSENT:
        del at[key]
    else:
        at[key] = value
    if told_well(lambda: optimizer.load_state_dict(state)):
        assert_same_states(optimizer.state_dict(), good)
    else:
        told_well(optimizer.step)
        optimizer.load_state_dict(good)
    parameter = optimizer.param_groups[0]["params"][0]
    told_well(lambda: optimizer.set_state(parameter, value))
    optimizer.load_state_dict(good)
    for call in (
        optimizer.load_state_dict,
        optimizer.get_state,
        optimizer.purge,
        optimizer.snapshot,
        optimizer.delete_snapshot,
    ):
        told_well(lambda call=call: call(value))
