"""Arguments of the commands that are not a training run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from srnn.errors import UserError, cannot_be_written
from srnn.run_folder import RunFolder


class Parser(argparse.ArgumentParser):
    """``--key VALUE``, and ``key=value`` for the same option, as everywhere else in srnn.

    What follows ``--key`` is taken literally.
    """

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; raises UserError for what does not fit."""
        known = {option.removeprefix("--") for action in self._actions for option in action.option_strings}
        spelled: list[str] = []
        for previous, word in zip(["", *argv], argv, strict=False):
            key, equals, value = word.partition("=")
            literal = previous.startswith("--") and "=" not in previous
            if equals and key == "srnn.plugins" and not literal:
                continue  # already acted on
            # One word, so that a value that starts with a dash stays a value.
            spelled.append(f"--{key}={value}" if equals and key in known and not literal else word)
        joined: list[str] = []
        for word in spelled:
            if joined and joined[-1].startswith("--") and joined[-1] != "--help" and joined[-1][2:] in known:
                joined[-1] = f"{joined[-1]}={word}"
            else:
                joined.append(word)
        return self.parse_args(joined)

    def error(self, message: str) -> NoReturn:
        """Bad arguments are the user's mistake like any other."""
        raise UserError(f"{self.prog.removeprefix('srnn ')}: {message}; see `{self.prog} --help`.")


def output_folder(folder: Path) -> Path:
    """What ``--output`` names, or its default, made if needed. Raises UserError if it cannot be written."""
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_be_written(folder, error, "--output") from None
    return folder


def packed_file(run: str) -> Path:
    """The packed file of a run's folder; a file is taken as it is. Raises UserError."""
    path = Path(run).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"run={run}: no such folder; give the folder of a finished run, such as outputs/RUN.")
    packed = RunFolder(path).packed
    if not packed.is_file():
        raise UserError(f"run={run}: this folder holds no model.safetensors, so it is no finished run of srnn.")
    return packed
