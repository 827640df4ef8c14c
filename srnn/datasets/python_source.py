"""The source of the running Python's own standard library: real text that is always there."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import sysconfig
from pathlib import Path

from srnn.datasets.text import Texts, TextStreams
from srnn.errors import UserError
from srnn.files import cache_folder, write_atomically
from srnn.registry import register
from srnn.registry.option_types import Count

# About 0.4 MB. Split by file, so that no text is seen in training that is measured later.
MODULES = {
    "train": ["ast", "calendar", "codecs", "configparser", "contextlib", "copy", "dataclasses", "fractions", "heapq"],
    "valid": ["functools", "queue"],
    "test": ["random", "textwrap"],
}


@register.dataset("python_source")
class PythonSource(TextStreams):
    """Characters of the running Python's standard library (0.4 MB); needs no download."""

    def __init__(self, batch_size: Count = 32, sequence_length: Count = 64, eval_streams: Count = 16) -> None:
        super().__init__("characters", batch_size, sequence_length, eval_streams)

    def texts(self) -> Texts:
        """From the cache when its checksum holds, else from the standard library."""
        cached = cache_folder() / f"python_source-{platform.python_implementation()}-{platform.python_version()}.json"
        texts = _read_cache(cached)
        if texts is None:
            texts = Texts(**{split: "".join(map(_source, names)) for split, names in MODULES.items()})
            _write_cache(cached, texts)
        return texts


def _source(module: str) -> str:
    path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(
            f"dataset=python_source: this Python comes without the source of its standard library (no {path}); use "
            f"dataset=text dataset.path=FILE."
        ) from None


def _checksum(texts: dict[str, str]) -> str:
    return hashlib.sha256("\0".join([*MODULES["train"], *texts.values()]).encode()).hexdigest()


def _read_cache(path: Path) -> Texts | None:
    """The cached texts; None when there are none or they are damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Texts(**data["texts"]) if data["sha256"] == _checksum(data["texts"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_cache(path: Path, texts: Texts) -> None:
    """Keep the texts; a cache that cannot be written is done without."""
    data = {"sha256": _checksum(vars(texts)), "texts": vars(texts)}
    try:
        write_atomically(path, json.dumps(data).encode())
    except OSError as error:
        print(
            f"srnn: no cache at {path.parent} ({error.strerror}); set SRNN_CACHE to a folder that can be written.",
            file=sys.stderr,
        )
