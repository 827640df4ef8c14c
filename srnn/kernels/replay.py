"""Calls on a GPU as CUDA graphs: what a call launches is recorded at the second call of a shape, then replayed.

Launching kernels one by one takes longer than many of them run. A graph launches all of them at once, but reads and
writes memory of its own: it begins with copies of the inputs and ends with copies of the outputs, to memory that each
call gets anew, so that outputs of earlier calls stay as they were. To tell a graph of other memory takes longer than to
launch it. A loop's outputs take turns in few places: so a call is recorded several times, each for another place.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srnn.cuda_graphs import Graph, recorded
from srnn.kernels.calls_in_parts import Parts, Steps
from srnn.kernels.graph_copies import GraphCopies, GraphRefusedError

_log = logging.getLogger("srnn.kernels")

MOST_SHAPES = 8  # of a module or layer; further ones run as they are
MOST_MEMORY = 256 << 20  # bytes of all recordings of a module or layer
GRAPHS = 3  # of a shape: a step's outputs are made while those before are its inputs, and those after are made ready
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
    """Inside, calls of this thread record nothing; what is recorded is replayed, and keeps no memory for the next call.

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
        memory: bytes that it takes while it runs, with its inputs and outputs; an estimate.
        checks: called before each replay; they raise if an earlier one failed.
        steps: None for a call that is not to be cut.
    """

    memory: int
    checks: tuple[Callable[[], None], ...] = ()
    steps: Steps | None = None


@dataclass(eq=False)
class _Graph:
    """A call's graph, and the copies of its inputs and outputs."""

    graph: Any
    copies: GraphCopies


@dataclass(eq=False)
class _Recording:
    """The graphs of a call, and what they are for.

    Attributes:
        graphs: all alike; that which was used longest ago comes first.
        like: tensors without memory, of the shapes and strides of the outputs.
        parts: how it is cut; None for a call that runs as a whole.
        checks: called before each replay.
        memory: bytes that it takes, with its outputs; an estimate.
        last: the call that used it last.
        next: memory for the next outputs, the graph that writes to it, and the stream and mode that it is for; made
            while the GPU works, which else waits.
    """

    graphs: list[_Graph]
    like: list[Tensor]
    parts: Parts | None = None
    checks: tuple[Callable[[], None], ...] = ()
    memory: int = 0
    last: int = 0
    next: tuple[list[Tensor], _Graph, tuple[int, bool]] | None = None

    @property
    def own(self) -> int:
        """Bytes that it does not share: the next outputs, which are not made in advance for calls that are cut."""
        return 0 if self.parts is not None else sum(part.numel() * part.itemsize for part in self.like)

    def replay(self, given: list[Tensor], raw: int) -> list[Tensor]:
        """The outputs for these inputs, on the current stream, whose address is given too."""
        # Memory belongs to the stream it was made on, and what was made in inference mode cannot be written to outside.
        use = (raw, torch.is_inference_mode_enabled())
        ready, self.next = self.next, None
        outputs, one, _ = ready if ready is not None and ready[2] == use else self._prepare(use)
        one.copies.read_from(_addresses(given, self.parts))
        one.graph.replay()
        # With recording off memory may be of others' graph, which has only what a call gives back.
        if self.parts is None and not _thread.recording_is_off:
            with suppress(torch.OutOfMemoryError, GraphRefusedError):  # this call has its outputs; the next one tells
                self.next = self._prepare(use)
        return outputs

    def _prepare(self, use: tuple[int, bool]) -> tuple[list[Tensor], _Graph, tuple[int, bool]]:
        outputs = [torch.empty_like(part) for part in self.like]
        places, known = _addresses(outputs, self.parts), [one.copies.writes_to for one in self.graphs]
        if places not in known:
            self.graphs[0].copies.write_to(places)
        one = self.graphs.pop(known.index(places) if places in known else 0)
        self.graphs.append(one)
        return outputs, one, use


