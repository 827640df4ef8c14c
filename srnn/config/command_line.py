"""The command line of a run or a sweep, checked before Hydra sees it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

from srnn.config.composing import (
    check_choice,
    compose_hydra,
    compose_settings,
    parse_override,
    run_folder,
    slug,
)
from srnn.config.hydra_internals import flags_parser
from srnn.config.sweeps import Job, choices_of, expand, identity
from srnn.errors import UserError
from srnn.registry import register
from srnn.terminal import plural

REFUSED = ("config_path", "config_name", "experimental_rerun")  # flags of Hydra's
OURS = "hydra_plugins.srnn_sweeper.SrnnSweeper"
HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")  # what launches on this machine
# Launchers and sweepers of the extra `launchers` -> the plug-in of Hydra's that has them.
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "ray": "hydra_ray_launcher",
    "slurm": "hydra_submitit_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "optuna": "hydra_optuna_sweeper",
    "search": "hydra_optuna_sweeper",
}


@dataclass(frozen=True)
class CommandLine:
    """A checked command line of ``train``.

    Attributes:
        argv: what Hydra has to be given for it.
        folder: of its run, but for the time in its name; or of its sweep.
        sweep: the same folder if it is a sweep; None for a single run.
        jobs: of a sweep that runs on this machine; none where they are not known, or may run on others.
    """

    argv: list[str]
    folder: Path
    sweep: Path | None
    jobs: Sequence[Job] = ()


def check_command_line(argv: Sequence[str]) -> CommandLine:
    """Compose and check every job a command line asks for, before Hydra starts the first.

    Raises:
        UserError: the first mistake in any of them.
    """
    arguments, argv = _parse([_literal(word) for word in argv])
    overrides = [parse_override(text) for text in arguments.overrides]
    for override in overrides:
        _check_given(override)
        _check_installed(override)
        if override.key_or_group == "experiment" and not override.is_sweep_override():
            check_choice(override)
    hydra = compose_hydra([text for text, o in zip(arguments.overrides, overrides, strict=True) if _is_hydras(o)])
    if arguments.multirun and arguments.cfg:
        raise UserError(f"--cfg {arguments.cfg} prints one job's config: leave out -m and name one value each.")
    if arguments.multirun or hydra.mode == RunMode.MULTIRUN:
        _check_folder_named(overrides, "hydra.run.dir", "hydra.sweep.dir", "a sweep")
        if not arguments.cfg:
            return _check_sweep(argv, overrides, hydra)
    else:
        _check_folder_named(overrides, "hydra.sweep.dir", "hydra.run.dir", "a single run")
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: several values make a sweep; add -m, or quote the value to mean one."
            )
    if arguments.cfg and (told := told_of_sweep(arguments.overrides)):
        print(f"srnn: {told}", file=sys.stderr)
    compose_settings(arguments.overrides)
    return CommandLine(list(argv), run_folder(arguments.overrides), sweep=None)


def told_of_sweep(overrides: Sequence[str]) -> str | None:
    """What to say where one config is made of options that start a sweep, as some presets do; None where they do not.

    Args:
        overrides: options, each of one value.

    Raises:
        UserError: one is wrong.
    """
    hydra = compose_hydra([text for text in overrides if _is_hydras(parse_override(text))])
    if hydra.mode != RunMode.MULTIRUN:
        return None
    if hydra.sweeper._target_ != OURS:
        return "this is a sweep, and here its config before a sweeper varies it."
    jobs = _jobs(overrides, hydra)
    mine = identity(compose_settings(overrides).located().as_dict())
    which = next((f"one of them, {job.name}" for job in jobs if job.identity == mine), "the config that they vary")
    count = plural(len(jobs), "job")
    return f"this is a sweep of {count}, and here {which}. For another, give one value to each option that it varies."


def _jobs(texts: Sequence[str], hydra: DictConfig) -> list[Job]:
    ours = [text for text in texts if not parse_override(text).is_hydra_override()]
    return expand(ours, hydra.sweeper.params, hydra.sweeper.rows or ((),))


def _parse(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Hydra's arguments, and the same words with its flags first: Hydra takes none between options."""
    parser = flags_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; options are GROUP.OPTION=VALUE, flags are in `srnn train --help`.")

    parser.error = refuse  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        refuse(f"{next((word for word in unknown if word.startswith('-')), unknown[0])}: no such flag")
    for flag in REFUSED:
        if getattr(arguments, flag) is not None:
            raise UserError(
                f"--{flag.replace('_', '-')}: srnn has one config; presets of your own are taken from --config-dir DIR."
            )
    if arguments.config_dir is not None:
        _add_config_dir(Path(arguments.config_dir))
    left = list(arguments.overrides)
    flags = [word for word in argv if not (left and word == left[0] and left.pop(0))]
    return arguments, [*flags, *arguments.overrides]


