"""The handle with DeepSpeed's interface: what it answers, what it moves, and where its memory comes from."""

from __future__ import annotations

import ctypes
import os
import stat
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import overspill
from support import MIB, pinned, random_bytes, status

ODD_LENGTHS = (0, 1, 511, 512, 513, 4095, 4096, 4097, 2 * MIB + 1)


# The interface.


def test_the_arguments_are_deepspeeds_with_their_defaults():
    handle = overspill.aio_handle()
    assert handle.get_block_size() == MIB
    assert handle.get_queue_depth() == 128
    assert handle.get_single_submit() is False
    assert handle.get_overlap_events() is False
    assert handle.get_intra_op_parallelism() == 1
    assert handle.get_alignment() == 512
    named = overspill.aio_handle(
        block_size=4096, queue_depth=8, single_submit=True, overlap_events=True, intra_op_parallelism=4
    )
    assert named.get_alignment() == 4 * 512
    assert named.get_single_submit() is True


def test_calls_take_deepspeeds_names(handle, tmp_path):
    path, tensor = str(tmp_path / "file"), random_bytes(4096)
    assert handle.write(buffer=tensor, filename=path, validate=True, file_offset=0) == 0
    assert handle.read(buffer=tensor, filename=path, validate=True, file_offset=0) == 0
    later = {"async": True}
    now = {"async": False}
    assert handle.pwrite(buffer=tensor, filename=path, validate=True, file_offset=0, **later) == 0
    assert handle.pread(tensor, path, True, True) == 0
    assert handle.wait() == 2
    assert handle.pread(buffer=tensor, filename=path, validate=True, **now) == 1
    assert handle.sync_pwrite(buffer=tensor, filename=path, file_offset=0) == 1
    assert handle.sync_pread(buffer=tensor, filename=path, file_offset=0) == 1
    assert handle.async_pwrite(buffer=tensor, filename=path, file_offset=0) == 0
    assert handle.async_pread(buffer=tensor, filename=path, file_offset=0) == 0
    assert handle.wait() == 2
    assert handle.new_cpu_locked_tensor(num_elem=5, example_tenosr=tensor).numel() == 5
    assert handle.free_cpu_locked_tensor(tensor=tensor) is False
    assert handle.is_pinned(buffer=tensor) is False
    for wrong in ({}, {"async": True, "offset": 1}):
        with pytest.raises(TypeError):
            handle.pread(tensor, path, True, **wrong)


def test_nothing_pending_is_no_error(handle):
    assert handle.wait() == 0


def test_a_synchronous_call_counts_what_was_pending(handle, tmp_path):
    tensor = random_bytes(MIB)
    for number in range(3):
        handle.async_pwrite(tensor, tmp_path / str(number))
    assert handle.sync_pwrite(tensor, tmp_path / "3") == 4
    assert handle.wait() == 0


def test_a_call_for_itself_counts_nothing_of_others(handle, tmp_path):
    handle.async_pwrite(random_bytes(MIB), tmp_path / "a")
    handle.write(random_bytes(MIB), tmp_path / "b", True)
    assert handle.wait() == 1


def test_a_queue_deeper_than_the_kernels_limit_works(backend, tmp_path):
    handle = overspill.aio_handle(4096, 1 << 20, backend=backend)
    assert handle.get_queue_depth() == 1 << 20
    tensor = random_bytes(MIB)
    handle.sync_pwrite(tensor, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == bytes(tensor.numpy())


def test_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("OVERSPILL_BACKEND", "threads")
    assert overspill.aio_handle().backend == "threads"
    assert overspill.aio_handle(backend="io_uring").backend == "io_uring"


def test_a_worse_backend_is_told_once(monkeypatch):
    from overspill import aio

    class Degraded:
        def __init__(self, *_):
            pass

        def degraded(self):
            return "io_uring is not available: it was taken away"

        def backend(self):
            return "threads"

        def close(self):
            pass

    monkeypatch.setattr(aio._native, "Handle", Degraded)
    with pytest.warns(RuntimeWarning, match="uses threads: io_uring is not available"):
        aio.aio_handle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aio.aio_handle()


def test_every_call_is_documented_and_typed():
    for name, member in vars(overspill.aio_handle).items():
        if callable(member) and not name.startswith("_"):
            assert member.__doc__ and "return" in member.__annotations__, name


# What is moved.


@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_any_length_offset_and_address_is_moved_whole(handle, tmp_path, length):
    path = tmp_path / "file"
    expected = bytearray(bytes(random_bytes(5 * MIB, 99).numpy()))
    path.write_bytes(expected)
    for number, offset in enumerate((0, 1, 512, 4096, 5000, MIB + 511)):
        plain = random_bytes(length, number)
        # Ordinary memory, and pinned memory at addresses of all kinds.
        for skip in (None, 0, 512, 77):
            tensor = plain if skip is None else pinned(handle, plain, skip)
            assert handle.sync_pwrite(tensor, path, offset) == 1
            expected[offset : offset + length] = bytes(plain.numpy())
            back = torch.zeros(length, dtype=torch.uint8)
            back = back if skip is None else pinned(handle, back, skip)
            assert handle.sync_pread(back, path, offset) == 1
            assert torch.equal(back, plain), (offset, skip)
    assert path.read_bytes() == expected


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
)
def test_any_type_is_moved(handle, tmp_path, dtype):
    tensor = torch.randn(1000).to(dtype)
    handle.sync_pwrite(tensor, tmp_path / "file")
    locked = handle.new_cpu_locked_tensor(1000, tensor)
    assert locked.dtype == dtype and locked.shape == (1000,)
    handle.sync_pread(locked, tmp_path / "file")
    assert torch.equal(locked, tensor)


