"""The recurrence on a GPU, forward and backward: a product and one other kernel a step, replayed from CUDA graphs.

Launching the kernels of a step one by one takes longer than they run. Graphs launch many steps at once, but read and
write memory of their own. So a sequence runs in pieces of ``PIECE_STEPS`` steps at most, which are copied in and out:
what graphs keep does not grow with the sequence, and one graph serves all lengths but for the last piece.

Shapes: T time, D directions, B batch, H hidden units, G gates * H.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srnn.cells import GATES, Cell
from srnn.cuda_graphs import Graph, recorded

PIECE_STEPS = 32  # steps of the longest graph
MOST_SIZES = 4  # sizes of a recurrence whose graphs are kept; their memory is mostly that of the recurrent matrix
_KEPT_GATES = {"gru": 4, "lstm": 4}

_lock = threading.Lock()  # the memory of a graph is for one call at a time
_known: OrderedDict[Any, _Graphs] = OrderedDict()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products here and now: autocast's, if that is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


def runs_on_gpu(u_TBG: Tensor, w_hh_GH: Tensor, state: tuple[Tensor, ...]) -> bool:
    """Whether ``GpuRecurrence`` takes these."""
    given = (u_TBG, w_hh_GH, *state)
    return (
        u_TBG.is_cuda
        and _has_triton()
        and u_TBG.numel() > 0
        and u_TBG.dim() == w_hh_GH.dim() + 1 <= 4
        and all(part.dtype == u_TBG.dtype and part.device == u_TBG.device for part in given)
        and not torch.compiler.is_compiling()
    )


@dataclass
class _Arrays:
    """A sequence, or a piece of one. Those a cell or a direction has no use for are another one, never read.

    Where no backward pass will come, gates are not kept, and of ``c`` and ``low`` the latest step alone [1, D, B, H].

    Attributes:
        w: recurrent matrices [D, G, H], in the dtype of products.
        u: products with the input [T, D, B, G]; backward, their gradients.
        h: states [T + 1, D, B, H], from that before the first step on.
        c: an LSTM's.
        low: ``h`` in the dtype of products.
        gates: what the backward step wants [T, D, B, 4 H].
        dy: gradients of outputs [T, D, B, H].
        dv: gradients of products with the state [T, D, B, G].
        carry: [1, D, B, H], what goes from step to step besides ``dh``.
        dh: [1, D, B, H], in the dtype of products.
    """

    cell: Cell
    w: Tensor
    u: Tensor
    h: Tensor
    c: Tensor
    low: Tensor
    gates: Tensor
    dy: Tensor
    dv: Tensor
    carry: Tensor
    dh: Tensor
    keeps: bool = True  # whether a backward pass may come

    @classmethod
    def empty(cls, cell: Cell, w: Tensor, u: Tensor, backward: bool, keeps: bool = True) -> _Arrays:
        """Arrays for products with the input ``u``, the forward ones or the backward ones too."""
        steps, *rows, width = u.shape
        hidden = width // GATES[cell]
        h = u.new_empty(steps + 1, *rows, hidden)
        some = h if keeps else h[:1]
        low = h if w.dtype == u.dtype else torch.empty_like(some, dtype=w.dtype)
        c = torch.empty_like(some) if cell == "lstm" else h
        gated = keeps and cell in _KEPT_GATES
        gates = u.new_empty(steps, *rows, _KEPT_GATES[cell] * hidden) if gated else h
        if not backward:
            return cls(cell, w, u, h, c, low, gates, dy=h, dv=u, carry=h, dh=h, keeps=keeps)
        apart = cell == "gru" or w.dtype != u.dtype
        dv = torch.empty_like(u, dtype=w.dtype) if apart else u
        dh = torch.empty_like(h[:1], dtype=w.dtype)
        return cls(cell, w, u, h, c, low, gates, torch.empty_like(h[1:]), dv, torch.empty_like(h[:1]), dh)

    def inputs_forward(self, begin: int, end: int) -> list[Tensor]:
        """What the steps from ``begin`` to ``end`` read."""
        states = [self.h[begin : begin + 1]]
        states += [_rows(self.c, begin, begin + 1)] if self.cell == "lstm" else []
        states += [_rows(self.low, begin, begin + 1)] if self.low is not self.h else []
        return [self.u[begin:end], *states]

    def outputs_forward(self, begin: int, end: int, keeps: bool) -> list[Tensor]:
        """What they write; or of it what is wanted where no backward pass comes."""
        first = begin + 1 if keeps else end
        states = [self.h[begin + 1 : end + 1]]
        states += [_rows(self.c, first, end + 1)] if self.cell == "lstm" else []
        states += [_rows(self.low, first, end + 1)] if self.low is not self.h else []
        return [*states, *([self.gates[begin:end]] if keeps and self.cell in _KEPT_GATES else [])]

    def inputs_backward(self, begin: int, end: int) -> list[Tensor]:
        """What their backward steps read."""
        kept = [self.gates[begin:end]] if self.cell in _KEPT_GATES else []
        kept += [self.c[begin : end + 1]] if self.cell == "lstm" else []
        return [self.dy[begin:end], self.h[begin : end + 1], *kept, self.carry, self.dh]

    def outputs_backward(self, begin: int, end: int) -> list[Tensor]:
        """What these write."""
        apart = [self.dv[begin:end]] if self.dv is not self.u else []
        return [self.u[begin:end], *apart, self.carry, self.dh]


def _rows(part: Tensor, begin: int, end: int) -> Tensor:
    """Steps of an array, or the one step that it has."""
    return part[begin:end] if len(part) > 1 else part


def _each(part: Tensor, steps: int) -> list[Tensor]:
    """Step by step; where an array has one, it is written over each time."""
    return list(part.unbind()) if len(part) > 1 else [part[0]] * (steps + 1)


def run_forward(given: _Arrays, steps: int) -> None:
    """The first steps of a sequence."""
    from srnn.models.recurring_kernel import UNITS_A_PROGRAM, step_forward

    w_HG, v = given.w.mT, torch.empty_like(given.u[0], dtype=given.w.dtype)
    size, hidden = given.h[0].numel(), given.h.shape[-1]
    h, c, low, gates = (_each(part, steps) for part in (given.h, given.c, given.low, given.gates))
    for t, u in enumerate(given.u[:steps].unbind()):
        torch.bmm(low[t], w_HG, out=v)
        step_forward[(-(-size // UNITS_A_PROGRAM),)](
            u, v, h[t], c[t], h[t + 1], c[t + 1], low[t + 1], gates[t], size, hidden,
            CELL=given.cell, LOW=given.low is not given.h, KEEP=given.keeps, BLOCK=UNITS_A_PROGRAM,
        )  # fmt: skip


def run_backward(given: _Arrays, steps: int) -> None:
    """The first steps of a sequence, from the last of them to its beginning."""
    from srnn.models.recurring_kernel import UNITS_A_PROGRAM, step_backward

    size, hidden, gru = given.h[0].numel(), given.h.shape[-1], given.cell == "gru"
    du, dv, dy, h, c, gates = (
        list(part.unbind()) for part in (given.u, given.dv, given.dy, given.h, given.c, given.gates)
    )
    for t in reversed(range(steps)):
        step_backward[(-(-size // UNITS_A_PROGRAM),)](
            dy[t], given.dh, given.carry, h[t if gru else t + 1], c[t], c[t + 1], gates[t], du[t], dv[t], size, hidden,
            CELL=given.cell, APART=given.dv is not given.u, BLOCK=UNITS_A_PROGRAM,
        )  # fmt: skip
        torch.bmm(dv[t], given.w, out=given.dh[0])


@dataclass
class _Graphs:
    """The graphs of one size of recurrence, and the memory that all of them work in."""

    arrays: _Arrays
    stream: Any
    ready: dict[tuple[bool, int], Any] = field(default_factory=dict)  # by direction of time, and steps

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, backward: bool, steps: int) -> None:
        """Run so many steps in the memory of the graphs."""
        if (graph := self.ready.get((backward, steps))) is None:
            self._run_once(backward)
            run = functools.partial(run_backward if backward else run_forward, self.arrays, steps)
            # All share the memory that they use while they run.
            pool = next((one.pool() for one in self.ready.values() if not isinstance(one, _Launched)), None)
            graph = self.ready[backward, steps] = _recorded_or_launched(run, self.stream, pool)
        graph.replay()

    def _run_once(self, backward: bool) -> None:
        """What a first call makes is not to be recorded: autograd's threads have cuBLAS handles of their own."""
        passed_on = [self.arrays.carry, self.arrays.dh]
        before = [part.clone() for part in passed_on]
        (run_backward if backward else run_forward)(self.arrays, 1)
        torch._foreach_copy_(passed_on, before)


