"""`overspill.AdamW` with all state on storage, DeepSpeed ZeRO-3 with its pipelined NVMe offload, and torch's fused AdamW in memory.

All three train the same stack of square linear layers, each in a process of its own, and take steps in turns. overspill
and DeepSpeed have bf16 parameters with exact fp32 masters; torch, whose state is in memory, fp32 ones. What is timed is the
optimizer's step after the backward pass of a batch. overspill loads ahead in that pass, and its last writes go on behind the
step, so the time until everything is on storage is told as well. Bytes are those that the system counted for the process, peaks its resident
memory. The figures are medians, the ratios those of neighbors.

With `--overhead` a model of 200 tensors takes steps, and what is told is the share of a step that is spent in Python.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import step as peers

WIDTH = peers.WIDTH
OVERHEAD_TENSORS = 200


def layers_of(arguments):
    """Shapes of the model's weights: square ones, or 200 of any shape with as many elements in all."""
    if arguments.overhead:
        return [(arguments.parameters // OVERHEAD_TENSORS // 256, 256)] * OVERHEAD_TENSORS
    return [(WIDTH, WIDTH)] * max(1, round(arguments.parameters / WIDTH**2))


def answer(parameters, prepare, optimizer_step, settle=lambda: {}):
    """Takes a step for every line that is read, and says what it took."""
    print(json.dumps({"parameters": parameters}), flush=True)
    # What one step has begun to load for the next counts for the next.
    before = peers.moved()
    for _ in sys.stdin:
        prepare()
        started = time.perf_counter()
        optimizer_step()
        seconds = time.perf_counter() - started
        more = settle()
        settled = time.perf_counter() - started
        after = peers.moved()
        found = {"seconds": seconds, "settled": settled, "bytes": after - before, "peak": peers.peak_bytes()}
        before = after
        print(json.dumps(found | more), flush=True)


def serve(arguments):
    """One side in a process of its own."""
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.serve == "deepspeed":
        peers.serve(arguments)
        return
    dtype = torch.bfloat16 if arguments.serve == "overspill" else torch.float32
    shapes = layers_of(arguments)
    parameters = sum(rows * columns for rows, columns in shapes)
    if arguments.overhead:
        weights = [torch.nn.Parameter(torch.randn(shape, dtype=dtype) * 0.02) for shape in shapes]
        gradients = [torch.randn(shape, dtype=dtype) * 0.01 for shape in shapes]

        def backward():
            for weight, gradient in zip(weights, gradients):
                weight.grad = gradient
    else:
        layers = (torch.nn.Linear(rows, columns, bias=False, dtype=dtype) for rows, columns in shapes)
        model = torch.nn.Sequential(*layers)
        weights = list(model.parameters())
        inputs = torch.randn(peers.BATCH, WIDTH, dtype=dtype)

        def backward():
            model.zero_grad(set_to_none=True)
            model(inputs).float().square().mean().backward()

    if arguments.serve == "torch":
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        answer(parameters, backward, optimizer.step)
        return

    import overspill

    state = os.path.join(arguments.folder, "state")
    optimizer = overspill.AdamW(weights, lr=1e-4, swap_dir=state, memory=arguments.memory, resident=0)
    inside = [0.0]

    def settle():
        report = optimizer.report()
        inside.append(report["seconds_step"])
        optimizer.settle()
        return {"inside": inside[-1] - inside[-2], "degraded": report["degraded_reason"]}

    answer(parameters, backward, optimizer.step, settle)
    optimizer.close()


class Side:
    """A side in a process of its own."""

    def __init__(self, arguments, folder, name, port):
        self.folder = os.path.join(folder, name)
        os.mkdir(self.folder)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
        environment["LOCAL_RANK"] = "0"
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name, "--folder", self.folder]
        self.log = open(os.path.join(self.folder, "log"), "w+")
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.parameters = self.answer()["parameters"]
        # The first step makes the state, and the second is the first to read it.
        self.step()
        self.step()

    answer = peers.DeepSpeed.answer
    step = peers.DeepSpeed.step
    close = peers.DeepSpeed.close


def main():
    parser = argparse.ArgumentParser(prog="bench/peers/run optimizer", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=".", help="existing directory on the disk to measure")
    parser.add_argument("--parameters", type=int, default=55_000_000, help="number of parameters, about")
    parser.add_argument("--memory", default="256MiB", help="the budget of overspill's state")
    parser.add_argument("--pairs", type=int, default=5, help="how many times each side is measured, in turns")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()), help="threads of all sides")
    parser.add_argument("--overhead", action="store_true", help="only the share of a step that Python takes")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--serve", choices=["overspill", "deepspeed", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if arguments.parameters < OVERHEAD_TENSORS * 256 or arguments.pairs < 1:
        parser.error(f"--parameters must be at least {OVERHEAD_TENSORS * 256}, and --pairs 1")
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    names = ["overspill"] if arguments.overhead else ["overspill", "deepspeed", "torch"]
    folder = tempfile.mkdtemp(prefix="overspill-peers-", dir=arguments.dir)
    try:
        sides = {name: Side(arguments, folder, name, 29590 + at) for at, name in enumerate(names)}
        rounds = []
        for turn in range(arguments.pairs):
            order = names if turn % 2 else names[::-1]
            rounds.append({name: sides[name].step() for name in order})
        for side in sides.values():
            side.close()
    finally:
        shutil.rmtree(folder)

    degraded = rounds[0]["overspill"]["degraded"]
    if degraded:
        raise SystemExit(f"peers: overspill's engine is degraded, no figures: {degraded}")

    def middle(name, value):
        return statistics.median(value(found[name]) for found in rounds)

    def seconds(found):
        return found["seconds"]

    parameters = sides["overspill"].parameters
    report = {
        "parameters": parameters,
        "step_seconds": middle("overspill", seconds),
        "settled_seconds": middle("overspill", lambda found: found["settled"]),
        "python_fraction": middle("overspill", lambda found: 1 - found["inside"] / found["seconds"]),
        "bytes_per_parameter_step": middle("overspill", lambda found: found["bytes"]) / parameters,
        "peak_rss_bytes": middle("overspill", lambda found: found["peak"]),
        "pairs": arguments.pairs,
        "threads": arguments.threads,
        "torch_version": importlib.metadata.version("torch"),
    }
    print(f"{parameters:,} parameters, medians of {arguments.pairs}")
    print(f"{'':12}{'step':>10}{'bytes/parameter':>18}{'peak memory':>14}")
    for name in names:
        moved = middle(name, lambda found: found["bytes"]) / parameters
        peak = middle(name, lambda found: found["peak"]) / 2**20
        print(f"{name:12}{middle(name, seconds):>8.3f} s{moved:>18.1f}{peak:>10.0f} MiB")
    for name in names[1:]:
        ratio = statistics.median(found[name]["seconds"] / found["overspill"]["seconds"] for found in rounds)
        report |= {
            f"{name}_step_seconds": middle(name, seconds),
            f"{name}_bytes_per_parameter_step": middle(name, lambda found: found["bytes"]) / parameters,
            f"{name}_peak_rss_bytes": middle(name, lambda found: found["peak"]),
            f"times_as_fast_as_{name}": ratio,
        }
        print(f"{ratio:.2f} times as fast as {name} (median of the ratios of neighbors)")
    if not arguments.overhead:
        report["deepspeed_version"] = importlib.metadata.version("deepspeed")
    print(f"overspill has everything on storage {report['settled_seconds']:.3f} s after the step began")
    print(f"{100 * report['python_fraction']:.2f} % of overspill's step are spent in Python")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