class Replays:
    """Calls of a function of tensors, from the second of a shape on as replays of a CUDA graph.

    Calls inside a capture or a trace, those under autocast, and those for which there is no room, are left to the
    caller. Settings such as ``torch.set_float32_matmul_precision`` hold as they were when a shape was recorded.
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
        self, kind: Any, given: list[Tensor], run: TensorCall, about: Callable[[], Recordable | None]
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
        done = self.again(kind, given)
        if done is not None or not _may_record():
            return done
        key = _key(kind, given)
        with self._lock:
            known = key in self.recorded or (self._is_second(key) and self._record_now(key, given, run, about()))
        return self.again(kind, given) if known else None

    def again(self, kind: Any, given: list[Tensor]) -> list[Tensor] | None:
        """The outputs of a call that was recorded, in memory of their own; None of another.

        Raises:
            RuntimeError: an earlier replay failed.
        """
        if not self.recorded or _thread.recording or not _is_plain():
            return None
        key = _key(kind, given)
        with self._lock:
            self._calls += 1
            one = self.recorded.get(key)
            if one is None:
                return None
            one.last = self._calls
            for check in one.checks:
                check()
            return self._replay(key, one, given)

    def _replay(self, key: Any, one: _Recording, given: list[Tensor]) -> list[Tensor] | None:
        device = given[0].get_device()
        raw = raw_stream(device)
        if raw != self._raw_stream:
            stream = torch.cuda.current_stream(device)
            if self._stream is not None:
                stream.wait_event(self._done)
            self._stream, self._raw_stream = stream, raw
        try:
            outputs = one.replay(_laid_out(given, one.parts), raw)
        except GraphRefusedError as error:
            self._leave(key, given, error)
            return None
        self._done.record(self._stream)
        return outputs

    def _leave(self, key: Any, given: list[Tensor], error: Exception | str) -> None:
        """Run such calls as they are from now on."""
        self.recorded.pop(key, None)
        self._once[key] = False
        _log.info("calls with inputs of %s run without a graph: %s", tuple(given[0].shape), error)

    def _is_second(self, key: Any) -> bool:
        if key in self._once:
            return self._once[key]
        self._once[key] = True
        if len(self._once) > _SEEN:
            self._once.popitem(last=False)
        return False

    def _record_now(self, key: Any, given: list[Tensor], run: TensorCall, about: Recordable | None) -> bool:
        """Whether it could be recorded."""
        if about is None:
            return False
        for check in about.checks:
            check()
        with _recording:
            beside = next(iter(self.recorded.values()), None)  # held, so that the memory they share lives on
            parts, memory = None, about.memory
            if not self._make_room(memory):
                parts = self._parts_of(given[0], about)
                if parts is None or not self._make_room(parts.memory):
                    return False
                memory = parts.memory
            if self._done is None:
                self._done, self._capture_stream = torch.cuda.Event(), torch.cuda.Stream(given[0].device)
            pool = None if beside is None else beside.graphs[0].graph.pool()
            try:
                one = record(run, given, pool, self._capture_stream, parts)
            except RuntimeError as error:  # of torch and CUDA: memory, or a call that cannot be recorded
                self._leave(key, given, error)
                return False
        one.checks, one.memory, one.last = about.checks, memory, self._calls
        self.recorded[key] = one
        if self._make_room(0, 0):  # for its outputs, which are made in advance, beside what the largest one takes
            return True
        self._leave(key, given, "there is no room for its outputs")
        return False

    def _make_room(self, memory: int, shapes: int = 1) -> bool:
        """Drop what has rested until so many more shapes fit, one of them of so many bytes. Whether they do."""
        if memory > MOST_MEMORY:
            return False
        while len(self.recorded) + shapes > MOST_SHAPES or self._taken(memory) > MOST_MEMORY:
            oldest = min(self.recorded, key=lambda key: self.recorded[key].last, default=None)
            if oldest is None or self._calls - self.recorded[oldest].last <= RESTING:
                return False
            del self.recorded[oldest]
        return True

    def _parts_of(self, x: Tensor, about: Recordable) -> Parts | None:
        """How to cut a call that takes more memory than there is beside the others' outputs."""
        room = MOST_MEMORY - sum(one.own for one in self.recorded.values())
        return None if about.steps is None else Parts.of(x, about.steps, about.memory, room)

    def _taken(self, memory: int) -> int:
        """Bytes of all recordings and another one of so many: their outputs, and what the largest takes beside them."""
        there = self.recorded.values()
        return sum(one.own for one in there) + max([memory, *(one.memory - one.own for one in there)])


def _key(kind: Any, given: list[Tensor]) -> Any:
    return (kind, *[(part.shape, part.dtype, part.get_device()) for part in given])


