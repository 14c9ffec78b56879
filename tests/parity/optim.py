"""The reference that overspill's update rules are compared with: `torch.optim` on the CPU, one tensor at a time.

    optim.py OUT SEED     runs every case below for a few steps and writes to OUT what each step began with and
                          what it made of it

OUT is a line of JSON, then raw little-endian numbers. The line lists the cases: name, hyper-parameters, shape, and per
step the tensors in the order in which they follow: parameter, gradient and state before, parameter and state after,
each with its name and type (`f32` or `f64`). The state before a step is that after the last one, except in the first.

A case that is `late` goes on with a step so much later after its first one.

Inputs are random and meet zeros, signed zeros, subnormals, tiny and huge numbers. What PyTorch reduces in an order of its
own (norms, products of matrices) is computed in `f64` on the same inputs: cases whose names end in `_f64`.

One operation of PyTorch is replaced. Its square root of `f32` comes from MKL, which is off by one unit in the last place for
some numbers; IEEE 754 has one right answer, which `f64` arithmetic rounded to `f32` gives. Everything else is PyTorch's.
"""

import json
import sys
from pathlib import Path

import torch

STEPS, ELEMENTS = 4, 1003
inexact_sqrt = torch.Tensor.sqrt
torch.Tensor.sqrt = lambda x: inexact_sqrt(x.double()).to(x.dtype)
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of "Symbolic Discovery of Optimization Algorithms"."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(m * beta1 + p.grad * (1 - beta1)) * group["lr"])
                m.mul_(beta2).add_(p.grad * (1 - beta2))


class ExactMuon(torch.optim.Optimizer):
    """Muon as published, iterated in the type of the parameter instead of bf16."""

    def __init__(self, params, lr, weight_decay, momentum, nesterov, rule):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        )
        self.rule = rule

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = group["momentum"]
                b = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                b.lerp_(p.grad, 1 - momentum)
                u = p.grad.lerp(b, momentum) if group["nesterov"] else b.clone()
                rows, columns = u.shape
                x = u.T if rows > columns else u
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if rows > columns else x
                ratios = {
                    "original": max(1, rows / columns) ** 0.5,
                    "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
                }
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(x * (group["lr"] * ratios[self.rule]))


def single(optimizer):
    return lambda params, **options: optimizer(params, foreach=False, **options)


def unfused(optimizer):
    return lambda params, **options: optimizer(params, foreach=False, fused=False, **options)


