"""The handle with DeepSpeed's interface: what it moves, what it answers, and what it refuses."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import overspill
from overspill import errors

BACKENDS = ("io_uring", "threads")
MIB = 1 << 20
# Longer than anything here takes on a slow machine.
BOUND = 60
ODD_LENGTHS = (0, 1, 511, 512, 513, 4095, 4096, 4097, MIB - 1, MIB + 1, 3 * MIB + 77)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def handle(backend):
    return overspill.aio_handle(128 << 10, 16, False, True, 2, backend=backend)


def random_bytes(length, seed=0):
    return torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pinned(handle, tensor, skip=0):
    """The tensor in pinned memory, `skip` bytes from its beginning."""
    whole = handle.new_cpu_locked_tensor(tensor.nbytes + skip, torch.empty(0, dtype=torch.uint8))
    copy = whole[skip:].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def memory_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


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


def test_numbers_that_cannot_be_meant_are_refused_by_name():
    for name in ("block_size", "queue_depth", "intra_op_parallelism"):
        for value in (0, -1):
            with pytest.raises(errors.ArgumentError, match=name):
                overspill.aio_handle(**{name: value})
    with pytest.raises(errors.ArgumentError, match="io_uring"):
        overspill.aio_handle(backend="libaio")


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


def test_a_handle_is_not_pickled(handle):
    with pytest.raises(errors.UnsupportedError):
        pickle.dumps(handle)


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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64))
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
    for path in (str(tmp_path / "a"), os.fsencode(tmp_path / "b"), tmp_path / "c", str(tmp_path / "\N{SNOWMAN}")):
        handle.sync_pwrite(tensor, path)
        back = torch.zeros(4096, dtype=torch.uint8)
        handle.sync_pread(back, path)
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("flags", (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_DIRECT, os.O_WRONLY | os.O_APPEND))
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


def test_descriptors_that_cannot_do_it_are_refused(handle, tmp_path):
    path, tensor = tmp_path / "file", random_bytes(512)
    path.write_bytes(bytes(512))
    with open(path, "rb") as file, pytest.raises(errors.StorageError) as caught:
        handle.async_pwrite(tensor, file.fileno())
    assert caught.value.errno == errno.EBADF
    with pytest.raises(errors.StorageError) as caught:
        handle.async_pwrite(tensor, fd=1_000_000)
    assert caught.value.errno == errno.EBADF
    ends = os.pipe()
    with pytest.raises(errors.StorageError):
        handle.async_pwrite(tensor, ends[1])
    for end in ends:
        os.close(end)
    for arguments in ((tensor,), (tensor, path, 0)):
        with pytest.raises(TypeError):
            handle.async_pwrite(*arguments, **({"fd": 3} if len(arguments) > 1 else {}))


def test_operations_on_the_same_bytes_keep_their_order(handle, tmp_path):
    path = tmp_path / "file"
    for number in range(20):
        source = random_bytes(2 * MIB + 5, number) if number % 2 else pinned(handle, random_bytes(2 * MIB + 5, number))
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
    buffers = [pinned(handle, random_bytes(SPAN, 2)), pinned(handle, random_bytes(SPAN, 3), 512), random_bytes(SPAN, 4)]
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


def test_what_reaches_beyond_a_pinned_tensor_is_not_pinned(handle):
    tensor = handle.new_cpu_locked_tensor(4096, torch.empty(0, dtype=torch.uint8))
    memory = (ctypes.c_uint8 * 8192).from_address(tensor.data_ptr())
    wider = torch.frombuffer(memory, dtype=torch.uint8)
    assert handle.is_pinned(wider[:4096]) and not handle.is_pinned(wider[:4097])


def test_small_tensors_share_memory_and_never_bytes(handle):
    tensors = [handle.new_cpu_locked_tensor(1 + 700 * n, torch.empty(0, dtype=torch.uint8)).fill_(n) for n in range(200)]
    assert all(bool((tensor == n).all()) for n, tensor in enumerate(tensors))


def test_memory_returns_when_the_last_tensor_is_gone(handle):
    def churn(count):
        for _ in range(count):
            whole = handle.new_cpu_locked_tensor(8 * MIB, torch.empty(0, dtype=torch.uint8))
            view = whole[5:]
            del whole
            handle.new_cpu_locked_tensor(5000, torch.empty(0, dtype=torch.uint8))
            assert handle.is_pinned(view)

    churn(2)
    before = memory_bytes()
    churn(100)
    assert memory_bytes() - before < 64 * MIB


def test_more_memory_than_there_is_is_refused(handle):
    with pytest.raises(errors.MemoryBudgetError):
        handle.new_cpu_locked_tensor(1 << 60, torch.empty(0, dtype=torch.uint8))
    with pytest.raises(errors.MemoryBudgetError):
        handle.new_cpu_locked_tensor(1 << 66, torch.empty(0))
    with pytest.raises(errors.ArgumentError):
        handle.new_cpu_locked_tensor(-1, torch.empty(0))


# Failures.


def test_a_file_that_ends_early_is_told_by_the_wait_and_poisons_nothing(handle, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(10_000))
    for tensor in (random_bytes(MIB), pinned(handle, random_bytes(MIB))):
        assert handle.async_pread(tensor, path) == 0
        assert handle.async_pwrite(tensor, tmp_path / "good") == 0
        with pytest.raises(errors.EndOfFileError, match="short ends before byte") as caught:
            handle.wait()
        assert caught.value.filename == str(path)
        assert handle.wait() == 0
        assert handle.sync_pread(torch.empty_like(tensor), tmp_path / "good") == 1


def test_a_missing_file_is_told_at_once(handle, tmp_path):
    for call in (handle.async_pread, handle.sync_pread):
        with pytest.raises(errors.StorageError, match="No such file") as caught:
            call(random_bytes(512), tmp_path / "missing")
        assert caught.value.errno == errno.ENOENT and isinstance(caught.value, OSError)
        assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(errors.StorageError):
        handle.async_pwrite(random_bytes(512), tmp_path / "no" / "folder")
    with pytest.raises(errors.StorageError):
        handle.async_pread(random_bytes(512), tmp_path)
    assert handle.wait() == 0


def test_a_full_disk_is_told_with_its_path(handle):
    for tensor in (random_bytes(3 * MIB), pinned(handle, random_bytes(3 * MIB))):
        handle.async_pwrite(tensor, "/dev/full")
        handle.async_pwrite(tensor, "/dev/full")
        with pytest.raises(errors.DiskFullError, match="/dev/full.*and 1 more operation failed") as caught:
            handle.wait()
        assert caught.value.errno == errno.ENOSPC


def test_a_limit_on_file_sizes_is_a_full_disk(handle, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        for tensor in (random_bytes(4 * MIB), pinned(handle, random_bytes(4 * MIB))):
            with pytest.raises(errors.DiskFullError) as caught:
                handle.sync_pwrite(tensor, tmp_path / "file")
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert handle.sync_pwrite(random_bytes(4 * MIB), tmp_path / "file") == 1


def test_validation_finds_a_byte_that_changed(handle, tmp_path):
    path, tensor = tmp_path / "file", random_bytes(MIB)
    handle.pwrite(tensor, path, True, True)
    # Under the feet of an operation that is over, but not waited for.
    while path.stat().st_size < MIB or path.read_bytes() != bytes(tensor.numpy()):
        pass
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(bytes([tensor[1000] ^ 1]))
    with pytest.raises(errors.CorruptionError, match="byte 1000"):
        handle.wait()


def test_what_cannot_be_moved_is_refused(handle, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(AttributeError):
        handle.async_pwrite(b"bytes", path)
    for lost in (torch.empty(5, device="meta"), torch.eye(5).to_sparse()):
        for call in (handle.async_pwrite, handle.async_pread):
            with pytest.raises(errors.UnsupportedError):
                call(lost, path)
    path.write_bytes(bytes(512))
    for offset, error in ((-1, errors.ArgumentError), ((1 << 63) - 5, errors.ArgumentError), (1 << 62, errors.EndOfFileError)):
        with pytest.raises(error):
            handle.sync_pread(random_bytes(512), path, offset)
    assert handle.wait() == 0


# Lifetimes.


def test_a_tensor_dropped_while_it_moves_stays_until_it_is_written(handle, tmp_path):
    for number in range(30):
        content = random_bytes(MIB + 3, number)
        tensor = content.clone() if number % 2 else pinned(handle, content)
        gone = weakref.ref(tensor)
        handle.async_pwrite(tensor, tmp_path / str(number))
        if not number % 2:
            handle.free_cpu_locked_tensor(tensor)
        del tensor
        # Whatever is allocated now must not be what is written.
        _noise = [random_bytes(MIB + 3, 77), handle.new_cpu_locked_tensor(MIB + 3, content).fill_(7)]
        assert gone() is None
    assert handle.wait() == 30
    for number in range(30):
        assert (tmp_path / str(number)).read_bytes() == bytes(random_bytes(MIB + 3, number).numpy())


def test_new_data_of_a_tensor_does_not_move_its_old_ones(handle, tmp_path):
    tensor = random_bytes(4 * MIB)
    expected = bytes(tensor.numpy())
    handle.async_pwrite(tensor, tmp_path / "file")
    tensor.data = torch.zeros(1, dtype=torch.uint8)
    gc.collect()
    handle.wait()
    assert (tmp_path / "file").read_bytes() == expected


def test_a_tensor_is_let_go_when_it_was_moved(handle, tmp_path):
    for make in (lambda: random_bytes(MIB), lambda: pinned(handle, random_bytes(MIB))):
        storage = make().untyped_storage()
        gone = weakref.ref(storage)
        handle.async_pwrite(torch.tensor([], dtype=torch.uint8).set_(storage), tmp_path / "file")
        del storage
        handle.wait()
        gc.collect()
        assert gone() is None


def test_a_dropped_handle_finishes_what_is_pending(backend, tmp_path):
    threads = threading.active_count()
    before = descriptors()
    for number in range(5):
        handle = overspill.aio_handle(backend=backend)
        handle.async_pwrite(random_bytes(3 * MIB, number), tmp_path / f"a{number}")
        handle.async_pwrite(pinned(handle, random_bytes(3 * MIB, number)), tmp_path / f"b{number}")
        del handle
        gc.collect()
        for letter in "ab":
            assert (tmp_path / f"{letter}{number}").read_bytes() == bytes(random_bytes(3 * MIB, number).numpy())
    assert descriptors() <= before and threading.active_count() == threads
    with open("/proc/self/status") as file:
        assert int(next(line for line in file if line.startswith("Threads")).split()[1]) < 100


def run_python(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=BOUND
    )


def test_the_end_of_the_program_finishes_what_is_pending(backend, tmp_path):
    script = """
