"""Tensors to files and back, by DeepSpeed's interface.

``aio_handle`` has the arguments, calls and answers of the handle of DeepSpeed's ``async_io`` op, on overspill's I/O engine::

    handle = overspill.aio_handle(block_size=1 << 20, queue_depth=32)
    tensor = handle.new_cpu_locked_tensor(1 << 20, torch.empty(0, dtype=torch.bfloat16))
    handle.async_pwrite(tensor, "/nvme/tensor")
    handle.wait()

What is different: any address, offset and length will do, of any tensor; what was not moved is an exception, never an answer
that looks like success; nothing ends the process. :func:`overspill.deepspeed.install` makes DeepSpeed use it.
"""

from __future__ import annotations

import ctypes
import operator
import os
import sys
import warnings
import weakref
from typing import Any, NoReturn, Union

import torch

from overspill import _native
from overspill.errors import ArgumentError, MemoryBudgetError, UnsupportedError

__all__ = ["aio_handle"]

File = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", int]

# DeepSpeed's own unit of alignment; nothing here depends on it.
_ALIGNMENT_BYTES = 512


class aio_handle:  # noqa: N801 - DeepSpeed's name
    """Reads and writes tensors, at the same time as everything else.

    Pinned tensors of :meth:`new_cpu_locked_tensor` are moved from where they lie, all others through memory of the
    handle's, up to 48 MiB. Tensors that are not contiguous, and those of other devices, are copied to the CPU first. A tensor
    must not be written to while it is being written to a file, and not be used while it is being read; it may be dropped.
    What is read by way of the CPU's memory reaches its tensor when it is waited for, or when another call needs it there,
    which then waits for it.
    Operations of one handle that touch the same bytes of a tensor or a file are carried out in the order of their calls, all
    others at the same time. All calls may come from several threads, and release the GIL while they wait.

    A handle belongs to the process that made it. One that is dropped, or left to the end of the program, finishes what is
    pending, within a minute.

    Args:
        block_size: bytes that go to the device in one request, from 1 on; rounded up to 4096, at most 1 GiB.
        queue_depth: requests that may be at the device at a time, from 1 on; at most 4096 are, and 64 MiB.
        single_submit: without effect here.
        overlap_events: without effect here.
        intra_op_parallelism: threads that copy tensors which are not pinned, from 1 on; at most 256.
        backend: ``"auto"``, ``"io_uring"``, ``"aio"`` or ``"threads"``; if ``None``, what the environment variable
            ``OVERSPILL_BACKEND`` says, or else ``"auto"``.

    Raises:
        overspill.errors.ArgumentError: a number is too small or none, or the backend unknown.
        overspill.errors.EngineError: the backend does not work here.

    Warns:
        RuntimeWarning: with ``"auto"``, if the best backend does not work here; once per reason.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
        *,
        backend: str | None = None,
    ) -> None:
        if backend is None:
            backend = os.environ.get("OVERSPILL_BACKEND") or "auto"
        self._native = _native.Handle(block_size, queue_depth, intra_op_parallelism, backend)
        self._block_size = block_size
        self._queue_depth = queue_depth
        self._single_submit = bool(single_submit)
        self._overlap_events = bool(overlap_events)
        self._intra_op_parallelism = intra_op_parallelism
        # Also at the end of the program, where objects may never be dropped.
        weakref.finalize(self, self._native.close)
        degraded = self._native.degraded()
        if degraded is not None and degraded not in _warned:
            _warned.add(degraded)
            warnings.warn(f"overspill uses {self.backend}: {degraded}", RuntimeWarning, stacklevel=2)

    def __repr__(self) -> str:
        return (
            f"aio_handle(block_size={self._block_size}, queue_depth={self._queue_depth}, "
            f"single_submit={self._single_submit}, overlap_events={self._overlap_events}, "
            f"intra_op_parallelism={self._intra_op_parallelism}, backend={self.backend!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError("a handle cannot be pickled or copied: make one in each process")

    @property
    def backend(self) -> str:
        """The way to the kernel in use: ``"io_uring"``, ``"aio"`` or ``"threads"``."""
        return self._native.backend()

    def get_block_size(self) -> int:
        """``block_size`` as it was given, in bytes."""
        return self._block_size

    def get_queue_depth(self) -> int:
        """``queue_depth`` as it was given."""
        return self._queue_depth

    def get_single_submit(self) -> bool:
        """``single_submit`` as it was given."""
        return self._single_submit

    def get_overlap_events(self) -> bool:
        """``overlap_events`` as it was given."""
        return self._overlap_events

    def get_intra_op_parallelism(self) -> int:
        """``intra_op_parallelism`` as it was given."""
        return self._intra_op_parallelism

    def get_alignment(self) -> int:
        """Bytes of which DeepSpeed wants lengths to be multiples; here, any length will do."""
        return self._intra_op_parallelism * _ALIGNMENT_BYTES

    def read(self, buffer: torch.Tensor, filename: File, validate: bool, file_offset: int = 0) -> int:
        """Fills ``buffer`` from a file and waits for that, whatever else is pending. Returns 0.

        As :meth:`pread`, which see for arguments and errors.
        """
        self._native.run(self._order(buffer, filename, False, file_offset, validate), True)
        return 0

    def write(self, buffer: torch.Tensor, filename: File, validate: bool, file_offset: int = 0) -> int:
        """Writes ``buffer`` to a file and waits for that, whatever else is pending. Returns 0.

        As :meth:`pwrite`, which see for arguments and errors.
        """
        self._native.run(self._order(buffer, filename, True, file_offset, validate), True)
        return 0

    # `async` is DeepSpeed's name of the parameter and a keyword of Python's.
    def pread(
        self, buffer: torch.Tensor, filename: File, validate: bool, *arguments: Any, **named: Any
    ) -> int:
        """``pread(buffer, filename, validate, async, file_offset=0)``: fills ``buffer`` from a file.

        Args:
            buffer: any tensor; as many bytes are read as it has.
            filename: a path, or the descriptor of a file that is open for reading.
            validate: whether to compare what was read with the file once more, as soon as it is there.
            async: whether to return 0 at once; otherwise the call waits, as :meth:`wait` does, and returns its answer.
            file_offset: bytes of the file to skip.

        Raises:
            overspill.errors.ArgumentError: nothing is called so, or no file is so large.
            overspill.errors.UnsupportedError: the tensor has no contents, is not dense or, to be read into, has elements
                that share memory.
            overspill.errors.MemoryBudgetError: there is no memory to copy through.
            overspill.errors.StorageError: the file cannot be opened. What fails later is told by the wait that covers it:
            overspill.errors.EndOfFileError: the file ends too early; ``buffer`` may have changed in part.
            overspill.errors.CorruptionError: validation has found another byte.
            overspill.errors.ForkError: the handle is another process's.
        """
        wait, offset = _asynchronous("pread", arguments, named)
        return self._move(self._order(buffer, filename, False, offset, validate), wait)

    def pwrite(
        self, buffer: torch.Tensor, filename: File, validate: bool, *arguments: Any, **named: Any
    ) -> int:
        """``pwrite(buffer, filename, validate, async, file_offset=0)``: writes ``buffer`` to a file.

        A file that does not exist is made, readable and writable by its owner; one that exists keeps what is around the
        bytes that are written, whichever handles of the process write there at the same time. Another process must not
        meanwhile, unless both write whole blocks of 4096 bytes. Nothing is flushed: that is ``os.fsync``'s.

        Args:
            buffer: any tensor.
            filename: a path, or the descriptor of a file that is open for writing.
            validate: whether to compare the file with ``buffer``, as soon as it is written. It must be readable.
            async: whether to return 0 at once; otherwise the call waits, as :meth:`wait` does, and returns its answer.
            file_offset: bytes of the file to skip.

        Raises:
            overspill.errors.ArgumentError: nothing is called so, or no file is so large.
            overspill.errors.UnsupportedError: the tensor has no contents, is not dense or, to be read into, has elements
                that share memory.
            overspill.errors.MemoryBudgetError: there is no memory to copy through.
            overspill.errors.StorageError: the file cannot be opened. What fails later is told by the wait that covers it:
            overspill.errors.DiskFullError: there is no room; the bytes that there was room for may have been written.
            overspill.errors.CorruptionError: validation has found another byte.
            overspill.errors.ForkError: the handle is another process's.
        """
        wait, offset = _asynchronous("pwrite", arguments, named)
        return self._move(self._order(buffer, filename, True, offset, validate), wait)

    def sync_pread(self, buffer: torch.Tensor, filename: File, file_offset: int = 0) -> int:
        """:meth:`pread` that waits: the number of operations that have ended, with those that were pending."""
        return self._move(self._order(buffer, filename, False, file_offset), True)

    def sync_pwrite(self, buffer: torch.Tensor, filename: File, file_offset: int = 0) -> int:
        """:meth:`pwrite` that waits: the number of operations that have ended, with those that were pending."""
        return self._move(self._order(buffer, filename, True, file_offset), True)

    def async_pread(self, buffer: torch.Tensor, filename: File, file_offset: int = 0) -> int:
        """:meth:`pread` that does not wait. Returns 0."""
        return self._move(self._order(buffer, filename, False, file_offset), False)

    def async_pwrite(
        self,
        buffer: torch.Tensor,
        filename: File | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """:meth:`pwrite` that does not wait, to a path or to a descriptor. Returns 0."""
        target = filename if fd is None else fd
        if target is None or (filename is not None and fd is not None):
            raise TypeError("async_pwrite() takes either filename or fd")
        return self._move(self._order(buffer, target, True, file_offset), False)

    def wait(self) -> int:
        """Waits until everything that was asked for is over; the number of operations, 0 if nothing was pending.

        An operation is counted by one wait; of several threads that wait, each returns only when all is over.

        Raises:
            overspill.errors.OverspillError: an operation has failed: the first one's error, with its path and errno. The
                others are over too, and the handle is as good as before.
            overspill.errors.StateError: what was read by way of the CPU's memory cannot be copied to its tensor.
            KeyboardInterrupt: everything goes on, and the next wait covers it.
        """
        return self._native.wait()

    def new_cpu_locked_tensor(self, num_elem: int, example_tenosr: torch.Tensor) -> torch.Tensor:
        """A pinned tensor of ``num_elem`` elements of the example's type, whose contents are anything.

        It lies on huge pages where the system has some, and is locked where the limits allow it. Its memory is free when
        the last tensor over it is gone and no I/O uses it, also without :meth:`free_cpu_locked_tensor`.

        Raises:
            overspill.errors.ArgumentError: for a negative number, and for what is no whole one.
            overspill.errors.MemoryBudgetError: the system has not as much memory.
        """
        return pinned_tensor(num_elem, _tensor(example_tenosr).dtype)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Gives a pinned tensor up; whether it was one, of this handle or another, from its first byte on.

        The tensor can be used on: it is no longer pinned, and its memory goes with it.
        """
        return unpin(tensor)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether ``buffer`` is moved without a copy: it lies in a pinned tensor of any handle, or is pinned by torch."""
        return is_pinned(buffer)

    def _order(
        self, buffer: torch.Tensor, file: File, write: bool, offset: int, validate: bool = False
    ) -> _native.Order:
        """What the native half is asked for: what is moved, and what has to be copied from it when it has been read.

        Raises:
            UnsupportedError: for what cannot be moved.
        """
        if _is_moved_in_place(_tensor(buffer)):
            return buffer, file, write, offset, bool(validate), None
        _check_extent(buffer)
        reach = _reach(buffer)
        if write:
            # What is copied now must have arrived.
            self._native.settle(*reach)
            return _packed(buffer), file, True, offset, bool(validate), None
        return _host(buffer), file, False, offset, bool(validate), (buffer.detach(), *reach)

    def _move(self, order: _native.Order, wait: bool) -> int:
        if wait:
            return self._native.run(order, False)
        self._native.submit(order)
        return 0


# What these say is more than what their memory has.
_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)

# The reasons for worse backends that were told.
_warned: set[str] = set()


def pinned_tensor(num_elem: int, dtype: torch.dtype) -> torch.Tensor:
    """A pinned tensor of ``num_elem`` elements, whose contents are anything.

    Raises:
        ArgumentError: for a negative number, and for what is no whole one.
        MemoryBudgetError: the system has not as much memory.
    """
    try:
        num_elem = operator.index(num_elem)
    except TypeError:
        raise ArgumentError(
            f"num_elem is of type {type(num_elem).__name__}, but must be a whole number"
        ) from None
    if dtype in _QUANTIZED:
        raise UnsupportedError(f"memory alone makes no tensor of {dtype}: pin one of torch.uint8")
    if num_elem < 0:
        raise ArgumentError("num_elem is negative: give the number of elements")
    if num_elem * dtype.itemsize >= 1 << 63:
        raise MemoryBudgetError(f"no system has memory for so many elements of {dtype}")
    if num_elem == 0:
        return torch.empty(0, dtype=dtype)
    memory = _native.Pinned(num_elem * dtype.itemsize)
    array = (ctypes.c_uint8 * len(memory)).from_address(memory.address)
    # The tensor keeps the array, and the array the memory.
    array.memory = memory  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=dtype, count=num_elem)


def unpin(tensor: torch.Tensor) -> bool:
    """Gives a pinned tensor up; whether it was one, from its first byte on."""
    return _has_memory(tensor) and _native.unpin(tensor.data_ptr())


def is_pinned(buffer: torch.Tensor) -> bool:
    """Whether all of ``buffer`` is pinned, by overspill or by torch."""
    if not _has_memory(buffer):
        return False
    return _native.is_pinned(buffer.data_ptr(), buffer.nbytes) or buffer.is_pinned()


def _tensor(given: torch.Tensor) -> torch.Tensor:
    """What was given as a tensor, which it is.

    Raises:
        UnsupportedError: for anything else.
    """
    if not isinstance(given, torch.Tensor):
        raise UnsupportedError(f"a torch.Tensor is needed, not {type(given).__name__}")
    return given


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether the processor has the tensor's elements, one behind the other or with gaps."""
    return _tensor(tensor).layout is torch.strided and tensor.device.type == "cpu"


