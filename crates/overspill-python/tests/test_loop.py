"""Everything that a training loop does with an optimizer: groups, schedulers, hooks, clipping, scaled losses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import overspill
from support import SMALL, assert_same, pair, parameters, set_gradients, twins


def test_groups_have_their_own_options_and_join_at_any_time(swap_dir, exact_sqrt):
    ours, theirs = twins()
    first = [{"params": x[:2], "lr": 0.1} for x in (ours, theirs)]
    optimizer = overspill.AdamW([first[0]], swap_dir=swap_dir, **SMALL)
    reference = torch.optim.AdamW([first[1]], foreach=False)
    optimizer.add_param_group({"params": ours[2], "betas": (0.5, 0.6)})
    reference.add_param_group({"params": theirs[2], "betas": (0.5, 0.6)})
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": ours[3:], "weight_decay": 0.5, "eps": 1e-3})
            reference.add_param_group({"params": theirs[3:], "weight_decay": 0.5, "eps": 1e-3})
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)


def test_parameters_that_thaw_get_their_state_then(swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    for p in (ours[0], theirs[0], ours[4], theirs[4]):
        p.requires_grad_(False)
    frozen = ours[4].detach().clone()
    for step in range(6):
        if step == 3:
            ours[0].requires_grad_(True)
            theirs[0].requires_grad_(True)
        set_gradients(step, [p for p in ours if p.requires_grad], [p for p in theirs if p.requires_grad])
        optimizer.step()
        reference.step()
        if step == 1:
            assert optimizer.report()["state_bytes"] < 8 * 120_000, "a frozen parameter has no place"
        assert_same(ours, theirs)
    assert torch.equal(ours[4], frozen)
    assert int(optimizer.state[ours[0]]["step"]) == 3 and ours[4] not in optimizer.state


def schedulers():
    from torch.optim import lr_scheduler as lrs

    yield lambda o: lrs.LambdaLR(o, lambda n: 0.9**n)
    yield lambda o: lrs.MultiplicativeLR(o, lambda n: 0.9)
    yield lambda o: lrs.StepLR(o, 2)
    yield lambda o: lrs.MultiStepLR(o, [1, 3])
    yield lambda o: lrs.ConstantLR(o)
    yield lambda o: lrs.LinearLR(o)
    yield lambda o: lrs.ExponentialLR(o, 0.9)
    yield lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], [2])
    yield lambda o: lrs.PolynomialLR(o)
    yield lambda o: lrs.CosineAnnealingLR(o, 4)
    yield lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)])
    yield lambda o: lrs.CyclicLR(o, 0.001, 0.1, cycle_momentum=True)
    yield lambda o: lrs.OneCycleLR(o, 0.1, total_steps=20)
    yield lambda o: lrs.CosineAnnealingWarmRestarts(o, 3)
    yield lambda o: lrs.ReduceLROnPlateau(o, patience=1)


def test_schedulers_drive_it_as_they_drive_torch(tmp_path, exact_sqrt):
    from torch.optim import lr_scheduler as lrs

    made = list(schedulers())
    names = {type(make(torch.optim.SGD(parameters([(2,)]), lr=0.1, momentum=0.9))).__name__ for make in made}
    assert {name for name in lrs.__all__ if name not in ("LRScheduler", "SWALR")} <= names
    for index, make in enumerate(made):
        options = {"lr": 0.1}
        ours, optimizer, theirs, reference = pair("AdamW", tmp_path / str(index), [(5, 7)], options)
        with optimizer, warnings.catch_warnings():
            warnings.simplefilter("error")
            driven = make(optimizer), make(reference)
            for step in range(6):
                set_gradients(step, ours, theirs)
                optimizer.step()
                reference.step()
                for scheduler in driven:
                    scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
                assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            assert_same(ours, theirs)


def test_a_rate_may_be_a_tensor_that_somebody_changes(swap_dir, exact_sqrt):
    rate = torch.tensor(0.1)
    ours, optimizer, theirs, _ = pair("AdamW", swap_dir, options={"lr": rate})
    reference = torch.optim.AdamW(theirs, lr=float(rate), foreach=False)
    for step in range(4):
        rate.fill_(0.1 / (step + 1))
        reference.param_groups[0]["lr"] = float(rate)
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)


def test_closures_and_hooks_are_called(swap_dir):
    (p,) = parameters([(4,)])
    optimizer = overspill.SGD([p], lr=0.1, swap_dir=swap_dir, **SMALL)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: called.append(f"loading {saved['more']}"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before", "after"] * 2 + ["saving", "loading 1", "loaded"]
    optimizer.zero_grad()
    assert p.grad is None


def test_a_parameter_without_a_gradient_is_left_alone(swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    for step in range(6):
        set_gradients(step, ours, theirs)
        for model in (ours, theirs):
            model[step % 5].grad = None
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in ours]
    assert optimizer.step() is None
    assert_same(ours, before)
    for a, b in zip(ours, theirs):
        assert int(optimizer.state[a]["step"]) == int(reference.state[b]["step"])


def test_shared_parameters_count_once(swap_dir, exact_sqrt):
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        model[2].weight = model[0].weight
        optimizer = (
            overspill.AdamW(model.named_parameters(), swap_dir=swap_dir, **SMALL)
            if ours
            else torch.optim.AdamW(model.named_parameters(), foreach=False)
        )
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.bias"]
        results.append(list(model.parameters()))
    assert_same(*results)
    (p,) = parameters([(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = overspill.SGD([p, p], lr=0.1, swap_dir=swap_dir / "twice", **SMALL)
    before = p.detach().clone()
    p.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(before - p, torch.full((3,), 0.1))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 1), (0, 3)])
def test_the_smallest_shapes_are_parameters_too(shape, swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, [shape, (5,)])
    for step in range(3):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)
    optimizer.load_state_dict(reference.state_dict())
    assert int(optimizer.state[ours[0]]["step"]) == 3


def test_strided_parameters_and_gradients_are_updated_in_place(swap_dir, exact_sqrt):
    base = torch.randn(20, 30)
    ours = [
        torch.nn.Parameter(base.clone().t()),
        torch.nn.Parameter(torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last)),
    ]
    theirs = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in ours]
    assert not ours[0].is_contiguous() and not ours[1].is_contiguous()
    pointers = [p.data_ptr() for p in ours]
    optimizer = overspill.AdamW(ours, swap_dir=swap_dir, max_norm=1.0, **SMALL)
    reference = torch.optim.AdamW(theirs, foreach=False)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.clone(memory_format=torch.preserve_format).as_strided(b.shape, b.stride())
            a.grad = torch.empty_like(a).copy_(b.grad)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, foreach=False)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert [p.data_ptr() for p in ours] == pointers
    with torch.no_grad():
        kept = [p.clone() for p in ours]
        optimizer.commit()
        for p in ours:
            p.zero_()
    optimizer.roll_back()
    assert_same(ours, kept)


def test_copies_of_what_is_not_contiguous_are_bounded(swap_dir, exact_sqrt, monkeypatch):
    from overspill.optim import staging

    monkeypatch.setattr(staging, "STAGED_BYTES", 5000)
    ours = [torch.nn.Parameter(torch.randn(30, 20).t()) for _ in range(6)]
    theirs = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in ours]
    optimizer = overspill.AdamW(ours, swap_dir=swap_dir, **SMALL)
    reference = torch.optim.AdamW(theirs, foreach=False)
    for step in range(3):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)
    # Two parameters a call, because their gradients are contiguous and stay where they are.
    assert optimizer.report()["passes"] == 3 * 2


def test_clipping_in_the_pass_is_clipping_before_it(swap_dir):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, options={"lr": 0.01}, max_norm=0.5)
    for step in range(4):
        set_gradients(step, ours, theirs)
        if step == 2:
            for p in (*ours, *theirs):
                p.grad *= 1e-4
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
        optimizer.step()
        reference.step()
        assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_spreads_what_is_no_number_as_torch_does(bad, swap_dir):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, options={"lr": 0.01}, max_norm=0.5)
    set_gradients(0, ours, theirs)
    for model in (ours, theirs):
        model[0].grad[1, 2] = bad
    torch.nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
    optimizer.step()
    reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_signs_that_torch_has_yet_to_turn_are_turned(swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, [(40,), (30,)])
    values = torch.randn(40)
    ours[0].data, theirs[0].data = torch._neg_view(values.clone()), -values
    assert ours[0].is_neg()
    for step in range(3):
        set_gradients(step, ours, theirs)
        ours[1].grad, theirs[1].grad = torch._neg_view(ours[1].grad), -theirs[1].grad
        optimizer.step()
        reference.step()
        assert_same([p.detach().resolve_neg() for p in ours], theirs)
    state, gradient = optimizer.get_state(ours[0]), torch.randn(40)
    optimizer.set_state(ours[0], {**state, "exp_avg": torch._neg_view(gradient.clone())})
    assert torch.equal(optimizer.get_state(ours[0])["exp_avg"], -gradient)


def unaligned(x):
    """The same numbers, one byte away from where fp32 is aligned."""
    moved = torch.frombuffer(bytearray(x.nbytes + 1), dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("swap", [{}, {"max_norm": 1e9}])
def test_memory_that_is_not_aligned_is_taken(swap, swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, [(40,), (5, 6)], **swap)
    ours[0].data = unaligned(ours[0].data)
    for step in range(3):
        set_gradients(step, ours, theirs)
        ours[1].grad = unaligned(ours[1].grad)
        optimizer.step()
        reference.step()
        assert_same(ours, theirs)
    state = optimizer.get_state(ours[1])
    optimizer.set_state(ours[1], {name: unaligned(x) if x.dim() else x for name, x in state.items()})
    assert all(torch.equal(x, state[name]) for name, x in optimizer.get_state(ours[1]).items())


def test_torchs_own_clipping_works(swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir)
    set_gradients(0, ours, theirs)
    for model in (ours, theirs):
        torch.nn.utils.clip_grad_norm_(model, 0.1)
    optimizer.step()
    reference.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("unscales", [False, True])
def test_a_grad_scaler_scales_and_skips(unscales, swap_dir, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, [(20, 10)], max_norm=None)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        for scaler, model, optim in ((scalers[0], ours, optimizer), (scalers[1], theirs, reference)):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(20, 10, generator=generator)
            optim.zero_grad()
            loss = (model[0] * x).square().mean() * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if unscales:
                scaler.unscale_(optim)
                torch.nn.utils.clip_grad_norm_(model, 0.1)
            scaler.step(optim)
            scaler.update()
        assert_same(ours, theirs)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert int(optimizer.state[ours[0]]["step"]) == 5


def test_fp16_parameters_train_with_a_grad_scaler(swap_dir):
    model = torch.nn.Linear(16, 16).half()
    optimizer = overspill.AdamW(model.parameters(), lr=1e-2, max_norm=1.0, swap_dir=swap_dir, **SMALL)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 16).half()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
