"""Sweeps: the jobs of a command line, and the folder in which the same sweep is resumed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Glob
from rich.table import Table

from srnn.config.composing import (
    compose_config,
    parse_override,
    presets,
    read_plain,
    settings_of,
    slug,
    unknown_options,
    with_options,
)
from srnn.config.settings import GROUPS, Settings
from srnn.errors import UserError
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.terminal import console


@dataclass(frozen=True)
class Job:
    """One run of a sweep: what to give Hydra for it, and a name that says how it differs from the others."""

    overrides: tuple[str, ...]
    name: str
    identity: str


def identity(config: Mapping[str, Any]) -> str:
    """A fingerprint of all in a config that a run's numbers depend on."""
    relevant = {key: value for key, value in config.items() if key not in ("tracking", "srnn", "init_partly")}
    # Absent from the configs of older runs.
    relevant = {key: value for key, value in relevant.items() if value is not None}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def expand(
    arguments: Sequence[str], params: Mapping[str, Any] | None = None, rows: Sequence[Sequence[str]] = ((),)
) -> list[Job]:
    """The jobs of a sweep, each once, in the order of their values.

    What a job's choices don't have or pass over is dropped for that job, if another job has it: ``pruning=none,gradual
    pruning.sparsity=0.8,0.9`` is three jobs.

    Args:
        arguments: overrides, of which some have several values.
        params: option -> values; arguments win.
        rows: overrides, each list of which is combined with all the rest.

    Raises:
        UserError: the first mistake in any job.
    """
    before = [f"{key}={value}" for key, value in (params or {}).items()]
    combined = [
        list(job) for row in rows for job in itertools.product(*choices_of([*before, *row, *arguments]).values())
    ]
    compose = functools.cache(compose_config)
    unknown = [unknown_options(job, compose) for job in combined]
    _check_known(combined, unknown)
    jobs: dict[str, tuple[Settings, tuple[str, ...]]] = {}
    for job, wrong in zip(combined, unknown, strict=True):
        kept = tuple(text for text in job if text not in wrong)
        settings = settings_of(with_options(kept, compose)).located()  # as the run keeps it, to be known again by
        jobs.setdefault(identity(settings.as_dict()), (settings, kept))
    names = _names(list(jobs.values()))
    return [Job(kept, name, key) for (key, (_, kept)), name in zip(jobs.items(), names, strict=True)]


def _check_known(jobs: Sequence[Sequence[str]], unknown: Sequence[Mapping[str, UserError]]) -> None:
    """Refuse what is of use to none of the jobs."""
    known = {text for job, wrong in zip(jobs, unknown, strict=True) for text in job if text not in wrong}
    errors = [error for wrong in unknown for text, error in wrong.items() if text not in known]
    if errors:
        raise next((error for error in errors if "Did you mean" in str(error)), errors[0])


