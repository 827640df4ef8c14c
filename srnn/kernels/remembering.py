"""What was measured once on a machine, kept in the cache folder: ``kernels.json``, under hardware and versions."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from srnn.files import cache_folder, write_atomically

_log = logging.getLogger("srnn.kernels")
BUSY = 1.5  # load for each CPU


def choices_file() -> Path:
    """Where it is kept."""
    return cache_folder() / "kernels.json"


def recall(key: str, what: str) -> dict[str, Any] | None:
    """What was kept of a thing under a key, or None."""
    entries = _read().get(key)
    entry = entries.get(what) if isinstance(entries, dict) else None
    return entry if isinstance(entry, dict) else None


def remember(key: str, what: str, entry: dict[str, Any]) -> None:
    """Keep what was measured; where that cannot be written, a line in the log says so."""
    path = choices_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Read again inside the lock: other processes write their own choices meanwhile.
        with FileLock(f"{path}.lock"):
            cache = _read()
            entries = cache.get(key)
            cache[key] = (entries if isinstance(entries, dict) else {}) | {what: entry}
            write_atomically(path, json.dumps(cache, indent=1).encode())
    except OSError as error:
        _log.info("the choice of kernels cannot be kept: %s", error)


def cpu_load() -> float | None:
    """How many threads of the machine wanted to run at once, over the last minute, for each CPU; None if unknown."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None


def busy() -> bool:
    """Whether far more wants to run than there are cores: figures taken meanwhile are good for this process only."""
    return (cpu_load() or 0.0) > BUSY


def _read() -> dict[str, Any]:
    try:
        found = json.loads(choices_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
