"""Choosing a backend by measuring: ``kernel=auto`` and ``kernel=dense``.

A candidate is timed at the user's own weights, threads and number of streams, once; what was found is kept in the cache
folder, under the hardware and the versions it was found with. The measurement is of the whole layer,
of single steps, short and long sequences apart, because different backends win there.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State, equal_lengths
from srnn.kernels.dense import Int8, OneDnn, Torch
from srnn.kernels.remembering import busy, recall, remember
from srnn.kernels.replayed import Replayed
from srnn.kernels.timing import Call, hardware, interleaved
from srnn.kernels.triton.backend import Triton
from srnn.registry import register
from srnn.sparse import SparseMatrix

log = logging.getLogger("srnn.kernels")

DENSE = ("torch", "torch+graph", "onednn", "int8")  # candidates that compute all zeros, too
_SHORT = 32  # steps up to which a sequence is a short one
_STEPS = {"cpu": 100, "cuda": 128}  # of a long sequence that is timed; 16 of a short one
_USES = ("single steps", f"up to {_SHORT} steps", "longer sequences")
_ROUNDS = 7
_SECONDS = 1.0  # after which no further round is begun
MARGIN = 0.97  # of the time of the best dense candidate, which a sparse one has to be below; less is noise

P = TypeVar("P")
measuring = threading.RLock()  # two measurements side by side would both be wrong


@dataclass(frozen=True)
class Choice:
    """What was chosen for a shape, and the measurement behind it.

    Attributes:
        what: the shape, streams and threads.
        winner: name of the candidate.
        seconds: candidate -> median time of a call; empty where there was only one candidate.
        left_out: candidate -> why it cannot run.
        layer: its kind, inputs and units, in words.
        use: how much of a call was timed, in words.
    """

    what: str
    winner: str
    seconds: dict[str, float]
    left_out: dict[str, str]
    layer: str = ""
    use: str = ""

    @property
    def in_short(self) -> str:
        """What for, the winner, and the times of it and of the best dense candidate."""
        mine = self.seconds.get(self.winner)
        dense = min((s for name, s in self.seconds.items() if name in DENSE), default=None)
        against = "" if dense is None or self.winner in DENSE else f", dense {1e6 * dense:,.0f}"
        return f"{self.use}: {self.winner}" + ("" if mine is None else f" ({1e6 * mine:,.0f} us{against})")

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e6 * s:,.0f} us" for name, s in sorted(self.seconds.items(), key=lambda x: x[1]))
        reasons = "".join(f"; not {name}: {reason}" for name, reason in self.left_out.items())
        return f"{self.what}: {self.winner} ({times or 'the only one that can run'}{reasons})"


class _Chooser(Kernel):
    """Runs the fastest of several backends."""

    def __init__(self) -> None:
        self.choices: dict[str, Choice] = {}  # what was chosen so far, by shape

    def candidates(self) -> dict[str, Kernel]:
        """Name -> backend."""
        raise NotImplementedError

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """What any candidate can run."""
        reasons = {name: k.supports(weights, device, dtype, batch) for name, k in self.candidates().items()}
        return None if None in reasons.values() else "; ".join(f"{name}: {why}" for name, why in reasons.items())

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """Measured at the first call with so many rows."""
        matrix = matrix.to(device)

        def prepare(kernel: Kernel) -> Product:
            return kernel.product(matrix, bias, device, dtype)

        def call(ready: Product, batch: int, steps: int) -> Call:
            x_BI = torch.randn(batch, matrix.shape[1], device=device, dtype=dtype)
            return lambda: ready(x_BI)

        layer = f"linear {matrix.shape[1]} to {matrix.shape[0]}"
        what = f"product {described_matrix(matrix)}"
        pick = _Pick[Product](self, what, layer, matrix, device, dtype, prepare, call)
        return _ChosenProduct(pick)

    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Recurrence:
        """Measured at the first call with so many streams."""
        weights = weights.to(device)

        def prepare(kernel: Kernel) -> Recurrence:
            return kernel.recurrence(weights, device, dtype)

        def call(ready: Recurrence, batch: int, steps: int) -> Call:
            u_NG = torch.randn(steps * batch, weights.w_hh.shape[0], device=device, dtype=dtype)
            sizes, state = equal_lengths(steps, batch), zero_state(weights, batch, device, dtype)
            return lambda: ready(u_NG, sizes, state)

        what = f"{weights.cell} recurrence {described_matrix(weights.w_hh)}"
        layer = f"{weights.cell} recurrence {weights.hidden_size}"
        return _ChosenRecurrence(_Pick[Recurrence](self, what, layer, weights, device, dtype, prepare, call))

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """Measured at the first call with so many streams, for single steps, short and long sequences apart."""
        weights = weights.to(device)

        def prepare(kernel: Kernel) -> Layer:
            return kernel.layer(weights, device, dtype)

        def call(ready: Layer, batch: int, steps: int) -> Call:
            x_NI = torch.randn(steps * batch, weights.w_ih.shape[1], device=device, dtype=dtype)
            sizes, state = equal_lengths(steps, batch), zero_state(weights, batch, device, dtype)
            return lambda: ready.run(x_NI, sizes, state)

        kind = f"{weights.cell}{' reversed' * weights.reverse}"
        what = f"{kind} {' '.join(described_matrix(m) for m in weights.matrices.values())}"
        layer = f"{kind} {weights.w_ih.shape[1]} to {weights.hidden_size}"
        return _ChosenLayer(_Pick[Layer](self, what, layer, weights, device, dtype, prepare, call))

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """Measured at the first call with so many streams, for both directions together."""
        forward, backward = forward.to(device), backward.to(device)

        def prepare(kernel: Kernel) -> Layer:
            return kernel.both(forward, backward, device, dtype)

        def call(ready: Layer, batch: int, steps: int) -> Call:
            x_NI = torch.randn(steps * batch, forward.w_ih.shape[1], device=device, dtype=dtype)
            state = tuple(torch.stack([part, part]) for part in zero_state(forward, batch, device, dtype))
            return lambda: ready.run(x_NI, equal_lengths(steps, batch), state)

        what = f"{forward.cell} both ways {' '.join(described_matrix(m) for m in forward.matrices.values())}"
        layer = f"{forward.cell} both ways {forward.w_ih.shape[1]} to {forward.hidden_size}"
        return _ChosenLayer(_Pick[Layer](self, what, layer, forward, device, dtype, prepare, call))

    def choose(
        self, what: str, where: tuple[torch.device, torch.dtype], calls: Mapping[str, Callable[[], Call]],
        left_out: dict[str, str], words: tuple[str, str],
    ) -> Choice:  # fmt: skip
        """Measure, or remember; logs one line either way. ``words`` are the choice's layer and use."""
        device, dtype = where
        key = f"{hardware(device)}; {dtype}; {' '.join(calls)}"
        known = remembered(key, what)
        choice = known or fastest(what, _that_run(calls, left_out), device, left_out)
        if known is None and not busy():
            remember(key, what, asdict(choice))
        self.choices[what] = choice = replace(choice, layer=words[0], use=words[1])
        log.info("%s", choice)
        return choice


