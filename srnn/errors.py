"""Errors meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user gave cannot be used.

    The text is one sentence or two: the key or file, what was given, what is allowed, what to do. The
    command line prints it without a traceback and exits with 2 (``SRNN_DEBUG=1`` shows the traceback).
    """


class JobFailed(BaseException):
    """Carries an error through Hydra, which announces every Exception of a job in its own words.

    Attributes:
        error: what happened.
        folder: the run's.
    """

    def __init__(self, error: Exception, folder: Path) -> None:
        super().__init__(str(error))
        self.error = error
        self.folder = folder


def cannot_be_written(folder: Path, error: OSError, option: str) -> UserError:
    """What to say about a folder for results, which ``option`` names."""
    return UserError(
        f"{option}={folder}: this folder cannot be written: {error.strerror or error}; set {option} to another."
    )


def in_words(error: Exception) -> str:
    """An error for people: of the system's, the file and what was wrong with it, without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{': '.join([*names, error.strerror])}."


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
