"""Plug-ins: files of a folder, and installed packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from srnn.errors import UserError
from srnn.files import expanded


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


def plugin_folders(wanted: str = "auto") -> list[Path]:
    """The folders whose files are plug-ins of a run: at most one.

    Args:
        wanted: ``srnn.plugins``: ``auto`` (what ``plugins`` under ``[tool.srnn]`` in the ``pyproject.toml`` of the
            working directory names; without it none), ``on`` (``plugins/`` there), ``off``, or a folder.

    Raises:
        UserError: a folder that is named is not there.
    """
    if wanted == "off":
        return []
    named: object = _plugins_of_project() if wanted == "auto" else "plugins" if wanted == "on" else wanted
    if named is None:
        return []
    source = "pyproject.toml: tool.srnn.plugins" if wanted == "auto" else "srnn.plugins"
    if not isinstance(named, str):
        raise UserError(f"{source}={named!r} must be the name of a folder.")
    folder = Path(os.path.abspath(expanded(named)))
    if not folder.is_dir():
        raise UserError(f"{source}={wanted if wanted != 'auto' else named}: there is no folder {folder}.")
    return [folder]


def _plugins_of_project() -> object:
    try:
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or not a file that any tool can read
        return None
    tools = project.get("tool")
    of_srnn = tools.get("srnn") if isinstance(tools, dict) else None
    return of_srnn.get("plugins") if isinstance(of_srnn, dict) else None


def passed_over(wanted: str) -> str | None:
    """A line on the files in ``plugins/`` of the working directory, which nobody asked for; None if there are none."""
    folder = Path.cwd() / "plugins"
    if wanted != "auto" or plugin_folders() or not any(plugin_files([folder])):
        return None
    return (
        f"the plug-ins in {folder} are passed over: add srnn.plugins=on, or the line 'plugins = \"plugins\"' under "
        f"[tool.srnn] in pyproject.toml."
    )
