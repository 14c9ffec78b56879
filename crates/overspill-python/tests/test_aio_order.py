"""The order in which a handle does what it is asked for: on the same bytes, by several threads, with gaps, validated."""

from __future__ import annotations

import gc
import os
import threading
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import overspill
from overspill import errors
from support import BOUND, MIB, pinned, random_bytes


def at_once(*calls):
    """What calls that are made at the same time answer, each on a thread of its own; waits for them with a bound."""
    start, answers = threading.Barrier(len(calls)), []

    def work(call):
        start.wait(BOUND)
        try:
            answers.append(call())
        except errors.OverspillError as error:
            answers.append(type(error))

    threads = [threading.Thread(target=work, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert len(answers) == len(calls), "a call has not ended"
    return answers


def write_often(handle, tensor, path):
    for _ in range(20):
        handle.async_pwrite(tensor, path)


# Several threads on the same bytes.


@pytest.mark.parametrize("make", ("ordinary", "pinned"))
def test_threads_that_write_the_same_bytes_wait_for_each_other_and_never_for_ever(backend, tmp_path, make):
    path = tmp_path / "file"
    for _ in range(8):
        handle = overspill.aio_handle(backend=backend)
        tensors = [torch.full((4096,), number, dtype=torch.uint8) for number in range(4)]
        if make == "pinned":
            # In part from where they lie, in part through blocks.
            tensors = [pinned(handle, tensor)[:4000] for tensor in tensors]

        for _ in range(10):
            at_once(*(partial(write_often, handle, tensor, path) for tensor in tensors))
            assert at_once(handle.wait) == [80]
            assert path.read_bytes() in [bytes(tensor.numpy()) for tensor in tensors]


def test_two_waits_for_one_operation_say_the_same_of_it(handle):
    # What is written to it is gone.
    tensor = torch.zeros(32 * MIB, dtype=torch.uint8)
    tensor[-1] = 1
    for _ in range(5):
        handle.pwrite(tensor, "/dev/zero", True, True)
        told = at_once(handle.wait, handle.wait)
        # A wait that began when the other one had ended has found nothing.
        assert told in ([errors.CorruptionError] * 2, [errors.CorruptionError, 0]), told


# Tensors with gaps: what is read reaches them when they are waited for, and whatever comes later finds it there.


def gapless():
    return torch.zeros(8, 8, dtype=torch.uint8)


def transposed():
    return gapless().t()


@pytest.fixture
def sources(tmp_path):
    """Files of 64 bytes of 1, of 2 and of 3."""
    for number in (1, 2, 3):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 64)
    return tmp_path


@pytest.mark.parametrize("source", (gapless, transposed))
@pytest.mark.parametrize("turn", (lambda x: x, torch.t))
def test_what_is_read_is_there_for_what_is_asked_for_later(handle, sources, source, turn):
    x = source()
    handle.async_pread(x, sources / "1")
    handle.async_pwrite(turn(x), sources / "copy")
    assert handle.wait() == 2
    assert (sources / "copy").read_bytes() == bytes([1]) * 64
    handle.async_pread(x, sources / "2")
    handle.write(turn(x), sources / "copy", False)
    assert (sources / "copy").read_bytes() == bytes([2]) * 64
    assert handle.wait() == 1 and set(x.flatten().tolist()) == {2}


@pytest.mark.parametrize("source", (gapless, transposed))
@pytest.mark.parametrize("turn", (lambda x: x, torch.t))
def test_of_several_reads_of_one_tensor_the_last_one_stays(handle, sources, source, turn):
    x = source()
    handle.async_pread(x, sources / "1")
    handle.read(turn(x), sources / "2", True)
    assert set(x.flatten().tolist()) == {2}
    handle.wait()
    assert set(x.flatten().tolist()) == {2}
    for number in (3, 1, 2):
        handle.async_pread(turn(x) if number == 1 else x, sources / str(number))
    assert handle.wait() == 3
    assert set(x.flatten().tolist()) == {2}
    handle.async_pread(x, sources / "1")
    assert handle.sync_pread(turn(x), sources / "3") == 2
    assert set(x.flatten().tolist()) == {3}


def test_what_is_being_written_is_not_changed_by_a_read_that_lands_alone(handle, sources):
    whole = torch.ones(64, MIB, dtype=torch.uint8)
    handle.async_pwrite(whole, sources / "copy")
    (sources / "large").write_bytes(bytes([2]) * 64 * 8)
    handle.read(whole[:, -8:], sources / "large", False)
    handle.wait()
    assert set((sources / "copy").read_bytes()) == {1}
    assert set(whole[:, -8:].flatten().tolist()) == {2}


def test_reads_of_the_columns_of_one_tensor_do_not_wait_for_each_other(handle, sources):
    table = torch.zeros(64, 100, dtype=torch.uint8)
    for column in range(100):
        handle.async_pread(table[:, column], sources / str(1 + column % 3))
    assert not table.any()
    assert handle.wait() == 100
    assert table.unique(dim=0).tolist() == [[1 + column % 3 for column in range(100)]]


VIEWS = (
    lambda x: x,
    torch.t,
    lambda x: x[::2],
    lambda x: x[:, 1:5],
    lambda x: x[3],
    lambda x: x[:, 2],
    lambda x: x[1:3, 1:3].t(),
)
STEPS = st.tuples(
    st.sampled_from(("async_pread", "async_pwrite", "read", "write", "sync_pread", "sync_pwrite", "wait")),
    st.integers(0, len(VIEWS) - 1),
    st.integers(0, 1),
    st.integers(0, 20),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.lists(STEPS, max_size=12))
# What lands early for the last one must not land before the first one, on which it comes down.
@example(program=[("async_pread", 6, 0, 0), ("async_pread", 1, 0, 0), ("async_pread", 4, 0, 0)])
def test_random_programs_with_gaps_agree_with_tensors_in_memory(any_handle, tmp_path_factory, program):
    """One tensor in all kinds of views, two files; every call as if it had waited."""
    any_handle.wait()
    folder = tmp_path_factory.mktemp("gaps")
    files = [folder / "0", folder / "1"]
    models = [random_bytes(100, number) for number in range(2)]
    for file, content in zip(files, models):
        file.write_bytes(bytes(content.numpy()))
    x, model = (random_bytes(64, 5).view(8, 8) for _ in range(2))
    for name, view, file, offset in program:
        if name == "wait":
            any_handle.wait()
            continue
        ours, theirs = VIEWS[view](x), VIEWS[view](model)
        part = models[file][offset : offset + theirs.numel()]
        if "write" in name:
            part.copy_(theirs.reshape(-1))
        else:
            theirs.copy_(part.view(theirs.shape))
        validate = (False,) if name in ("read", "write") else ()
        getattr(any_handle, name)(ours, files[file], *validate, offset)
    any_handle.wait()
    assert torch.equal(x, model)
    for file, content in zip(files, models):
        assert file.read_bytes() == bytes(content.numpy())


def test_a_dropped_handle_lands_what_is_pending(backend, sources):
    handle = overspill.aio_handle(backend=backend)
    x = transposed()
    handle.async_pread(x, sources / "3")
    del handle
    gc.collect()
    assert set(x.flatten().tolist()) == {3}


# Validation.


def test_validation_is_over_before_the_same_bytes_are_written_again(handle, tmp_path):
    path = tmp_path / "file"
    for number in range(10):
        first, second, back = (random_bytes(2 * MIB + 100, 3 * number + turn) for turn in range(3))
        if number % 2:
            first, second, back = (pinned(handle, tensor) for tensor in (first, second, back))
        handle.pwrite(first, path, True, True)
        handle.pwrite(second[5:], path, True, True, 7)
        handle.pread(back, path, True, True)
        handle.async_pread(first, path)
        handle.async_pwrite(second, path)
        assert handle.wait() == 5
        assert torch.equal(back[:7], first[:7]) and torch.equal(back[7:], second[5:-2])


def test_what_is_validated_is_the_file_that_was_opened_whatever_its_name(handle, tmp_path):
    tensor, path = random_bytes(5000), tmp_path / "file"
    with open(path, "w+b") as file:
        path.unlink()
        assert handle.write(tensor, file.fileno(), True) == 0
        assert handle.read(tensor, file.fileno(), True) == 0
    memory = os.memfd_create("memory")
    assert handle.write(tensor, memory, True) == 0
    assert handle.read(tensor, memory, True) == 0
    os.close(memory)
    # It has another name when it is compared, or a pipe has its own: one of these is in time.
    for _ in range(20):
        handle.pwrite(tensor, path, True, True)
        path.rename(tmp_path / "renamed")
        assert handle.wait() == 1
        handle.pwrite(tensor, path, True, True)
        path.unlink()
        os.mkfifo(path)
        assert at_once(handle.wait) == [1]
        path.unlink()
