"""A run's packed network, on each dense runtime and on each backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.exporting.dense_networks import dense_networks, in_onnxruntime
from srnn.exporting.reading import read_chain
from srnn.inference.example_calls import example_input
from srnn.inference.latency import STEPS, latencies
from srnn.inference.packed_file import read
from srnn.inference.packing import PackedModel
from srnn.inference.unpacking import unpack
from srnn.registry import register

_INT8_ERROR = 0.2  # of a whole network, as a relative norm: what it costs in its score, `srnn export` says


@dataclass(frozen=True)
class PackedRow:
    """The network on one backend, one stream.

    Attributes:
        what: ``sequence`` or ``step``.
        backend: a kernel's name, one of ``dense_networks``, or ``onnxruntime int8``.
        seconds: of a whole call, the median.
        over_dense: how many times faster than the fastest of ``dense_networks``.
    """

    what: str
    backend: str
    seconds: float
    over_dense: float


def measure_packed(path: Path, limit: float) -> list[PackedRow]:
    """Time a packed file on each backend that can run here, outputs checked first.

    Args:
        path: the file.
        limit: seconds that all of it may take, about; never more than a minute.

    Raises:
        UserError: the file cannot be read, or a backend computes it wrong.
    """
    packed = read(path)
    example = example_input(packed.supplied, STEPS)
    if example is None:
        raise UserError(f"{path} reads neither tokens nor vectors of a known size: bench cannot make inputs for it.")
    inputs_T = example[0]
    dense = dense_networks(packed, example)
    models = dict(dense)
    for name in (n for n in register.names("kernel") if n not in dense):
        kernel = register.build("kernel", {"name": name})
        if kernel.unasked and kernel.supports(None, torch.device("cpu")) is None:
            models[name] = unpack(packed, kernel)
    if "onnxruntime" in dense:
        models["onnxruntime int8"] = in_onnxruntime(read_chain(dense["torch"]), "int8")
    _check_outputs(path, packed, models, inputs_T)
    found = latencies(models, inputs_T, min(30.0, limit / 2))  # sequences and steps take half of it each
    return [
        PackedRow(what, name, seconds, min(times[n] for n in dense) / seconds)
        for what, times in found.items()
        for name, seconds in times.items()
    ]


def _check_outputs(path: Path, packed: PackedModel, models: dict[str, Any], inputs_T: Tensor) -> None:
    """Against the dense network with the same weights, in float64."""
    with torch.inference_mode():
        truth = unpack(packed).double()(inputs_T[None].double() if inputs_T.is_floating_point() else inputs_T[None])[0]
        for name, model in models.items():
            error = float((model(inputs_T[None])[0] - truth).norm() / truth.norm())
            if not error <= (_INT8_ERROR if name.endswith("int8") else 1e-4):
                raise UserError(f"bench: {name} computes {path} wrong, its error is {error:.1e}; please report it.")