def cases():
    adam, adamw, sgd = unfused(torch.optim.Adam), unfused(torch.optim.AdamW), unfused(torch.optim.SGD)
    adagrad, adafactor, muon = unfused(torch.optim.Adagrad), single(torch.optim.Adafactor), torch.optim.Muon
    vector = (ELEMENTS,)
    yield "adamw", adamw, {**ADAM, "weight_decay": 0.1}, vector, torch.float32
    yield (
        "adamw_plain",
        adamw,
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        vector,
        torch.float32,
    )
    yield "adamw_amsgrad", adamw, {**ADAM, "weight_decay": 0.1, "amsgrad": True}, vector, torch.float32
    yield "adam", adam, {**ADAM, "weight_decay": 0.1}, vector, torch.float32
    yield "adam_amsgrad", adam, {**ADAM, "weight_decay": 0.1, "amsgrad": True}, vector, torch.float32
    yield "sgd", sgd, {"lr": 0.1, "weight_decay": 0.01}, vector, torch.float32
    yield (
        "sgd_momentum",
        sgd,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
        vector,
        torch.float32,
    )
    yield (
        "sgd_nesterov",
        sgd,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        vector,
        torch.float32,
    )
    options = {
        "lr": 0.1,
        "lr_decay": 0.05,
        "weight_decay": 0.01,
        "initial_accumulator_value": 0.1,
        "eps": 1e-10,
    }
    yield "adagrad", adagrad, options, vector, torch.float32
    yield "lion", Lion, {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}, vector, torch.float32
    yield "adamw_late", adamw, {**ADAM, "weight_decay": 0.1, "late": 10**6}, vector, torch.float32
    yield "adamw_still", adamw, {**ADAM, "lr": 0.0, "weight_decay": 0.1}, vector, torch.float32
    wild = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 1e-3, "weight_decay": 10.0}
    yield "adamw_wild", adamw, wild, vector, torch.float32
    yield (
        "adam_late",
        adam,
        {**ADAM, "betas": (0.999, 0.9999999), "weight_decay": 3.0, "late": 40},
        vector,
        torch.float32,
    )
    yield "adagrad_late", adagrad, {**options, "late": 10**6}, vector, torch.float32
    wild = {"lr": 3.0, "momentum": 0.999, "dampening": 0.5, "weight_decay": 2.0}
    yield "sgd_wild", sgd, wild, vector, torch.float32
    options = {"lr": 1e-2, "beta2_decay": -0.8, "eps": (2.0**-23, 1e-3), "d": 1.0, "weight_decay": 0.1}
    for kind, dtype in [("", torch.float32), ("_f64", torch.float64)]:
        yield "adafactor_vector" + kind, adafactor, options, vector, dtype
        yield "adafactor_matrix" + kind, adafactor, options, (37, 53), dtype
        yield "adafactor_batch" + kind, adafactor, options, (3, 19, 23), dtype
    for name, shape, adjust in [("wide", (32, 80), "original"), ("tall", (80, 32), "match_rms_adamw")]:
        options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": name == "tall"}
        yield f"muon_{name}", muon, {**options, "adjust_lr_fn": adjust}, shape, torch.float32
        exact = lambda params, adjust_lr_fn, **rest: ExactMuon(params, rule=adjust_lr_fn, **rest)  # noqa: E731
        yield f"muon_{name}_f64", exact, {**options, "adjust_lr_fn": adjust}, shape, torch.float64


def values(shape, generator, edges: bool):
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 3, shape, generator=generator)
    if edges:
        flat = x.view(-1)
        picks = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e-30, -1e-30, 1e-19, 1e15, -1e15, 1.0])
        places = torch.randperm(flat.numel(), generator=generator)[:200]
        flat[places] = picks[torch.arange(200) % len(picks)]
    return x


def main() -> None:
    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    listed, data = [], []

    def keep(name, tensor):
        data.append(tensor.detach().clone().contiguous())
        return {"name": name, "type": {torch.float32: "f32", torch.float64: "f64"}[tensor.dtype]}

    for name, make, options, shape, dtype in cases():
        # Edges belong to the rules that take each element on its own: beside a huge one the rest of a norm is nothing.
        edges = len(shape) == 1 and not name.startswith("adafactor")
        if edges:
            start = values(shape, generator, edges)
        else:
            start = torch.randn(shape, generator=generator)
        parameter = torch.nn.Parameter(start.to(dtype))
        late = options.get("late", 0)
        optimizer = make([parameter], **{k: v for k, v in options.items() if k != "late"})
        steps = []
        for number in range(STEPS):
            grad = (
                values(shape, generator, edges)
                if edges
                else torch.randn(shape, generator=generator) * 10.0**-number
            )
            state = optimizer.state[parameter]
            if late and number > 0:
                state["step"].fill_(number + late)
            # An `f64` run begins each step from what single precision can hold.
            with torch.no_grad():
                for tensor in [parameter, *(x for x in state.values() if torch.is_tensor(x))]:
                    tensor.copy_(tensor.float())

            def moments(state=state):
                return [(k, v) for k, v in state.items() if torch.is_tensor(v) and k != "step"]

            tensors = [keep("param", parameter.float()), keep("grad", grad)]
            tensors += [keep(k, v.float()) for k, v in moments()]
            parameter.grad = grad.to(dtype)
            optimizer.step()
            tensors += [keep("new param", parameter)] + [keep("new " + k, v) for k, v in moments()]
            steps.append(tensors)
        listed.append({"name": name, "shape": shape, "options": options, "steps": steps})

    with out.open("wb") as file:
        file.write(json.dumps(listed).encode() + b"\n")
        for tensor in data:
            file.write(tensor.numpy().tobytes())


main()
