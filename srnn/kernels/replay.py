"""Layers of another backend as CUDA graphs: what a call launches is recorded once for each shape, then replayed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State
from srnn.sparse import SparseMatrix

MOST_GRAPHS = 8  # of a layer, which each hold their inputs and outputs; further shapes run as they are


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
        return _ReplayedLayer(self.inner.layer(weights, device, dtype))

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """The other backend's, replayed."""
        return _ReplayedLayer(self.inner.both(forward, backward, device, dtype))


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    x_NI: Tensor
    state: State
    y_NP: Tensor
    end: State
    done: Any  # event: its inputs and outputs are free again, for whatever stream comes next


@dataclass(frozen=True)
class _ReplayedLayer(Layer):
    inner: Layer
    recorded: dict[Any, _Recorded] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)  # a graph has one set of inputs and outputs

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        steps, streams = len(batch_sizes), state[0].shape[-2]
        if steps * streams != x_NI.shape[0] or not steps or torch.cuda.is_current_stream_capturing():
            return self.inner.run(x_NI, batch_sizes, state)
        key = (steps, streams)
        with self.lock:
            if key not in self.recorded:
                if len(self.recorded) == MOST_GRAPHS:
                    return self.inner.run(x_NI, batch_sizes, state)
                self.recorded[key] = self._record(x_NI, batch_sizes, state)
            one, stream = self.recorded[key], torch.cuda.current_stream(x_NI.device)
            stream.wait_event(one.done)
            for own, given in zip((one.x_NI, *one.state), (x_NI, *state), strict=True):
                own.copy_(given)
            one.graph.replay()
            y_NP, end = one.y_NP.clone(), tuple(part.clone() for part in one.end)
            one.done.record(stream)
            return y_NP, end

    def _record(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> _Recorded:
        # What is written to at each call must not belong to inference mode, which the next may not be in.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x_NI.device):
            x_NI, state = x_NI.clone(), tuple(part.clone() for part in state)
            self.inner.run(x_NI, batch_sizes, state)  # what is done at a first call is not to be recorded
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y_NP, end = self.inner.run(x_NI, batch_sizes, state)
        return _Recorded(graph, x_NI, state, y_NP, end, torch.cuda.Event())