@dataclass
class _Launched:
    """Stands for a graph that could not be recorded: launches what would be in it."""

    replay: Callable[[], None]


def _recorded_or_launched(run: Callable[[], None], stream: Any, pool: Any) -> Any:
    """A graph of a call; or the call itself, and a warning that says why, once for each reason."""
    try:
        return _recorded(run, stream, pool)
    except RuntimeError as error:  # CUDA's errors, and out of memory, are such
        _warn_once(f"{error}".partition("\n")[0])
        return _Launched(run)


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"a recurrence cannot be recorded as a CUDA graph, and is launched step by step, which takes longer: {why}",
        stacklevel=2,
    )


def _recorded(run: Callable[[], None], stream: Any, pool: Any) -> Any:
    """A graph of a call; what it reads and writes is as before."""
    graph = Graph()
    with recorded(graph, stream.device, pool, stream):
        run()
    return graph


def _graphs_of(given: _Arrays) -> _Graphs:
    """The graphs for such a sequence on the current stream."""
    stream = torch.cuda.current_stream(given.u.device)
    key = (given.cell, given.u.shape[1:], given.u.dtype, given.w.dtype, stream)
    if key not in _known:
        if len(_known) >= MOST_SIZES:
            torch.cuda.synchronize(given.u.device)  # what goes may be running
            _known.popitem(last=False)
        with torch.inference_mode(False):  # memory that later calls write to, in whatever mode they are
            u = torch.zeros(PIECE_STEPS, *given.u.shape[1:], dtype=given.u.dtype, device=given.u.device)
            arrays = _Arrays.empty(given.cell, torch.empty_like(given.w), u, backward=True)
        _known[key] = _Graphs(arrays, torch.cuda.Stream(given.u.device))
    _known.move_to_end(key)
    return _known[key]


