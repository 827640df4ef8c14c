"""Layers on a GPU as CUDA graphs: what a call launches is recorded at the second call of a shape, then replayed.

Launching kernels one by one takes longer than many of them run. A graph launches all of them at once, but reads and
writes memory of its own: inputs are copied in and outputs out, so that those of earlier calls stay as they were.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State
from srnn.sparse import SparseMatrix

_log = logging.getLogger("srnn.kernels")

MOST_SHAPES = 8  # of a layer; further ones run as they are
MOST_MEMORY = 256 << 20  # of all recordings of a backend's object, which the layers of a network share
RESTING = 1000  # calls of a layer after which a shape that was not among them makes room for another
_SEEN = 64  # shapes that are remembered until they come again
_OVERHEAD = 4 << 20  # of a recording: memory comes in segments

_recording = threading.Lock()  # recording waits for the whole device, which no other recording may meet
_thread = threading.local()


@contextmanager
def nothing_recorded() -> Iterator[None]:
    """Inside, calls of this thread record nothing; what is recorded already is replayed.

    For code that runs in memory of a graph that others are about to record, as compiled graphs do.
    """
    before = getattr(_thread, "nothing", False)
    _thread.nothing = True
    try:
        yield
    finally:
        _thread.nothing = before


@dataclass(eq=False)
class _Recording:
    """A graph with its own inputs and outputs.

    Attributes:
        size: bytes it takes, as estimated.
        last: the layer's call that used it last.
        streams: those it has run on.
    """

    graph: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    size: int = 0
    last: int = 0
    streams: set[Any] = field(default_factory=set)

    def replay(self, given: list[Tensor], stream: Any) -> list[Tensor]:
        """Copies of the outputs for these inputs, on this stream, which is the current one."""
        if stream not in self.streams:
            self.streams.add(stream)
            for part in self.inputs:  # not to be handed on before this stream is done with them
                part.record_stream(stream)
        torch._foreach_copy_(self.inputs, given)  # one launch
        self.graph.replay()
        copies = [torch.empty_like(part) for part in self.outputs]
        torch._foreach_copy_(copies, self.outputs)
        return copies


class Recordings:
    """The recordings of all layers that share ``MOST_MEMORY``. A copy of it, as of a pickled kernel, has none."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[_Recording] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def fit(self, size: int) -> bool:
        """Whether there is room for so many bytes more."""
        return sum(one.size for one in self.alive) + size <= MOST_MEMORY


