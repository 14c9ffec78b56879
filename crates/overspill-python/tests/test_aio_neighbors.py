"""Several handles of one process on one file: what begins or ends within a sector is nobody else's loss."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest
import torch

import overspill
from support import BACKENDS, BOUND, MIB, pinned, random_bytes

SECTOR = 4096


def test_neighbors_that_write_into_one_sector_by_two_handles_lose_nothing(tmp_path, backend):
    path, first, second = tmp_path / "file", *(overspill.aio_handle(backend=backend) for _ in range(2))
    path.write_bytes(bytes(16 * SECTOR))
    for number in range(1, 201):
        first.async_pwrite(torch.full((1001,), number, dtype=torch.uint8), path, 5)
        second.async_pwrite(torch.full((1003,), number, dtype=torch.uint8), path, 1006)
        assert first.wait() == second.wait() == 1
        found = path.read_bytes()
        assert found == bytes(5) + bytes([number]) * 2004 + bytes(16 * SECTOR - 2009), number


def test_what_grows_a_file_by_two_handles_leaves_it_as_long_as_the_longer_one(tmp_path, backend):
    near, far = random_bytes(1001, 1), random_bytes(5000, 2)
    first, second = (overspill.aio_handle(backend=backend) for _ in range(2))
    for number in range(100):
        path = tmp_path / str(number)
        first.async_pwrite(near, path, 3)
        second.async_pwrite(far, path, 8 * SECTOR)
        assert first.wait() == second.wait() == 1
        assert path.read_bytes() == bytes(3) + near.numpy().tobytes() + bytes(8 * SECTOR - 1004) + bytes(
            far.numpy()
        )


def test_what_would_go_straight_to_the_engine_waits_behind_what_its_handle_waits_for(tmp_path, backend):
    first, second = (overspill.aio_handle(backend=backend) for _ in range(2))
    near, far = random_bytes(1001, 1), pinned(second, random_bytes(2 * SECTOR, 2))
    for number in range(150):
        path = tmp_path / str(number)
        first.async_pwrite(near, path, 3)
        # This one waits for the other handle, and the next behind it.
        second.async_pwrite(far[:1], path, 8 * SECTOR - 1)
        second.async_pwrite(far, path, 8 * SECTOR)
        assert first.wait() == 1 and second.wait() == 2
        before = bytes(3) + bytes(near.numpy()) + bytes(8 * SECTOR - 1005) + bytes(far[:1].numpy())
        assert path.read_bytes() == before + bytes(far.numpy()), number


def test_many_handles_and_threads_on_one_file_end_and_lose_nothing(tmp_path):
    path, count, lengths = tmp_path / "file", 6, random.Random(7)
    # Some ranges are whole sectors, and some are not; they lie one behind the other.
    bounds = [0]
    for number in range(count):
        length = (
            2 * SECTOR if number % 3 == 0 and bounds[-1] % SECTOR == 0 else lengths.randrange(1, 3 * SECTOR)
        )
        bounds.append(bounds[-1] + length)
    path.write_bytes(bytes(bounds[-1]))
    handles = [overspill.aio_handle(intra_op_parallelism=2, backend=name) for name in BACKENDS]
    last: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        start, end = bounds[number], bounds[number + 1]
        for turn in range(30):
            content = random_bytes(end - start, 100 * number + turn)
            handle = handles[(number + turn) % len(handles)]
            handle.write(content, path, turn % 7 == 0, start)
            back = torch.zeros_like(content)
            handles[turn % len(handles)].read(back, path, False, start)
            assert torch.equal(back, content), (number, turn)
        last[number] = content

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert len(last) == count, "a thread has failed, or not ended"
    assert path.read_bytes() == b"".join(bytes(last[number].numpy()) for number in range(count))


def test_odd_writes_by_turns_of_several_handles_are_all_there(tmp_path):
    path, count, length = tmp_path / "file", 600, 3 * SECTOR // 2 + 1
    handles = [overspill.aio_handle(backend=name) for name in (*BACKENDS, "auto")]
    parts = [random_bytes(length, number) for number in range(count)]
    # Pinned ones would go straight to the engine, if they waited for nobody.
    parts = [pinned(handles[0], part) if number % 5 == 0 else part for number, part in enumerate(parts)]
    for number, part in enumerate(parts):
        handles[number % len(handles)].async_pwrite(part, path, number * length)
        if number % 7 == 0:
            handles[number % 3].async_pwrite(part[:1], path, number * length)
    assert sum(handle.wait() for handle in handles) == count + len(range(0, count, 7))
    assert path.read_bytes() == b"".join(bytes(part.numpy()) for part in parts)


class Calling(torch.Tensor):
    """A tensor whose copy uses a handle."""

    @staticmethod
    def over(tensor, call):
        calling = tensor.as_subclass(Calling)
        calling.call = call
        return calling

    def copy_(self, *arguments):
        self.call()
        return self.as_subclass(torch.Tensor).copy_(*arguments)

    def detach(self):
        return Calling.over(self.as_subclass(torch.Tensor).detach(), self.call)


def test_copies_that_use_each_others_handles_end(tmp_path):
    handles = [overspill.aio_handle() for _ in range(2)]
    sources, targets = ([tmp_path / f"{kind}{n}" for n in range(2)] for kind in ("source", "target"))
    for source in sources:
        source.write_bytes(bytes(range(64)))
    both, ended = threading.Barrier(2), []

    def work(number):
        def call():
            both.wait(BOUND)
            handles[1 - number].sync_pwrite(torch.ones(4096, dtype=torch.uint8), targets[number])

        gaps = torch.zeros(64, 2, dtype=torch.uint8)
        handle = handles[number]
        handle.async_pread(Calling.over(gaps[:, 0], call), sources[number])
        both.wait(BOUND)
        handle.wait()
        ended.append(gaps)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert len(ended) == 2, "they wait for each other"
    for gaps in ended:
        assert torch.equal(gaps[:, 0], torch.arange(64, dtype=torch.uint8)) and not gaps[:, 1].any()


def test_a_failed_write_holds_no_other_handle_up(tmp_path, backend):
    path, full = tmp_path / "file", "/dev/full"
    first, second = (overspill.aio_handle(backend=backend) for _ in range(2))
    for _ in range(20):
        first.async_pwrite(random_bytes(1001), full, 3)
        second.async_pwrite(random_bytes(999), full, 7)
        for handle in (first, second):
            with pytest.raises(overspill.errors.DiskFullError):
                handle.wait()
    # A handle that is gone holds nobody up either.
    first.async_pwrite(random_bytes(MIB + 1), path, 1)
    del first
    assert second.write(random_bytes(999), path, False, 7) == 0


def test_a_fork_does_not_wait_for_what_its_parent_has_begun(tmp_path):
    path, handle = tmp_path / "file", overspill.aio_handle()
    parts = [random_bytes(MIB, number) for number in range(64)]
    for number, part in enumerate(parts):
        handle.async_pwrite(part, path, 1 + number * MIB)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(BOUND)
            overspill.aio_handle().write(random_bytes(777), path, False, 1 + 80 * MIB)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert handle.wait() == len(parts)
