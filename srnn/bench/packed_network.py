"""A run's packed network, on its best dense modules and on each backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srnn.bench.onnx_baseline import ONNX_BASELINES, OnnxRuntime
from srnn.errors import UserError
from srnn.exporting.reading import read_chain
from srnn.inference.example_calls import example_input
from srnn.inference.latency import STEPS, latencies
from srnn.inference.packed_file import read
from srnn.inference.packing import PackedModel
from srnn.inference.unpacking import unpack
from srnn.registry import register

_DENSE = ("dense", "onnxruntime")  # what is compared with
_INT8_ERROR = 0.2  # of a whole network, as a relative norm: what it costs in its score, `srnn export` says


@dataclass(frozen=True)
class PackedRow:
    """The network on one backend, one stream.

    Attributes:
        what: ``sequence`` or ``step``.
        backend: a kernel's name; ``dense`` for the best dense modules, ``onnxruntime`` for its graph of the network.
        seconds: of a whole call, the median.
        over_dense: how many times faster than the faster of ``dense`` and ``onnxruntime`` in fp32.
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
    models: dict[str, Any] = {}
    for name in ["dense", *(n for n in register.names("kernel") if n != "dense")]:
        kernel = register.build("kernel", {"name": name})
        if kernel.unasked and kernel.supports(None, torch.device("cpu")) is None:
            models[name] = unpack(packed, kernel)
    models |= _in_onnxruntime(packed)
    example = example_input(packed.supplied, STEPS)
    if example is None:
        raise UserError(f"{path} reads neither tokens nor vectors of a known size: bench cannot make inputs for it.")
    inputs_T = example[0]
    _check_outputs(path, packed, models, inputs_T)
    found = latencies(models, inputs_T, min(30.0, limit / 2))  # sequences and steps take half of it each
    return [
        PackedRow(what, name, seconds, min(times[n] for n in _DENSE if n in times) / seconds)
        for what, times in found.items()
        for name, seconds in times.items()
    ]


def _in_onnxruntime(packed: PackedModel) -> dict[str, Any]:
    """The network as onnxruntime's own graph, where it is installed and the network is a chain of layers."""
    network = unpack(packed)
    if OnnxRuntime().supports(None, torch.device("cpu")) is not None:
        return {}
    try:
        chain = read_chain(network)
    except UserError:
        return {}
    return {name: kernel.network(chain) for name, kernel in ONNX_BASELINES.items()}


def _check_outputs(path: Path, packed: PackedModel, models: dict[str, Any], inputs_T: Tensor) -> None:
    """Against the dense network with the same weights, in float64."""
    with torch.inference_mode():
        truth = unpack(packed).double()(inputs_T[None].double() if inputs_T.is_floating_point() else inputs_T[None])[0]
        for name, model in models.items():
            error = float((model(inputs_T[None])[0] - truth).norm() / truth.norm())
            if not error <= (_INT8_ERROR if name.endswith("int8") else 1e-4):
                raise UserError(f"bench: {name} computes {path} wrong, its error is {error:.1e}; please report it.")
