"""Options of the commands that are not a training run, made from typed signatures.

A command is one function; its typed arguments *are* its options, as those of a registered component are::

    @command
    def main(folder: Annotated[str, Help("a finished run's folder")], /, tolerance: float = 0.1) -> int:
        '''What ``--help`` says that the command does.'''

Arguments before ``/`` stand alone on the command line, the others are ``--tolerance VALUE`` or ``tolerance=VALUE``. The
argument ``run``, or the list ``runs``, is both in every command: ``outputs/RUN``, or ``run=outputs/RUN``.
"""

from __future__ import annotations

import argparse
import inspect
import os
import tempfile
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from srnn.errors import UserError, cannot_be_written
from srnn.files import expanded
from srnn.registry import Component, Option, Range
from srnn.run_folder import RunFolder

_T = TypeVar("_T")


@dataclass(frozen=True)
class Help:
    """What ``--help`` says about an argument, written in its annotation: ``Annotated[int, Help("tokens to write")]``.

    Attributes:
        text: what it is. A default follows in brackets, unless it is None or blank.
        metavar: what stands for the value; without it the argument's name in capitals, or its choices.
        choices: all values there are, where they are not known as a ``Literal``.
    """

    text: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None


# What several commands take.
RunOption = Annotated[str, Help("a run's folder, or a packed file", metavar="RUN")]
KernelOption = Annotated[str, Help("the backend that runs it")]

RUNS = ("run", "runs")  # arguments that name runs

# As in srnn.formats, which imports torch: seconds that `--help` and a mistyped option need not wait for.
ValuesChoice = Literal["fp32", "fp16", "bf16", "int8"]
FloatsChoice = Literal["fp32", "fp16", "bf16"]
StructureChoice = Literal["auto", "element", "4x1", "8x1", "16x1", "32x1"]


def command(function: Callable[..., int]) -> Callable[[Sequence[str]], int]:
    """Decorator: a function of typed arguments -> one that reads them from the words of a command line."""

    def main(argv: Sequence[str]) -> int:
        return call(function, argv)

    main.__doc__ = function.__doc__
    return main


def call(function: Callable[..., _T], argv: Sequence[str]) -> _T:
    """Read the arguments of ``function`` from ``argv``, and call it.

    Args:
        function: with typed arguments: str, int, float, bool, a ``Literal``, any of these or None; or a list, which
            takes all words that are left. A dataclass is one too: for options that are too many for a function. Its
            module names the command, the first line of its docstring heads ``--help``.
        argv: the words after the command.

    Returns:
        What ``function`` returns.

    Raises:
        UserError: an unknown, missing, ill-typed or out-of-range argument; names it and what was given.
        SystemExit: after ``--help``.
    """
    component = Component("command", function.__module__.rpartition(".")[2], function, function.__module__)
    parser = Parser(prog=f"srnn {component.name}", description=component.summary)
    alone = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_ONLY]
    for option in component.options.values():
        if option.name in (*alone, *RUNS):
            parser.add_argument(option.name, **_settings(option, alone=True))
        else:
            parser.add_argument(_flag(option.name), required=option.required, **_settings(option, alone=False))
    given = vars(parser.parse(argv))
    for option in component.options.values():
        _check_range(component.name, option, given[option.name])
    words = [given.pop(name) for name in alone]
    return function(*words, **given)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settings(option: Option, alone: bool) -> dict[str, Any]:
    """What argparse has to know about an argument, besides its name."""
    annotation, *marks = typing.get_args(option.type) if _is(option.type, Annotated) else (option.type,)
    about = next((mark for mark in marks if isinstance(mark, Help)), Help(""))
    if _is(annotation, typing.Union, types.UnionType):
        (annotation,) = (kind for kind in typing.get_args(annotation) if kind is not type(None))
    settings: dict[str, Any] = {"help": _help(about, option), "metavar": about.metavar}
    if not option.required:
        settings["default"] = option.default
    if _is(annotation, list):
        settings["nargs"] = "*"
        (annotation,) = typing.get_args(annotation)
    elif alone and not option.required:
        settings["nargs"] = "?"
    if _is(annotation, Literal):
        return settings | {"choices": typing.get_args(annotation)}
    if about.choices is not None:
        return settings | {"choices": about.choices}
    if annotation is bool:
        return settings | {"type": _boolean} | ({} if alone else {"nargs": "?", "const": True})  # --flag alone is true
    return settings | {"type": annotation}


