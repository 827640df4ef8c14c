"""Ctrl-C, wherever it comes: it is neither lost nor taken for a fault."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interruptible() -> Iterator[None]:
    """While inside, a Ctrl-C ends the block with ``KeyboardInterrupt``, also where Python or compiled code hides it.

    Python drops an exception that leaves a destructor, and prints a traceback. Compiled code may make another one of
    it: matplotlib's, a ``ValueError`` in the middle of a plot.

    Raises:
        KeyboardInterrupt: there was one, and the block ended with it or with another exception after it.
    """
    with _sent_again():
        before: Any = signal.getsignal(signal.SIGINT)
        raised = False

        def interrupt(number: int, frame: FrameType | None) -> None:
            nonlocal raised
            try:
                before(number, frame)
            except KeyboardInterrupt:
                raised = True
                raise

        listens = callable(before) and threading.current_thread() is threading.main_thread()  # only it may
        if listens:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        except Exception as error:
            if raised:
                raise KeyboardInterrupt from error
            raise
        finally:
            if listens:
                signal.signal(signal.SIGINT, before)


@contextmanager
def _sent_again() -> Iterator[None]:
    """Send a Ctrl-C again that comes while an object is taken down."""
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        # Not at once, which would be dropped like the first. A signal: it also ends what waits.
        main_thread = threading.main_thread().ident or 0
        timers.append(threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)))
        timers[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:  # what was to be interrupted has ended
            timer.cancel()
