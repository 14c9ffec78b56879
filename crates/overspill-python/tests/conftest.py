"""What all tests share: backends, handles, directories, and PyTorch with the one right square root."""

from __future__ import annotations

import faulthandler
import os
import signal

import pytest
import torch

import overspill
from support import BACKENDS

# Two cores, and no test that waits for ever.
torch.set_num_threads(2)
# A shell starts what it leaves in the background deaf to this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
TIMEOUT_SECONDS = 120


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every way to move bytes."""
    return request.param


@pytest.fixture
def handle(backend):
    """A handle for each of them."""
    return overspill.aio_handle(128 << 10, 16, False, True, 2, backend=backend)


@pytest.fixture
def any_handle():
    """One handle, for what is the same whoever moves the bytes."""
    return overspill.aio_handle()


@pytest.fixture(scope="session")
def terminal(request):
    """Standard error as it was before pytest began to keep it: what is kept is lost when the process ends at once."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        duplicate = os.dup(2)
    with open(duplicate, "w") as file:
        yield file


@pytest.fixture(autouse=True)
def watchdog(terminal):
    """A test that hangs says where, and ends the run."""
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def swap_dir(tmp_path):
    """A directory that does not exist yet."""
    return tmp_path / "swap"


@pytest.fixture
def exact_sqrt(monkeypatch):
    """PyTorch's square root of fp32 is off by one unit in the last place for some numbers; IEEE 754 has one right answer."""
    inexact = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: inexact(x.double()).to(x.dtype))