def _is(annotation: Any, *origins: Any) -> bool:
    return typing.get_origin(annotation) in origins


def _help(about: Help, option: Option) -> str:
    default = "" if option.required or option.default is None else option.default
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    text = f"{about.text} ({shown})" if shown.strip() else about.text
    text += "; also run=RUN" if option.name in RUNS else ""
    return text.replace("%", "%%")  # argparse fills in %(default)s


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text == "true"


def _check_range(name: str, option: Option, value: Any) -> None:
    for mark in typing.get_args(option.type):
        if isinstance(mark, Range):
            try:
                mark.check(value)
            except ValueError as error:
                raise UserError(f"{name}: {_flag(option.name)}={value} {error}.") from None


class Parser(argparse.ArgumentParser):
    """``--key VALUE``, and ``key=value`` for the same option, as everywhere else in srnn.

    What follows ``--key`` is taken literally. A run is named as ``run=R`` or by the bare word ``R`` in every command.
    """

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; raises UserError for what does not fit."""
        known = {option.removeprefix("--") for action in self._actions for option in action.option_strings}
        takes_run = any(action.dest in RUNS for action in self._actions)
        bare: list[str] = []
        flags: list[str] = []  # each one word, so that a value that starts with a dash stays a value
        words = iter(argv)
        for word in words:
            key, equals, value = word.partition("=")
            name = key.removeprefix("--").replace("_", "-")  # as in options of runs
            if equals and key == "srnn.plugins":
                continue  # already acted on
            if takes_run and name == "run" and (equals or key != name):
                bare.append(unquoted(value) if key == name else value if equals else next(words, ""))
            elif equals and name in known:
                flags.append(f"--{name}={value}")
            elif key.startswith("--") and name in known and name != "help":
                following = next(words, None)
                flags.append(f"--{name}" if following is None else f"--{name}={following}")
            elif word.startswith("-"):
                flags.append(word)
            elif takes_run and equals and key.isidentifier() and not os.path.exists(word):
                self.error(f"unrecognized arguments: {word}")  # an option mistyped, and no folder
            else:
                bare.append(word)
        return self.parse_args([*bare, *flags])

    def error(self, message: str) -> NoReturn:
        """Bad arguments are the user's mistake like any other."""
        command = self.prog.removeprefix("srnn ")
        if message == "the following arguments are required: RUN":
            raise UserError(f"{command}: which run? Give its folder, as `{self.prog} outputs/RUN`.")
        raise UserError(f"{command}: {message}; see `{self.prog} --help`.")


def unquoted(value: str) -> str:
    """A value as Hydra reads it: a pair of quotes around all of it is no part of it. Raises UserError."""
    if len(value) < 2 or value[0] not in ("'", '"') or value[-1] != value[0]:
        return value
    from srnn.config.composing import parse_override  # not before: most commands run without Hydra

    return str(parse_override(f"value={value}").value())


def output_folder(folder: Path) -> Path:
    """What ``--output`` names, or its default, made if needed. Raises UserError if it cannot be written."""
    folder = expanded(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_be_written(folder, error, "--output") from None
    return folder


def packed_file(run: str) -> Path:
    """The packed file of a run's folder; a file is taken as it is. Raises UserError."""
    path = expanded(run)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{run}: no such folder; give that of a finished run, as outputs/RUN.")
    packed = RunFolder(path).packed
    if not packed.is_file():
        raise UserError(
            f"{run}: this folder holds no model.safetensors, so it is no finished run of srnn."
            f"{RunFolder(path).how_to_finish}"
        )
    from srnn.recording.environment import require_plugins

    require_plugins(RunFolder(path))
    return packed
