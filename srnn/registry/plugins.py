"""Plug-ins: files of a folder, and installed packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path


def import_file(name: str, path: Path) -> None:
    """Import a file as the module ``name``; nothing is left of one that raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def plugin_files(folders: list[Path]) -> Iterator[Path]:
    """Every ``*.py`` of the folders, each folder once; names that start with ``_`` are left out."""
    seen = set()
    for folder in folders:
        if folder.is_dir() and folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield from sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))
