"""Dense products and layers: what a sparse kernel has to beat.

``kernel=dense`` (see ``choosing.py``) is the faster of torch's own modules and, on a CPU, products with weights laid
out by oneDNN beforehand. Neither wins everywhere: with 7680 x 2560 on two cores (AMD EPYC, AVX2) oneDNN takes 5.3 ms
against 4.7 for one row and one thread, 3.0 against 3.9 with two threads, 7.5 against 14.0 for four rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State
from srnn.kernels.reference import StepLoop
from srnn.meta_device import without_memory
from srnn.sparse import SparseMatrix


class StepLoopKernel(Kernel):
    """A backend with a product of its own and torch's operations for the rest: what a plug-in with a product needs.

    Derive from it and write ``supports`` and ``product``; the example of ``Kernel`` does.
    """

    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Recurrence:
        """A loop of steps."""
        new_bias = weights.new_bias
        return StepLoop(
            weights.cell,
            self.product(weights.w_hh, None, device, dtype),
            None if new_bias is None else new_bias.to(device, dtype),
            None if weights.w_hr is None else self.product(weights.w_hr, None, device, dtype),
            weights.reverse,
        )


class Torch(StepLoopKernel):
    """Torch's own modules, ``nn.GRU`` and its kind."""

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """Everything torch runs."""
        return None

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """``F.linear``."""
        weight = matrix.to_dense().to(device, dtype)
        bias = None if bias is None else bias.to(device, dtype)
        return lambda x_NI: F.linear(x_NI, weight, bias)

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """A one-layer module; the loop of steps for what it cannot do."""
        loop = super().layer(weights, device, dtype)
        return _TorchLayer((weights,), device, dtype, loop) if _is_torchs(weights) else loop

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """A bidirectional module."""
        loop = super().both(forward, backward, device, dtype)
        return _TorchLayer((forward, backward), device, dtype, loop) if _is_torchs(forward) else loop


def _is_torchs(weights: LayerWeights) -> bool:
    """Whether torch's own module is used. With projections it leaves oneDNN, and says so at each first call."""
    return weights.cell != "clipped_relu" and weights.w_hr is None


class _TorchLayer(Layer):
    """A module of torch of one direction, which runs forward, so a reversed one gets its steps reversed; or of both."""

    def __init__(
        self, directions: tuple[LayerWeights, ...], device: torch.device, dtype: torch.dtype, loop: Layer
    ) -> None:
        weights = directions[0]
        self.both, self.loop = len(directions) == 2, loop
        self.reverse, self.lstm = weights.reverse and not self.both, weights.cell == "lstm"
        kinds = {"gru": nn.GRU, "lstm": nn.LSTM}
        cell = kinds.get(weights.cell, nn.RNN)
        options: dict[str, Any] = {} if weights.cell in kinds else {"nonlinearity": weights.cell}
        bias = any(part.b_ih is not None or part.b_hh is not None for part in directions)
        with without_memory():
            module = cell(weights.w_ih.shape[1], weights.hidden_size, bias=bias, bidirectional=self.both, **options)
        tensors: dict[str, Tensor] = {}
        for suffix, part in zip(("_l0", "_l0_reverse"), directions, strict=False):
            tensors |= {f"weight_{name[2:]}{suffix}": matrix.to_dense() for name, matrix in part.matrices.items()}
            if bias:  # torch's module has both or none, so one that is not there is zero
                none = torch.zeros(part.w_ih.shape[0])
                tensors[f"bias_ih{suffix}"] = none if part.b_ih is None else part.b_ih
                tensors[f"bias_hh{suffix}"] = none if part.b_hh is None else part.b_hh
        # Flat memory on a GPU and, for torch's oneDNN LSTM, on a CPU.
        module.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
        module.requires_grad_(False).flatten_parameters()
        self.module = module.eval()

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        steps, streams = len(batch_sizes), int(batch_sizes[0]) if len(batch_sizes) else 0
        if streams * steps != x_NI.shape[0] or state[0].shape[-2] != streams or not x_NI.shape[0]:
            return self.loop.run(x_NI, batch_sizes, state)
        x_TBI = x_NI.view(steps, streams, -1)
        wide = tuple(part if self.both else part[None] for part in state)
        y_TBP, after = self.module(x_TBI.flip(0) if self.reverse else x_TBI, wide if self.lstm else wide[0])
        y_TBP = y_TBP.flip(0) if self.reverse else y_TBP
        end = after if self.lstm else (after,)
        return y_TBP.reshape(x_NI.shape[0], -1), tuple(part if self.both else part[0] for part in end)


class OneDnn(StepLoopKernel):
    """A loop of steps around oneDNN's product with weights laid out beforehand; CPU, fp32."""

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """An x86 or ARM CPU with a torch that has oneDNN."""
        if device.type != "cpu" or dtype != torch.float32:
            return "oneDNN's packed products run in fp32 on a CPU"
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """Reordered once."""
        if 0 in matrix.shape:
            return Torch().product(matrix, bias, device, dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix.to_dense(), None)
        bias = None if bias is None else bias.float()
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda x_NI: linear(x_NI.contiguous(), packed, bias, "none", [], "")


class Int8(StepLoopKernel):
    """Dynamic int8: weights quantised a row, inputs as they come; CPU."""

    tolerance = 0.1

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """A CPU with a quantised engine."""
        if device.type != "cpu" or dtype != torch.float32:
            return "dynamic int8 runs on a CPU"
        return None if torch.backends.quantized.engine != "none" else "this torch has no quantised engine"

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """Quantised and packed once."""
        if 0 in matrix.shape:
            return Torch().product(matrix, bias, device, dtype)
        weight = matrix.to_dense()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        with warnings.catch_warnings():  # torch announces that it will drop these; it has no other such product yet
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(scales), dtype=torch.long)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, None if bias is None else bias.float())
        # As torch's own modules do it: with the full range of inputs, the engine's 16-bit sums overflow on AVX2.
        return lambda x_NI: torch.ops.quantized.linear_dynamic(x_NI, packed, reduce_range=True)
