"""What the handle refuses: in one line, as an exception of the package, and nothing has changed."""

from __future__ import annotations

import errno
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import overspill
from overspill import errors
from overspill.errors import ArgumentError, MemoryBudgetError, StorageError, UnsupportedError
from support import random_bytes

HUGE = 10**5000
"""Python does not even print it."""


def brief(value):
    """What a test is called by."""
    return f"{value:x}"[:12] if isinstance(value, int) else ascii(value)[:12]


def refused(error, call, *arguments, **named):
    """The line in which a call refuses."""
    with pytest.raises(errors.OverspillError) as caught:
        call(*arguments, **named)
    line = str(caught.value)
    assert type(caught.value) is error, line
    assert 10 < len(line) < 300 and line.isprintable()
    return caught.value


@pytest.fixture
def path(tmp_path):
    """A file of 4096 bytes, which a test leaves as it was."""
    path, content = tmp_path / "file", bytes(random_bytes(4096).numpy())
    path.write_bytes(content)
    yield path
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ("block_size", "queue_depth", "intra_op_parallelism"))
@pytest.mark.parametrize("value", (0, -1, 1 << 63, -HUGE, HUGE, 2.5, "8", None, []), ids=brief)
def test_numbers_that_cannot_be_meant_are_refused_by_name(name, value):
    assert name in str(refused(ArgumentError, overspill.aio_handle, **{name: value}))


@pytest.mark.parametrize("backend", ("libaio", "AIO", "\ud800", 5, b"aio"))
def test_a_backend_that_there_is_not_is_refused_with_those_that_there_are(backend, monkeypatch):
    assert "io_uring" in str(refused(ArgumentError, overspill.aio_handle, backend=backend))
    monkeypatch.setenv("OVERSPILL_BACKEND", "floppy")
    assert "floppy" in str(refused(ArgumentError, overspill.aio_handle))


def test_a_handle_is_not_pickled(any_handle):
    refused(UnsupportedError, pickle.dumps, any_handle)


# Files.


@pytest.mark.parametrize(
    "file",
    (
        -1,
        1 << 31,
        1 << 64,
        -HUGE,
        HUGE,
        True,
        1.5,
        None,
        [],
        torch.zeros(3, 3),
        "",
        b"",
        "a\0b",
        b"a\0b",
        "\ud800",
    ),
    ids=brief,
)
def test_what_names_no_file_is_refused_by_every_call(any_handle, path, file):
    tensor = torch.zeros(4)
    for call in (any_handle.sync_pread, any_handle.sync_pwrite, any_handle.async_pread):
        refused(ArgumentError, call, tensor, file)
    for call in (any_handle.read, any_handle.write):
        refused(ArgumentError, call, tensor, file, True)
    if file is not None:
        refused(ArgumentError, any_handle.async_pwrite, tensor, fd=file)
    assert any_handle.wait() == 0


@pytest.mark.parametrize("name", ("x" * 300, b"\xff\xfe/none", "none/none", "."))
def test_a_file_that_cannot_be_opened_is_told_with_its_name(any_handle, tmp_path, name):
    place = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    with pytest.raises(StorageError) as caught:
        any_handle.sync_pwrite(torch.zeros(4), place)
    assert caught.value.errno and os.fsencode(caught.value.filename) == place
    assert not os.listdir(tmp_path)


def test_descriptors_that_cannot_do_it_are_refused(any_handle, path):
    tensor = random_bytes(512)
    with open(path, "rb") as file:
        assert refused(StorageError, any_handle.async_pwrite, tensor, file.fileno()).errno == errno.EBADF
    with open(path, "r+b") as file, open(path, "ab") as writable:
        assert refused(StorageError, any_handle.async_pread, tensor, writable.fileno()).errno == errno.EBADF
        number = file.fileno()
    assert refused(StorageError, any_handle.async_pwrite, tensor, fd=number).errno == errno.EBADF
    assert refused(StorageError, any_handle.async_pwrite, tensor, fd=1_000_000).errno == errno.EBADF
    ends = os.pipe()
    refused(StorageError, any_handle.async_pwrite, tensor, ends[1])
    for end in ends:
        os.close(end)
    for arguments in ((tensor,), (tensor, path, 0)):
        with pytest.raises(TypeError):
            any_handle.async_pwrite(*arguments, **({"fd": 3} if len(arguments) > 1 else {}))


