"""``kernel=triton``: persistent kernels on a GPU."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Recurrence, State
from srnn.kernels.replayed import ReplayedLayer, ReplayedRecurrence
from srnn.kernels.triton.chip import chip_of, interpreted
from srnn.kernels.triton.products.layout import TritonProduct
from srnn.kernels.triton.recurrence import TritonRecurrence
from srnn.registry import register
from srnn.sparse import SparseMatrix, stacked

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@register.kernel("triton")
class Triton(Kernel):
    """A whole sequence in one launch, the weights on the chip.

    Values of fp16, bf16 or fp32, sums in fp32; docs/kernels.md says what runs in which form. Layers and
    recurrences are replayed as CUDA graphs from the second call of a shape on, see ``ReplayedLayer``.

    Args:
        precision: of products of fp32 with several streams or many rows: ``tf32x3`` makes three of tf32 of one where
            that is faster, and is as exact as ``ieee``; ``tf32`` has 11 bits.
        structure: ``stored`` runs weights as they are stored; others lay recurrent weights out in these blocks, zeros
            and all: for weights with few zeros, of layers that fit the chip.
    """

    device_types = ("cuda",)

    def __init__(
        self,
        precision: Literal["tf32x3", "ieee", "tf32"] = "tf32x3",
        structure: Literal["stored", "8x1", "16x1", "32x1"] = "stored",
    ) -> None:
        self.precision, self.structure = precision, structure

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """A CUDA GPU of compute capability 7.0 and up, or Triton's interpreter."""
        if (reason := _missing()) is not None:
            return reason
        if device.type == "cuda":
            if torch.cuda.get_device_capability(device) < (7, 0):
                return "needs a GPU of compute capability 7.0 or newer"
        elif not (device.type == "cpu" and interpreted()):
            return f"runs on CUDA GPUs, not on {device.type}"
        if dtype not in _FLOATS:
            return f"computes in fp16, bf16 or fp32, not in {dtype}"
        one = [] if weights is None or isinstance(weights, LayerWeights) else [weights]
        for matrix in weights.matrices.values() if isinstance(weights, LayerWeights) else one:
            if matrix.values_name == "int8":
                return "takes fp16, bf16 or fp32 values, not int8"
        if isinstance(weights, LayerWeights):
            if weights.w_hr is not None:
                return "has no projections of an LSTM's output"
            chip = chip_of(device)
            if weights.hidden_size > chip.tuning.most_units:
                return f"takes up to {chip.tuning.most_units} hidden units, not {weights.hidden_size}"
            rows, columns = weights.w_hh.shape
            room = chip.processors * chip.tuning.dense_bytes
            if self.structure != "stored" and rows * columns * dtype.itemsize > room:
                return f"in {self.structure} blocks its recurrent weights may not fit the chip"
        return None

    def product(
        self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> TritonProduct:
        """Sparse for few rows, and for many of tall blocks; else dense."""
        bias = None if bias is None else bias.to(device)
        # As exact, and with as many rows as a sequence has faster: on an H100 4096 of fp32 by 7680x2560 32x1 90 % take
        # 466 us, as tf32x3 537.
        precision = "ieee" if self.precision == "tf32x3" else self.precision
        return TritonProduct(matrix.to(device), bias, dtype, precision, chip_of(device).tuning)

    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Recurrence:
        """One launch a sequence."""
        recurrence = self._launched(weights, device, dtype)
        return ReplayedRecurrence(recurrence, weights, dtype, recurrence.check) if device.type == "cuda" else recurrence

    def _launched(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> TritonRecurrence:
        return TritonRecurrence((self._laid_out(weights),), device, dtype, self.precision, chip_of(device))

    def _laid_out(self, weights: LayerWeights) -> LayerWeights:
        matrix = weights.w_hh
        if self.structure in ("stored", matrix.structure):
            return weights
        dense, structure = matrix.to_dense(), self.structure
        blocks = SparseMatrix.from_dense(dense, structure, matrix.values_name, matrix.gates)  # type: ignore[arg-type]
        return replace(weights, w_hh=blocks)

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """The product hands its outputs on in the order in which the recurrence reads them."""
        product = self.product(weights.w_ih, weights.input_bias, device, dtype)
        return _replayed(_Layer(product, self._launched(weights, device, dtype)), (weights,), device)

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """In one launch, where weights are stored alike and both directions fit the device."""
        forward, backward = self._laid_out(forward), self._laid_out(backward)
        alike = forward.w_hh.height == backward.w_hh.height and forward.w_ih.height == backward.w_ih.height
        chip = chip_of(device)
        fit = 2 * forward.w_hh.groups // forward.w_hh.gates <= 2 * chip.processors or forward.w_hh.height == 1
        if not (alike and fit):
            return super().both(forward, backward, device, dtype)
        biases = forward.input_bias, backward.input_bias
        bias = None if biases[0] is None or biases[1] is None else torch.cat([biases[0], biases[1]])
        product = self.product(stacked([forward.w_ih, backward.w_ih]), bias, device, dtype)
        recurrence = TritonRecurrence((forward, backward), device, dtype, self.precision, chip)
        return _replayed(_Layer(product, recurrence), (forward, backward), device)


@dataclass(frozen=True)
class _Layer(Layer):
    """One direction, or both, as the recurrence has them."""

    product: TritonProduct
    recurrence: TritonRecurrence

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        in_slices = self.recurrence.slices(state[0].shape[-2]) is not None
        recur = self.recurrence.directions if self.recurrence.count == 2 else self.recurrence
        return recur(self.product(x_NI, streams_together=in_slices), batch_sizes, state)


def _replayed(layer: _Layer, directions: tuple[LayerWeights, ...], device: torch.device) -> Layer:
    recurrence = layer.recurrence
    graphs = device.type == "cuda"
    return ReplayedLayer(layer, directions, recurrence.dtype, recurrence.check) if graphs else layer
