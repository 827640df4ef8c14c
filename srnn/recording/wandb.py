"""Weights & Biases: offline unless asked otherwise, everything inside the run's folder.

Whatever W&B does, a run goes on: its results are in its own folder, and W&B only gets a copy.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from srnn.config.settings import TrackingConfig
from srnn.errors import UserError
from srnn.registry import register
from srnn.run_folder import RunFolder

ONLINE_TIMEOUT = 20.0  # seconds a dead network may cost before the run goes on offline
STEP = "trainer/global_step"  # what curves go over
# Of the environment -> what decides instead.
PASSED_OVER = {
    "WANDB_MODE": "tracking.mode decides",
    "WANDB_PROJECT": "tracking.project decides",
    "WANDB_NAME": "tracking.name decides",
    "WANDB_RUN_GROUP": "tracking.group decides",
    "WANDB_TAGS": "tracking.tags decides",
    "WANDB_RUN_ID": "each run has an id of its own",
    "WANDB_RESUME": "srnn resume RUN resumes the W&B run of its folder",
    "WANDB_DIR": "W&B's files are in the run's folder",
    "WANDB_JOB_TYPE": "it is train or compare",
}
_said: set[str] = set()  # lines that are printed once a process
_unreachable: set[str] = set()  # servers that a run of this process has waited for in vain


@contextmanager
def wandb_run(
    tracking: TrackingConfig, folder: Path, config: Mapping[str, Any], job_type: str, tags: Sequence[str] = ()
) -> Iterator[Any]:
    """A W&B run, finished at the end whatever happens; None when disabled or when it cannot start.

    Args:
        tracking: mode and names.
        folder: the run's folder; W&B keeps its files in ``wandb/`` there.
        config: the resolved config, plain data.
        job_type: ``train`` or ``compare``.
        tags: beside those of ``tracking``.

    A run whose folder holds a W&B run already resumes that one.

    Raises:
        UserError: ``mode=online`` without an API key.
    """
    if tracking.mode == "disabled" or _is_off():
        yield None
        return
    _say_what_is_passed_over()
    # W&B stages artifacts and reads settings in the user's home unless told otherwise, for each run anew.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[name] = str(RunFolder(folder).wandb / "staging")
    os.environ.setdefault("WANDB_SILENT", "true")
    run = _start(tracking, folder, config, job_type, [*tags, *tracking.tags])
    if run is None:
        yield None
        return
    failed = True
    try:
        yield run
        failed = False
    finally:
        with carefully("the end of the run"):
            _finish(run, int(failed))


def _is_off() -> bool:
    """Whether the environment switches W&B off, as W&B's own documents tell; said once."""
    for name, values in (("WANDB_MODE", ("disabled",)), ("WANDB_DISABLED", ("true", "1", "yes"))):
        if os.environ.get(name, "").lower() in values:
            _say_once(f"{name}={os.environ[name]}: no W&B run is kept.")
            return True
    return False


def _say_what_is_passed_over() -> None:
    """A run's config says all about its W&B run, so that it can be repeated; say what the environment says in vain."""
    for name, option in PASSED_OVER.items():
        if name in os.environ:
            _say_once(f"{name}={os.environ[name]} is passed over: {option}.")


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"srnn: {line}", file=sys.stderr)


def define_scores(run: Any, objective: str) -> None:
    """Curves go over training steps, and a run's summary keeps the best validation, by which runs are sorted."""
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    learned: Any = register.get("objective", objective).factory
    for score in dict.fromkeys([learned.telling, "loss"]):
        best = "max" if score in learned.higher_is_better else "min"
        run.define_metric(f"valid_{score}", step_metric=STEP, step_sync=True, summary=f"{best},last")


def _start(
    tracking: TrackingConfig, folder: Path, config: Mapping[str, Any], job_type: str, tags: Sequence[str]
) -> Any:
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
        "job_type": job_type,
        "tags": list(dict.fromkeys(tags)),
        "dir": str(folder),
        "config": dict(config),
        "settings": wandb.Settings(init_timeout=ONLINE_TIMEOUT, silent=True),
    }
    # Of its own, or an earlier one's: an id in the environment would make one run of all jobs of a sweep.
    earlier = _runs(folder)
    options |= {"id": _id_of(earlier[-1]) if earlier else secrets.token_hex(4), "resume": "allow"}
    # Whatever W&B raises, it must not cost the run: offline where online fails, and without it where that fails.
    modes = dict.fromkeys([tracking.mode, "offline"])
    if _host() in _unreachable:
        modes.pop("online", None)
    for mode in modes:
        try:
            run = wandb.init(mode=mode, **options)
            _quiet_log()
            return run
        except Exception as error:
            kept = ""
            if mode == "online":
                _unreachable.add(_host())
                kept = ". This run is kept offline, and so are later ones of this process"
            print(f"srnn: W&B does not start {mode}: {str(error).partition('. ')[0]}{kept}.", file=sys.stderr)
    return None


