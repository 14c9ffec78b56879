"""The optimizers' steps are PyTorch's, to the bit, in every format."""

from __future__ import annotations

import copy

import pytest
import torch

import overspill
from support import SMALL, assert_same, narrowed, pair, parameters, set_gradients

ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
RULES = [
    ("AdamW", ADAM),
    ("AdamW", {**ADAM, "amsgrad": True, "maximize": True}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, "amsgrad": True}),
    ("Adam", {**ADAM, "decoupled_weight_decay": True}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.01, "initial_accumulator_value": 0.1}),
    ("Lion", {"lr": 1e-2, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), RULES)
def test_steps_are_those_of_torch(name, options, swap_dir, backend, exact_sqrt):
    ours, optimizer, theirs, reference = pair(name, swap_dir, options=options, backend=backend)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for step in range(6):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)
    assert optimizer.report()["backend"] == backend
    optimizer.close()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Adagrad"])
def test_a_step_is_within_the_rounding_of_torchs_own_square_root(name, swap_dir):
    ours, optimizer, theirs, reference = pair(name, swap_dir)
    for step in range(5):
        set_gradients(step, ours, theirs)
        before = [p.detach().clone() for p in theirs]
        optimizer.step()
        reference.step()
        for a, b, start in zip(ours, theirs, before):
            # The update differs in its last place; the parameter, which is larger, hardly ever does.
            assert (a - b).abs().max() <= 4 * 2.0**-23 * (b.abs() + (b - start).abs()).max()
            with torch.no_grad():
                b.copy_(a)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_adafactor_is_torchs_up_to_the_order_of_sums(swap_dir, backend):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours, optimizer, theirs, reference = pair(
        "Adafactor", swap_dir, options=options, backend=backend, memory="32MiB"
    )
    for step in range(4):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    state = optimizer.state_dict()["state"]
    assert state[0]["row_var"].shape == (37, 1) and state[0]["col_var"].shape == (1, 53)
    assert state[1]["variance"].shape == (101,)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_muon_is_torchs_up_to_its_bf16(adjust, swap_dir):
    options = {"lr": 0.02, "adjust_lr_fn": adjust}
    shapes = [(32, 80), (80, 32)]
    ours, optimizer, theirs, reference = pair("Muon", swap_dir, shapes, options, memory="32MiB")
    start = [p.detach().clone() for p in theirs]
    for step in range(3):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    for a, b, begin in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - begin).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
def test_narrow_parameters_are_the_rounded_ones_of_torch_in_fp32(name, dtype, swap_dir, exact_sqrt):
    narrow = parameters(dtype=dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    optimizer = getattr(overspill, name)(narrow, lr=1e-3, swap_dir=swap_dir, **SMALL)
    _, _, _, reference = pair(name, swap_dir.with_name("unused"), options={"lr": 1e-3})
    reference.param_groups[0]["params"] = wide
    for step in range(8):
        set_gradients(step, narrow)
        for p, copied in zip(narrow, wide):
            copied.grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert_same(narrow, [narrowed(p, dtype) for p in wide])
    state = optimizer.state_dict()["state"]
    assert_same([state[i]["master"] for i in range(len(wide))], wide)


@pytest.mark.parametrize(
    ("dtype", "swap"),
    [
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.bfloat16, {"moments": "bfloat16"}),
        (torch.float32, {"moments": "8bit"}),
        (torch.float32, {"moments": "bfloat16"}),
    ],
)
def test_formats_that_round_train_as_well(dtype, swap, tmp_path):
    ends = []
    for index, options in enumerate([{}, swap, swap]):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).to(dtype)
        optimizer = overspill.AdamW(
            model.parameters(), lr=1e-2, swap_dir=tmp_path / str(index), **SMALL, **options
        )
        x = torch.randn(256, 64).to(dtype)
        for _ in range(40):
            optimizer.zero_grad()
            loss = (model(x).float() - x.float().roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(float(loss.detach()))
        has_master = "master" in optimizer.state_dict()["state"][0]
        assert has_master == (dtype == torch.bfloat16 and "stochastic_rounding" not in options)
    assert ends[1] == ends[2], "rounding at random is the same at random"
    assert ends[1] < 1.3 * ends[0] < 0.7


def test_gradients_of_any_type_are_taken(swap_dir):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.fail("this torch has no gradients of another type than the parameter's: use 2.10 or newer")
    results = []
    for index, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16]):
        (p,) = parameters([(50, 60)], dtype=torch.bfloat16)
        p.grad_dtype = None
        p.grad = torch.full((50, 60), 0.5).to(dtype)
        with overspill.AdamW([p], swap_dir=swap_dir / str(index), **SMALL) as optimizer:
            optimizer.step()
        results.append(p)
    assert_same(results[1:], [results[0]] * 2)
