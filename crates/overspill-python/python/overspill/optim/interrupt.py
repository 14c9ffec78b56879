"""Steps that are whole: signals that would raise in the middle of one wait for its end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Callable, Optional

__all__ = ["uninterrupted"]

Handler = Callable[[int, Optional[FrameType]], object]

_HELD_BACK = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back the handlers of SIGINT and SIGTERM; what came meanwhile is handled at the end, in its order, each
    whatever those before it raise; of several exceptions the last one goes on.

    Python runs handlers in its main thread only, between any two instructions there: one that raises after the native
    step, but before its parameters' steps are counted, would leave the two apart. In other threads nothing can.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[Handler, int]] = []
    try:
        with contextlib.ExitStack() as stack:
            for held_back in _HELD_BACK:
                handler = signal.getsignal(held_back)
                if callable(handler):

                    def note(number: int, _: FrameType | None, handler: Handler = handler) -> None:
                        arrived.append((handler, number))

                    # Registered before it is needed: a handler that raises right here finds its own in place again.
                    stack.callback(signal.signal, held_back, handler)
                    signal.signal(held_back, note)
            yield
    finally:
        raised: BaseException | None = None
        for handler, number in arrived:
            try:
                handler(number, None)
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised
