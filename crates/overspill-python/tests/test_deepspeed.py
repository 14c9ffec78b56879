"""An unmodified DeepSpeed on overspill's handle."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.aio import AsyncIOBuilder
from deepspeed.ops.op_builder.gds import GDSBuilder

import overspill
from support import BACKENDS

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "deepspeed" / "train.py"
# Longer than anything here takes on a slow machine.
BOUND = 600
# DeepSpeed's accelerator for the CPU compiles a collective of its own, which has nothing to do with storage.
RUN_EXAMPLE = """
import runpy, sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def installed():
    overspill.deepspeed.install()
    yield
    overspill.deepspeed.uninstall()


@pytest.fixture
def no_compiler(tmp_path):
    """An environment in which nothing can be compiled, and nothing has been."""
    tools = tmp_path / "tools"
    tools.mkdir()
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    environment = {**os.environ, "PATH": str(tools), "CC": "/bin/false", "CXX": "/bin/false"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(extensions), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    yield environment
    assert not list(extensions.iterdir())


def run_python(script, environment):
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=BOUND
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_way_to_the_op_leads_to_ours():
    for builder in (
        AsyncIOBuilder(),
        deepspeed.ops.op_builder.AsyncIOBuilder(),
        get_accelerator().create_op_builder("AsyncIOBuilder"),
        get_accelerator().get_op_builder("AsyncIOBuilder")(),
        deepspeed.ops.op_builder.async_io.AsyncIOBuilder(),
    ):
        assert builder.is_compatible() and builder.is_compatible(verbose=True)
        assert builder.load().aio_handle is overspill.aio_handle
        assert builder.load(verbose=False).aio_handle is overspill.aio_handle


def test_other_ops_are_left_alone():
    builder = GDSBuilder()
    assert builder.NAME == "gds"
    # It inherits from the builder of ours, and needs CUDA.
    assert builder.is_compatible() is False
    with pytest.raises(Exception, match="(?i)cuda|compat|ninja|gds"):
        builder.load()


def test_installing_twice_is_once_and_can_be_undone():
    before = dict(vars(AsyncIOBuilder))
    overspill.deepspeed.install()
    assert dict(vars(AsyncIOBuilder)) == before and overspill.deepspeed.is_installed()
    overspill.deepspeed.uninstall()
    overspill.deepspeed.uninstall()
    assert not overspill.deepspeed.is_installed()
    assert AsyncIOBuilder.load.__module__.startswith("deepspeed.")
    assert AsyncIOBuilder.is_compatible.__module__.startswith("deepspeed.")


@pytest.mark.parametrize("order", ("before", "after"))
def test_it_works_before_and_after_deepspeed_is_imported(order, no_compiler):
    first, second = "import overspill.deepspeed; overspill.deepspeed.install()", "import deepspeed"
    if order == "after":
        first, second = second, first
    script = f"""
{first}
{second}
import sys
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.aio import AsyncIOBuilder as other
assert AsyncIOBuilder is other and AsyncIOBuilder().is_compatible()
assert AsyncIOBuilder().load().aio_handle().backend in ("io_uring", "aio", "threads")
assert sys.modules[AsyncIOBuilder.__module__].__spec__.loader.get_source(AsyncIOBuilder.__module__)
overspill.deepspeed.uninstall()
assert AsyncIOBuilder.load.__module__ == AsyncIOBuilder.__module__
"""
    run_python(script, no_compiler)


def test_installing_without_deepspeed_says_what_is_missing():
    script = """
import sys, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "deepspeed" else find_spec(name, *rest)
import overspill
try:
    overspill.deepspeed.install()
except ModuleNotFoundError as error:
    assert "pip install deepspeed" in str(error) and not overspill.deepspeed.is_installed()
else:
    raise SystemExit("nothing was missed")
"""
    run_python(script, os.environ)


def test_the_other_functions_of_the_op_are_there(tmp_path):
    op = AsyncIOBuilder().load()
    source, path = torch.randn(100_000), str(tmp_path / "file")
    assert op.aio_write(source, path, 1 << 20, 32, False, True, True) == 0
    target = torch.zeros_like(source)
    assert op.aio_read(target, path, 1 << 20, 32, False, True, True) == 0
    assert torch.equal(source, target)
    assert op.deepspeed_memcpy(target.zero_(), source) == 0
    assert torch.equal(source, target)


def test_native_pinning_is_known_to_the_handle(no_compiler):
    script = """
import gc, torch, overspill.deepspeed
overspill.deepspeed.install()
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.aio import AsyncIOBuilder
handle, accelerator = AsyncIOBuilder().load().aio_handle(), get_accelerator()
pinned = accelerator.pin_memory(torch.arange(10000.0).view(100, 100))
assert accelerator.is_pinned(pinned) and handle.is_pinned(pinned) and handle.is_pinned(pinned[5])
assert pinned.sum() == 49995000.0
base = pinned.data_ptr()
view = pinned[3]
del pinned
gc.collect()
assert handle.is_pinned(view), "a view keeps it"
del view
gc.collect()
from overspill import _native
assert not _native.is_pinned(base, 1)
again = accelerator.pin_memory(torch.ones(5))
accelerator.unpin_memory(again)
assert not handle.is_pinned(again)
"""
    run_python(script, {**no_compiler, "DS_PIN_MEMORY_BACKEND": "native"})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def losses(environment, ranks, folder, *options):
    """Trains the example; the losses of the first rank, exactly."""
    path = folder / f"losses{len(list(folder.iterdir()))}.json"
    port = str(free_port())
    command = [
        sys.executable,
        "-c",
        RUN_EXAMPLE,
        str(EXAMPLE),
        "--steps",
        "5",
        "--losses",
        str(path),
        *options,
    ]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = open(folder / f"log{rank}", "w+")
        processes.append(
            (subprocess.Popen(command, env={**environment, **place}, stdout=log, stderr=log, cwd=folder), log)
        )
    try:
        for process, log in processes:
            process.wait(BOUND)
            log.seek(0)
            assert process.returncode == 0, log.read()[-3000:]
    finally:
        for process, log in processes:
            process.kill()
            process.wait()
            log.close()
    return [float.fromhex(loss) for loss in json.loads(path.read_text())]


@pytest.mark.parametrize(("ranks", "backends"), ((1, BACKENDS), (2, ("io_uring", "aio"))))
def test_training_on_storage_has_the_losses_of_training_in_memory(no_compiler, tmp_path, ranks, backends):
    """Swapping must not change a bit, so what swaps nothing is the reference: it needs neither op."""
    swap = tmp_path / "swap"
    expected = losses(no_compiler, ranks, tmp_path, "--in-memory")
    assert expected[-1] < expected[0] - 1, "it learns"
    for backend in backends:
        environment = {**no_compiler, "OVERSPILL_BACKEND": backend}
        assert losses(environment, ranks, tmp_path, "--swap-dir", str(swap)) == expected
        for rank in range(ranks):
            parameters = list(swap.glob(f"zero_stage_3/bfloat16params/rank{rank}/*.swp"))
            moments = list(swap.glob(f"zero_stage_3/optimizer/rank{rank}/exp_avg-*.swp"))
            assert parameters and moments, "it swapped"
