"""Whole networks of the sizes people have, one stream on a CPU: ``auto`` and ``cpu`` against the best dense there is.

Called as a user would: outputs and state of a sequence, or of one step from the state before.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.bench.layers import relative_error
from srnn.bench.onnx_baseline import ONNX_BASELINES, OnnxRuntime
from srnn.cells import GATES, cell_of
from srnn.exporting.reading import read_chain
from srnn.formats import DTYPES
from srnn.inference.sparsify import sparsify
from srnn.inference.whole_network import LENGTHS
from srnn.kernels.dense import Int8, OneDnn
from srnn.kernels.timing import Call, hardware

_CPU = torch.device("cpu")
_TURNS, _TURN, _WARM = 9, 4e-3, 2  # seconds of a turn, and calls of it that are not counted: weights are elsewhere
_CHECKED = 16  # steps that are compared with float64
_ERRORS = {"int8": 0.2, "onnxruntime int8": 0.2}  # of others 1e-4
_FP32 = ("torch", "onednn", "onnxruntime")


@dataclass(frozen=True)
class SmallNetwork:
    """Recurrent layers and a linear decoder of each step.

    Attributes:
        name: what it is like; layers of ``cell`` with ``inputs`` numbers a step, ``hidden`` units and ``outputs``.
    """

    name: str
    cell: type[nn.GRU] | type[nn.LSTM]
    inputs: int
    hidden: int
    layers: int
    outputs: int

    def __str__(self) -> str:
        shape = f"{self.cell.__name__} {self.inputs}-{self.hidden} x {self.layers}, {self.outputs} outputs"
        return f"{self.name}: {shape}" if self.name else shape


# Those with names have the shapes of networks that packages of PyPI ship.
NETWORKS = (
    SmallNetwork("", nn.GRU, 40, 24, 1, 8),
    SmallNetwork("", nn.LSTM, 40, 24, 2, 8),
    SmallNetwork("", nn.GRU, 40, 64, 2, 32),
    SmallNetwork("", nn.LSTM, 64, 64, 1, 32),
    SmallNetwork("voice detector", nn.LSTM, 128, 128, 1, 1),
    SmallNetwork("", nn.GRU, 64, 128, 3, 64),
    SmallNetwork("beat tracker", nn.LSTM, 150, 150, 2, 3),
    SmallNetwork("letters to sounds", nn.GRU, 256, 256, 1, 74),
    SmallNetwork("speaker encoder", nn.LSTM, 40, 256, 3, 256),
    SmallNetwork("", nn.GRU, 128, 512, 2, 128),
    SmallNetwork("", nn.LSTM, 512, 512, 1, 128),
    SmallNetwork("", nn.GRU, 256, 1024, 1, 256),
)


class Tagger(nn.Module):
    """What is timed: outputs_BTO and state of x_BTI and the state before."""

    def __init__(self, shape: SmallNetwork) -> None:
        super().__init__()
        self.rnn: Any = shape.cell(shape.inputs, shape.hidden, num_layers=shape.layers, batch_first=True)
        self.decoder = nn.Linear(shape.hidden, shape.outputs)

    def forward(self, x_BTI: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As torch's layers."""
        y_BTH, state = self.rnn(x_BTI, state)
        return self.decoder(y_BTH), state


@dataclass(frozen=True)
class SmallNetworkRow:
    """One network at one length; times are microseconds of a whole call, None where a backend cannot run.

    Attributes:
        chosen: what ``auto`` took.
        dense: the fastest fp32 dense backend.
        auto_over_dense: how many times faster ``auto`` is than it.
        auto_over_torch: the same over the faster of torch and oneDNN, which ``auto`` can take itself.
        cpu_over_dense: the same of the sparse kernels everywhere.
        auto_over_int8: of ``auto`` over the fastest int8 dense.
    """

    device: str
    network: str
    structure: str
    values: str
    sparsity: float
    threads: int
    steps: int
    torch_us: float | None
    onednn_us: float | None
    onnxruntime_us: float | None
    int8_us: float | None
    onnxruntime_int8_us: float | None
    cpu_us: float
    auto_us: float
    chosen: str
    dense: str
    auto_over_dense: float
    auto_over_torch: float
    cpu_over_dense: float
    auto_over_int8: float | None


def small_cases(
    sparsities: Sequence[float], structures: Sequence[Any], values: Sequence[Any]
) -> list[tuple[SmallNetwork, Format]]:
    """All networks in all formats."""
    return [(n, Format(*format)) for n in NETWORKS for format in itertools.product(sparsities, structures, values)]


