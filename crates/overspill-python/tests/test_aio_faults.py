"""The handle when something goes wrong or away: files, disks, tensors, threads, signals, processes."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import overspill
from overspill import _native, errors
from support import BOUND, MIB, descriptors, pinned, random_bytes, status

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


def test_without_memory_to_copy_through_the_call_is_refused_and_nothing_waits_for_it(tmp_path):
    script = """
import resource, sys, torch, overspill
handle = overspill.aio_handle()
tensor, path = torch.ones(100_000, dtype=torch.uint8), sys.argv[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), hard))
for _ in range(3):
    try:
        handle.async_pwrite(tensor, path)
        sys.exit("taken")
    except overspill.errors.MemoryBudgetError:
        pass
assert handle.wait() == 0
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
handle.async_pwrite(tensor, path)
handle.async_pwrite(tensor, path)
assert handle.wait() == 2
"""
    done = run_python(script, tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b"\1" * 100_000


def test_validation_finds_a_byte_that_is_another(handle):
    # What is written to it is gone, and zeros are read.
    tensor = torch.zeros(3 * MIB, dtype=torch.uint8)
    tensor[2 * MIB + 1000 :] = 1
    for source in (tensor, pinned(handle, tensor)):
        handle.pwrite(source, "/dev/zero", True, True)
        with pytest.raises(errors.CorruptionError, match=f"byte {2 * MIB + 1000} on"):
            handle.wait()
        assert handle.wait() == 0
    assert handle.read(tensor, "/dev/zero", True) == 0


class Deaf(torch.Tensor):
    """A tensor that takes no other one's contents."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is torch.Tensor.copy_:
            raise RuntimeError("deaf")
        return super().__torch_function__(function, types, arguments, named or {})


def test_what_cannot_be_copied_to_its_tensor_is_told_and_all_else_is_copied(handle, tmp_path):
    expected = torch.randn(8, 8)
    handle.sync_pwrite(expected, tmp_path / "file")
    deaf, good = torch.zeros(8, 8).as_subclass(Deaf), torch.zeros(8, 8)
    handle.async_pread(deaf.t(), tmp_path / "file")
    handle.async_pread(good.t(), tmp_path / "file")
    with pytest.raises(errors.StateError, match="cannot be copied to its tensor.*deaf"):
        handle.wait()
    assert torch.equal(good.t(), expected)
    assert handle.wait() == 0
    # What the system has refused comes first.
    handle.async_pread(deaf.t(), tmp_path / "file")
    handle.async_pwrite(good, "/dev/full")
    with pytest.raises(errors.DiskFullError, match="and 1 more operation failed"):
        handle.wait()
    # Also if it was needed earlier than waited for.
    handle.async_pread(deaf.t(), tmp_path / "file")
    handle.write(deaf.as_subclass(torch.Tensor), tmp_path / "other", False)
    with pytest.raises(errors.StateError, match="deaf"):
        handle.wait()


class Busy(torch.Tensor):
    """A tensor that uses the handle when it is copied to, and when it goes."""

    handle = None
    turns = 0

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is torch.Tensor.copy_:
            Busy.turns += 1
            Busy.handle.wait()
            Busy.handle.async_pwrite(arguments[0].as_subclass(torch.Tensor), "/dev/null")
        return super().__torch_function__(function, types, arguments, named or {})

    def __del__(self):
        Busy.turns += 1
        try:
            Busy.handle.wait()
        except errors.EndOfFileError:
            pass


@pytest.mark.parametrize("length", (1, 256))
def test_a_tensor_may_use_the_handle_when_it_is_copied_to_and_when_it_goes(handle, tmp_path, length):
    (tmp_path / "file").write_bytes(bytes(length))
    Busy.handle, Busy.turns = handle, 0
    tensor = torch.ones(8, 8).t().as_subclass(Busy)
    handle.async_pread(tensor, tmp_path / "file")
    del tensor
    told = []

    def wait():
        try:
            told.append(handle.wait())
        except errors.EndOfFileError:
            told.append("end")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(BOUND)
    assert not waiting.is_alive() and len(told) == 1
    gc.collect()
    assert Busy.turns > 0
    handle.wait()
    Busy.handle = None


class Interrupting(torch.Tensor):
    """A tensor whose copy is interrupted once."""

    is_calm = False

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is torch.Tensor.copy_ and not cls.is_calm:
            cls.is_calm = True
            raise KeyboardInterrupt
        return super().__torch_function__(function, types, arguments, named or {})


def test_an_interrupted_copy_is_left_for_the_next_wait(any_handle, tmp_path):
    expected = torch.randn(8, 8)
    any_handle.sync_pwrite(expected, tmp_path / "file")
    tensors = [torch.zeros(8, 8).as_subclass(kind).t() for kind in (torch.Tensor, Interrupting, torch.Tensor)]
    for tensor in tensors:
        any_handle.async_pread(tensor, tmp_path / "file")
    with pytest.raises(KeyboardInterrupt):
        any_handle.wait()
    assert any_handle.wait() == 3
    for tensor in tensors:
        assert torch.equal(tensor.as_subclass(torch.Tensor), expected)


# Lifetimes.


class Memory(bytearray):
    """Memory of Python's that says when it goes."""


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
    def ordinary():
        memory = Memory(bytes(random_bytes(MIB).numpy()))
        return torch.frombuffer(memory, dtype=torch.uint8), weakref.ref(memory)

    def locked():
        tensor = pinned(handle, random_bytes(MIB))
        address = tensor.data_ptr()
        return tensor, lambda: _native.is_pinned(address, 1) or None

    for make in (ordinary, locked):
        tensor, memory = make()
        handle.async_pwrite(tensor, tmp_path / "file")
        del tensor
        handle.wait()
        gc.collect()
        assert memory() is None


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
            assert (tmp_path / f"{letter}{number}").read_bytes() == bytes(
                random_bytes(3 * MIB, number).numpy()
            )
    assert descriptors() <= before and threading.active_count() == threads
    assert status("Threads") < 100


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


def test_a_failure_that_nobody_waited_for_is_told_at_the_end():
    script = """
import torch, overspill
handle = overspill.aio_handle()
handle.async_pwrite(torch.zeros(4096), "/dev/full")
"""
    done = run_python(script)
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
    memory, open_before = status("VmRSS"), descriptors()
    rounds(2000)
    assert status("VmRSS") - memory < 8 << 10
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

    threads = [
        threading.Thread(target=work, args=place)
        for place in (("full", "/dev/full"), ("good", tmp_path / "f"))
    ]
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
    for call in (
        lambda: handle.async_pwrite(tensor, path),
        handle.wait,
        lambda: handle.read(tensor, path, False),
    ):
        try:
            call()
            found.append("no error")
        except errors.ForkError:
            found.append("ForkError")
    # One of its own works, with memory that its parent has pinned.
    own = overspill.aio_handle(backend="threads")
    found.append(own.sync_pwrite(tensor, path))
    found.append(own.is_pinned(tensor))
    handle = own = None
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
