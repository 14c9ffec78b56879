"""`overspill.aio_handle` and DeepSpeed's handle move the same files in one Python process, in turns.

Both are made with the same arguments. Pinned tensors are each side's own, ordinary ones the same for both. One side moves all
files, then the other; which begins changes with every pair. Before a file is written its tensor is filled anew, and what a
side has written last is compared with the file; what is read last is, too. The figures are medians, the ratios those of
neighbors.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time

import numpy
import torch

import overspill

MIB = 1 << 20
LAYOUTS = {"1 file": 1, "16 files": 16}
MEMORIES = ("pinned", "ordinary")
ACTIONS = ("read", "write")
GRID = tuple(itertools.product((MIB, 8 * MIB), (8, 32, 128), (1, 2)))


def deepspeed_op():
    """DeepSpeed's op, compiled if need be."""
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return AsyncIOBuilder().load(verbose=False)


class Side:
    """A handle, and the tensors that it moves."""

    def __init__(self, make, memory):
        self.make = make
        self.memory = memory

    def begin(self, settings, files):
        block, depth, threads = settings
        self.handle = self.make(block, depth, False, True, threads)
        self.parts = list(self.memory.chunk(files))

    def move(self, action, paths):
        """Moves every file once; the rate in 10⁹ bytes per second."""
        submit = self.handle.async_pread if action == "read" else self.handle.async_pwrite
        started = time.perf_counter()
        for part, path in zip(self.parts, paths):
            if submit(part, path, 0) != 0:
                sys.exit(f"peers: {path} was refused")
        done = self.handle.wait()
        elapsed = time.perf_counter() - started
        if done != len(paths):
            sys.exit(f"peers: {done} of {len(paths)} files were moved")
        return self.memory.nbytes / elapsed / 1e9

    def check(self, paths):
        """Looks at every byte, and leaves none of them in the page cache."""
        for part, path in zip(self.parts, paths):
            if not numpy.array_equal(numpy.fromfile(path, dtype=numpy.uint8), part.numpy()):
                sys.exit(f"peers: {path} and the memory of {self.make.__module__} differ")
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(sides, settings, action, paths, pairs):
    """Rates of both sides, pair by pair."""
    for side in sides:
        side.begin(settings, len(paths))
        if action == "read":
            side.memory.zero_()
        side.move(action, paths)
    rates = {side: [] for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            if action == "write":
                side.memory.fill_(len(rates[side]) % 251 + 1)
            rates[side].append(side.move(action, paths))
            if pair >= pairs - 2:
                side.check(paths)
    for side in sides:
        del side.handle
    return [rates[side] for side in sides]


def cells(wanted):
    """Every cell of which all parts of `wanted` are in the name."""
    for layout, memory, settings, action in itertools.product(LAYOUTS, MEMORIES, GRID, ACTIONS):
        block, depth, threads = settings
        name = f"{action}, {layout}, {memory}, block {block // MIB} MiB, depth {depth}, parallelism {threads}"
        if all(part in name for part in wanted):
            yield name, layout, memory, settings, action


def main():
    parser = argparse.ArgumentParser(prog="bench/peers/run handle", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=".", help="existing directory on the disk to measure")
    parser.add_argument("--mib", type=int, default=1024, help="MiB of all files together, a multiple of 16")
    parser.add_argument("--pairs", type=int, default=5, help="how many times each side is measured, in turns")
    parser.add_argument(
        "--cells", nargs="*", default=[], help="parts of the names of cells, such as `read` `depth 32`"
    )
    parser.add_argument("--json", help="write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.mib < 16 or arguments.mib % 16 or arguments.pairs < 1:
        parser.error("--mib must be a multiple of 16 and --pairs at least 1")
    if not os.path.isdir(arguments.dir):
        parser.error(f"{arguments.dir} is not a directory")
    wanted = list(cells(arguments.cells))
    if not wanted:
        parser.error("no cell has such a name")

    # An end by signal cleans up like any other.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("peers: terminated"))

    size = arguments.mib * MIB
    makers = (overspill.aio_handle, deepspeed_op().aio_handle)
    owners = [make(MIB, 32, False, True, 1) for make in makers]
    backend = owners[0].backend
    example = torch.empty(0, dtype=torch.uint8)
    ordinary = torch.ones(size, dtype=torch.uint8)
    pinned = [owner.new_cpu_locked_tensor(size, example).fill_(1) for owner in owners]
    memories = {"pinned": pinned, "ordinary": [ordinary, ordinary]}
    folder = tempfile.mkdtemp(prefix="overspill-peers-", dir=arguments.dir)
    found = []
    try:
        paths = {
            name: [os.path.join(folder, f"{count}-{n}") for n in range(count)]
            for name, count in LAYOUTS.items()
        }
        # The files are there before anything is measured, and not all zeros.
        for files in paths.values():
            writer = Side(overspill.aio_handle, pinned[0])
            writer.begin((MIB, 32, 1), len(files))
            pinned[0].copy_(torch.arange(size, dtype=torch.int32).bitwise_and_(0xFF))
            writer.move("write", files)
        for name, layout, memory, settings, action in wanted:
            sides = [Side(make, tensor) for make, tensor in zip(makers, memories[memory])]
            ours, theirs = measure(sides, settings, action, paths[layout], arguments.pairs)
            cell = {
                "name": name,
                "ours_gbps": statistics.median(ours),
                "deepspeed_gbps": statistics.median(theirs),
                "ratio_to_deepspeed": statistics.median(a / b for a, b in zip(ours, theirs)),
            }
            found.append(cell)
            rates = f"{cell['ours_gbps']:>7.2f} GB/s{cell['deepspeed_gbps']:>7.2f} GB/s{cell['ratio_to_deepspeed']:>7.2f}"
            print(f"{name:72}{rates}", flush=True)
    finally:
        shutil.rmtree(folder)
    worst = min(found, key=lambda cell: cell["ratio_to_deepspeed"])
    print(
        f"{len(found)} cells, overspill over DeepSpeed; the least is {worst['ratio_to_deepspeed']:.2f}: {worst['name']}"
    )
    report = {
        "cells": found,
        "bytes": size,
        "pairs": arguments.pairs,
        "backend": backend,
        "deepspeed_version": importlib.metadata.version("deepspeed"),
        "torch_version": importlib.metadata.version("torch"),
    }
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
