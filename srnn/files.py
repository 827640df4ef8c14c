"""Files: where caches live, writing that leaves the last good file when it is cut short, and CSV."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent  # the installed package
UNFINISHED = ".unfinished"  # the end of a file's name while it is written


def cache_folder() -> Path:
    """``$SRNN_CACHE``, else ``srnn`` in the user's cache folder; without a home, one in the temporary folder."""
    for named, below in (("SRNN_CACHE", ""), ("XDG_CACHE_HOME", "srnn")):
        if os.environ.get(named):
            return expanded(os.environ[named]) / below
    home = home_folder()
    return home / ".cache" / "srnn" if home else Path(tempfile.gettempdir()) / f"srnn-{os.getuid()}"


def home_folder() -> Path | None:
    """The user's home; None for a user id without an account where HOME is not set, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced; as it is where there is no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def named_in_utf8(path: Path) -> Iterator[str]:
    """A name of a file for libraries that take no other than UTF-8. On Linux it may be of any bytes.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if str(path).encode(errors="replace") == os.fsencode(path):
        yield str(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def sweep_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote into a folder, which no other process may use now."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def nearest_there(path: Path) -> Path:
    """The path itself if it exists, else the nearest of its parents that does; absolute."""
    path = Path(os.path.abspath(path))
    return next(there for there in (path, *path.parents) if os.path.exists(there))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it first, then moved into place. Makes the folder.

    Where ``path`` is a symbolic link, the file it leads to is written, and the link stays.

    Raises:
        OSError: the folder cannot be written or the disk is full; an older file is still there. Or something else than
            a file stands there, such as a device or a pipe, which moving a file into place would remove.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "is no file, but a folder, a device or a pipe, and is left as it is", str(path))
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        # Made by the system call itself, so that the umask decides who may read it, as for any other file.
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # the file that was meant, for the message
        raise


def csv_bytes(
    rows: Sequence[Any], columns: Iterable[str] | None = None, quoted: Collection[str] = (), line_end: str = "\n"
) -> bytes:
    """Rows as a CSV file in UTF-8, under a line of names; a folder's name of other bytes keeps them.

    Args:
        rows: mappings, or instances of a dataclass, whose fields are the columns. What a row lacks, and None, is left
            empty.
        columns: their names, in order; without them all that any row has.
        quoted: columns whose values are always quoted. Others are where they have to be, as the module ``csv`` does,
            which cannot quote one column and not the next.
        line_end: of each line.
    """
    records = [_record(row) for row in rows]
    names = list(dict.fromkeys(name for record in records for name in record) if columns is None else columns)
    lines = [",".join(map(_cell, names))]
    lines += [",".join(_cell(record.get(name), name in quoted) for name in names) for record in records]
    return "".join(f"{line}{line_end}" for line in lines).encode(errors="surrogateescape")


def _record(row: Any) -> Mapping[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)} if is_dataclass(row) else row


def _cell(value: Any, always: bool = False) -> str:
    text = "" if value is None else str(value)
    if always or any(mark in text for mark in ',"\r\n'):
        text = '"' + text.replace('"', '""') + '"'
    return text
