"""Saying why a first call takes so long: on a new machine it compiles."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

MESSAGE = "srnn: making the CPU kernels ready; once on a machine they are compiled, which takes some seconds."


class _Announced:
    """Says on standard error what a call does that takes over a second: the first one on a machine compiles."""

    def __init__(self, key: tuple[object, ...]) -> None:
        self.key = key
        self.timer = threading.Timer(1.0, _announce)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        _done.add(self.key)


@lru_cache  # once
def _announce() -> None:
    print(MESSAGE, file=sys.stderr, flush=True)


_done: set[tuple[object, ...]] = set()


def announced(*key: object) -> AbstractContextManager[None]:
    """Around the first call of a kind; nothing around later ones."""
    return nullcontext() if key in _done else _Announced(key)
