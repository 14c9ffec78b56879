"""DeepSpeed ZeRO-3 with parameters and optimizer state on storage trains on its own op and on overspill's handle.

Both train the example, `examples/deepspeed/train.py`, in one process and in two (gloo). The losses must be the same to the
last bit, or the exit status is 1.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "deepspeed" / "train.py"
# Seconds; far more than a training takes.
BOUND = 600


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(folder, ranks, steps, backend):
    """The losses of rank 0, exactly; `backend` is that of overspill's handle, or `None` for DeepSpeed's own op."""
    path = pathlib.Path(folder) / "losses.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLE), "--steps", str(steps), "--losses", str(path)]
    command += ["--swap-dir", str(pathlib.Path(folder) / "swap")]
    command += ["--own"] if backend is None else []
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1"} | ({} if backend is None else {"OVERSPILL_BACKEND": backend})
    with contextlib.ExitStack() as ended:
        processes = []
        for rank in range(ranks):
            log = ended.enter_context(tempfile.TemporaryFile("w+"))
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
            ended.callback(process.wait)
            ended.callback(process.kill)
            processes.append((process, log))
        for process, log in processes:
            if process.wait(BOUND) != 0:
                log.seek(0)
                sys.exit(f"peers: the example failed:\n{log.read()[-3000:]}")
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(prog="bench/peers/run losses", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default=".", help="existing directory to swap to")
    parser.add_argument("--steps", type=int, default=10, help="steps of each training")
    parser.add_argument("--json", help="write the losses to this file")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    if not os.path.isdir(arguments.dir):
        parser.error(f"{arguments.dir} is not a directory")

    report, differing = {}, []
    folder = tempfile.mkdtemp(prefix="overspill-peers-", dir=arguments.dir)
    try:
        for ranks in (1, 2):
            own = train(folder, ranks, arguments.steps, None)
            report[f"deepspeed, {ranks}"] = own
            for backend in ("io_uring", "aio", "threads"):
                name = f"overspill, {backend}, {ranks}"
                report[name] = train(folder, ranks, arguments.steps, backend)
                if report[name] != own:
                    differing.append(name)
            first, last = float.fromhex(own[0]), float.fromhex(own[-1])
            print(
                f"processes: {ranks}; loss {first:.4f} to {last:.4f} in {arguments.steps} steps", flush=True
            )
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    if differing:
        sys.exit(f"peers: the losses differ from those of DeepSpeed's own op: {'; '.join(differing)}")
    print("on overspill's handle, by each backend, every loss is that of DeepSpeed's own op")


if __name__ == "__main__":
    main()
