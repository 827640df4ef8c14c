"""Fetching files into the cache: whole or not at all, resuming where an earlier try stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from srnn.errors import UserError
from srnn.files import write_atomically
from srnn.terminal import console

CONNECT_SECONDS, READ_SECONDS = 10, 30  # without an answer, until a network counts as dead
CHUNK = 1 << 13  # what a broken connection can cost


def fetch(url: str, path: Path, checksum: str | None = None) -> Path:
    """The file at ``path``, downloaded from ``url`` if it is not there or is damaged.

    What arrives is kept in ``path.part``, so that a stopped download resumes there; a finished file has its SHA-256
    beside it, in ``path.sha256``, and is checked against that each time. Processes that want the same file wait for
    the first.

    Args:
        url: where from.
        path: where to.
        checksum: ``"md5:..."`` or ``"sha256:..."`` of the file, where it is known.

    Raises:
        UserError: no network, an answer that is no file, a size or checksum that does not match, a folder that
            cannot be written.
    """
    import requests
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not is_whole(path, checksum):
                _download(url, path, checksum)
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be downloaded: {_reason(error)}") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; set SRNN_CACHE to a folder with room."
        ) from None
    return path


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}."
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke; what arrived is kept, run again and it goes on from there."
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return "no connection."
    return f"{error}."


def is_whole(path: Path, checksum: str | None = None) -> bool:
    """Whether a file that was fetched is there, as it was when it arrived, and has the checksum.

    Args:
        path: the file.
        checksum: as for ``fetch``.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if not path.is_file() or not beside.is_file() or beside.read_bytes().strip() != _digest(path, "sha256").encode():
        return False
    algorithm, _, wanted = (checksum or "").partition(":")
    return not wanted or _digest(path, algorithm) == wanted


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _download(url: str, path: Path, checksum: str | None) -> None:
    part = path.with_name(f"{path.name}.part")
    _receive(url, part)
    algorithm, _, wanted = (checksum or "").partition(":")
    if wanted and _digest(part, algorithm) != wanted:
        part.unlink()
        raise UserError(f"{url} is not the file that was expected: its {algorithm} is not {wanted}.")
    write_atomically(path.with_name(f"{path.name}.sha256"), _digest(part, "sha256").encode())
    os.replace(part, path)


def _receive(url: str, part: Path) -> None:
    """Append to ``part`` what is missing of it."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as answer:
        if answer.status_code == 416:  # there is nothing after what we have: it is whole, or of another file
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if whole != str(have):
                part.unlink()
                raise UserError(f"{url} has changed since its download began; run again to fetch it anew.")
            return
        answer.raise_for_status()
        resumes = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        length = answer.headers.get("Content-Length")
        total = (have if resumes else 0) + int(length) if length else None
        with part.open("ab" if resumes else "wb") as file:
            _write(answer.iter_content(CHUNK), file, url, total)
    if total is not None and part.stat().st_size != total:
        raise UserError(
            f"{url} stopped after {part.stat().st_size:,} of {total:,} bytes; run again and it goes on from there."
        )


def _write(chunks: Iterable[bytes], file: BinaryIO, url: str, total: int | None) -> None:
    """Write what comes, with a bar on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console.print(f"downloading {url}", soft_wrap=True)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=file.tell())
        for chunk in chunks:
            file.write(chunk)
            progress.advance(task, len(chunk))