def about(streams: int) -> int:
    """The next power of two: numbers of streams that share a choice."""
    return 1 << max(0, streams - 1).bit_length()


def length_class(steps: int) -> int:
    """0 for a single step, 1 for a short sequence, 2 for a longer one: different backends win there."""
    return 0 if steps <= 1 else 1 if steps <= _SHORT else 2


def remembered(key: str, what: str) -> Choice | None:
    """A choice that was kept, if it is one of the candidates that ``key`` ends with."""
    entry = recall(key, what)
    try:
        choice = Choice(**(entry or {}))
    except TypeError:
        return None
    return choice if choice.what == what and choice.winner in key.split() else None


def zero_state(weights: LayerWeights, batch: int, device: torch.device, dtype: torch.dtype) -> State:
    """The state of streams that have seen nothing."""
    sizes = (weights.output_size, weights.hidden_size) if weights.cell == "lstm" else (weights.output_size,)
    return tuple(torch.zeros(batch, size, device=device, dtype=dtype) for size in sizes)


@dataclass
class _Pick(Generic[P]):
    """The chosen candidate for a number of streams, made ready."""

    chooser: _Chooser
    what: str
    layer: str
    weights: LayerWeights | SparseMatrix
    device: torch.device
    dtype: torch.dtype
    prepare: Callable[[Kernel], P]
    call: Callable[[P, int, int], Call]

    def __post_init__(self) -> None:
        self.made: list[Choice] = []
        self._chosen: dict[tuple[int, int, int], str] = {}
        self._ready: dict[str, P] = {}

    def __call__(self, batch: int, steps: int) -> P:
        key = (about(batch), length_class(steps), torch.get_num_threads())
        name = self._chosen.get(key)
        return self._ready[name] if name is not None else self._first(key)

    def _first(self, key: tuple[int, int, int]) -> P:
        with measuring:
            name = self._chosen.get(key) or self._choose(*key)
            ready = self._prepared(name)
            self._chosen[key] = name  # last, because other threads look without the lock
            self._ready = {n: r for n, r in self._ready.items() if n in self._chosen.values()}
            return ready

    def _prepared(self, name: str) -> P:
        if name not in self._ready:
            self._ready[name] = self.prepare(self.chooser.candidates()[name])
        return self._ready[name]

    def _choose(self, batch: int, length: int, threads: int) -> str:
        reasons = {
            name: kernel.supports(self.weights, self.device, self.dtype, batch)
            for name, kernel in self.chooser.candidates().items()
            if kernel.device_types is None or self.device.type in kernel.device_types
        }
        able = [name for name, reason in reasons.items() if reason is None]
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        if not able:
            raise RuntimeError(f"no kernel can run {self.what}: {left_out}")
        steps = (1, 16, _STEPS.get(self.device.type, 100))[length]
        kind = f"{batch} at a time, {_USES[length]}, {threads} threads"
        what = f"{self.what}, {kind}"
        plural = "s" * (batch > 1)
        of_layer = f"{batch:,} stream{plural}, {steps} step{'s' * (length > 0)}"
        use = f"{batch:,} row{plural}" if isinstance(self.weights, SparseMatrix) else of_layer
        calls = {name: partial(self._call, name, batch, steps) for name in able}
        self.made.append(self.chooser.choose(what, (self.device, self.dtype), calls, left_out, (self.layer, use)))
        return self.made[-1].winner

    def _call(self, name: str, batch: int, steps: int) -> Call:
        return self.call(self._prepared(name), batch, steps)


