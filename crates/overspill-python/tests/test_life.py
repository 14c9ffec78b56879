"""Optimizers in processes that are interrupted, fork, load data, and run for long."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import overspill
from overspill import AdamW, _native
from overspill.errors import ForkError, StorageError
from overspill.optim.interrupt import uninterrupted
from support import BOUND, SMALL, assert_same, descriptors, pair, parameters, set_gradients, status


class Interrupting:
    """The native half of an optimizer, with a signal before and after each step."""

    def __init__(self, native, number):
        self._native = native
        self._number = number

    def step(self, *arguments):
        os.kill(os.getpid(), self._number)
        self._native.step(*arguments)
        os.kill(os.getpid(), self._number)

    def __getattr__(self, name):
        return getattr(self._native, name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_takes_effect_when_it_is_whole(
    number, swap_dir, backend, exact_sqrt
):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, backend=backend)

    def interrupted(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, interrupted)
    try:
        for step in range(6):
            set_gradients(step, ours, theirs)
            reference.step()
            if step == 3:
                whole = optimizer._native
                optimizer._native = Interrupting(whole, number)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
                optimizer._native = whole
            else:
                optimizer.step()
            assert_same(ours, theirs)
            assert [int(x["step"]) for x in optimizer.state.values()] == [step + 1] * len(ours)
            assert signal.getsignal(number) is interrupted
    finally:
        signal.signal(number, before)


def test_a_signal_is_not_lost_when_a_step_fails(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    set_gradients(0, ours)
    optimizer.step()

    class Failing(Interrupting):
        def step(self, *arguments):
            os.kill(os.getpid(), self._number)
            raise StorageError("the disk is gone", 5)

    optimizer._native = Failing(optimizer._native, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as told:
        optimizer.step()
    assert isinstance(told.value.__context__, StorageError)
    assert int(optimizer.state[ours[0]]["step"]) == 1


INTERRUPTED = """
import signal, sys
import torch
import overspill

signal.signal(signal.SIGINT, signal.default_int_handler)
p = torch.nn.Parameter(torch.zeros(30))
p.grad = torch.ones_like(p)
# Every step takes one off, so what the parameter is says how many there were.
optimizer = overspill.Lion([p], lr=1.0, swap_dir=sys.argv[1], memory="8MiB", resident=0)
optimizer.step()

def interrupted_at(wanted):
    # Takes a step, with a signal at one of the lines of Python that it passes; whether it is as long as that.
    line = 0

    def trace(frame, event, _):
        nonlocal line
        if event == "line":
            line += 1
            if line == wanted:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        optimizer.step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return line >= wanted

line = 1
while interrupted_at(line):
    steps = int(optimizer.state[p]["step"])
    assert torch.equal(p.detach(), torch.full_like(p, -steps)), f"line {line}: {steps} steps are counted"
    line += 1
assert line > 100 and steps > line // 4, f"{steps} steps of {line} lines"
"""


def test_signals_that_arrive_at_any_time_leave_steps_whole(swap_dir):
    # In a process of its own: what is raised at the line at which a "with" ends comes before the end of what it entered, so
    # torch's functions of subclasses stay turned off. No signal is handled there, but what a tracer raises is raised there.
    command = [sys.executable, "-c", INTERRUPTED, str(swap_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr


def test_a_fork_cannot_use_it_and_does_no_harm(swap_dir, backend, exact_sqrt):
    ours, optimizer, theirs, reference = pair("AdamW", swap_dir, backend=backend)
    for step in range(4):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        if step == 1:
            child = os.fork()
            if child == 0:
                told = 1
                try:
                    optimizer.step()
                except ForkError:
                    told = 0
                with contextlib.suppress(ForkError):
                    optimizer.close()
                del optimizer
                gc.collect()
                os._exit(told)
            _, state = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(state) == 0
            assert swap_dir.exists()
        assert_same(ours, theirs)


def test_a_fork_in_the_middle_of_a_step_is_told_too(swap_dir):
    p = torch.nn.Parameter(torch.ones(1 << 16))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], swap_dir=swap_dir, **SMALL)
    optimizer.step()
    taken, leave = threading.Event(), threading.Event()

    def hold():
        with optimizer._lock:
            taken.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        told = 1
        try:
            optimizer.step()
        except ForkError:
            told = 0
        os._exit(told)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    optimizer.close()


def test_every_signal_of_a_step_is_handled_whatever_the_others_raise():
    handled = []
    former = signal.signal(signal.SIGTERM, lambda *_: handled.append("SIGTERM"))
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert handled == ["SIGTERM"]


def test_a_fork_is_told_that_the_threads_are_its_parents(swap_dir):
    ours, optimizer, _, _ = pair("AdamW", swap_dir)
    set_gradients(0, ours)
    optimizer.step()
    child = os.fork()
    if child == 0:
        told = 0
        for use in (
            lambda: _native.norm([ours[0].grad]),
            lambda: AdamW(ours, swap_dir=swap_dir.with_name("another"), max_norm=1.0).step(),
        ):
            try:
                use()
                told = 1
            except ForkError:
                pass
        os._exit(told)
    _, state = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(state) == 0
    optimizer.close()


class Rows(torch.utils.data.Dataset):
    """Rows that worker processes make."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((16,), float(index))


def test_workers_of_a_data_loader_live_beside_it(swap_dir, exact_sqrt):
    results = []
    for make in (
        lambda p: overspill.AdamW(p, swap_dir=swap_dir, **SMALL),
        lambda p: torch.optim.AdamW(p, foreach=False),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 1)
        optimizer = make(model.parameters())
        model(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        for _ in range(2):
            # Forks while the optimizer has threads, and ends while it goes on.
            for rows in torch.utils.data.DataLoader(Rows(), batch_size=8, num_workers=2):
                optimizer.zero_grad()
                model(rows / 64).square().mean().backward()
                optimizer.step()
        results.append(list(model.parameters()))
    assert_same(*results)


def test_ten_thousand_steps_take_no_more_memory_and_no_more_files(swap_dir, backend):
    model = parameters([(8, 8), (8,)])
    optimizer = overspill.AdamW(model, swap_dir=swap_dir, backend=backend, max_norm=1.0, **SMALL)
    set_gradients(0, model)

    def run(count):
        for _ in range(count):
            optimizer.step()
        gc.collect()
        return status("VmRSS"), descriptors(), status("Threads")

    memory, files, threads = run(1000)
    later = run(9000)
    assert later[1:] == (files, threads)
    assert later[0] - memory < 4096, f"{later[0] - memory} KiB more"
    assert int(optimizer.state[model[0]]["step"]) == 10_000


def test_many_optimizers_one_after_the_other_leave_nothing(swap_dir, backend):
    def one():
        ours, optimizer, _, _ = pair("AdamW", swap_dir, [(50, 50)], backend=backend)
        set_gradients(0, ours)
        optimizer.step()
        optimizer.state_dict()
        optimizer.close()

    for _ in range(3):
        one()
    gc.collect()
    before = descriptors(), status("Threads"), status("VmRSS")
    for _ in range(10):
        one()
    gc.collect()
    assert (descriptors(), status("Threads")) == before[:2]
    assert status("VmRSS") - before[2] < 16384
    assert not swap_dir.exists()
