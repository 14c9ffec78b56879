"""What the memory of a tensor may be, and what becomes of it while it is used."""

from __future__ import annotations

import threading

import pytest
import torch

import overspill
from overspill.errors import ArgumentError, UnsupportedError
from support import SMALL, assert_same, parameters


class Wrapper(torch.Tensor):
    """A tensor around another, without memory."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(x):
            return x.inner if isinstance(x, Wrapper) else x

        made = function(*[plain(x) for x in args], **(kwargs or {}))
        return Wrapper(made) if isinstance(made, torch.Tensor) else made


class Boasting(torch.Tensor):
    """A tensor that says that it is longer than it is."""

    @property
    def nbytes(self):
        return 1 << 30

    def numel(self):
        return 1 << 28


def resized(tensor, size):
    tensor.untyped_storage().resize_(size)
    return tensor


@pytest.mark.parametrize("size", [0, 64])
def test_a_tensor_whose_storage_was_resized_is_refused_by_a_handle(size, tmp_path, backend):
    handle = overspill.aio_handle(backend=backend)
    path = tmp_path / "file"
    path.write_bytes(bytes(4000))
    for call in (handle.sync_pread, handle.async_pread, handle.sync_pwrite, handle.async_pwrite):
        with pytest.raises(UnsupportedError, match="resized|no memory"):
            call(resized(torch.ones(1000), size), path)
    assert handle.wait() == 0
    assert path.read_bytes() == bytes(4000)


@pytest.mark.parametrize("size", [0, 64])
def test_a_parameter_whose_storage_was_resized_is_refused_and_the_optimizer_goes_on(size, swap_dir):
    ours = parameters()
    optimizer = overspill.AdamW(ours, swap_dir=swap_dir, **SMALL)
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.commit()
    before = [p.detach().clone() for p in ours]
    resized(ours[0].data, size)
    with pytest.raises(UnsupportedError, match="resized|no memory"):
        optimizer.step()
    assert_same(ours[1:], before[1:])
    ours[0].data = torch.zeros(before[0].shape)
    optimizer.roll_back()
    assert_same(ours, before)
    optimizer.step()
    optimizer.close()


def test_tensors_without_memory_of_their_own_are_refused_and_what_they_say_is_not_believed(tmp_path):
    handle = overspill.aio_handle()
    with pytest.raises(UnsupportedError, match="no memory"):
        handle.sync_pwrite(Wrapper(torch.ones(1000)), tmp_path / "file")
    handle.sync_pwrite(torch.ones(10).as_subclass(Boasting), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == 40


def test_new_data_of_a_parameter_do_not_move_the_old_ones_of_a_step(swap_dir, backend):
    p = torch.nn.Parameter(torch.ones(1 << 20))
    p.grad = torch.ones(1 << 20)
    optimizer = overspill.AdamW([p], swap_dir=swap_dir, backend=backend, **SMALL)
    done = threading.Event()

    def exchange():
        while not done.is_set():
            p.data = torch.ones(1 << 20)
            p.grad = torch.ones(1 << 20)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(30):
            optimizer.step()
    finally:
        done.set()
        thread.join()
    optimizer.close()


def test_a_gradient_that_is_memory_of_its_parameter_is_refused(swap_dir):
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = overspill.SGD([p], lr=0.5, swap_dir=swap_dir, **SMALL)
    p.grad = p.detach()
    with pytest.raises(ArgumentError, match="clone"):
        optimizer.step()
    p.grad = p.detach().clone()
    optimizer.step()
    assert_same([p], [torch.full((100,), 0.5)])
    optimizer.close()
