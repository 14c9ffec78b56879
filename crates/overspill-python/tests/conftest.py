"""What all tests share: both backends, directories, and PyTorch with the one right square root."""

from __future__ import annotations

import faulthandler

import pytest
import torch

# Two cores, and no test that waits for ever.
torch.set_num_threads(2)
TIMEOUT_SECONDS = 120


@pytest.fixture(params=["io_uring", "threads"])
def backend(request):
    """Every way to move bytes that is worth a test of its own."""
    return request.param


@pytest.fixture(autouse=True)
def watchdog():
    """A test that hangs says where, and ends the run."""
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
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