@contextmanager
def _here(tensor: Tensor) -> Iterator[None]:
    """On the tensor's device, products as they were chosen before."""
    place: Any = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with place, torch.autocast(tensor.device.type, enabled=False):
        yield


def _run(given: _Arrays, backward: bool) -> None:
    """A whole sequence: from graphs, or launch by launch inside a graph that is being recorded."""
    if not given.u.is_cuda or torch.cuda.is_current_stream_capturing():
        (run_backward if backward else run_forward)(given, len(given.u))
        return
    with _lock:
        _in_pieces(given, backward, _graphs_of(given))


def _in_pieces(given: _Arrays, backward: bool, graphs: _Graphs) -> None:
    piece = graphs.arrays
    piece.w.copy_(given.w)
    begins = range(0, len(given.u), PIECE_STEPS)
    for begin in reversed(begins) if backward else begins:
        end = min(begin + PIECE_STEPS, len(given.u))
        inside, whole = (0, end - begin), (begin, end)
        if backward:
            torch._foreach_copy_(piece.inputs_backward(*inside), given.inputs_backward(*whole))
            graphs.replay(True, end - begin)
            torch._foreach_copy_(given.outputs_backward(*whole), piece.outputs_backward(*inside))
        else:
            torch._foreach_copy_(piece.inputs_forward(*inside), given.inputs_forward(*whole))
            graphs.replay(False, end - begin)
            results = piece.outputs_forward(*inside, given.keeps)
            torch._foreach_copy_(given.outputs_forward(*whole, given.keeps), results)


class GpuRecurrence(torch.autograd.Function):
    """``recur`` with one dimension D of directions; ``state`` is h, and c of an LSTM.

    Products are computed in the dtype given, all else in that of the inputs. The gradient of the recurrent matrix is
    one product over all steps. ``keeps`` says whether a backward pass may come.
    """

    @staticmethod
    def forward(ctx: Any, cell: Cell, products: torch.dtype, keeps: bool, u: Tensor, w: Tensor, *state: Tensor) -> Any:
        """y [T, D, B, H], and the state after the last step."""
        with _here(u):
            made = _Arrays.empty(cell, w.to(products).contiguous(), u.contiguous(), backward=False, keeps=keeps)
            made.h[0] = state[0]
            made.low[0] = state[0]
            if cell == "lstm":
                made.c[0] = state[1]
            _run(made, backward=False)
        ctx.cell = cell
        if keeps:
            ctx.save_for_backward(w, made.w, made.h, made.c, made.low, made.gates)
        after = (made.h[-1].clone(), made.c[-1].clone()) if cell == "lstm" else (made.h[-1].clone(),)
        return made.h[1:], *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Those of ``u``, ``w`` and the state before the first step."""
        dy, *dstate = gradients
        w, low_w, h, c, low, gates = ctx.saved_tensors
        with _here(h):
            du = h.new_empty(*dy.shape[:-1], w.shape[-2])
            apart = ctx.cell == "gru" or low_w.dtype != h.dtype
            dv = torch.empty_like(du, dtype=low_w.dtype) if apart else du
            carry = dstate[1][None].contiguous() if ctx.cell == "lstm" else torch.zeros_like(h[:1])
            carry, dh = carry.clone(), dstate[0][None].to(low_w.dtype, copy=True).contiguous()
            made = _Arrays(ctx.cell, low_w, du, h, c, low, gates, dy.contiguous(), dv, carry, dh)
            _run(made, backward=True)
            dw = None
            if ctx.needs_input_grad[4]:
                dw = torch.stack([_over_steps(dv[:, d], low[:-1, d]) for d in range(len(w))]).to(w.dtype)
        before = (dh[0].to(h.dtype), carry[0]) if ctx.cell == "lstm" else (dh[0].to(h.dtype) + carry[0],)
        return None, None, None, du, dw, *before


def _over_steps(dv_TBG: Tensor, h_TBH: Tensor) -> Tensor:
    """The sum over steps and streams of their outer products, [G, H]."""
    return dv_TBG.flatten(0, 1).T @ h_TBH.flatten(0, 1)
