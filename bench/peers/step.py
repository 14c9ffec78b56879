"""An optimizer step with all state on storage: DeepSpeed ZeRO-3 with its pipelined NVMe offload, and overspill, in turns.

Both have the same number of parameters, bf16 weights with exact fp32 masters, and bf16 gradients in memory when the step
begins. DeepSpeed's model is a stack of square linear layers; what is timed is `engine.step()`, after a backward pass. Of
overspill it is the step of `overspill bench step`, until everything is on storage. Bytes are those that the system counted
for the process. The figures are medians, the ratios those of neighbors.
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

WIDTH = 2048
BATCH = 64


def moved():
    """Bytes that this process has read from storage and written to it."""
    with open("/proc/self/io") as file:
        found = dict(line.split(": ") for line in file.read().splitlines())
    return int(found["read_bytes"]) + int(found["write_bytes"])


def peak_bytes():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def serve(arguments):
    """DeepSpeed in a process of its own: a step for every line that is read."""
    import deepspeed
    import torch

    torch.set_num_threads(arguments.threads)
    layers = max(1, round(arguments.parameters / WIDTH**2))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    nvme = {"device": "nvme", "nvme_path": arguments.folder, "buffer_count": 12}
    nvme |= {"pipeline_read": True, "pipeline_write": True}
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": nvme, "sub_group_size": 10**7},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    inputs = torch.randn(BATCH, WIDTH, dtype=torch.bfloat16)
    print(json.dumps({"parameters": layers * WIDTH**2}), flush=True)
    for _ in sys.stdin:
        engine.backward(engine(inputs).float().square().mean())
        before, started = moved(), time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "bytes": moved() - before, "peak": peak_bytes()}), flush=True)


class DeepSpeed:
    def __init__(self, arguments, folder):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "RANK": "0", "WORLD_SIZE": "1"}
        environment["LOCAL_RANK"] = "0"
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        self.log = open(os.path.join(folder, "log"), "w+")
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.parameters = self.answer()["parameters"]

    def answer(self):
        # DeepSpeed logs to the same stream.
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise SystemExit("peers: DeepSpeed has ended: " + self.log.read()[-2000:])

    def step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


class Overspill:
    def __init__(self, arguments, parameters):
        self.command = [
            arguments.overspill,
            "bench",
            "step",
            "--dir",
            arguments.dir,
            "--pairs",
            "1",
            "--json",
            "-",
        ]
        self.command += ["--parameters", str(parameters)]
        self.parameters = parameters

    def step(self):
        run = subprocess.run(self.command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout)
        bytes_moved = found["bytes_per_parameter_step"] * self.parameters
        return {
            "seconds": found["step_seconds"],
            "bytes": bytes_moved,
            "planned": found["memory_planned_bytes"],
        }


def main():
    parser = argparse.ArgumentParser(prog="bench/peers/run step", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=".", help="existing directory on the disk to measure")
    parser.add_argument("--parameters", type=int, default=55_000_000, help="number of parameters, about")
    parser.add_argument("--pairs", type=int, default=7, help="how many times each side is measured, in turns")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()), help="threads of both")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--overspill", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        serve(arguments)
        return
    if arguments.parameters < 1 or arguments.pairs < 1:
        parser.error("--parameters and --pairs must be at least 1")
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    folder = tempfile.mkdtemp(prefix="overspill-peers-", dir=arguments.dir)
    try:
        theirs = DeepSpeed(arguments, folder)
        ours = Overspill(arguments, theirs.parameters)
        # The first step makes the state, and the second is the first to read it.
        theirs.step()
        theirs.step()
        steps = []
        for pair in range(arguments.pairs):
            first, second = (ours, theirs) if pair % 2 else (theirs, ours)
            found = {first: first.step(), second: second.step()}
            steps.append((found[ours], found[theirs]))
        theirs.close()
    finally:
        shutil.rmtree(folder)

    def middle(side, name):
        return statistics.median(step[side][name] for step in steps)

    report = {
        "parameters": ours.parameters,
        "step_seconds": middle(0, "seconds"),
        "deepspeed_step_seconds": middle(1, "seconds"),
        "times_as_fast": statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in steps),
        "bytes_per_parameter_step": middle(0, "bytes") / ours.parameters,
        "deepspeed_bytes_per_parameter_step": middle(1, "bytes") / ours.parameters,
        "swap_memory_bytes": middle(0, "planned"),
        "deepspeed_peak_rss_bytes": middle(1, "peak"),
        "pairs": arguments.pairs,
        "threads": arguments.threads,
        "deepspeed_version": importlib.metadata.version("deepspeed"),
        "torch_version": importlib.metadata.version("torch"),
    }
    print(f"{'':32}{'overspill':>12}{'DeepSpeed':>12}")
    print(f"{'step':32}{report['step_seconds']:>10.3f} s{report['deepspeed_step_seconds']:>10.3f} s")
    moved_ours, moved_theirs = (
        report["bytes_per_parameter_step"],
        report["deepspeed_bytes_per_parameter_step"],
    )
    print(f"{'bytes per parameter and step':32}{moved_ours:>12.1f}{moved_theirs:>12.1f}")
    print(f"{report['times_as_fast']:.2f} times as fast (median of {arguments.pairs} pairs)")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