@dataclass(frozen=True)
class _ChosenProduct:
    pick: _Pick[Product]

    def __call__(self, x_NI: Tensor) -> Tensor:
        return self.pick(x_NI.shape[0], 1)(x_NI)


@dataclass(frozen=True)
class _ChosenRecurrence(Recurrence):
    pick: _Pick[Recurrence]

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        return self.pick(state[0].shape[0], len(batch_sizes))(u_NG, batch_sizes, state)


@dataclass(frozen=True)
class _ChosenLayer(Layer):
    pick: _Pick[Layer]

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        return self.pick(state[0].shape[-2], len(batch_sizes)).run(x_NI, batch_sizes, state)

    def chosen(self, steps: int, streams: int) -> Layer:
        """The fastest."""
        return self.pick(streams, steps)


def choices_made(made: object) -> list[Choice]:
    """What was chosen so far for a layer, recurrence or product that ``auto`` or ``dense`` made; of others nothing."""
    return list(made.pick.made) if isinstance(made, _ChosenProduct | _ChosenRecurrence | _ChosenLayer) else []


@register.kernel("dense")
class Dense(_Chooser):
    """The best dense layer: torch's own or oneDNN's packed products, whichever is faster; or dynamic int8."""

    def __init__(self, values: Literal["fp32", "int8"] = "fp32") -> None:
        super().__init__()
        self._candidates: dict[str, Kernel] = (
            {"int8": Int8()} if values == "int8" else {"torch": Torch(), "onednn": OneDnn()}
        )
        self.tolerance = max(kernel.tolerance for kernel in self._candidates.values())

    def candidates(self) -> dict[str, Kernel]:
        """Of fp32, or int8."""
        return self._candidates


