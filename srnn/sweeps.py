"""Sweeps: the jobs of a command line, and the folder in which the same sweep goes on."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from srnn.config import (
    GROUPS,
    Settings,
    check_choice,
    compose_config,
    compose_hydra,
    compose_settings,
    parse_override,
    slug,
    unknown_options,
)
from srnn.errors import UserError
from srnn.terminal import console
from srnn.tracking.scores import TELLING

OURS = "hydra_plugins.srnn_sweeper.SrnnSweeper"
ERROR = "error.txt"  # in a job's folder: why it failed


@dataclass(frozen=True)
class Job:
    """One run of a sweep: what to give Hydra for it, and a name that says how it differs from the others."""

    overrides: tuple[str, ...]
    name: str
    identity: str


def identity(config: Mapping[str, Any]) -> str:
    """A fingerprint of all in a config that a run's numbers depend on."""
    relevant = {key: value for key, value in config.items() if key not in ("tracking", "srnn")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def expand(
    arguments: Sequence[str], params: Mapping[str, Any] | None = None, rows: Sequence[Sequence[str]] = ((),)
) -> list[Job]:
    """The jobs of a sweep, each once, in the order of their values.

    An option that a job's choices don't have is dropped for that job, if another job has it: ``pruning=none,gradual
    pruning.sparsity=0.8,0.9`` is three jobs.

    Args:
        arguments: overrides, of which some have several values.
        params: option -> values; arguments win.
        rows: overrides, each list of which is combined with all the rest.

    Raises:
        UserError: the first mistake in any job.
    """
    before = [f"{key}={value}" for key, value in (params or {}).items()]
    combined = [list(job) for row in rows for job in itertools.product(*_choices([*before, *row, *arguments]).values())]
    composed = functools.cache(lambda chosen: compose_config(chosen))
    unknown = [unknown_options(job, composed) for job in combined]
    jobs: dict[str, tuple[Settings, tuple[str, ...]]] = {}
    _check_known(combined, unknown)
    for job, wrong in zip(combined, unknown, strict=True):
        kept = tuple(text for text in job if text not in wrong)
        settings = compose_settings(kept)
        jobs.setdefault(identity(settings.as_dict()), (settings, kept))
    names = _names(list(jobs.values()))
    return [Job(kept, name, key) for (key, (_, kept)), name in zip(jobs.items(), names, strict=True)]


def _check_known(jobs: Sequence[Sequence[str]], unknown: Sequence[Mapping[str, UserError]]) -> None:
    """Refuse an option that none of the jobs has."""
    known = {_key(text) for job, wrong in zip(jobs, unknown, strict=True) for text in job if text not in wrong}
    errors = [error for wrong in unknown for text, error in wrong.items() if _key(text) not in known]
    if errors:
        raise next((error for error in errors if "Did you mean" in str(error)), errors[0])


def _choices(texts: Sequence[str]) -> dict[str, list[str]]:
    """Key -> an override for each of its values; what comes later wins."""
    choices: dict[str, list[str]] = {}
    for text in texts:
        override = parse_override(text)
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [text]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise UserError(f"{text}: a sweep takes values, such as {key}=1,2; an interval needs hydra/sweeper=optuna.")
    return choices


def _key(text: str) -> str:
    return text.partition("=")[0]


def _names(jobs: Sequence[tuple[Settings, tuple[str, ...]]]) -> list[str]:
    """Model, pruning, whatever else differs between the jobs, and the seed."""
    options = [dict(text.partition("=")[::2] for text in kept) for _, kept in jobs]
    shown = {"model", "pruning", "seed"}  # always
    keys = [key for key in dict.fromkeys(itertools.chain(*options)) if key not in shown]
    keys = [key for key in keys if len({given[key] for given in options if key in given}) > 1]
    names = []
    for (settings, _), given in zip(jobs, options, strict=True):
        differing = [
            given[key] if key in GROUPS else f"{key.rpartition('.')[2]}-{given[key]}" for key in keys if key in given
        ]
        names.append(
            slug("_".join([settings.model["name"], settings.pruning["name"], *differing, f"s{settings.seed}"]))
        )
    return names


class Sweep:
    """A sweep's folder, with a folder for each job. A job is known again by its config, whatever its folder's name.

    Attributes:
        folders: job -> its folder, there or not.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder = folder
        self.jobs = list(jobs)
        there = {key: path for path in sorted(folder.glob("*/config.yaml")) if (key := _identity_of(path)) is not None}
        self.folders = {job: there[job.identity].parent for job in jobs if job.identity in there}
        taken = Counter(job.name for job in jobs if job not in self.folders)
        for job in jobs:
            if job not in self.folders:
                alone = taken[job.name] == 1 and not (folder / job.name).exists()
                self.folders[job] = folder / (job.name if alone else f"{job.name}_{job.identity[:6]}")

    def finished(self, job: Job) -> bool:
        """Whether it ended well: the report is the last file of a run."""
        return (self.folders[job] / "report.json").is_file()

    def left(self) -> list[Job]:
        """The jobs to run or to go on with."""
        return [job for job in self.jobs if not self.finished(job)]

    def announce(self) -> None:
        """What will be done."""
        left = self.left()
        begun = sum((self.folders[job] / "config.yaml").is_file() for job in left)
        counts = [
            (len(self.jobs) - len(left), "finished already"),
            (begun, "to go on with"),
            (len(left) - begun, "new"),
        ]
        words = ", ".join(f"{count} {word}" for count, word in counts if count)
        console.print(f"Sweep {self.folder}: {len(self.jobs)} jobs: {words}", markup=False, soft_wrap=True)

    def summarize(self, ran: Sequence[Job]) -> bool:
        """A table of all jobs, what failed and why, and the ways on. Returns whether all jobs are finished."""
        table = Table(title=f"Sweep {self.folder}", title_justify="left")
        for column in ("job", "", "test", "sparsity"):
            table.add_column(column, justify="right" if column in ("test", "sparsity") else "left", overflow="fold")
        for job in self.jobs:
            table.add_row(escape(self.folders[job].name), *self._row(job, job in ran))
        console.print(table)
        failed = self.left()
        for job in failed:
            console.print(f"failed: {self.folders[job]}: {_error(self.folders[job])}", markup=False, soft_wrap=True)
        if failed:
            again = "the same command goes on with them"
            console.print(f"{len(failed)} of {len(self.jobs)} jobs failed; {again}.", soft_wrap=True)
        if len(failed) < len(self.jobs):
            console.print(f"Compare them: srnn compare {self.folder}", soft_wrap=True)
        if any(self.folder.glob("*/wandb/offline-run-*")):
            console.print(f"Upload all to W&B: wandb sync {self.folder}/*/wandb/offline-run-*", soft_wrap=True)
        return not failed

    def _row(self, job: Job, ran: bool) -> list[str]:
        if not self.finished(job):
            return ["failed", "", ""]
        report = json.loads((self.folders[job] / "report.json").read_text())
        score = TELLING[report["objective"]]
        test, sparsity = report["scores"]["test_packed"][score], report["sparsity"]["reached"]
        return [
            "finished" if ran else "finished before",
            f"{test:.4f} {score.replace('_', ' ')}",
            f"{100 * sparsity:.2f} %",
        ]


def _identity_of(path: Path) -> str | None:
    """Of a run's ``config.yaml``; None if it is damaged."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return identity(config) if isinstance(config, dict) else None


def _error(folder: Path) -> str:
    """The last line of what a job left; a killed one leaves nothing."""
    try:
        return (folder / ERROR).read_text().strip().splitlines()[-1].removeprefix("srnn.errors.UserError: ")
    except (OSError, IndexError):
        return "it was stopped or killed, and left no error"


@dataclass(frozen=True)
class CommandLine:
    """A checked command line of ``train``.

    Attributes:
        argv: what Hydra has to be given for it.
        sweep: the folder of its jobs; None for a single run.
    """

    argv: list[str]
    sweep: Path | None


def check_command_line(argv: Sequence[str]) -> CommandLine:
    """Compose and check every job a command line asks for, before Hydra starts the first.

    Raises:
        UserError: the first mistake in any of them.
    """
    arguments = get_args_parser().parse_args(list(argv))
    overrides = [parse_override(text) for text in arguments.overrides]
    for override in overrides:
        if override.key_or_group == "experiment" and not override.is_sweep_override():
            check_choice(override)
    hydra = compose_hydra([text for text, o in zip(arguments.overrides, overrides, strict=True) if _is_hydras(o)])
    _check_installed(hydra)
    sweep = arguments.multirun or (hydra.mode == RunMode.MULTIRUN and not arguments.cfg)
    if not sweep:
        for override in overrides:
            if override.is_sweep_override():
                raise UserError(
                    f"{override.input_line}: several values make a sweep; add -m, or quote the value to mean one."
                )
        compose_settings(arguments.overrides)
        return CommandLine(list(argv), sweep=None)
    if arguments.cfg:
        raise UserError(f"--cfg {arguments.cfg} prints the config of one job: leave out -m and name one value each.")
    ours = hydra.sweeper._target_ == OURS
    texts = [str(o.input_line) for o in overrides if not o.is_hydra_override()]
    if ours:
        expand(texts, hydra.sweeper.params, hydra.sweeper.rows or ((),))
    else:
        _check_space(texts)
    to_hydra = {text: _as_values(o) if ours else text for text, o in zip(arguments.overrides, overrides, strict=True)}
    words = [to_hydra.get(word, word) for word in argv]
    folder = hydra.sweep.dir
    if folder == "auto":
        folder = f"outputs/{_folder_name(overrides)}"
        words.append(f"hydra.sweep.dir={folder}")
    return CommandLine(words, sweep=Path(folder))


def _is_hydras(override: Override) -> bool:
    """Whether it says how jobs run: an option of Hydra's, or a preset, which may bring some."""
    preset = override.key_or_group == "experiment" and not override.is_sweep_override()
    return preset or override.is_hydra_override()


def _as_values(override: Override) -> str:
    """An override as a sweep over its one value.

    Hydra composes the config of the sweep itself with what is not swept, and would refuse options that only some
    of the jobs have.
    """
    text = str(override.input_line)
    value = override.get_value_element_as_str() if not override.is_sweep_override() else ""
    return text if _is_hydras(override) or not value else f"{override.get_key_element()}=choice({value})"


def _check_space(texts: Sequence[str]) -> None:
    """Check every value once, where a sweeper chooses which of them it combines; of an interval the ends."""
    parsed = [parse_override(text) for text in texts]
    values: list[list[str]] = []
    for override in parsed:
        key = override.get_key_element()
        if override.is_interval_sweep():
            interval: Any = override.value()
            values.append([f"{key}={interval.start}", f"{key}={interval.end}"])
        else:
            values.append(_choices([str(override.input_line)])[key])
    for index in range(max(map(len, values), default=1)):
        compose_settings([choices[min(index, len(choices) - 1)] for choices in values])


def _folder_name(overrides: Sequence[Override]) -> str:
    """The same for the same sweep: what is swept, readable, and a fingerprint of all of it."""
    ours = sorted(((str(o.input_line), o) for o in overrides if not o.is_hydra_override()), key=lambda pair: pair[0])
    shown = []
    for text, override in ours:
        key, _, value = text.partition("=")
        if key == "experiment":
            shown.append(value)
        elif override.is_sweep_override():
            shown.append(f"{key.rpartition('.')[2]}-{value.removeprefix('choice').strip('()')}")
    readable = slug("_".join(shown))[:60].strip("-._")
    return f"sweep_{readable}_{hashlib.sha256(' '.join(text for text, _ in ours).encode()).hexdigest()[:6]}"


def _check_installed(hydra: DictConfig) -> None:
    """Name the extra that brings a launcher or sweeper. Raises UserError."""
    for kind in ("launcher", "sweeper"):
        package = ".".join(str(hydra[kind]._target_).split(".")[:2])
        if importlib.util.find_spec(package) is None:
            name = hydra.runtime.choices.get(f"hydra/{kind}")
            raise UserError(
                f"hydra/{kind}={name} needs a package that is not installed: pip install 'srnn[launchers]'."
            )