def measure_small(shape: SmallNetwork, format: Format, steps: Sequence[int] = LENGTHS) -> Iterator[SmallNetworkRow]:
    """A row a length: outputs checked against float64 first, then all backends timed in turns.

    Raises:
        RuntimeError: a backend computes wrong.
    """
    torch.manual_seed(0)
    x_BTI = torch.randn(1, max(*steps, 100), shape.inputs)
    dense = _pruned_network(shape, format)
    backends = _backends(dense, format, x_BTI[:, :100])
    with torch.inference_mode():
        truth = _pruned_network(shape, format).double()(x_BTI[:, :_CHECKED].double())[0]
        states = {}
        for name, network in backends.items():
            outputs, states[name] = network(x_BTI[:, :_CHECKED].contiguous())
            error = relative_error(outputs, truth)
            if not error <= _ERRORS.get(name, 1e-4):
                raise RuntimeError(f"{name} computes {shape}, {format} wrong: its error is {error:.1e}")
        for length in steps:
            x = x_BTI[:, :length].contiguous()
            calls: dict[str, Call] = {name: partial(n, x, states[name]) for name, n in backends.items()}
            chosen = backends["auto"].sparsify_report.partition("kernels: ")[2]
            yield _row(shape, format, length, _times(calls), chosen)


def _pruned_network(shape: SmallNetwork, format: Format) -> Tagger:
    """With random weights, rounded as they are stored."""
    torch.manual_seed(1)
    network, random = Tagger(shape).eval(), torch.Generator().manual_seed(2)
    for name, weight in network.named_parameters():
        if weight.ndim == 2:
            gates = GATES[cell_of(network.rnn)] if name.startswith("rnn") else 1
            found = pruned(weight.shape[0], weight.shape[1], gates, format, random)
            weight.data = (found if format.values == "int8" else found.to(DTYPES[format.values])).float()
    network.rnn.flatten_parameters()
    return network.requires_grad_(False)


def _backends(dense: Tagger, format: Format, example: Tensor) -> dict[str, Any]:
    """Name -> network with the same weights; ``auto`` as structure, because a decoder can be too small for blocks."""
    found: dict[str, Any] = {"torch": dense}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 50 % what cannot be smaller stays dense, as it would for anyone
        found["onednn"] = sparsify(dense, "auto", format.values, OneDnn())
        found["int8"] = sparsify(dense, "auto", format.values, Int8())
        found["cpu"] = sparsify(dense, "auto", format.values, "cpu")
        found["auto"] = sparsify(dense, "auto", format.values, "auto", example=example)
    if OnnxRuntime().supports(None, _CPU) is None:
        chain = read_chain(dense)
        found |= {name: kernel.network(chain) for name, kernel in ONNX_BASELINES.items()}
    return found


def _times(calls: Mapping[str, Call]) -> dict[str, float]:
    """Microseconds: the median of a turn in which a call is repeated, as in a stream; of the best of several turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(_TURNS):
        for name, call in calls.items():
            several: list[float] = []
            began = time.perf_counter()
            while not several or time.perf_counter() - began < _TURN:
                before = time.perf_counter()
                call()
                several.append(time.perf_counter() - before)
            best[name] = min(best[name], float(np.median(several[_WARM if len(several) > 2 * _WARM else 0 :])))
    return {name: round(1e6 * seconds, 2) for name, seconds in best.items()}


def _row(shape: SmallNetwork, format: Format, steps: int, us: Mapping[str, float], chosen: str) -> SmallNetworkRow:
    best = min((name for name in _FP32 if name in us), key=us.__getitem__)
    int8 = min((us[name] for name in _ERRORS if name in us), default=None)
    return SmallNetworkRow(
        device=hardware(_CPU),
        network=str(shape),
        structure=format.structure,
        values=format.values,
        sparsity=format.sparsity,
        threads=torch.get_num_threads(),
        steps=steps,
        **{f"{name.replace(' ', '_')}_us": us.get(name) for name in (*_FP32, *_ERRORS)},
        cpu_us=us["cpu"],
        auto_us=us["auto"],
        chosen=chosen,
        dense=best,
        auto_over_dense=round(us[best] / us["auto"], 3),
        auto_over_torch=round(min(us["torch"], us["onednn"]) / us["auto"], 3),
        cpu_over_dense=round(us[best] / us["cpu"], 3),
        auto_over_int8=None if int8 is None else round(int8 / us["auto"], 3),
    )