def _is_moved_in_place(buffer: torch.Tensor) -> bool:
    """Whether files have the very bytes of the tensor's memory.

    Raises:
        UnsupportedError: for a tensor that has none.
    """
    if buffer.layout is not torch.strided or buffer.device.type == "meta":
        raise UnsupportedError(
            "tensors without contents, and those that are not dense, cannot be moved: materialize it, or call "
            ".to_dense() first"
        )
    # Of these, torch has yet to turn the signs: the bytes are others than the numbers'.
    is_lazy = buffer.is_conj() or buffer.is_neg()
    return buffer.device.type == "cpu" and buffer.is_contiguous() and not is_lazy


def _packed(buffer: torch.Tensor) -> torch.Tensor:
    """The elements one behind the other in the CPU's memory, as they are now.

    Raises:
        MemoryBudgetError: the system has not as much memory.
        UnsupportedError: torch cannot do it.
    """
    try:
        return buffer.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    except RuntimeError as error:
        told = str(error).partition("\n")[0]
        if "alloc" in told or "out of memory" in told:
            raise MemoryBudgetError(
                f"no memory to copy the tensor of {buffer.nbytes} bytes to: {told}"
            ) from error
        raise UnsupportedError(f"the tensor cannot be copied: {told}") from error


def _host(buffer: torch.Tensor) -> torch.Tensor:
    """Memory of the CPU's to read into, from where it can be copied to the tensor.

    Raises:
        UnsupportedError: it cannot.
    """
    if buffer.is_quantized:
        raise UnsupportedError(
            "a quantized tensor can be read into where it has no gaps: call .contiguous() first"
        )
    if buffer.is_nested:
        raise UnsupportedError(
            "a nested tensor can be read into where it has no gaps: call .contiguous() first"
        )
    if _overlaps(buffer):
        raise UnsupportedError(
            "elements of the tensor share memory, so they cannot all be read: read into a tensor of its own, for "
            "example torch.empty(tensor.shape, dtype=tensor.dtype)"
        )
    return pinned_tensor(buffer.numel(), buffer.dtype).view(buffer.shape)


