"""Files: where caches live, and writing that leaves the last good file when it is cut short."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent  # the installed package


def cache_folder() -> Path:
    """``$SRNN_CACHE``, else ``srnn`` in the user's cache folder."""
    named = os.environ.get("SRNN_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srnn"


def nearest_there(path: Path) -> Path:
    """The path itself if it exists, else the nearest of its parents that does; absolute."""
    path = Path(os.path.abspath(path))
    return next(there for there in (path, *path.parents) if os.path.exists(there))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it first, then moved into place. Makes the folder.

    Raises:
        OSError: the folder cannot be written or the disk is full; an older file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # the file that was meant, for the message
        raise
