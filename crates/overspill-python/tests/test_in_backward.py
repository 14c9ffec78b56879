"""What happens while backward runs: updates, loading ahead, and who keeps whom."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import weakref

import pytest
import torch

import overspill
from overspill.errors import ArgumentError, StateError, UnsupportedError
from overspill.optim import staging
from support import SMALL, assert_same


def layers(count=12, width=128):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))


def test_updates_in_backward_are_the_same_and_free_gradients(swap_dir, backend):
    models = [layers(), layers()]
    plain = overspill.AdamW(
        models[0].parameters(), lr=1e-3, swap_dir=swap_dir / "a", backend=backend, **SMALL
    )
    early = overspill.AdamW(
        models[1].parameters(),
        lr=1e-3,
        swap_dir=swap_dir / "b",
        backend=backend,
        in_backward=True,
        memory="5MiB",
        resident=0,
    )
    left = []
    for step in range(4):
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, (plain, early)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            left.append(sum(p.grad is not None for p in model.parameters()))
            optimizer.step()
        assert_same(models[0].parameters(), models[1].parameters())
        assert all(p.grad is None for p in models[1].parameters())
    assert set(left[::2]) == {24} and max(left[1::2]) < 24, left
    assert [int(x["step"]) for x in early.state.values()] == [4] * 24


def test_in_backward_refuses_what_needs_all_gradients(swap_dir):
    model = layers(2)
    with pytest.raises(ArgumentError, match="max_norm"):
        overspill.AdamW(model.parameters(), swap_dir=swap_dir, in_backward=True, max_norm=1.0)
    optimizer = overspill.AdamW(model.parameters(), swap_dir=swap_dir, in_backward=True, **SMALL)
    with pytest.raises(UnsupportedError, match="closure"):
        optimizer.step(lambda: 0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 128)).sum()).backward()
    with pytest.raises(UnsupportedError, match="GradScaler"):
        scaler.step(optimizer)
    optimizer.close()
    model(torch.ones(1, 128)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "a closed optimizer watches nothing"


@pytest.mark.parametrize("memory", ["5MiB", "64MiB"])
def test_a_second_backward_before_a_step_is_refused_at_any_size(memory, swap_dir):
    model, x = layers(), torch.ones(1, 128)
    optimizer = overspill.AdamW(
        model.parameters(), swap_dir=swap_dir, in_backward=True, memory=memory, resident=0
    )
    model(x).sum().backward()
    with pytest.raises(StateError, match=r"before step\(\)"):
        model(x).sum().backward()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    model(x).sum().backward()
    optimizer.step()


def test_parameters_do_not_keep_the_optimizer(swap_dir):
    model = layers(2)
    optimizer = overspill.AdamW(model.parameters(), swap_dir=swap_dir, in_backward=True, **SMALL)
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    assert swap_dir.exists()
    del optimizer
    assert not swap_dir.exists(), "at once: nothing is left to a collector of cycles"
    model(torch.ones(1, 128)).sum().backward()


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_optimizer_does_not_keep_parameters(in_backward, swap_dir):
    model = layers(2)
    optimizer = overspill.AdamW(model.parameters(), swap_dir=swap_dir, in_backward=in_backward, **SMALL)
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    weights = [weakref.ref(p) for p in model.parameters()]
    del model, optimizer
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4


class Spy:
    """The native half, which counts how often it is asked to load ahead."""

    def __init__(self, native):
        self.native = native
        self.prefetched = 0

    def prefetch(self):
        self.prefetched += 1
        self.native.prefetch()

    def __getattr__(self, name):
        return getattr(self.native, name)


def test_backward_loads_ahead_what_the_end_of_a_step_had_no_memory_for(swap_dir):
    model = layers(4)
    optimizer = overspill.AdamW(model.parameters(), swap_dir=swap_dir, **SMALL)
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    spy = optimizer._native = Spy(optimizer._native)
    model(torch.ones(1, 128)).sum().backward()
    assert spy.prefetched == 8, "with every gradient"
    optimizer.step()
    assert spy.prefetched == 9, "and at the end of a step"
    # Who has closed it, or has none of it any more, is not asked.
    optimizer.close()
    model(torch.ones(1, 128)).sum().backward()
    assert spy.prefetched == 9 and not model[0].weight._post_accumulate_grad_hooks


def test_models_are_copied_and_pickled_beside_it_and_a_fork_may_train_them(swap_dir):
    model = layers(2)
    optimizer = overspill.AdamW(model.parameters(), swap_dir=swap_dir, **SMALL)
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(model.parameters(), twin.parameters())
        twin(torch.ones(1, 128)).sum().backward()
        assert model[0].weight.grad is None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Not by backward(), which torch refuses in forks of a process that has had its threads.
            for hook in model[0].weight._post_accumulate_grad_hooks.values():
                hook(model[0].weight)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    optimizer.close()


def test_an_interrupt_while_backward_updates_applies_no_gradient_twice(swap_dir):
    parameter = torch.nn.Parameter(torch.zeros(5_000_000))
    optimizer = overspill.AdamW(
        [parameter], lr=1.0, weight_decay=0.0, swap_dir=swap_dir, memory="64MiB", in_backward=True
    )
    run = optimizer._run

    def interrupted(*arguments):
        run(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    optimizer._run = interrupted
    with pytest.raises(KeyboardInterrupt):
        parameter.sum().backward()
    optimizer._run = run
    assert int(optimizer.state[parameter]["step"]) == 1 and parameter.grad is None
    optimizer.step()
    assert int(optimizer.state[parameter]["step"]) == 1
    assert torch.allclose(parameter, torch.tensor(-1.0))


def test_a_roll_back_drops_what_backward_has_not_used(swap_dir):
    model, undisturbed = layers(4), layers(4)
    optimizers = [
        overspill.AdamW(x.parameters(), lr=1e-2, swap_dir=swap_dir / name, in_backward=True, **SMALL)
        for name, x in (("a", model), ("b", undisturbed))
    ]
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    for network, optimizer in zip((model, undisturbed), optimizers):
        network(x).square().mean().backward()
        optimizer.step()
        optimizer.commit()

    def failing(_):
        raise ZeroDivisionError

    hook = model[0].weight.register_hook(failing)
    with pytest.raises(ZeroDivisionError):
        model(x).square().mean().backward()
    hook.remove()
    optimizers[0].roll_back()
    assert all(p.grad is None for p in model.parameters())
    for network, optimizer in zip((model, undisturbed), optimizers):
        network(x).square().mean().backward()
        optimizer.step()
    assert_same(model.parameters(), undisturbed.parameters())


def test_a_step_that_fails_half_way_applies_no_gradient_twice(swap_dir, monkeypatch):
    monkeypatch.setattr(staging, "STAGED_BYTES", 64)
    parameters = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(3)]
    optimizer = overspill.SGD(parameters, lr=1.0, swap_dir=swap_dir, in_backward=True, **SMALL)
    for p in parameters:
        # It is copied to be used.
        p.grad = torch.ones(16, 8)[::2]
    copies, copy_of = [], staging.Staging.gradient

    def failing(self, gradient):
        copies.append(gradient)
        if len(copies) == 2:
            raise MemoryError
        return copy_of(self, gradient)

    monkeypatch.setattr(staging.Staging, "gradient", failing)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert [p.grad is None for p in parameters] == [True, False, False]
    optimizer.step()
    assert [int(x["step"]) for x in optimizer.state.values()] == [1, 1, 1]
    assert all(not p.any() for p in parameters)
