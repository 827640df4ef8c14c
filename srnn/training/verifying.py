"""Packing a run's network, and making sure that the packed file is that network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import srnn
from srnn.exporting.dense_networks import RUNTIMES, dense_networks
from srnn.inference.calibration import record_inputs
from srnn.inference.latency import STEPS, latencies
from srnn.inference.packed_file import read, write
from srnn.inference.packing import PackedModel, pack
from srnn.inference.unpacking import unpack
from srnn.kernels import Auto, Dense
from srnn.run_folder import RunFolder
from srnn.training.preparing import Run

CALIBRATION_BATCHES = 20  # of validation data, for int8
# How far the outputs of sparse kernels may be from the dense modules' with the same weights, as a relative norm: both
# are off by rounding.
READ_BACK_TOLERANCE = 1e-4


def rehearse(run: Run, folder: RunFolder) -> None:
    """Pack the untrained network and read it back, so that what cannot be packed is known before hours of training.

    Raises:
        UserError: the network cannot be packed, or cannot be rebuilt from its file.
    """
    values = "fp32" if run.packed.values == "int8" else run.packed.values  # int8 would run it over data
    try:
        unpack(_write_and_read(folder.trial, _packed(run, values)), Dense())
    finally:
        folder.trial.unlink(missing_ok=True)


def pack_and_verify(run: Run, folder: RunFolder) -> PackedModel:
    """Write the packed file of the trained network, read it back, and make sure that it is the network.

    Raises:
        UserError: a weight is not finite, or too large for the values asked for.
        RuntimeError: the file is not what was written.
    """
    wanted = _packed(run, run.packed.values)
    packed = _write_and_read(folder.packed, wanted)
    weights, rounded = run.model.state_dict(), packed.state_dict()
    for name, weight in wanted.state_dict().items():
        if not torch.equal(rounded[name], weight):
            raise RuntimeError(f"{name} is not in the packed file as it was written")
    for name, matrix in packed.matrices.items():
        count = int((weights[name] != 0).sum())
        if matrix.structure == "element" and matrix.entries != count:
            raise RuntimeError(f"the packed file holds {matrix.entries} weights of {name}, not {count}")
    return packed


def score(run: Run, packed: PackedModel) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Score the best checkpoint and its packed form on the whole test part, and time the packed form.

    Returns:
        Scores under ``test`` and ``test_packed``; and the latencies of the report.

    Raises:
        RuntimeError: the sparse kernels compute something else than the dense ones.
    """
    sparse = unpack(packed, run.kernel)
    inputs, _ = next(iter(run.data.val_dataloader()))
    with torch.inference_mode():
        wanted, got = unpack(packed)(inputs)[0], sparse(inputs)[0]
    error = float((got - wanted).norm() / wanted.norm())
    if not error <= max(READ_BACK_TOLERANCE, run.kernel.tolerance):
        raise RuntimeError(f"the sparse kernels' outputs are {error:.2g} away from the dense ones'")
    objective = type(run.objective)
    scores = {
        "test": objective.score(run.model, run.data, "test"),
        "test_packed": objective.score(sparse, run.data, "test"),
    }
    stream_T = inputs.reshape(-1) if run.data.objective == "next_token" else inputs[0]
    dense = dense_networks(packed, inputs[:1])
    latency: dict[str, Any] = latencies(dense | {"sparse": sparse}, stream_T)
    for times in latency.values():
        times["dense"] = min(times.pop(name) for name in dense)
    latency["dense_runtimes"] = [RUNTIMES[name] for name in dense]
    latency |= {"threads": torch.get_num_threads(), "steps": min(STEPS, len(stream_T)), "read_back_error": error}
    choices = run.kernel.choices.values() if isinstance(run.kernel, Auto | Dense) else []
    latency["choices"] = [asdict(choice) for choice in choices]
    return scores, latency


def calibration(model: nn.Module, data: Any) -> Mapping[str, torch.Tensor]:
    """What the matrices of a network multiply on validation data, for int8."""

    def run_over(network: nn.Module) -> None:
        for inputs, _ in itertools.islice(data.val_dataloader(), CALIBRATION_BATCHES):
            network(inputs)

    return record_inputs(model, run_over)


def _packed(run: Run, values: Any) -> PackedModel:
    about = {
        "dataset": run.data.located(dict(run.config["dataset"])),
        "pruning": run.config["pruning"],
        "seed": run.seed,
        "srnn": srnn.__version__,
    }
    energies = calibration(run.model, run.data) if values == "int8" else None
    packed = pack(run.model, run.config["model"], run.data.sizes, values, run.packed.structure, energies)
    return replace(packed, vocabulary=run.data.vocabulary, about=about)


def _write_and_read(path: Path, packed: PackedModel) -> PackedModel:
    write(path, packed)
    return read(path)
