"""The console that everything is printed to."""

from __future__ import annotations

import sys

from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False)


def plural(count: int, word: str) -> str:
    """A number of things, for people."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