def choices_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Key -> an override for each of its values, once; what comes later wins."""
    choices: dict[str, list[str]] = {}
    for text in texts:
        override = parse_override(text)
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [text]
        elif isinstance(pattern := override.value(), Glob):  # Hydra itself asks its search path, which is not set here
            if key not in GROUPS:
                raise UserError(f"{text}: a glob is of the names of a group: {', '.join(GROUPS)}.")
            choices[key] = [f"{key}={name}" for name in pattern.filter(presets(key))]
        elif override.is_discrete_sweep():
            choices[key] = list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))
        else:
            raise UserError(f"{text}: a sweep takes values, such as {key}=1,2; an interval needs hydra/sweeper=search.")
        if not choices[key]:
            raise UserError(f"{text}: there is no value in it, so the sweep has no jobs.")
    return choices


def _names(jobs: Sequence[tuple[Settings, tuple[str, ...]]]) -> list[str]:
    """Model, pruning, whatever else differs between the jobs, and the seed."""
    options = [dict(text.partition("=")[::2] for text in kept) for _, kept in jobs]
    shown = {"model", "pruning", "seed"}  # always
    keys = [key for key in dict.fromkeys(itertools.chain(*options)) if key not in shown]
    keys = [key for key in keys if len({given[key] for given in options if key in given}) > 1]
    names = []
    for (settings, _), given in zip(jobs, options, strict=True):
        words = {key: slug(given[key]) for key in keys if key in given}
        differing = [word if key in GROUPS else f"{key.rpartition('.')[2]}-{word}" for key, word in words.items()]
        parts = [settings.model["name"], settings.pruning["name"], *differing, f"s{settings.seed}"]
        names.append(slug("_".join(parts)))
    return names


class Sweep:
    """A sweep's folder, with a folder for each job. A job is known again by its config, whatever its folder's name.

    Attributes:
        folders: job -> its folder, there or not.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder = folder
        self.jobs = list(jobs)
        there = {key: run.path for run in RunFolder.below(folder, "*") if (key := identity_of(run.config)) is not None}
        self.folders = {job: there[job.identity] for job in jobs if job.identity in there}
        taken = Counter(job.name for job in jobs if job not in self.folders)
        for job in jobs:
            if job not in self.folders:
                alone = taken[job.name] == 1 and not (folder / job.name).exists()
                self.folders[job] = folder / (job.name if alone else f"{job.name}_{job.identity[:6]}")

    def finished(self, job: Job) -> bool:
        """Whether it ended well: the report is the last file of a run."""
        return RunFolder(self.folders[job]).finished

    def left(self) -> list[Job]:
        """The jobs to run or to resume."""
        return [job for job in self.jobs if not self.finished(job)]

    def announce(self) -> None:
        """What will be done."""
        left = self.left()
        begun = sum(RunFolder(self.folders[job]).config.is_file() for job in left)
        counts = [
            (len(self.jobs) - len(left), "finished already"),
            (begun, "to resume"),
            (len(left) - begun, "new"),
        ]
        words = ", ".join(f"{count} {word}" for count, word in counts if count)
        console.print(f"Sweep {self.folder}: {len(self.jobs)} jobs: {words}", soft_wrap=True)
        if left:
            console.print(f"What a job prints is in its {RunFolder(self.folder).log.name}.")

    def summarize(self, ran: Sequence[Job]) -> bool:
        """A table of all jobs, what failed and why, and the ways on. Returns whether all jobs are finished."""
        table = Table(title=f"Sweep {self.folder}", title_justify="left")
        for column in ("job", "", "test", "sparsity", "time"):
            table.add_column(column, justify="left" if column in ("job", "") else "right", overflow="fold")
        for job in self.jobs:
            table.add_row(self.folders[job].name, *self._row(job, job in ran))
        console.print(table)
        failed = self.left()
        for job in failed:
            console.print(f"failed: {self.folders[job]}: {_error(self.folders[job])}", soft_wrap=True)
        if failed:
            again = "the same command resumes them"
            console.print(f"{len(failed)} of {len(self.jobs)} jobs failed; {again}.", soft_wrap=True)
        if len(failed) < len(self.jobs):
            console.print(f"Compare them: srnn compare {shlex.quote(str(self.folder))}", soft_wrap=True)
        if any(self.folder.glob("*/wandb/offline-run-*")):
            console.print(
                f"Upload all to W&B: wandb sync {shlex.quote(str(self.folder))}/*/wandb/offline-run-*", soft_wrap=True
            )
        return not failed

    def _row(self, job: Job, ran: bool) -> list[str]:
        if not self.finished(job):
            return ["failed", "", "", ""]
        try:
            told = outcome(RunFolder(self.folders[job]).read_report())
        except (UserError, KeyError, TypeError, ValueError):
            return ["its report is damaged", "", "", ""]
        return ["finished" if ran else "finished before", *told]


def outcome(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a job came to: the test's score that tells most, the sparsity, and how long it took."""
    objective: Any = register.get("objective", report["objective"]).factory
    score = str(objective.telling)
    test, sparsity = report["scores"]["test_packed"][score], report["sparsity"]["reached"]
    return f"{test:.4f} {score.replace('_', ' ')}", f"{100 * sparsity:.2f} %", f"{report['seconds']['total']:.0f} s"


def identity_of(path: Path) -> str | None:
    """Of a run's ``config.yaml``; None if it is damaged."""
    try:
        return identity(read_plain(path))
    except (UserError, TypeError, ValueError):  # or it holds what no config does, such as bytes
        return None


def _error(folder: Path) -> str:
    """The last line of what a job left; a killed one leaves nothing."""
    try:
        lines = RunFolder(folder).error.read_text(encoding="utf-8").strip().splitlines()
        return lines[-1].removeprefix("srnn.errors.UserError: ")
    except (OSError, IndexError):
        return "it was stopped or killed, and left no error"
