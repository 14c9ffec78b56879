"""What several tests need: models, gradients and references for optimizers, tensors for the handle."""

from __future__ import annotations

import json
import os
import re

import torch

import overspill

SMALL = {"memory": "8MiB", "resident": 0}
"""Everything moves: nothing of the state stays in memory."""

BACKENDS = ("io_uring", "aio", "threads")
"""Every way to move bytes. A machine that lacks one of them fails its tests, and the error says what is missing."""

MIB = 1 << 20

BOUND = 60
"""Seconds; longer than anything that is waited for takes on a slow machine."""

SHAPES = [(37, 53), (101,), (), (3, 19, 23), (400, 300)]


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of "Symbolic Discovery of Optimization Algorithms"."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(m * beta1 + p.grad * (1 - beta1)) * group["lr"])
                m.mul_(beta2).add_(p.grad * (1 - beta2))


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    """Random parameters, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def twins(shapes=SHAPES, seed=0):
    """The same parameters twice."""
    return parameters(shapes, seed=seed), parameters(shapes, seed=seed)


def set_gradients(step, *models):
    """Gives all models the gradients of a step."""
    for model in models:
        generator = torch.Generator().manual_seed(1000 + step)
        for p in model:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def assert_same(ours, theirs):
    """Bit by bit."""
    for index, (a, b) in enumerate(zip(ours, theirs)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.detach(), b.detach()), f"{index}: {ulps(a, b)} units in the last place apart"


def assert_same_states(ours, theirs):
    """What two `state_dict()` have, bit by bit."""
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, own in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][name], x) for name, x in own.items())


def ulps(a, b):
    """How many fp32 numbers two tensors are apart at most."""

    def ordered(x):
        bits = x.detach().float().contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFF_FFFF), bits)

    return int((ordered(a) - ordered(b)).abs().max()) if a.numel() else 0


def narrowed(x, dtype):
    """A master as a weight: the nearest; of two that are as near, the even fp16 one, and the larger bf16 one."""
    if dtype != torch.bfloat16:
        return x.detach().to(dtype)
    bits = x.detach().contiguous().view(torch.int32).long() & 0xFFFF_FFFF
    return ((bits + 0x8000) >> 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)


def pair(name, swap_dir, shapes=SHAPES, options=None, **swap):
    """Parameters and optimizer, ours and PyTorch's."""
    ours, theirs = twins(shapes)
    options = options or {}
    optimizer = getattr(overspill, name)(ours, swap_dir=swap_dir, **{**SMALL, **swap}, **options)
    reference = Lion if name == "Lion" else getattr(torch.optim, name)
    unfused = {} if name in ("Lion", "Muon") else {"foreach": False}
    return ours, optimizer, theirs, reference(theirs, **options, **unfused)


def random_bytes(length, seed=0):
    return torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pinned(handle, tensor, skip=0):
    """The tensor in pinned memory, `skip` bytes from its beginning."""
    whole = handle.new_cpu_locked_tensor(tensor.nbytes + skip, torch.empty(0, dtype=torch.uint8))
    copy = whole[skip:].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def status(name):
    """A line of this process's status: kilobytes, or a count."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{name}:\s*(\d+)", file.read(), re.MULTILINE)[1])


def descriptors():
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def manifest_of(path):
    """What a manifest says, behind its first line."""
    return json.loads(path.read_text().split("\n", 1)[1])