def test_tensors_with_gaps_are_moved_as_their_elements(handle, tmp_path):
    tensor = torch.arange(24.0).view(4, 6).t()
    handle.sync_pwrite(tensor, tmp_path / "file")
    back = torch.zeros(12, 8)[::2, ::2]
    handle.async_pread(back, tmp_path / "file")
    handle.wait()
    assert torch.equal(back, tensor)


def test_what_torch_has_yet_to_conjugate_or_negate_is_moved_as_its_numbers(handle, tmp_path):
    numbers = torch.randn(600, dtype=torch.complex64)
    for lazy in (numbers.conj(), torch._neg_view(numbers.real.clone())):
        assert lazy.is_contiguous() and (lazy.is_conj() or lazy.is_neg())
        handle.sync_pwrite(lazy, tmp_path / "file")
        plain = torch.empty(lazy.shape, dtype=lazy.dtype)
        handle.sync_pread(plain, tmp_path / "file")
        assert torch.equal(plain, lazy)
        lazy.zero_()
        handle.sync_pread(lazy, tmp_path / "file")
        assert torch.equal(plain, lazy)


def test_a_parameter_is_read_in_place(handle, tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(100))
    handle.sync_pwrite(torch.ones(100), tmp_path / "file")
    handle.sync_pread(parameter, tmp_path / "file")
    assert torch.equal(parameter.detach(), torch.ones(100))


def test_a_file_is_made_for_its_owner_and_never_cut(handle, tmp_path):
    path, tensor = tmp_path / "file", random_bytes(8192)
    handle.sync_pwrite(tensor, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    handle.sync_pwrite(tensor[:100], path, 50)
    assert path.stat().st_size == 8192
    link = tmp_path / "link"
    link.symlink_to(path)
    handle.sync_pwrite(tensor[:512], link)
    assert path.read_bytes()[:512] == bytes(tensor[:512].numpy())


def test_paths_come_in_every_form(handle, tmp_path):
    tensor = random_bytes(4096)
    for path in (
        str(tmp_path / "a"),
        os.fsencode(tmp_path / "b"),
        tmp_path / "c",
        str(tmp_path / "\N{SNOWMAN}"),
    ):
        handle.sync_pwrite(tensor, path)
        back = torch.zeros(4096, dtype=torch.uint8)
        handle.sync_pread(back, path)
        assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "flags", (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_DIRECT, os.O_WRONLY | os.O_APPEND)
)
def test_a_descriptor_is_written_at_the_offset_and_left_as_it_was(handle, tmp_path, flags):
    path, tensor = tmp_path / "file", random_bytes(MIB + 100)
    path.write_bytes(bytes(MIB))
    fd = os.open(path, flags)
    before = os.lseek(fd, 0, os.SEEK_CUR)
    handle.async_pwrite(tensor, fd, 512)
    handle.async_pwrite(tensor[:10], fd=fd, file_offset=MIB + 612)
    # It may be closed at once.
    assert os.lseek(fd, 0, os.SEEK_CUR) == before
    os.close(fd)
    assert handle.wait() == 2
    assert path.read_bytes()[512:] == bytes(torch.cat([tensor, tensor[:10]]).numpy())


def test_operations_on_the_same_bytes_keep_their_order(handle, tmp_path):
    path = tmp_path / "file"
    for number in range(20):
        source = (
            random_bytes(2 * MIB + 5, number)
            if number % 2
            else pinned(handle, random_bytes(2 * MIB + 5, number))
        )
        back = torch.zeros_like(source)
        again = torch.zeros_like(source)
        handle.async_pwrite(torch.zeros_like(source), path)
        handle.async_pwrite(source, path)
        handle.async_pread(back, path)
        # Reads what was read, from memory.
        handle.async_pwrite(back, tmp_path / "copy")
        handle.async_pread(again, tmp_path / "copy")
        assert handle.wait() == 5
        assert torch.equal(back, source) and torch.equal(again, source)