def _quiet_log() -> None:
    """Let W&B's own log fail in silence, as on a full disk, where Python prints a traceback a line."""
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]


def _finish(run: Any, exit_code: int) -> None:
    """Finish it; where W&B's own process is gone, let the next run of this one start another."""
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except Exception:
        with suppress(Exception):
            wandb.teardown(exit_code)
        raise


def has_key() -> bool:
    """In the environment, or where `wandb login` puts it. Asking W&B itself might prompt or wait."""
    from requests.utils import get_netrc_auth

    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(_host()))


def _host() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def sync_command(folder: Path) -> str | None:
    """What uploads an offline run later, the parts of a resumed one in order; None if there is none."""
    runs = [run for run in _runs(folder) if run.name.startswith("offline")]
    return f"wandb sync {shlex.join(map(str, runs))}" if runs else None


def _runs(folder: Path) -> list[Path]:
    """The W&B runs in a run's folder, oldest first: a resumed run has several, of one id."""
    runs = {file.parent for file in RunFolder(folder).wandb.glob("*run-*-*/run-*.wandb")}
    return sorted(runs, key=lambda path: path.name.partition("run-")[2])


def _id_of(run: Path) -> str:
    """By the file's name: the folder's ends in a number where two were made within a second."""
    return next(run.glob("run-*.wandb")).stem.removeprefix("run-")


def log_results(
    run: Any,
    folder: RunFolder,
    summary: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    plots: Sequence[Path],
) -> None:
    """Send the end of a training run: summary, tables that are not empty, plots, and the networks as artifacts."""
    with carefully("the results"):
        run.summary.update(dict(summary))
        log_tables(run, {name: rows for name, rows in tables.items() if rows}, plots)
    with carefully("the artifacts"):
        _log_networks(run, folder)


def log_tables(run: Any, tables: Mapping[str, Sequence[Mapping[str, Any]]], plots: Sequence[Path]) -> None:
    """Rows as tables, and pictures."""
    import wandb

    for name, rows in tables.items():
        columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(str(key)) for key in columns] for row in rows]
        # An option may be a word in one run and a number in another: pruning.start_itr=auto, 0.3.
        run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})
    run.log({path.stem: wandb.Image(str(path)) for path in plots})


def _log_networks(run: Any, folder: RunFolder) -> None:
    """The networks of a run, named as its files; each says what it was made from: dense, pruned, packed.

    W&B draws lineage of what a run used, which it takes only online; ``made_from`` is there in any case.
    """
    import wandb

    dense = run.config["pruning"]["name"] == "none"
    files = {"best-dense": folder.best_dense, "best": folder.best, "packed": folder.packed}
    made_from = _initial_artifact(run)
    for name, file in files.items():
        if file.is_file() and not (dense and name == "best-dense"):
            artifact = wandb.Artifact(f"{run.id}-{name}", type="model", metadata={"made_from": made_from})
            artifact.add_file(str(file), policy="immutable")
            run.log_artifact(artifact)
            made_from = artifact.name


def _initial_artifact(run: Any) -> str | None:
    """The artifact that ``init_from`` names, if it is of a run with a W&B run."""
    source = run.config.get("init_from")
    folders = [] if source is None else [path for path in (Path(source), *Path(source).parents) if _runs(path)]
    if not folders:
        return None
    stem = Path(source).stem if Path(source).suffix == ".ckpt" else "best"
    name = f"{_id_of(_runs(folders[0])[-1])}-{'packed' if Path(source).suffix == '.safetensors' else stem}"
    if not run.offline:
        with carefully(f"the use of {name}"):
            run.use_artifact(f"{name}:latest")
    return name


@contextmanager
def carefully(what: str) -> Iterator[None]:
    """Whatever W&B raises inside is said and costs nothing more."""
    try:
        yield
    except Exception as error:
        print(f"srnn: W&B did not take {what}: {error}", file=sys.stderr)
