"""The sweeper of ``python -m srnn -m``. Hydra takes its plug-ins from the namespace ``hydra_plugins`` only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from srnn.config.sweeps import Sweep


class SrnnSweeper(Sweeper):
    """Hands the jobs that are left to the launcher, and tells in the end what became of all of them.

    Args:
        params: option -> values, as on the command line, which wins.
        rows: lists of options, each of them combined with all ``params``.
    """

    def __init__(self, params: Mapping[str, Any] | None = None, rows: Sequence[Sequence[str]] | None = None) -> None:
        self.params = params or {}
        self.rows = rows or [[]]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        self.folder = Path(config.hydra.sweep.dir)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run what is left of the sweep.

        Raises:
            UserError: an option is wrong in one of the jobs, and none has been started; or the sweep runs already.
            SystemExit: with 1, after all jobs, if some of them failed.
        """
        from filelock import FileLock, Timeout

        from srnn.config.sweeps import Sweep, expand
        from srnn.errors import UserError

        jobs = expand(arguments, self.params, self.rows)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                self._run(Sweep(self.folder, jobs))
        except Timeout:
            raise UserError(
                f"{self.folder}: this sweep is running already; wait for it, or name another hydra.sweep.dir."
            ) from None

    def _run(self, sweep: Sweep) -> None:
        for package in ("hydra", "hydra_plugins"):  # launchers tell each job's options, on lines of their own
            logging.getLogger(package).setLevel(logging.WARNING)
        left = sweep.left()
        sweep.announce()
        if left:
            overrides = [[*job.overrides, f"hydra.sweep.subdir={sweep.folders[job].name}"] for job in left]
            try:
                self.launcher.launch(overrides, initial_job_idx=0)
            except KeyboardInterrupt:
                print(f"srnn: {sweep.folder} was stopped; the same command resumes it.", file=sys.stderr)
                raise
            except Exception as error:  # such as a worker that was killed: the folders tell what was done
                print(f"srnn: the launcher stopped: {type(error).__name__}: {error}", file=sys.stderr)
        if not sweep.summarize(ran=left):
            raise SystemExit(1)
