"""Layers and recurrences whose calls are replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from srnn.kernels.calls_in_parts import Steps
from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State, equal_lengths
from srnn.kernels.replay import Recordable, Replays
from srnn.sparse import SparseMatrix


class ReplayedLayer(Layer):
    """A layer whose calls with sequences of equal length are replayed, see ``Replays``.

    Args:
        inner: the layer.
        directions: its weights.
        dtype: of its inputs.
        check: called before each replay; raises if an earlier one failed.
    """

    def __init__(
        self,
        inner: Layer,
        directions: tuple[LayerWeights, ...],
        dtype: torch.dtype,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.inner, self.check, self.replays = inner, check, Replays()
        first, count = directions[0], len(directions)
        inputs, outputs = first.w_ih.shape[1], count * first.hidden_size
        # Inputs, and products with them; then a transposed copy of the former, or states and outputs in two orders.
        numbers = inputs + count * first.w_ih.shape[0] + max(inputs, 2 * outputs) + outputs
        self.row_bytes = _with_gaps(numbers * dtype.itemsize)
        self.may_be_cut = count == 1 and not first.reverse  # backwards the last steps come first

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """As the layer."""
        return _replayed(self.replays, self.inner.run, (x_NI, batch_sizes, state), self.recordable)

    def recordable(self, rows: int, streams: int) -> Recordable:
        """What there is to know of a call with so many rows in all, of so many streams of equal length."""
        checks = () if self.check is None else (self.check,)
        return Recordable(rows * self.row_bytes, checks, Steps(0, streams) if self.may_be_cut else None)


class ReplayedRecurrence(Recurrence):
    """A recurrence whose calls with sequences of equal length are replayed, see ``Replays``.

    Args:
        inner: the recurrence.
        weights: its weights.
        dtype: of its inputs.
        check: called before each replay; raises if an earlier one failed.
    """

    def __init__(self, inner: Recurrence, weights: LayerWeights, dtype: torch.dtype, check: Callable[[], None]) -> None:
        self.inner, self.replays = inner, Replays()
        # Products, with a copy in another order; states, outputs, and the latter in another order.
        self.row_bytes = _with_gaps((2 * weights.w_hh.shape[0] + 3 * weights.hidden_size) * dtype.itemsize)
        self.checks = (check,)
        self.may_be_cut = not weights.reverse

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """As the recurrence."""
        return _replayed(self.replays, self.inner, (u_NG, batch_sizes, state), self.recordable)

    def recordable(self, rows: int, streams: int) -> Recordable:
        """What there is to know of a call with so many rows in all, of so many streams of equal length."""
        return Recordable(rows * self.row_bytes, self.checks, Steps(0, streams) if self.may_be_cut else None)


def _with_gaps(size: int) -> int:
    """What torch's allocator takes for so many bytes, of calls of 100 MB and over: mostly up to 4 % more."""
    return size + size // 16


def _replayed(
    replays: Replays,
    inner: Callable[[Tensor, Tensor, State], tuple[Tensor, State]],
    inputs: tuple[Tensor, Tensor, State],
    about: Callable[[int, int], Recordable],
) -> tuple[Tensor, State]:
    """A call of a layer or recurrence with rows, sizes of steps and a state; replayed where all are of one length."""
    rows, batch_sizes, state = inputs
    streams = state[0].shape[-2]
    if rows.shape[0] and rows.shape[0] == len(batch_sizes) * streams:

        def run(given: list[Tensor]) -> list[Tensor]:
            y_NP, end = inner(given[0], equal_lengths(given[0].shape[0] // streams, streams), tuple(given[1:]))
            return [y_NP, *end]

        done = replays("run", [rows, *state], run, lambda: about(rows.shape[0], streams))
        if done is not None:
            return done[0], tuple(done[1:])
    return inner(rows, batch_sizes, state)


class Replayed(Kernel):
    """A backend whose layers are replayed, for sequences of equal length. Only layers: products run as they are.

    Args:
        inner: the backend whose layers they are.
    """

    device_types = ("cuda",)

    def __init__(self, inner: Kernel) -> None:
        self.inner = inner
        self.tolerance = inner.tolerance

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """What the other backend runs, on a GPU."""
        return (
            "CUDA graphs run on CUDA" if device.type != "cuda" else self.inner.supports(weights, device, dtype, batch)
        )

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """The other backend's."""
        return self.inner.product(matrix, bias, device, dtype)

    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Recurrence:
        """The other backend's."""
        return self.inner.recurrence(weights, device, dtype)

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """The other backend's, replayed."""
        return ReplayedLayer(self.inner.layer(weights, device, dtype), (weights,), dtype)

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """The other backend's, replayed."""
        return ReplayedLayer(self.inner.both(forward, backward, device, dtype), (forward, backward), dtype)
