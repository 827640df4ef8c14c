"""Weights & Biases: offline unless asked otherwise, everything inside the run's folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger

from srnn.config import TrackingConfig
from srnn.errors import UserError

ONLINE_TIMEOUT = 20.0  # seconds a dead network may cost before the run goes on offline


@contextmanager
def wandb_logger(tracking: TrackingConfig, folder: Path, config: dict[str, Any]) -> Iterator[WandbLogger | None]:
    """A Lightning logger for one run, finished at the end whatever happens; None when disabled.

    Args:
        tracking: mode and names.
        folder: the run's folder; W&B keeps its files in ``wandb/`` there.
        config: the resolved config, plain data.

    A run whose folder holds a W&B run already goes on as the same one.

    Raises:
        UserError: ``mode=online`` without an API key.
    """
    if tracking.mode == "disabled":
        yield None
        return
    # W&B stages artifacts and reads settings in the user's home unless told otherwise, for each run anew.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[name] = str(folder / "wandb" / "staging")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    run = _start(tracking, folder, config)
    if run is None:
        yield None
        return
    failed = True
    try:
        # Lightning's logger does this only for a run it starts itself: curves go over training steps.
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        yield WandbLogger(experiment=run)
        failed = False
    finally:
        try:
            wandb.finish(exit_code=int(failed))
        except Exception as error:
            print(f"srnn: W&B could not finish: {error}", file=sys.stderr)


def _start(tracking: TrackingConfig, folder: Path, config: dict[str, Any]) -> Any:
    import wandb

    if tracking.mode == "online" and not has_key():
        raise UserError(
            "tracking.mode=online needs a W&B API key: set WANDB_API_KEY or run `wandb login`, or use "
            "tracking.mode=offline."
        )
    options: dict[str, Any] = {
        "project": tracking.project,
        "group": tracking.group,
        "name": tracking.name or folder.name,
        "dir": str(folder),
        "config": config,
        "settings": wandb.Settings(init_timeout=ONLINE_TIMEOUT, silent=True),
    }
    if earlier := _runs(folder):
        options |= {"id": earlier[-1].name.rpartition("-")[2], "resume": "allow"}
    # Whatever W&B raises, it must not cost the run: offline where online fails, and without it where that fails.
    for mode in dict.fromkeys([tracking.mode, "offline"]):
        try:
            return wandb.init(mode=mode, **options)
        except Exception as error:
            print(f"srnn: W&B does not start {mode}: {error}", file=sys.stderr)
    return None


def has_key() -> bool:
    """In the environment, or where `wandb login` puts it. Asking W&B itself might prompt or wait."""
    from requests.utils import get_netrc_auth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(host))


def sync_command(folder: Path) -> str | None:
    """What uploads an offline run later, the parts of a resumed one in order; None if there is none."""
    runs = [run for run in _runs(folder) if run.name.startswith("offline")]
    return f"wandb sync {' '.join(map(str, runs))}" if runs else None


def _runs(folder: Path) -> list[Path]:
    """The W&B runs in a run's folder, oldest first: a resumed run has several, of one id."""
    runs = [path for path in (folder / "wandb").glob("*run-*-*") if path.is_dir()]
    return sorted(runs, key=lambda path: path.name.partition("run-")[2])


def log_results(
    logger: WandbLogger,
    summary: dict[str, Any],
    layers: list[dict[str, Any]],
    plots: list[Path],
    packed: Path,
) -> None:
    """Send the end of a run: summary, a table of layers, the plots, the packed file as an artifact."""
    try:
        _log_results(logger.experiment, summary, layers, plots, packed)
    except Exception as error:  # everything is in the run's folder already
        print(f"srnn: W&B did not take the results: {error}", file=sys.stderr)


def _log_results(
    run: Any, summary: dict[str, Any], layers: list[dict[str, Any]], plots: list[Path], packed: Path
) -> None:
    import wandb

    run.summary.update(summary)
    if layers:
        columns: list[str | int] = list(layers[0])
        table = wandb.Table(columns=columns, data=[list(row.values()) for row in layers])
        run.log({"layers": table})
    run.log({path.stem: wandb.Image(str(path)) for path in plots})
    artifact = wandb.Artifact(f"{run.id}-packed", type="model")
    artifact.add_file(str(packed), policy="immutable")
    run.log_artifact(artifact)