def test_a_missing_file_is_told_at_once(any_handle, tmp_path):
    for call in (any_handle.async_pread, any_handle.sync_pread):
        with pytest.raises(StorageError, match="No such file") as caught:
            call(random_bytes(512), tmp_path / "missing")
        assert caught.value.errno == errno.ENOENT and isinstance(caught.value, OSError)
        assert caught.value.filename == str(tmp_path / "missing")
    assert any_handle.wait() == 0


@pytest.mark.parametrize(
    "offset",
    (-1, (1 << 63) - 5, 1 << 63, 1 << 64, -HUGE, HUGE, 1.5, "0", None, b"", torch.zeros(2)),
    ids=brief,
)
def test_an_offset_that_no_file_has_is_refused(any_handle, path, offset):
    for call in (
        any_handle.sync_pread,
        any_handle.sync_pwrite,
        any_handle.async_pread,
        any_handle.async_pwrite,
    ):
        assert "file_offset" in str(refused(ArgumentError, call, torch.zeros(4), path, offset))
    assert any_handle.wait() == 0


def test_an_offset_behind_the_end_is_the_end_of_the_file(any_handle, path):
    with pytest.raises(errors.EndOfFileError):
        any_handle.sync_pread(random_bytes(512), path, 1 << 62)


# Tensors.


def of_no_contents():
    with FakeTensorMode():
        return torch.zeros(4)


def freed():
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def resized():
    tensor = torch.zeros(8, 8)
    view = tensor.t()
    tensor.untyped_storage().resize_(4)
    return view


