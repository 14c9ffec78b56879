"""DeepSpeed's aio handle and overspill's engine move the same files, in turns.

`overspill bench turns` makes the files, moves them when it is told to, and compares what it reads. DeepSpeed moves
them through its handle from one thread of a process of its own, always from its own pinned tensors, once as they are and
once with huge pages under them, as overspill's memory has: glibc is asked for those (`glibc.malloc.hugetlb`), which
DeepSpeed's users would have to know. Its settings are the best of a small grid, found on the single file before
anything is compared, and so are ours. What DeepSpeed has read is compared with the file, and so is the file with
what DeepSpeed has written. The figures are medians, the ratios those of neighbors.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import numpy
import torch

MIB = 1 << 20
# DeepSpeed's memory, and what the environment of its process has to say for it.
MEMORIES = {"pinned": {}, "pinned, huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
LAYOUTS = {"1 file": 1, "16 files": 16}
ACTIONS = ("read", "write")
NAMES = {"read": "read", "write": "overwrite"}


def deepspeed_handle():
    """DeepSpeed's op, compiled if need be. Only the processes that use it load it."""
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return AsyncIOBuilder().load(verbose=False)


class Overspill:
    """A running `overspill bench turns`; the files are removed when it ends."""

    def __init__(self, arguments, files, settings=(MIB, 32)):
        block, depth = settings
        size = arguments.mib * MIB
        arguments = [arguments.overspill, "bench", "turns", "--dir", arguments.dir, "--size", str(size)]
        arguments += ["--files", str(files), "--block", str(block), "--depth", str(depth)]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = self.answer()
        self.backend = ready["backend"]
        self.paths = ready["paths"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, request):
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.answer()["gbps"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("peers: overspill ended early")
        return json.loads(line)


class Settings:
    """How DeepSpeed's handle is made."""

    def __init__(self, block, depth, single_submit, overlap_events, threads):
        self.arguments = (block, depth, single_submit, overlap_events, threads)

    def handle(self):
        return deepspeed_handle().aio_handle(*self.arguments)

    def describe(self):
        names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
        return dict(zip(names, self.arguments))


class Pinned:
    """DeepSpeed's own pinned memory."""

    def __init__(self, size):
        self.owner = deepspeed_handle().aio_handle(MIB, 32, False, True, 1)
        self.tensor = self.owner.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
        if self.tensor.nbytes != size:
            sys.exit(f"peers: DeepSpeed gave {self.tensor.nbytes} bytes instead of {size}")
        self.tensor.zero_()


def say(what):
    print(f"peers: {what}", file=sys.stderr, flush=True)


def huge_page_bytes():
    """How much of this process's memory lies on huge pages."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("AnonHugePages:"))


def move(handle, action, parts, paths):
    """DeepSpeed moves every file once; the rate in 10⁹ bytes per second."""
    submit = handle.async_pread if action == "read" else handle.async_pwrite
    started = time.perf_counter()
    for part, path in zip(parts, paths):
        if submit(part, path, 0) != 0:
            sys.exit(f"peers: DeepSpeed refused to {action} {path}")
    done = handle.wait()
    elapsed = time.perf_counter() - started
    if done != len(paths):
        sys.exit(f"peers: DeepSpeed moved {done} of {len(paths)} files")
    return sum(part.nbytes for part in parts) / elapsed / 1e9


def compare_with_files(parts, paths):
    """Looks at every byte, and leaves none of them in the page cache."""
    for part, path in zip(parts, paths):
        if not numpy.array_equal(numpy.fromfile(path, dtype=numpy.uint8), part.numpy()):
            sys.exit(f"peers: {path} and DeepSpeed's memory differ")
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def split(memory, paths):
    """The memory, in one part for each file."""
    return list(memory.tensor.chunk(len(paths)))


def best_settings(overspill, memory):
    """For reads and for writes, the best of a grid; a setting counts with the better one of two runs."""
    grid = [
        Settings(*point) for point in itertools.product((MIB, 8 * MIB), (32, 128), (False,), (True,), (1, 2))
    ]
    parts = split(memory, overspill.paths)
    best = {}
    for action in ACTIONS:

        def rate(settings, action=action):
            handle = settings.handle()
            return max(move(handle, action, parts, overspill.paths) for _ in range(2))

        winner = max(grid, key=rate)
        block, depth, _, _, threads = winner.arguments
        flags = [
            Settings(block, depth, single, overlap, threads)
            for single in (False, True)
            for overlap in (False, True)
        ]
        best[action] = max(flags, key=rate)
    return best


def our_best_settings(arguments):
    """The same for our side: block size and depth."""

    def rate(settings, action):
        with Overspill(arguments, 1, settings) as overspill:
            return max(overspill.ask(action) for _ in range(3))

    grid = [(MIB, 32), (MIB, 64), (4 * MIB, 8), (8 * MIB, 4), (8 * MIB, 8)]
    return {action: max(grid, key=lambda settings: rate(settings, action)) for action in ACTIONS}


def compare(overspill, memory, settings, action, pairs):
    """Both sides in turns; ours begins every second time."""
    parts = split(memory, overspill.paths)
    handle = settings.handle()
    ours, theirs = [], []
    overspill.ask("write")

    def our_turn():
        ours.append(overspill.ask(action))

    def their_turn():
        if action == "write":
            memory.tensor.fill_(len(theirs) + 1)
        theirs.append(move(handle, action, parts, overspill.paths))

    for pair in range(pairs):
        for turn in (our_turn, their_turn) if pair % 2 == 0 else (their_turn, our_turn):
            turn()
    if action == "write":
        overspill.ask("write")
        overspill.ask("check")
        move(handle, "write", parts, overspill.paths)
    compare_with_files(parts, overspill.paths)
    return {
        "ours_gbps": statistics.median(ours),
        "deepspeed_gbps": statistics.median(theirs),
        "ratio_to_deepspeed": statistics.median(a / b for a, b in zip(ours, theirs)),
        "pairs": pairs,
        "settings": settings.describe(),
    }


def measure(name, arguments):
    """All cells with one kind of memory for DeepSpeed; in a process of its own."""
    size = arguments.mib * MIB
    memory, cells = Pinned(size), []
    huge_bytes = huge_page_bytes()
    if "huge" in name and huge_bytes < size // 2:
        say(f"only {huge_bytes // MIB} MiB are on huge pages, whatever the row says")
    say(f"finding the best settings of both sides, DeepSpeed on {name} memory")
    with Overspill(arguments, 1) as overspill:
        settings = best_settings(overspill, memory)
    ours = our_best_settings(arguments)
    for layout, files in LAYOUTS.items():
        for action in ACTIONS:
            say(f"{NAMES[action]}, {layout}, {name} memory")
            with Overspill(arguments, files, ours[action]) as overspill:
                found = compare(overspill, memory, settings[action], action, arguments.pairs)
                backend = overspill.backend
            block, depth = ours[action]
            cell = {"name": f"{NAMES[action]}, {layout}", "memory": name, "huge_page_bytes": huge_bytes}
            cells.append({**cell, **found, "our_settings": {"block_size": block, "queue_depth": depth}})
    return {"cells": cells, "backend": backend}


def main():
    parser = argparse.ArgumentParser(prog="bench/peers/run", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=".", help="existing directory on the disk to measure")
    parser.add_argument("--mib", type=int, default=1024, help="MiB of all files together, a multiple of 16")
    parser.add_argument("--pairs", type=int, default=7, help="how many times each side is measured, in turns")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--overspill", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=MEMORIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mib < 16 or arguments.mib % 16 or arguments.pairs < 1:
        parser.error("--mib must be a multiple of 16 and --pairs at least 1")
    if not os.path.isdir(arguments.dir):
        parser.error(f"{arguments.dir} is not a directory")

    # An end by signal cleans up like any other.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("peers: terminated"))

    if arguments.memory:
        json.dump(measure(arguments.memory, arguments), sys.stdout)
        return
    cells = []
    for name, environment in MEMORIES.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
        run = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        if run.returncode != 0:
            sys.exit(run.returncode)
        found = json.loads(run.stdout)
        cells += found["cells"]

    print(f"{'':22}{'DeepSpeed on':>20}{'overspill':>12}{'DeepSpeed':>12}{'ratio':>8}")
    for cell in cells:
        rates = f"{cell['ours_gbps']:>7.2f} GB/s{cell['deepspeed_gbps']:>7.2f} GB/s{cell['ratio_to_deepspeed']:>8.2f}"
        print(f"{cell['name']:22}{cell['memory']:>20}{rates}")
    report = {
        "cells": cells,
        "bytes": arguments.mib * MIB,
        "backend": found["backend"],
        "deepspeed_version": importlib.metadata.version("deepspeed"),
        "torch_version": importlib.metadata.version("torch"),
    }
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