SPAN = 40_000
PLACES = st.one_of(st.integers(0, SPAN), st.integers(0, SPAN // 512).map(lambda n: n * 512))
STEPS = st.tuples(
    st.sampled_from(("read", "write", "wait")), st.integers(0, 1), st.integers(0, 2), PLACES, PLACES, PLACES
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.lists(STEPS, max_size=12))
def test_random_programs_agree_with_bytes_in_memory(handle, tmp_path_factory, program):
    """Files and buffers, pinned and not, moved at random, with and without waits in between."""
    handle.wait()
    folder = tmp_path_factory.mktemp("program")
    files = [folder / "0", folder / "1"]
    model_files = [bytearray(bytes(random_bytes(SPAN, n).numpy())) for n in range(2)]
    for file, content in zip(files, model_files):
        file.write_bytes(content)
    buffers = [
        pinned(handle, random_bytes(SPAN, 2)),
        pinned(handle, random_bytes(SPAN, 3), 512),
        random_bytes(SPAN, 4),
    ]
    model_buffers = [bytearray(bytes(buffer.numpy())) for buffer in buffers]
    pending = 0
    for action, file, buffer, at, offset, length in program:
        if action == "wait":
            assert handle.wait() == pending
            pending = 0
            continue
        length = min(length, SPAN - at, SPAN - offset)
        part = buffers[buffer][at : at + length]
        pending += 1
        if action == "write":
            handle.async_pwrite(part, files[file], offset)
            model_files[file][offset : offset + length] = model_buffers[buffer][at : at + length]
        else:
            handle.async_pread(part, files[file], offset)
            model_buffers[buffer][at : at + length] = model_files[file][offset : offset + length]
    assert handle.wait() == pending
    for file, content in zip(files, model_files):
        assert file.read_bytes() == content
    for buffer, content in zip(buffers, model_buffers):
        assert bytes(buffer.numpy()) == content


# Pinned memory.


def test_views_are_pinned_for_every_handle_until_it_is_given_up():
    one, other = overspill.aio_handle(), overspill.aio_handle(backend="threads")
    for count in (1, 1000, 3 * MIB):
        tensor = one.new_cpu_locked_tensor(count, torch.empty(0, dtype=torch.bfloat16))
        assert tensor.nbytes == 2 * count and tensor.data_ptr() % 4096 == 0
        for view in (tensor, tensor[count // 2 :], tensor.view(torch.uint8), tensor[:1]):
            assert one.is_pinned(view) and other.is_pinned(view)
        assert not one.is_pinned(torch.empty(count))
        assert other.free_cpu_locked_tensor(tensor) is True
        assert not one.is_pinned(tensor) and not other.is_pinned(tensor)
        assert one.free_cpu_locked_tensor(tensor) is False
        # Given up, not taken away.
        tensor.fill_(1)
        assert tensor.sum() > 0
    assert one.new_cpu_locked_tensor(0, torch.empty(0)).numel() == 0


def test_what_reaches_beyond_a_pinned_tensor_is_not_pinned(any_handle):
    tensor = any_handle.new_cpu_locked_tensor(4096, torch.empty(0, dtype=torch.uint8))
    memory = (ctypes.c_uint8 * 8192).from_address(tensor.data_ptr())
    wider = torch.frombuffer(memory, dtype=torch.uint8)
    assert any_handle.is_pinned(wider[:4096]) and not any_handle.is_pinned(wider[:4097])


def test_small_tensors_share_memory_and_never_bytes(any_handle):
    tensors = [
        any_handle.new_cpu_locked_tensor(1 + 700 * n, torch.empty(0, dtype=torch.uint8)).fill_(n)
        for n in range(200)
    ]
    assert all(bool((tensor == n).all()) for n, tensor in enumerate(tensors))


def test_memory_returns_when_the_last_tensor_is_gone(any_handle):
    def churn(count):
        for _ in range(count):
            whole = any_handle.new_cpu_locked_tensor(8 * MIB, torch.empty(0, dtype=torch.uint8))
            view = whole[5:]
            del whole
            any_handle.new_cpu_locked_tensor(5000, torch.empty(0, dtype=torch.uint8))
            assert any_handle.is_pinned(view)

    churn(2)
    before = status("VmRSS")
    churn(100)
    assert status("VmRSS") - before < 64 << 10