LOST = {
    "bytes": lambda: b"bytes",
    "number": lambda: 5,
    "nothing": lambda: None,
    "meta": lambda: torch.empty(5, device="meta"),
    "sparse": lambda: torch.eye(5).to_sparse(),
    "fake": of_no_contents,
    "freed": freed,
    "resized": resized,
}
SHARED = {
    "expanded": lambda: torch.zeros(1).expand(5),
    "row for all": lambda: torch.zeros(4).expand(3, 4),
    "windows": lambda: torch.zeros(20).unfold(0, 4, 2),
    "strides": lambda: torch.zeros(10).as_strided((3, 3), (1, 1)),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_cannot_be_moved_is_refused(any_handle, path, name):
    for call in (
        any_handle.sync_pread,
        any_handle.sync_pwrite,
        any_handle.async_pread,
        any_handle.async_pwrite,
    ):
        refused(UnsupportedError, call, LOST[name](), path)
    assert any_handle.wait() == 0


@pytest.mark.parametrize("name", SHARED)
def test_elements_that_share_memory_are_written_and_not_read_into(any_handle, path, tmp_path, name):
    tensor = SHARED[name]()
    assert "torch.empty" in str(refused(UnsupportedError, any_handle.sync_pread, tensor, path))
    any_handle.sync_pwrite(tensor, tmp_path / "written")
    assert (tmp_path / "written").stat().st_size == 4 * tensor.numel()
    (tmp_path / "written").unlink()


STRIDED = st.integers(1, 4).flatmap(
    lambda dimensions: st.tuples(*[st.lists(st.integers(0, 5), min_size=dimensions, max_size=dimensions)] * 2)
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape_and_strides=STRIDED)
def test_no_tensor_whose_elements_share_memory_is_read_into(any_handle, tmp_path, shape_and_strides):
    shape, strides = shape_and_strides
    tensor = torch.arange(200.0).as_strided(shape, strides)
    shares = tensor.unique().numel() < tensor.numel()
    expected = torch.randn(shape)
    any_handle.sync_pwrite(expected, tmp_path / "file")
    try:
        any_handle.sync_pread(tensor, tmp_path / "file")
    except UnsupportedError:
        return
    assert not shares and torch.equal(tensor, expected)


VIEWS = st.lists(
    st.one_of(
        st.tuples(st.just("slice"), st.integers(0, 3), st.integers(0, 2), st.integers(1, 3)),
        st.tuples(st.just("transpose"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("diagonal"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("select"), st.integers(0, 3)),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(views=VIEWS)
def test_every_view_whose_elements_have_their_own_memory_is_read_into(any_handle, tmp_path, views):
    tensor = torch.zeros(4, 5, 6, 4)
    for kind, *numbers in views:
        if tensor.ndim < 2 or 0 in tensor.shape:
            break
        first, second = numbers[0] % tensor.ndim, numbers[-1] % tensor.ndim
        if kind == "slice":
            tensor = tensor.movedim(first, 0)[numbers[1] :: numbers[2]]
        elif kind == "transpose":
            tensor = tensor.transpose(first, second)
        elif kind == "diagonal" and first != second:
            tensor = tensor.diagonal(0, first, second)
        elif kind == "select":
            tensor = tensor.select(first, 0)
    expected = torch.randn(tensor.shape)
    any_handle.sync_pwrite(expected, tmp_path / "file")
    any_handle.sync_pread(tensor, tmp_path / "file")
    assert torch.equal(tensor, expected)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_pinned_memory_that_cannot_be_meant_is_refused(any_handle):
    example = torch.empty(0, dtype=torch.uint8)
    for count in (1 << 60, 1 << 66, HUGE):
        refused(MemoryBudgetError, any_handle.new_cpu_locked_tensor, count, example)
    for count in (-1, -HUGE, 1.5, "5", None):
        refused(ArgumentError, any_handle.new_cpu_locked_tensor, count, example)
    for other in (torch.uint8, None, 5):
        refused(UnsupportedError, any_handle.new_cpu_locked_tensor, 5, other)
        refused(UnsupportedError, any_handle.free_cpu_locked_tensor, other)
        refused(UnsupportedError, any_handle.is_pinned, other)
    for lost in (torch.empty(5, device="meta"), torch.eye(5).to_sparse(), of_no_contents(), freed()):
        assert any_handle.free_cpu_locked_tensor(lost) is False
        assert any_handle.is_pinned(lost) is False


@pytest.mark.parametrize("dtype", (torch.quint8, torch.qint8, torch.qint32))
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_numbers_that_memory_alone_does_not_make_are_refused(any_handle, path, dtype):
    quantized = torch.quantize_per_tensor(torch.ones(4, 5), 0.1, 0, dtype)
    refused(UnsupportedError, any_handle.sync_pread, quantized.t(), path)
    refused(UnsupportedError, any_handle.new_cpu_locked_tensor, 4, quantized)
    # Those that have their memory already are what they were.
    any_handle.sync_pread(quantized, path)
    assert bytes(quantized.int_repr().flatten().view(torch.uint8)[:20].numpy()) == path.read_bytes()[:20]


def test_tensors_within_a_transform_are_refused(any_handle, path):
    def moved(move):
        def within(x):
            refused(UnsupportedError, move, x, path)
            refused(UnsupportedError, any_handle.sync_pwrite, x.t(), path)
            return x.sum()

        return within

    for move in (any_handle.sync_pread, any_handle.sync_pwrite):
        torch.func.grad(moved(move))(torch.ones(4, 3))
        torch.vmap(moved(move))(torch.ones(2, 4, 3))


def test_there_is_no_memory_for_a_copy_of_almost_nothing_many_times(any_handle, path):
    refused(MemoryBudgetError, any_handle.sync_pwrite, torch.zeros(1).expand(1 << 40), path)


@pytest.mark.parametrize("raised", (KeyboardInterrupt, ZeroDivisionError))
def test_what_a_path_of_somebodys_own_raises_is_passed_on(any_handle, raised):
    class Path:
        def __fspath__(self):
            raise raised("mine")

    with pytest.raises(raised, match="mine"):
        any_handle.sync_pread(torch.zeros(4), Path())