import sys, torch, overspill
handle = overspill.aio_handle(backend=sys.argv[2])
handle.async_pwrite(torch.full((32 << 20,), 7, dtype=torch.uint8), sys.argv[1])
keep = [handle]
keep.append(keep)
"""
    done = run_python(script, tmp_path / "file", backend)
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 32 << 20 and content == b"\7" * len(content)


def test_a_failure_that_nobody_waited_for_is_told_at_the_end(backend):
    script = """
import sys, torch, overspill
handle = overspill.aio_handle(backend=sys.argv[1])
handle.async_pwrite(torch.zeros(4096), "/dev/full")
"""
    done = run_python(script, backend)
    assert "DiskFullError" in done.stderr


def test_ten_thousand_operations_leave_nothing_behind(handle, tmp_path):
    path = tmp_path / "file"
    source, target = random_bytes(20_000), torch.zeros(20_000, dtype=torch.uint8)
    locked = pinned(handle, source)

    def rounds(count):
        for _ in range(count):
            handle.async_pwrite(source, path)
            handle.async_pread(target, path)
            handle.async_pwrite(locked[:8192], tmp_path / "other")
            handle.sync_pread(locked[8192:16384], tmp_path / "other")
            with pytest.raises(errors.EndOfFileError):
                handle.sync_pread(target, tmp_path / "other")

    rounds(100)
    memory, open_before = memory_bytes(), descriptors()
    rounds(2000)
    assert memory_bytes() - memory < 8 * MIB
    # The last file may just be on its way out.
    assert abs(descriptors() - open_before) <= 2
    assert torch.equal(target, source)


# Threads, signals, processes.


def test_threads_on_one_handle_do_not_see_each_other(handle, tmp_path):
    failures = []

    def work(number):
        try:
            for turn in range(30):
                content = random_bytes(100_000 + 512 * number, 100 * number + turn)
                tensor = content if turn % 2 else pinned(handle, content)
                back = torch.zeros_like(tensor)
                assert handle.sync_pwrite(tensor, tmp_path / str(number), 512 * turn) == 1
                assert handle.sync_pread(back, tmp_path / str(number), 512 * turn) == 1
                assert torch.equal(back, content)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
    assert not failures


def test_the_failure_of_a_synchronous_call_is_its_own_threads(handle, tmp_path):
    told = {"full": [], "good": []}

    def work(name, path):
        for _ in range(100):
            try:
                told[name].append(handle.sync_pwrite(random_bytes(50_000), path))
            except errors.DiskFullError:
                told[name].append("full")

    threads = [threading.Thread(target=work, args=place) for place in (("full", "/dev/full"), ("good", tmp_path / "f"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert told == {"full": ["full"] * 100, "good": [1] * 100}


def test_waits_of_several_threads_count_everything_once(handle, tmp_path):
    counts = []

    def work(number):
        for turn in range(20):
            handle.async_pwrite(random_bytes(50_000), tmp_path / f"{number}-{turn}")
            counts.append(handle.wait())
            # Whoever has counted it, it is over.
            assert (tmp_path / f"{number}-{turn}").stat().st_size == 50_000

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert sum(counts) + handle.wait() == 80


def test_other_threads_run_while_one_waits(backend, tmp_path):
    handle = overspill.aio_handle(backend=backend)
    tensor = handle.new_cpu_locked_tensor(256 * MIB, torch.empty(0, dtype=torch.uint8)).fill_(1)
    turns, over = [0], threading.Event()

    def count():
        while not over.is_set():
            turns[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    while turns[0] == 0:
        pass
    before = turns[0]
    handle.sync_pwrite(tensor, tmp_path / "file")
    assert turns[0] > before
    over.set()
    counter.join(BOUND)


def test_an_interrupted_wait_loses_nothing(handle, tmp_path):
    tensor = handle.new_cpu_locked_tensor(512 * MIB, torch.empty(0, dtype=torch.uint8)).fill_(3)
    ready = threading.Event()

    def interrupt():
        ready.wait(BOUND)
        # Time for the wait to begin.
        threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    recovered = False
    for _ in range(20):
        ready.clear()
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        handle.async_pwrite(tensor, tmp_path / "file")
        counted = None
        try:
            ready.set()
            counted = handle.wait()
            # The signal comes now, at the latest.
            interrupter.join(BOUND)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            interrupter.join(BOUND)
        # One that came when the wait was over has found nothing to give back.
        if counted is None and handle.wait() == 1:
            recovered = True
            break
    assert recovered
    assert handle.wait() == 0
    back = handle.new_cpu_locked_tensor(512 * MIB, tensor)
    handle.sync_pread(back, tmp_path / "file")
    assert torch.equal(back, tensor)
    (tmp_path / "file").unlink()


def in_fork(handle, tensor, path, answers):
    found = []
    for call in (lambda: handle.async_pwrite(tensor, path), handle.wait, lambda: handle.read(tensor, path, False)):
        try:
            call()
            found.append("no error")
        except errors.ForkError:
            found.append("ForkError")
    # One of its own works, with memory that its parent has pinned.
    own = overspill.aio_handle(backend="threads")
    found.append(own.sync_pwrite(tensor, path))
    found.append(own.is_pinned(tensor))
    del handle, own
    gc.collect()
    answers.send(found)
    answers.close()


@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_is_refused_and_leaves_the_parents_handle_alone(handle, tmp_path):
    tensor = pinned(handle, random_bytes(MIB))
    handle.async_pwrite(tensor, tmp_path / "parent")
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=in_fork, args=(handle, tensor, str(tmp_path / "child"), theirs))
    process.start()
    theirs.close()
    assert ours.poll(BOUND)
    assert ours.recv() == ["ForkError", "ForkError", "ForkError", 1, True]
    process.join(BOUND)
    assert process.exitcode == 0
    assert handle.wait() == 1
    assert (tmp_path / "parent").read_bytes() == (tmp_path / "child").read_bytes() == bytes(tensor.numpy())
