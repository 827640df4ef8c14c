"""A run without training: a trained network is pruned as it is, scored on the validation part, and kept."""

from __future__ import annotations

from typing import Any

from srnn.pruning.callback import PruningCallback
from srnn.recording.metrics import MetricsFile, WandbCurves
from srnn.recording.recorder import Recorder, Validation
from srnn.run_folder import RunFolder
from srnn.training.checkpoints import AtomicCheckpoints
from srnn.training.preparing import Run


def prune_only(run: Run, folder: RunFolder, wandb: Any = None) -> Recorder:
    """Do in a run's folder what ``fit`` does, but for the training: the best checkpoint is the network as it is now.

    Args:
        run: whose method needs no training.
        folder: where its files go.
        wandb: the W&B run that gets its scores.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    pruning = PruningCallback(run.method, run.model, run.reference)
    pruning.pruner = pruner = run.pruner()
    pruner.finalize()
    recorder = Recorder(pruning, every=1)
    scores = {f"valid_{name}": value for name, value in run.objective.score(run.model, run.data, "valid").items()}
    recorder.validations.append(Validation(0, scores, pruner.sparsity, recorder.is_dense(), recorder.is_finished()))
    for logger in (MetricsFile(folder.metrics), *([WandbCurves(wandb)] if wandb is not None else [])):
        logger.log_metrics(scores | {"sparsity/total": pruner.sparsity}, step=0)
        logger.save()
    checkpoint: dict[str, Any] = {"state_dict": run.objective.state_dict()}
    run.objective.on_save_checkpoint(checkpoint)
    AtomicCheckpoints().save_checkpoint(checkpoint, folder.best)
    return recorder
