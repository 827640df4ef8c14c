"""What every export format shares: its entry in the table of formats, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

# What a file says about itself; or a function that makes it of the network with the numbers that the file holds.
About = str | Callable[[nn.Module], str]


@dataclass(frozen=True)
class ExportRequest:
    """What every format is given beside the network and the file.

    Attributes:
        example: the arguments of a call, or None.
        about: what the file says about itself.
        tell: called with sentences on what the file costs, where that is known before it is run; the report then
            leaves them out.
    """

    example: Any = None
    about: About = ""
    tell: Callable[[str], None] | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and what it was compared with before.

    Attributes:
        path: the file; of several, the first one to look at.
        nbytes: of all that was written.
        verified: what was run and compared, in words.
        difference: the largest difference of an output or state from the network's, over the larger of 1 and the
            largest output; None where nothing could be run. Of a program in integers, the numpy model's.
        notes: what a user should know about the file, in sentences.
    """

    path: Path
    nbytes: int
    verified: str
    difference: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line each: the file, what was verified, the notes."""
        head = f"{self.path}: {self.nbytes:,} bytes"
        away = "" if self.difference is None else f": largest difference {self.difference:.1e}"
        return "\n".join([head, f"{self.verified}{away}", *self.notes])


def _nothing_to_check(**options: object) -> None:
    pass


@dataclass(frozen=True)
class ExportFormat:
    """A way to write a network.

    Attributes:
        suffix: of its files, such as ``.onnx``.
        write: ``write(model, path, request, **options)``; its keyword arguments are the format's options. It
            leaves no file unless what it wrote agrees with the network.
        check: called with the options before anything is read or run; raises UserError for a value that there is not,
            or a package that is missing.
    """

    suffix: str
    write: Callable[..., ExportReport]
    check: Callable[..., None] = _nothing_to_check
