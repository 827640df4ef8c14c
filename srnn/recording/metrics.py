"""What a run logs, step by step: ``metrics.csv``, and the curves of its W&B run."""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from srnn.errors import UserError
from srnn.files import csv_bytes, write_atomically
from srnn.recording.summary import read_metrics
from srnn.recording.wandb import carefully

_SECONDS = 5.0  # between two writes while a run goes on


class MetricsFile(Logger):
    """Lightning's logger for a CSV file that a resumed run continues. Always whole on disk.

    Attributes:
        rows: what was logged, a row a call.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._saved = time.monotonic()

    @property
    def name(self) -> str:
        """Lightning wants one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning wants one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        self.rows.append({**metrics, "step": step})
        if time.monotonic() - self._saved > _SECONDS:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write all rows; none yet leave the file that a resumed run goes on with as it is."""
        self._saved = time.monotonic()
        if self.rows:
            write_atomically(self.path, csv_bytes(self.rows, line_end="\r\n"))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest."""
        self.save()

    def go_on_from(self, count: int) -> None:
        """Take over the first ``count`` rows of the file; later ones are logged again.

        Raises:
            UserError: the file is damaged: what is drawn of it in the end is looked at now.
        """
        if not self.path.is_file():  # a run whose checkpoint was carried elsewhere
            return
        try:
            read_metrics(self.path)
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
            if len(rows) < count:
                raise ValueError(f"{len(rows)} rows are left of {count}")
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(
                f"{self.path} is damaged: {error}. Take it away to go on without the curves up to here."
            ) from None
        self.rows = rows[:count]


class WandbCurves(WandbLogger):
    """Lightning's logger for a W&B run that has been started. When W&B fails, training goes on without it."""

    def __init__(self, run: Any) -> None:
        super().__init__(experiment=run)
        self._failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send a row, until one could not be sent: each further one might wait again."""
        if not self._failed:
            self._failed = True
            with carefully("a row, and will get no more"):
                super().log_metrics(metrics, step)
                self._failed = False

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They were given at its start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The run is finished by whoever started it."""