def _literal(word: str) -> str:
    """An override whose value Hydra cannot read without quotes, such as a name of a file with ``=`` in it, quoted."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[+~]{0,2}[\w./@]+", key) or re.search(r"['\"\[\]{}(),$\\]", value):
        return word
    try:
        parse_override(word)
    except UserError:
        return f"{key}='{value}'"
    return word


def _add_config_dir(folder: Path) -> None:
    """Take presets from a folder of the user's, as from those of installed plug-ins."""
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder.")
    if folder.resolve() not in register.conf_folders:
        register.conf_folders.append(folder.resolve())


def _check_sweep(argv: Sequence[str], overrides: Sequence[Override], hydra: DictConfig) -> CommandLine:
    """Check all jobs of a sweep, and find its folder."""
    ours = hydra.sweeper._target_ == OURS
    texts = [str(o.input_line) for o in overrides if not o.is_hydra_override()]
    jobs: list[Job] = []
    if ours:
        jobs = _jobs(texts, hydra)
    else:
        _check_space(texts)
    to_hydra = {str(o.input_line): _as_values(o) for o in overrides} if ours else {}
    words = [to_hydra.get(word, word) for word in argv]
    folder = hydra.sweep.dir
    if folder == "auto":
        folder = f"outputs/{_folder_name(overrides) if ours else f'{datetime.now():%Y-%m-%d_%H-%M-%S}_search'}"
        words.append(f"hydra.sweep.dir={folder}")
    here = str(hydra.launcher._target_).rpartition(".")[2] in HERE
    return CommandLine(words, Path(folder), sweep=Path(folder), jobs=jobs if here else ())


def _is_hydras(override: Override) -> bool:
    """Whether it says how jobs run: an option of Hydra's, or a preset, which may bring some."""
    preset = override.key_or_group == "experiment" and not override.is_sweep_override()
    return preset or override.is_hydra_override()


def _as_values(override: Override) -> str:
    """An override as a sweep over its one value, named twice: in ``choice(...)`` it would lose quotes and null.

    Hydra composes the config of the sweep itself with what is not swept, and would refuse options that only some
    of the jobs have.
    """
    text = str(override.input_line)
    value = override.get_value_element_as_str() if not override.is_sweep_override() else ""
    return text if _is_hydras(override) or not value else f"{override.get_key_element()}={value},{value}"


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
            values.append(choices_of([str(override.input_line)])[key])
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
            shown.append(f"{key.rpartition('.')[2]}-{slug(value.removeprefix('choice'))}")
    readable = slug("_".join(shown))[:60].strip("-._")
    swept = " ".join(text for text, _ in ours).encode(errors="surrogateescape")
    return f"sweep_{readable}_{hashlib.sha256(swept).hexdigest()[:6]}"


def _check_given(override: Override) -> None:
    """Refuse an option without a value: a shell leaves that of a variable that is not set. Raises UserError."""
    key, _, value = str(override.input_line).partition("=")
    if not value.strip() and not override.is_delete():
        raise UserError(f"{key}=: no value is given. Leave it out for its default; null means none, where allowed.")


def _check_folder_named(overrides: Sequence[Override], passed_over: str, used: str, what: str) -> None:
    """Refuse a folder that would not be used, unless the one that is used is named, too. Raises UserError."""
    named = {override.key_or_group: override.input_line for override in overrides}
    if passed_over in named and used not in named:
        raise UserError(f"{named[passed_over]} has no effect on {what}: give {used}=FOLDER.")


def _check_installed(override: Override) -> None:
    """Name the extra that brings a launcher or sweeper. Raises UserError."""
    if override.key_or_group in ("hydra/launcher", "hydra/sweeper"):
        package = PLUGINS.get(str(override.value()))
        if package is not None and importlib.util.find_spec(f"hydra_plugins.{package}") is None:
            raise UserError(f"{override.input_line} needs hydra_plugins.{package}: pip install 'srnn[launchers]'.")