@register.kernel("auto")
class Auto(_Chooser):
    """Whatever is fastest here: measures every backend once and never takes one slower than dense.

    On a GPU also torch's modules as CUDA graphs, and ``triton`` with dense blocks where those fit the chip, because a
    persistent kernel can beat torch without any sparsity.
    """

    def candidates(self) -> dict[str, Kernel]:
        """Dense in fp32, and every registered sparse backend."""
        return self._all

    @functools.cached_property
    def _all(self) -> dict[str, Kernel]:
        names = [name for name in register.names("kernel") if name not in ("dense", "auto")]
        sparse: dict[str, Kernel] = {name: register.rebuild("kernel", {"name": name}) for name in names}
        unasked = {name: kernel for name, kernel in sparse.items() if kernel.unasked}
        on_gpu: dict[str, Kernel] = {"torch+graph": Replayed(Torch())}
        if "triton" in unasked:
            # The faster ones without zeros, for one stream and for several: GRU 1024 2.7 us a step, GRU 512 3.1 with 16
            on_gpu |= {"triton+8x1": Triton(structure="8x1"), "triton+16x1": Triton(structure="16x1")}
        return Dense().candidates() | unasked | on_gpu


def fastest(what: str, calls: Mapping[str, Call], device: torch.device, left_out: Mapping[str, str]) -> Choice:
    """Time calls against each other, interleaved, and take the fastest."""
    if len(calls) == 1:
        return Choice(what, next(iter(calls)), {}, dict(left_out))
    times = interleaved(calls, device, _ROUNDS, _SECONDS)
    seconds = {name: median(many) for name, many in times.items()}
    dense = min((name for name in seconds if name in DENSE), key=seconds.__getitem__, default=None)
    winner = min(seconds, key=seconds.__getitem__)
    if dense is not None and seconds[winner] > MARGIN * seconds[dense]:
        winner = dense
    return Choice(what, winner, seconds, dict(left_out))


def _that_run(calls: Mapping[str, Callable[[], Call]], left_out: dict[str, str]) -> dict[str, Call]:
    """Candidates made ready and tried once: a sparse one that fails, for lack of memory say, is left out, and why."""
    able: dict[str, Call] = {}
    for name, make in calls.items():
        try:
            call = make()
            with torch.inference_mode():
                call()
        except Exception as error:
            if name in DENSE:
                raise
            left_out[name] = told_of(name, error)
        else:
            able[name] = call
    return able


def told_of(name: str, error: Exception) -> str:
    """Why a candidate that failed is left out, in a line; a warning in the log says it, too."""
    reason = f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
    log.warning("%s cannot be used: %s", name, reason)
    return reason


def described_matrix(matrix: SparseMatrix) -> str:
    """A matrix's shape, format and number of blocks, to two digits: what is measured is good for about as many."""
    rows, columns = matrix.shape
    unit = "non-zeros" if matrix.structure == "element" else "blocks"
    blocks = float(f"{matrix.blocks:.1e}")
    return f"{rows}x{columns} {matrix.structure} {matrix.values_name} (about {blocks:,.0f} {unit})"
