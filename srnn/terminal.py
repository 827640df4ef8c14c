"""The console that everything is printed to."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

WIDTH = 110  # characters, where the output is no terminal


class _Console(Console):
    """Prints what it is given as it is: brackets in a path are no markup. A reader that goes away ends nothing.

    Attributes:
        instead: what prints in its place, while that is there.
    """

    instead: Console | None = None

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich's, but for what stands in its place."""
        if self.instead is not None:
            self.instead.print(*objects, **how)
            return
        try:
            super().print(*objects, **how)
        except OSError:  # a log on a full disk, a terminal whose line was lost
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Print nothing more, and say once why."""
        self.quiet = True
        close_output()
        with suppress(OSError):  # it may be the same terminal
            print("srnn: the output was closed; srnn itself goes on, and its files tell the rest.", file=sys.stderr)


def _console(file: TextIO | None = None) -> _Console:
    stream = file or sys.stdout  # None in a process that was started without output
    width = None if stream is not None and stream.isatty() else WIDTH
    return _Console(file=file, width=width, highlight=False, soft_wrap=False, markup=False, emoji=False)


console = _console()


@dataclass(frozen=True)
class Screen:
    """Where a run shows its progress.

    Attributes:
        console: that it is printed to.
        title: what stands before it: of a sweep's job its name.
        bar: whether it is a bar; else it is a line now and then.
    """

    console: Console
    title: str
    bar: bool


_jobs: list[Screen] = []


def screen() -> Screen:
    """Where progress is shown now."""
    return _jobs[-1] if _jobs else Screen(console, "", console.is_terminal)


@contextmanager
def logged(path: Path, title: str, bar: bool) -> Iterator[None]:
    """Print into a file, and show nothing but progress, while inside: what a sweep's job prints nobody reads at once.

    Warnings go into the file, and are shown with the title before them.

    Args:
        path: the file; what it holds stays.
        title: what stands before the progress.
        bar: whether a terminal may show it as a bar; not if several processes write to it.
    """
    beside, show = _console(), warnings.showwarning

    def warn(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        text = warnings.formatwarning(message, category, filename, lineno)
        console.print(text, end="", soft_wrap=True)
        print(f"{title}: {text}", end="", file=sys.stderr)

    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        _jobs.append(Screen(beside, f"{title}: ", bar and beside.is_terminal))
        console.instead = _console(file)
        warnings.showwarning = warn  # type: ignore[assignment]
        try:
            yield
        finally:
            console.instead, warnings.showwarning = None, show
            _jobs.pop()


def close_output() -> None:
    """Send what is printed from now on nowhere: the interpreter would fail at its end, flushing to a closed reader."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def open_closed_streams() -> None:
    """Give a process that was started without input or output (``>&-``) ones that lead nowhere.

    Without them the first file that it opens gets their number, and whatever is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(handle, "w" if number else "r", closefd=False))


def show_what_can_be_shown() -> None:
    """Let characters that the output's encoding lacks be escaped, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextmanager
def warnings_in_words() -> Iterator[None]:
    """Print warnings of this package as sentences while inside: from which line they come helps no user."""
    before, package = warnings.formatwarning, f"{Path(__file__).parent}{os.sep}"

    def told(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if filename.startswith(package):
            return f"srnn: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = before


def plural(count: int, word: str) -> str:
    """A number of things, for people."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