class ReplayedLayer(Layer):
    """A layer whose calls with sequences of equal length are replayed, from the second call of a shape on.

    Others run as they are: inside a capture, under autocast, and where there is no room for one more recording.
    Settings such as ``torch.set_float32_matmul_precision`` hold as they were when a shape was recorded.

    Args:
        inner: the layer.
        row_bytes: that a row of inputs takes in a call, with all that is made of it; an estimate.
        recordings: what it shares memory with.
        check: called before each replay; raises if an earlier one failed.
    """

    def __init__(
        self, inner: Layer, row_bytes: int, recordings: Recordings, check: Callable[[], None] | None = None
    ) -> None:
        self.inner, self.row_bytes, self.recordings, self.check = inner, row_bytes, recordings, check
        self.recorded: dict[Any, _Recording] = {}
        self._once: OrderedDict[Any, bool] = OrderedDict()  # shapes that came -> whether they may be recorded
        self._calls = 0
        self._lock = threading.Lock()  # a recording has one set of inputs and outputs
        self._stream: Any = None  # of the last replay
        self._done: Any = None  # event: all recordings, which share memory, may be used again

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """As the layer."""
        rows, steps, streams = x_NI.shape[0], len(batch_sizes), state[0].shape[-2]
        if not rows or rows != steps * streams or _must_run_as_it_is():
            return self.inner.run(x_NI, batch_sizes, state)
        with self._lock:
            key = (steps, streams, x_NI.dtype, *(part.dtype for part in state))
            one = self._recording_of(key, x_NI, batch_sizes, state)
            if one is not None:
                if self.check is not None:
                    self.check()
                y_NP, *end = self._replay(one, [x_NI, *state])
                return y_NP, tuple(end)
        return self.inner.run(x_NI, batch_sizes, state)

    def _replay(self, one: _Recording, given: list[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream(given[0].device)
        if self._stream is not None and self._stream != stream:
            stream.wait_event(self._done)
        outputs = one.replay(given, stream)
        self._done.record(stream)
        self._stream = stream
        return outputs

    def _recording_of(self, key: Any, x_NI: Tensor, batch_sizes: Tensor, state: State) -> _Recording | None:
        """The one of a shape; recorded now, if this is the second call; None if there is none."""
        self._calls += 1
        one = self.recorded.get(key)
        if one is None:
            if not self._is_second(key) or getattr(_thread, "nothing", False):
                return None
            one = self._recorded_now(key, x_NI, batch_sizes, state)
            if one is None:
                return None
        one.last = self._calls
        return one

    def _is_second(self, key: Any) -> bool:
        if key in self._once:
            return self._once[key]
        self._once[key] = True
        if len(self._once) > _SEEN:
            self._once.popitem(last=False)
        return False

    def _recorded_now(self, key: Any, x_NI: Tensor, batch_sizes: Tensor, state: State) -> _Recording | None:
        size = x_NI.shape[0] * self.row_bytes + _OVERHEAD
        with _recording:
            beside = next(iter(self.recorded.values()), None)  # held, so that the memory they share lives on
            if not self._make_room(size):
                return None
            if self.check is not None:
                self.check()
            try:
                one = record(self.inner, x_NI, batch_sizes, state, None if beside is None else beside.graph.pool())
            except RuntimeError as error:  # of torch and CUDA: memory, or a call that cannot be recorded
                self._once[key] = False
                _log.info("calls of %d rows run without a graph: %s", x_NI.shape[0], error)
                return None
            one.size = size
            self.recorded[key] = one
            self.recordings.alive.add(one)
        if self._done is None:
            self._done = torch.cuda.Event()
        return one

    def _make_room(self, size: int) -> bool:
        """Drop recordings that have rested until one of so many bytes fits. Whether it does."""
        if size > MOST_MEMORY:
            return False
        while len(self.recorded) >= MOST_SHAPES or not self.recordings.fit(size):
            oldest = min(self.recorded, key=lambda key: self.recorded[key].last, default=None)
            if oldest is None or self._calls - self.recorded[oldest].last <= RESTING:
                return False
            self.recordings.alive.discard(self.recorded.pop(oldest))
        return True


def _must_run_as_it_is() -> bool:
    return torch.cuda.is_current_stream_capturing() or torch.is_autocast_enabled("cuda")


def record(inner: Layer, x_NI: Tensor, batch_sizes: Tensor, state: State, pool: Any) -> _Recording:
    """Record a call of a layer with such inputs.

    Args:
        inner: the layer.
        x_NI: inputs.
        batch_sizes: of equal lengths.
        state: before the first step.
        pool: of the graphs that are never replayed at the same time as this one; None for none.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    device = x_NI.device
    # What is written to at each call must not belong to inference mode, which the next may not be in. The outer stream
    # context gives this thread its stream back also if the recording fails.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
    ):
        inputs = [torch.zeros(part.shape, dtype=part.dtype, device=device) for part in (x_NI, *state)]
        x_NI, state = inputs[0], tuple(inputs[1:])
        inner.run(x_NI, batch_sizes, state)  # what is made or compiled at a first call is not to be recorded
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating memory.
        with torch.cuda.graph(graph, pool, torch.cuda.Stream(device), capture_error_mode="thread_local"):
            y_NP, end = inner.run(x_NI, batch_sizes, state)
    return _Recording(graph, inputs, [y_NP, *end])


def replayed(
    inner: Layer,
    directions: tuple[LayerWeights, ...],
    dtype: torch.dtype,
    recordings: Recordings,
    check: Callable[[], None] | None = None,
) -> ReplayedLayer:
    """``inner``, of such directions, replayed."""
    first = directions[0]
    # Inputs and a transposed copy; products; states, outputs, and both in another order.
    numbers = 2 * first.w_ih.shape[1] + len(directions) * (first.w_ih.shape[0] + 6 * first.hidden_size)
    return ReplayedLayer(inner, numbers * dtype.itemsize, recordings, check)


class Replayed(Kernel):
    """A backend whose layers are replayed, for sequences of equal length. Only layers: products run as they are.

    Args:
        inner: the backend whose layers they are.
    """

    device_types = ("cuda",)

    def __init__(self, inner: Kernel) -> None:
        self.inner = inner
        self.tolerance = inner.tolerance
        self._recordings = Recordings()

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
        return replayed(self.inner.layer(weights, device, dtype), (weights,), dtype, self._recordings)

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """The other backend's, replayed."""
        inner = self.inner.both(forward, backward, device, dtype)
        return replayed(inner, (forward, backward), dtype, self._recordings)