def _is_plain() -> bool:
    """Whether calls of this thread are neither captured, traced, nor under autocast."""
    # What torch's public functions ask in the end, as the GPU waits for the answers.
    others = torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None
    return not (others or torch.cuda.is_current_stream_capturing())


def _may_record() -> bool:
    return not (_thread.recording or _thread.recording_is_off) and _is_plain()


def raw_stream(device: int) -> int:
    """The address of the current stream, which takes far less time to tell than the stream itself."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def _laid_out(given: list[Tensor], parts: Parts | None) -> list[Tensor]:
    """Inputs, or copies of them, that copies take as pieces of memory."""
    plain = [part if part.is_contiguous() else part.contiguous() for part in given[0 if parts is None else 1 :]]
    return plain if parts is None else [parts.laid_out(given[0]), *plain]


def _addresses(tensors: list[Tensor], parts: Parts | None) -> list[int]:
    """Of inputs or outputs, of which the first is cut."""
    rest = [part.data_ptr() for part in tensors[0 if parts is None else 1 :]]
    return rest if parts is None else parts.addresses(tensors[0]) + rest


def record(run: TensorCall, given: list[Tensor], pool: Any, stream: Any, parts: Parts | None = None) -> _Recording:
    """Record a call with such inputs.

    Args:
        run: the call.
        given: its inputs.
        pool: of the graphs that are never replayed at the same time as this one; None for none.
        stream: to record on.
        parts: how it is cut.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    device = given[0].device
    # What is written to at each call must not belong to inference mode, which the next may not be in.
    with _set("recording"), torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        given = _laid_out(given, parts)
        taken = [torch.empty_like(part) for part in run(given)]  # what is made at a first call is not to be recorded
        if parts is not None:
            if not taken[0].movedim(parts.dim, 0).is_contiguous():
                raise RuntimeError("the parts of its outputs are no pieces of memory")
            state = given[1:]
            for some in parts.cut(given[0]):  # for which kernels may be compiled, too
                state = run([some, *state])[1:]
        graphs: list[_Graph] = []
        for _ in range(GRAPHS):
            graphs.append(_captured(run, given, taken, graphs[0].graph.pool() if graphs else pool, stream, parts))
        for to in taken:
            to.untyped_storage().resize_(0)
    return _Recording(graphs, taken, parts)


def _captured(
    run: TensorCall, given: list[Tensor], taken: list[Tensor], pool: Any, stream: Any, parts: Parts | None
) -> _Graph:
    """A graph of a call with these inputs, which ends with copies of its outputs to ``taken``."""
    graph, into, out = Graph(keep_graph=True), list[_Copy](), list[_Copy]()

    def part(some: Tensor, state: list[Tensor], to: Tensor) -> list[Tensor]:
        """Run one; in a function of its own, so that its memory is free for the next one."""
        own, *after = run([_copied(some, into), *state])
        _copy_to(to, own, out)
        if parts is None:
            return after
        for one, new in zip(ends, after, strict=True):
            one.copy_(new)
        return ends

    with recorded(graph, given[0].device, pool, stream):
        before = list[_Copy]()  # of the state, which comes after the first input
        state = [_copied(each, before) for each in given[1:]]
        # Made before the first part: in between they could split memory that the next part takes as a whole.
        ends = [] if parts is None else [torch.empty_like(to) for to in taken[1:]]
        pieces = [(given[0], taken[0])] if parts is None else zip(parts.cut(given[0]), parts.cut(taken[0]), strict=True)
        for some, to in pieces:
            state = part(some, state, to)
        for to, own in zip(taken[1:], state, strict=True):
            _copy_to(to, own, out)
    graph.instantiate()
    return _Graph(graph, GraphCopies(graph, into + before, out, given[0].get_device()))


_Copy = tuple[int, int, int]  # addresses from and to, and bytes


def _copied(part: Tensor, copies: list[_Copy]) -> Tensor:
    """An input's copy in the graph."""
    own = torch.empty_like(part).copy_(part)
    copies.append((part.data_ptr(), own.data_ptr(), part.nbytes))
    return own


def _copy_to(to: Tensor, part: Tensor, copies: list[_Copy]) -> None:
    """Copy an output out of the graph, as the piece of memory that it has to be for that."""
    own = part if part.stride() == to.stride() else torch.empty_like(to).copy_(part)
    to.copy_(own)
    copies.append((own.data_ptr(), to.data_ptr(), to.nbytes))
