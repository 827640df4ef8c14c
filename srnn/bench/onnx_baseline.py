"""onnxruntime as a dense baseline: a graph of its own of the same layer or product, in fp32 and dynamic int8.

It runs on as many threads as torch does when it is made ready.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from srnn.exporting.chain import Chain, Direction, LinearPart, RecurrentPart
from srnn.exporting.dense_networks import in_onnxruntime
from srnn.exporting.onnx_session import OnnxNetwork
from srnn.kernels.contract import Layer, LayerWeights, Product, State
from srnn.kernels.dense import StepLoopKernel
from srnn.sparse import SparseMatrix


class OnnxRuntime(StepLoopKernel):
    """Layers and products in onnxruntime, the zeros left in.

    Args:
        values: ``fp32``, or ``int8`` for dynamic quantisation, which it has for LSTM layers and products.
    """

    def __init__(self, values: Literal["fp32", "int8"] = "fp32") -> None:
        self.values = values
        self.tolerance = 0.1 if values == "int8" else 1e-5

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """Where it is installed; on a CPU, in fp32."""
        if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
            return "onnxruntime is not installed: pip install 'srnn[onnx]'"
        if device.type != "cpu" or dtype != torch.float32:
            return "onnxruntime is a baseline in fp32 on a CPU"
        if isinstance(weights, LayerWeights):
            if weights.reverse or weights.w_hr is not None:
                return "only whole forward layers are timed in onnxruntime"
            if self.values == "int8" and weights.cell != "lstm":
                return f"onnxruntime has no int8 {weights.cell} layer"
        return None

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """A graph of one product."""
        network = self.network(Chain((LinearPart("product", matrix, bias),), batch_first=True))
        return lambda x_NI: network.run(x_NI[None])[0][0]

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """A graph of one layer."""
        direction = Direction(weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh)
        part = RecurrentPart("layer", weights.cell, ((direction,),))
        return _OnnxLayer(self.network(Chain((part,), batch_first=False)))

    def network(self, chain: Chain) -> OnnxNetwork:
        """A graph of a whole chain; in int8 what onnxruntime has int8 for."""
        return in_onnxruntime(chain, self.values)


ONNX_BASELINES: dict[str, OnnxRuntime] = {"onnxruntime": OnnxRuntime(), "onnxruntime int8": OnnxRuntime("int8")}


@dataclass(frozen=True)
class _OnnxLayer(Layer):
    """Streams of equal length: bench has no others."""

    network: Any

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """One call of the session."""
        x_TBI = x_NI.view(len(batch_sizes), state[0].shape[0], -1)
        given = {name: part[None] for name, part in zip(self.network.states, state, strict=True)}
        y_TBP, after = self.network.run(x_TBI, given)
        return y_TBP.view(x_NI.shape[0], -1), tuple(part[0] for part in after.values())
