"""A run's folder: the names of its files, and the lock of the process that works in it."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from srnn.errors import UserError
from srnn.files import sweep_unfinished


@dataclass(frozen=True)
class RunFolder:
    """The only place that knows what a run's files are called.

    Example::

        folder = RunFolder(Path("outputs/RUN"))
        if folder.finished:
            report = folder.read_report()

    Args:
        path: the folder; it need not be there.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def below(cls, folder: Path, pattern: str = "**") -> list[RunFolder]:
        """The folders of runs in a folder, by name: at any depth, or those that a glob ``pattern`` finds."""
        configs = folder.glob(f"{pattern}/{cls(folder).config.name}")
        return [cls(path.parent) for path in sorted(configs)]

    @property
    def config(self) -> Path:
        """The resolved config, YAML: with ``environment`` the first file of a run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Command, git, packages, hardware, checksums of the data."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """What was logged, a row a call."""
        return self.path / "metrics.csv"

    @property
    def report(self) -> Path:
        """What the run measured; the last of its own files: it says that the run is finished."""
        return self.path / "report.json"

    @property
    def packed(self) -> Path:
        """The packed network."""
        return self.path / "model.safetensors"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.path / "plots"

    @property
    def wandb(self) -> Path:
        """The folder of W&B's own files."""
        return self.path / "wandb"

    @property
    def error(self) -> Path:
        """Of a sweep's job: why it failed."""
        return self.path / "error.txt"

    @property
    def log(self) -> Path:
        """Of a sweep's job: what it printed."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The checkpoint that a stopped run is resumed from."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The best checkpoint at the sparsity asked for."""
        return self.checkpoints / "best.ckpt"

    @property
    def best_dense(self) -> Path:
        """The best checkpoint before pruning began."""
        return self.checkpoints / "best-dense.ckpt"

    @property
    def trial(self) -> Path:
        """The packed file of the untrained network; there for a moment only."""
        return self.path / ".untrained.safetensors"

    @property
    def finished(self) -> bool:
        """Whether a run ended well here."""
        return self.report.is_file()

    @property
    def begun(self) -> bool:
        """Whether a run trained here, to its end or not."""
        return self.checkpoints.exists()

    @property
    def how_to_finish(self) -> str:
        """A sentence, after a blank, if a run was stopped here; else nothing."""
        stopped = self.begun and self.config.is_file() and not self.finished
        return f" It was stopped, or trains still: `srnn resume {self.path}` goes on with it." if stopped else ""

    def warn_unless_finished(self, option: str) -> None:
        """Warn, in the words of an option that names it, that this run has more to learn: it may be training still."""
        if not self.finished:
            warnings.warn(
                f"{option}={self.path}: this run has not ended, so its best checkpoint until now is taken. "
                f"`srnn resume {self.path}` goes on with it.",
                stacklevel=3,
            )

    def read_report(self) -> dict[str, Any]:
        """The report. Raises OSError if it is not there, UserError if it is damaged."""
        return read_json(self.report)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here, while inside. A lock ends with the process that holds it.

        Raises:
            UserError: another process trains here now.
            OSError: the folder cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.path}: another process trains in this folder now; wait for it, or set another hydra.run.dir."
            ) from None
        try:
            for folder in (self.path, self.checkpoints, self.plots):
                sweep_unfinished(folder)
            yield
        finally:
            # While it is held: later, the file could be the next holder's. Who has opened it by now finds it gone.
            self._lock.unlink(missing_ok=True)
            lock.release()

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    def take_back(self, there: Path) -> None:
        """Remove the folder of a run that was refused, and the parents made with it: as if it had not been started.

        Args:
            there: what was there of its path before the run; it stays, whatever it holds.
        """
        folder = Path(os.path.abspath(self.path))
        first = {self.config.name, self.environment.name}
        if folder == there or not folder.is_dir() or not {path.name for path in folder.iterdir()} <= first:
            return
        for name in first:
            (folder / name).unlink(missing_ok=True)
        for made in itertools.takewhile(lambda path: path != there, (folder, *folder.parents)):
            try:
                made.rmdir()
            except OSError:  # something else has come into it
                return


def read_json(path: Path) -> dict[str, Any]:
    """A mapping that srnn wrote as JSON. Raises OSError if it is not there, UserError if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