def _check_extent(buffer: torch.Tensor) -> None:
    """Refuses what says that it has more memory than there is; torch would read and write beyond it.

    Raises:
        UnsupportedError: says how much.
    """
    if buffer.device.type != "cpu" or buffer.is_nested or not buffer.numel():
        return
    needed = buffer.storage_offset() * buffer.element_size() + _span(buffer)
    try:
        has = buffer.untyped_storage().nbytes()
    except RuntimeError as error:
        raise UnsupportedError("the tensor has no memory of its own") from error
    if needed > has:
        raise UnsupportedError(
            f"the tensor needs {needed} bytes of its storage, which has {has}: it was resized"
        )


def _reach(buffer: torch.Tensor) -> tuple[int, int]:
    """The addresses of the tensor's first byte and behind its last; gaps in between count, too."""
    try:
        if buffer.is_nested:
            storage = buffer.untyped_storage()
            return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        start = buffer.data_ptr()
        return start, start + _span(buffer)
    except RuntimeError:
        # Where it is, only its device knows: it may be anywhere.
        return 0, sys.maxsize


def _span(buffer: torch.Tensor) -> int:
    """Bytes from the tensor's first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(buffer.shape, buffer.stride()))
    return (last + 1) * buffer.element_size() if buffer.numel() else 0


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements may share memory: a dimension does not step over all that the finer ones reach."""
    reach = 0
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1
    ):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def _asynchronous(function: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[bool, int]:
    """Whether to wait, and the offset in the file, of what follows ``validate``."""
    names = ("async", "file_offset")
    if len(arguments) > len(names):
        raise TypeError(f"{function}() takes at most 5 arguments")
    found = dict(zip(names, arguments))
    for name, value in named.items():
        if name not in names or name in found:
            raise TypeError(f"{function}() got an unexpected or repeated argument {name!r}")
        found[name] = value
    if "async" not in found:
        raise TypeError(f"{function}() misses the argument 'async'")
    return not found["async"], found.get("file_offset", 0)
