"""The report of a run: ``report.json``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import srnn
from srnn.errors import UserError
from srnn.inference.packing import PackedModel
from srnn.pruning.pruner import Pruner
from srnn.recording.environment import read_environment
from srnn.recording.recorder import Recorder, Validation
from srnn.run_folder import RunFolder


def milestones(validations: Sequence[Validation]) -> dict[str, dict[str, float] | None]:
    """The validations that count: when pruning started, the best dense one before it, the best at the end.

    A run without pruning has only the best; None stands for a validation that did not happen.
    """
    dense = [v for v in validations if v.dense and not v.finished]
    finished = [v for v in validations if v.finished]
    return {
        "pruning_started": _scores(dense[-1]) if dense else None,
        "best_dense": _scores(min(dense, key=_loss)) if dense else None,
        "best": _scores(min(finished, key=_loss)) if finished else None,
    }


def _loss(validation: Validation) -> float:
    return validation.scores["valid_loss"]


def _scores(validation: Validation) -> dict[str, float]:
    return {"step": validation.step} | {k.removeprefix("valid_"): v for k, v in validation.scores.items()}


def transcripts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was wanted and what the network gave in each validation, a row for each example; none of most objectives."""
    # Reports of older versions lack them.
    return [{"step": v["step"], **each} for v in report["validations"] for each in v.get("examples", ())]


def build_report(
    config: Mapping[str, Any],
    objective: str,
    model: nn.Module,
    packed: PackedModel,
    packed_bytes: int,
    scores: dict[str, Any],
    recorder: Recorder,
) -> dict[str, Any]:
    """All that the run measured, as plain data. Shares are 0..1, times seconds, sizes bytes."""
    pruner = recorder.pruner
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # shared ones once
    return {
        "model": config["model"]["name"],
        "dataset": config["dataset"]["name"],
        "objective": objective,
        "pruning": config["pruning"]["name"],
        "seed": config["seed"],
        "config": dict(config),
        "scores": scores,
        "steps": pruner.itr,
        "epochs": pruner.itr / pruner.run.steps_per_epoch,
        "phases": pruner.method.phases if pruner.method.layer_types else None,
        "layers": _layers(pruner, weights),
        "sparsity": _sparsities(pruner, weights),
        "size": {
            "parameters": sum(w.numel() for w in weights.values()),
            "nonzeros": sum(int((w != 0).sum()) for w in weights.values()),
            "dense_bytes": 4 * sum(w.numel() for w in weights.values()),
            "packed_bytes": packed_bytes,
            "packed_values": config["packed"]["values"],
            "bytes_per_nonzero": _bytes_per_nonzero(packed),
        },
        "seconds": {"training_loop": recorder.loop_seconds, "pruning": pruner.seconds},
        "versions": {
            "srnn": srnn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "validations": [vars(v) | {"scores": dict(v.scores)} for v in recorder.validations],
    }


def run_beside(given: str | None, folder: RunFolder) -> dict[str, Any] | None:
    """What the run that this one learned from scored on the same test data.

    Args:
        given: that run's folder, its packed file or one of its checkpoints, as a config names it.
        folder: of this run.

    Returns:
        Its name, its sparsity and its test scores; None where there are none: no finished run, or other test data.
    """
    path = Path(given).expanduser() if given else None
    for home in () if path is None else (path, path.parent, path.parent.parent):
        other = RunFolder(home)
        if home == folder.path or not other.report.is_file():
            continue
        try:
            report = json.loads(other.report.read_text())
            data = [read_environment(each)["data"]["test"] for each in (other, folder)]
            found = {"sparsity": report["sparsity"]["reached"], "scores": report["scores"]["test_packed"]}
        except (UserError, ValueError, KeyError, TypeError, OSError):  # a report may be anyone's
            return None
        return {"run": home.resolve().name} | found if data[0] == data[1] else None
    return None


def _layers(pruner: Pruner, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for group in pruner.groups:
        for part in group.parts:
            nonzeros = int((part.of(weights[part.parameter_name]) != 0).sum())
            row = {"parameter": part.name, "layer_type": part.layer_type, "weights": part.size, "nonzeros": nonzeros}
            row |= {"sparsity": 1 - nonzeros / part.size, "threshold": group.epsilon, "structure": str(group.structure)}
            rows.append(row | {"revived": int(part.revived.sum())})
    return rows


def _sparsities(pruner: Pruner, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Reached and wanted, for each layer type and in all, counted in the weights themselves."""
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for part in pruner.parts:
        there = int((part.of(weights[part.parameter_name]) == 0).sum())
        zeros[part.layer_type] = zeros.get(part.layer_type, 0) + there
        sizes[part.layer_type] = sizes.get(part.layer_type, 0) + part.size
    total = sum(sizes.values())
    asked = [None if group.sparsity is None else group.target for group in pruner.groups]
    known = [count for count in asked if count is not None]
    wanted = (sum(known) / total if total else 0.0) if len(known) == len(asked) else None
    return {
        "wanted": wanted,
        "by_layer_type": {kind: zeros[kind] / size for kind, size in sizes.items()},
        "reached": sum(zeros.values()) / total if total else 0.0,
    }


def _bytes_per_nonzero(packed: PackedModel) -> float | None:
    """Bytes of values and columns over entries; row pointers and header are apart."""
    entries = sum(packed.nonzeros.values())
    stored = sum(m.values.nbytes + m.columns.nbytes for m in packed.matrices.values())
    return stored / entries if entries else None


def recurrent_matrix(model: nn.Module, pruner: Pruner) -> tuple[str, Tensor] | None:
    """Name and weight of the matrix to show: the first recurrent one that is pruned, else the first that is."""
    pruned = pruner.masks()
    matrices = {name: w for name, w in model.state_dict().items() if w.ndim == 2 and name in pruned}
    names = sorted(matrices, key=lambda name: "weight_hh" not in name)
    return (names[0], matrices[names[0]]) if names else None
