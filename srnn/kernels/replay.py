"""Calls on a GPU as CUDA graphs: what a call launches is recorded at the second call of a shape, then replayed.

Launching kernels one by one takes longer than many of them run. A graph launches all of them at once, but reads and
writes memory of its own: inputs are copied in and outputs out, so that those of earlier calls stay as they were. To
copy within the graph, by addresses in a table of the host's, took longer: reading it over PCIe alone 0.25 to 0.5 ms.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State
from srnn.sparse import SparseMatrix

_log = logging.getLogger("srnn.kernels")

MOST_SHAPES = 8  # of a module or layer; further ones run as they are
MOST_MEMORY = 256 << 20  # bytes of all recordings of a module or layer
RESTING = 1000  # calls after which a shape that was not among them makes room for another
_SEEN = 64  # shapes that are remembered until they come again

TensorCall = Callable[[list[Tensor]], list[Tensor]]  # a call as a function of tensors
_recording = threading.Lock()  # recording waits for the whole device, which no other recording may meet


class _Thread(threading.local):
    """Of each thread: whether a recording is being made in it, and whether none is to be."""

    recording = False
    recording_is_off = False


_thread = _Thread()


@contextmanager
def nothing_recorded() -> Iterator[None]:
    """Inside, calls of this thread record nothing; what is recorded already is replayed.

    For code that runs in memory of a graph that others are about to record, as compiled graphs do.
    """
    with _set("recording_is_off"):
        yield


@contextmanager
def _set(name: str) -> Iterator[None]:
    """A flag of this thread."""
    before = getattr(_thread, name)
    setattr(_thread, name, True)
    try:
        yield
    finally:
        setattr(_thread, name, before)


@dataclass(frozen=True)
class Recordable:
    """What is to be known of a call before it is recorded.

    Attributes:
        memory: bytes that it takes, with its inputs and outputs; an estimate.
        checks: called before each replay; they raise if an earlier one failed.
    """

    memory: int
    checks: tuple[Callable[[], None], ...] = ()


@dataclass(eq=False)
class _Recording:
    """A graph with its own inputs and outputs.

    Attributes:
        about: what was known before.
        last: the call that used it last.
        streams: the addresses of those it has run on.
    """

    graph: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    about: Recordable = field(default_factory=lambda: Recordable(0))
    last: int = 0
    streams: set[int] = field(default_factory=set)

    @property
    def own(self) -> int:
        """Bytes that nothing else may use."""
        return sum(part.nbytes for part in (*self.inputs, *self.outputs))

    def replay(self, given: list[Tensor], stream: Any, raw_stream: int) -> list[Tensor]:
        """Copies of the outputs for these inputs, on this stream, which is the current one."""
        if raw_stream not in self.streams:
            self.streams.add(raw_stream)
            for part in self.inputs:  # not to be handed on before this stream is done with them
                part.record_stream(stream)
        if len(given) == 1:
            self.inputs[0].copy_(given[0])
        else:
            torch._foreach_copy_(self.inputs, given)  # one launch
        self.graph.replay()
        copies = [torch.empty_like(part) for part in self.outputs]
        torch._foreach_copy_(copies, self.outputs)
        return copies


class Replays:
    """Calls of a function of tensors, from the second of a shape on as replays of a CUDA graph.

    Calls inside a capture and under autocast, and those for which there is no room, are left to the caller. Settings
    such as ``torch.set_float32_matmul_precision`` hold as they were when a shape was recorded.
    """

    def __init__(self) -> None:
        self.recorded: dict[Any, _Recording] = {}
        self._once: OrderedDict[Any, bool] = OrderedDict()  # shapes that came -> whether they may be recorded
        self._calls = 0
        self._lock = threading.Lock()  # a recording has one set of inputs and outputs
        self._stream: Any = None  # of the last replay
        self._raw_stream = -1
        self._done: Any = None  # event: all recordings, which share memory, may be used again
        self._capture_stream: Any = None  # one for all, because memory is handed on within a stream

    def __call__(
        self, kind: str, given: list[Tensor], run: TensorCall, about: Callable[[], Recordable | None]
    ) -> list[Tensor] | None:
        """The outputs, in memory of their own; None where the caller has to run the call.

        Args:
            kind: of the call: those of one kind and the same shapes are alike.
            given: its inputs, on one GPU.
            run: the call.
            about: asked before it is recorded; None if it cannot be.

        Raises:
            RuntimeError: an earlier replay failed.
        """
        if _thread.recording or torch.cuda.is_current_stream_capturing() or torch.is_autocast_enabled("cuda"):
            return None
        key = (kind, *[(part.shape, part.dtype, part.get_device()) for part in given])
        with self._lock:
            self._calls += 1
            one = self.recorded.get(key)
            if one is None:
                if not self._is_second(key) or _thread.recording_is_off:
                    return None
                one = self._recorded_now(key, given, run, about())
                if one is None:
                    return None
            one.last = self._calls
            for check in one.about.checks:
                check()
            return self._replay(one, given)

    def _replay(self, one: _Recording, given: list[Tensor]) -> list[Tensor]:
        device = given[0].get_device()
        raw = raw_stream(device)
        if raw != self._raw_stream:
            stream = torch.cuda.current_stream(device)
            if self._stream is not None:
                stream.wait_event(self._done)
            self._stream, self._raw_stream = stream, raw
        outputs = one.replay(given, self._stream, raw)
        self._done.record(self._stream)
        return outputs

    def _is_second(self, key: Any) -> bool:
        if key in self._once:
            return self._once[key]
        self._once[key] = True
        if len(self._once) > _SEEN:
            self._once.popitem(last=False)
        return False

    def _recorded_now(
        self, key: Any, given: list[Tensor], run: TensorCall, about: Recordable | None
    ) -> _Recording | None:
        if about is None:
            return None
        for check in about.checks:
            check()
        with _recording:
            beside = next(iter(self.recorded.values()), None)  # held, so that the memory they share lives on
            if not self._make_room(about.memory):
                return None
            if self._done is None:
                self._done, self._capture_stream = torch.cuda.Event(), torch.cuda.Stream(given[0].device)
            try:
                one = record(run, given, None if beside is None else beside.graph.pool(), self._capture_stream)
            except RuntimeError as error:  # of torch and CUDA: memory, or a call that cannot be recorded
                self._once[key] = False
                _log.info("calls with inputs of %s run without a graph: %s", tuple(given[0].shape), error)
                return None
        one.about = about
        self.recorded[key] = one
        return one

    def _make_room(self, memory: int) -> bool:
        """Drop recordings that have rested until one of so many bytes fits. Whether it does."""
        if memory > MOST_MEMORY:
            return False
        while len(self.recorded) >= MOST_SHAPES or self._taken(memory) > MOST_MEMORY:
            oldest = min(self.recorded, key=lambda key: self.recorded[key].last, default=None)
            if oldest is None or self._calls - self.recorded[oldest].last <= RESTING:
                return False
            del self.recorded[oldest]
        return True

    def _taken(self, memory: int) -> int:
        """Bytes of all recordings with one more: they share what they use only while they run."""
        there = self.recorded.values()
        return sum(one.own for one in there) + max([memory, *(one.about.memory - one.own for one in there)])


def raw_stream(device: int) -> int:
    """The address of the current stream, which takes far less time to tell than the stream itself."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def record(run: TensorCall, given: list[Tensor], pool: Any, stream: Any) -> _Recording:
    """Record a call with such inputs.

    Args:
        run: the call.
        given: its inputs.
        pool: of the graphs that are never replayed at the same time as this one; None for none.
        stream: to record on.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    device = given[0].device
    # What is written to at each call must not belong to inference mode, which the next may not be in. The outer stream
    # context gives this thread its stream back also if the recording fails.
    with (
        _set("recording"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
    ):
        inputs = [torch.zeros(part.shape, dtype=part.dtype, device=device) for part in given]
        run(inputs)  # what is made or compiled at a first call is not to be recorded
        graph = torch.cuda.CUDAGraph()
        # cuBLAS keeps its workspaces for good: one that was made before would be shared with other graphs, which may
        # run at the same time, and one that was made inside would keep the graph's memory.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may go on allocating memory.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                outputs = run(inputs)
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return _Recording(graph, inputs, outputs)


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
        first = directions[0]
        # Inputs and a transposed copy; products; states, outputs, and the latter in another order.
        numbers = 2 * first.w_ih.shape[1] + len(directions) * (first.w_ih.shape[0] + 3 * first.hidden_size)
        self.row_bytes = numbers * dtype.itemsize

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """As the layer."""
        rows = x_NI.shape[0]
        return _replayed(self.replays, self.inner.run, (x_NI, batch_sizes, state), lambda: self.recordable(rows))

    def recordable(self, rows: int) -> Recordable:
        """What there is to know of a call with so many rows."""
        return Recordable(rows * self.row_bytes, () if self.check is None else (self.check,))


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
        self.row_bytes = (2 * weights.w_hh.shape[0] + 3 * weights.hidden_size) * dtype.itemsize
        self.checks = (check,)

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """As the recurrence."""
        memory = u_NG.shape[0] * self.row_bytes
        about = partial(Recordable, memory, self.checks)
        return _replayed(self.replays, self.inner, (u_NG, batch_sizes, state), about)


def _replayed(
    replays: Replays,
    inner: Callable[[Tensor, Tensor, State], tuple[Tensor, State]],
    inputs: tuple[Tensor, Tensor, State],
    about: Callable[[], Recordable],
) -> tuple[Tensor, State]:
    """A call of a layer or recurrence with rows, sizes of steps and a state; replayed where all are of one length."""
    rows, batch_sizes, state = inputs
    if rows.shape[0] and rows.shape[0] == len(batch_sizes) * state[0].shape[-2]:

        def run(given: list[Tensor]) -> list[Tensor]:
            y_NP, end = inner(given[0], batch_sizes, tuple(given[1:]))
            return [y_NP, *end]

        done = replays("run", [rows, *state], run, about)
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
