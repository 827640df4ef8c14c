"""What a run was made in: ``environment.json``, by which ``srnn rerun`` tells why numbers differ."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from srnn.errors import UserError
from srnn.files import PACKAGE, write_atomically
from srnn.registry import register
from srnn.registry.registry import KINDS
from srnn.run_folder import RunFolder, read_json

if TYPE_CHECKING:
    from srnn.datasets.base import DataModule  # which needs Lightning: a packed file is run without it

LONGEST_PATCH = 1 << 20  # bytes of uncommitted changes that are kept


def environment(command: Sequence[str], config: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The command, the folder it ran in, the state of git, all packages' versions, the hardware, files of plug-ins."""
    return {
        "command": shlex.join(command),
        "folder": os.getcwd(),
        "plugins": plugins_of(config),
        "python": sys.version.split()[0],
        "git": _git(),
        "packages": _packages(),
        "hardware": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }


def data_checksums(data: DataModule) -> dict[str, str]:
    """Part -> SHA-256 of its data."""
    from srnn.datasets.base import SPLITS

    return {part: data.checksum(part) for part in SPLITS}


def write_environment(folder: RunFolder, made_in: Mapping[str, Any]) -> None:
    """Write it into a run's folder."""
    write_atomically(folder.environment, json.dumps(made_in, indent=1).encode())


def record_data(folder: RunFolder, data: DataModule) -> None:
    """Add the data's checksums; a resumed run must find the data it was started with. Raises UserError."""
    made_in, sums = read_environment(folder), data_checksums(data)
    before = made_in.get("data", sums)
    if not isinstance(before, Mapping):
        raise UserError(f"{folder.environment} is damaged: its data are a {type(before).__name__}.")
    if before != sums:
        changed = " and ".join(part for part in sums if before.get(part) != sums[part])
        raise UserError(f"{folder} cannot go on: its data have changed since it was started ({changed}).")
    if "data" not in made_in:
        write_environment(folder, {**made_in, "data": sums})


def plugins_of(config: Mapping[str, Any]) -> dict[str, str]:
    """``kind=name`` -> the file of the plug-in that it comes from, for all in a run's config that is of plug-ins."""
    found = {}
    for kind in KINDS:
        component = register.components.get((kind, str(config.get(kind, {}).get("name"))))
        if component is not None and component.origin.startswith("plug-in"):
            file = getattr(sys.modules.get(component.factory.__module__), "__file__", None)
            found[f"{kind}={component.name}"] = str(file or component.origin)
    return found


def require_plugins(folder: RunFolder) -> None:
    """Refuse to read a run whose plug-ins are not loaded. Raises UserError, which names their files."""
    known = read_environment(folder).get("plugins", {})
    for chosen, file in known.items() if isinstance(known, dict) else ():
        kind, _, name = str(chosen).partition("=")
        if kind in KINDS and name not in register.names(kind):
            raise UserError(
                f"{folder} uses {chosen} of the plug-in {file}, which is not loaded: install its package again, or add "
                f"srnn.plugins={Path(str(file)).parent}."
            )


def read_environment(folder: RunFolder) -> dict[str, Any]:
    """Of a run's folder; empty if it has none. Raises UserError for a damaged file."""
    return read_json(folder.environment) if folder.environment.is_file() else {}


@contextmanager
def started_in(folder: RunFolder) -> Iterator[None]:
    """Work in the folder that a run was started in, while inside: what its config names by a relative path is there.

    Where that folder is gone, as for a run that was carried to another machine, it stays the working folder.
    """
    there = read_environment(folder).get("folder")
    here = os.getcwd()
    if not isinstance(there, str) or not os.path.isdir(there):
        yield
        return
    os.chdir(there)
    try:
        yield
    finally:
        os.chdir(here)


def changed_data(folder: RunFolder, data: DataModule) -> str | None:
    """What to say where the data are not those of a run any more; None if they are, or if it was not recorded."""
    before, sums = read_environment(folder).get("data"), data_checksums(data)
    if not isinstance(before, Mapping):
        return None
    changed = [part for part in sums if part in before and before[part] != sums[part]]
    if not changed:
        return None
    told = ", ".join(f"{part} was SHA-256 {str(before[part])[:12]}..., is {sums[part][:12]}..." for part in changed)
    return f"These are not the data of the run: {told}. The scores are no scores of that run."


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, a line each, as far as the earlier one was recorded."""
    lines = []
    for kind in (kind for kind in ("python", "git", "packages", "hardware", "data") if kind in before):
        one, two = before.get(kind), now.get(kind)
        if not isinstance(one, Mapping) or not isinstance(two, Mapping):
            one, two = {kind: one}, {kind: two}
        changed = [name for name in {**one, **two} if one.get(name) != two.get(name)]
        lines += [f"{kind}: {name}: {_short(one.get(name))} -> {_short(two.get(name))}" for name in changed]
    return lines


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _packages() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items()))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict[str, Any]:
    """Commit and uncommitted changes: of srnn's own repository, and of the working folder's if that is another."""
    state: dict[str, Any] = {}
    roots: dict[str, None] = {}
    for folder in (PACKAGE, Path.cwd()):
        if root := _ask_git(folder, "rev-parse", "--show-toplevel"):
            roots[root] = None
    for root in roots:
        status = _ask_git(Path(root), "status", "--porcelain")
        changed = any(not line.startswith("??") for line in (status or "").splitlines())
        patch = (_ask_git(Path(root), "diff", "HEAD") if changed else None) or ""
        state[root] = {
            "commit": _ask_git(Path(root), "rev-parse", "HEAD"),
            "status": status,
            "patch": patch if len(patch) <= LONGEST_PATCH else f"longer than {LONGEST_PATCH} bytes, not kept",
        }
    return state


def _ask_git(folder: Path, *question: str) -> str | None:
    """Git's answer; None where there is no git or no repository."""
    # It takes no lock: killed in the middle, it would leave one that stops the user's next `git commit`.
    asked = ["git", "--no-optional-locks", "-c", "diff.autoRefreshIndex=false", "-C", str(folder), *question]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
