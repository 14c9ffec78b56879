"""The AdamW update of overspill, torch and DeepSpeed on fp32 state in memory, in turns.

Each side updates as many parameters as the others, with its own arrays and on two threads, one step at a time. Rates count
28 bytes per parameter: 16 read and 12 written. The figures are medians, the ratios those of neighbors.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import time

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

BYTES = 28


class Overspill:
    def __init__(self, command, parameters):
        self.command = [
            command,
            "bench",
            "adam",
            "--parameters",
            str(parameters),
            "--pairs",
            "1",
            "--json",
            "-",
        ]

    def gbps(self):
        run = subprocess.run(self.command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(run.stdout)["gbps"]


class Torch:
    """An optimizer of torch, or one with its interface."""

    def __init__(self, make, parameters):
        self.parameter = torch.nn.Parameter(torch.full((parameters,), 0.5))
        self.parameter.grad = torch.full((parameters,), 0.1)
        self.optimizer = make([self.parameter])
        # The first step makes the state.
        self.optimizer.step()

    def gbps(self):
        started = time.perf_counter()
        self.optimizer.step()
        seconds = time.perf_counter() - started
        if not torch.isfinite(self.parameter[:: max(1, len(self.parameter) // 4096)]).all():
            raise SystemExit("peers: the update diverged")
        return len(self.parameter) * BYTES / seconds / 1e9


def main():
    parser = argparse.ArgumentParser(prog="bench/peers/run adam", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=100_000_000, help="number of parameters")
    parser.add_argument("--pairs", type=int, default=7, help="how many times each side is measured, in turns")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count()), help="threads of torch and DeepSpeed"
    )
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--overspill", required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.parameters < 1 or arguments.pairs < 1:
        parser.error("--parameters and --pairs must be at least 1")
    torch.set_num_threads(arguments.threads)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)

    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    peers = {
        "torch.optim.AdamW(fused=True)": lambda p: torch.optim.AdamW(p, fused=True, **settings),
        "DeepSpeedCPUAdam": lambda p: DeepSpeedCPUAdam(p, adamw_mode=True, **settings),
    }
    ours = Overspill(arguments.overspill, arguments.parameters)
    cells = []
    for name, make in peers.items():
        theirs = Torch(make, arguments.parameters)
        rates = []
        for pair in range(arguments.pairs):
            first, second = (ours, theirs) if pair % 2 else (theirs, ours)
            measured = {first: first.gbps(), second: second.gbps()}
            rates.append((measured[ours], measured[theirs]))
        del theirs
        cells.append(
            {
                "peer": name,
                "gbps": statistics.median(rate for rate, _ in rates),
                "peer_gbps": statistics.median(rate for _, rate in rates),
                "ratio_to_peer": statistics.median(ours / theirs for ours, theirs in rates),
            }
        )

    print(f"{'':32}{'overspill':>12}{'peer':>12}{'ratio':>8}")
    for cell in cells:
        rates = f"{cell['gbps']:>7.1f} GB/s{cell['peer_gbps']:>7.1f} GB/s{cell['ratio_to_peer']:>8.2f}"
        print(f"{cell['peer']:32}{rates}")
    report = {
        "cells": cells,
        "parameters": arguments.parameters,
        "pairs": arguments.pairs,
        "threads": arguments.threads,
        "deepspeed_version": importlib.metadata.version("deepspeed"),
        "torch_version": importlib.metadata.version("torch"),
    }
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
