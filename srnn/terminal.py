"""The console that everything is printed to."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class _Console(Console):
    """Prints what it is given as it is: brackets in a path are no markup. A reader that goes away ends nothing."""

    def on_broken_pipe(self) -> None:
        """Print nothing more, and say once why."""
        self.quiet = True
        close_output()
        print("srnn: the output was closed; srnn itself goes on, and its files tell the rest.", file=sys.stderr)


console = _Console(
    width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False, markup=False, emoji=False
)


def close_output() -> None:
    """Send what is printed from now on nowhere: the interpreter would fail at its end, flushing to a closed reader."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def show_what_can_be_shown() -> None:
    """Let characters that the output's encoding lacks be escaped, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def plural(count: int, word: str) -> str:
    """A number of things, for people."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
