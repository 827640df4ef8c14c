"""Inputs into a CUDA graph's own memory, and outputs out of it, within the graph: a call is then one launch.

Where they lie differs from call to call, and a graph's arguments do not. So the host writes the addresses of each call
into a row of a table that the device reads, the rows in turn, and the device counts the calls to know its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CALLS = 1 << 10  # calls that may wait for the device; half of them are known to be over
PARTS = 8  # of a row: inputs and outputs
_PROGRAMS, _BLOCK = 64, 1024
_INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # by bytes
_retired: list[tuple[Tensor, Any]] = []  # tables of graphs that are gone, and events after which nobody reads them


@triton.jit
def hand_over(
    own,  # [PARTS], addresses of the graph's inputs and outputs
    words,  # [PARTS], their sizes
    table,  # [CALLS, PARTS], addresses of the caller's, in memory of the host
    turns,  # [2]: calls whose inputs were handed over, or are being so; and the same of outputs
    FIRST: tl.constexpr,  # of the parts of this launch, of which each has a column of the grid
    OUT: tl.constexpr,  # 0 for inputs, 1 for outputs
    WORD: tl.constexpr,  # integers of the size of a word
    CALLS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy inputs in or outputs out. Each launch counts for the other one, which does not run at the same time."""
    part = FIRST + tl.program_id(1)
    turn = tl.load(turns + OUT)
    mine = tl.load(own + part)
    theirs = tl.load(table + turn % CALLS * PARTS + part, volatile=True)
    source, target = theirs, mine
    if OUT:
        source, target = mine, theirs
    size = tl.load(words + part)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        value = tl.load(source.to(tl.pointer_type(WORD)) + place, mask=inside)
        tl.store(target.to(tl.pointer_type(WORD)) + place, value, mask=inside)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(turns + 1 - OUT, turn + OUT)


def _word_of(parts: Sequence[Tensor]) -> int:
    """Bytes of the longest word that all of them begin at and consist of."""
    return math.gcd(8, *(part.nbytes for part in parts), *(part.data_ptr() for part in parts))


class Handing:
    """What a graph needs to take its inputs from callers and to give them outputs.

    Args:
        inputs: the graph's own.
        outputs: like its own, whose addresses are not known yet.

    Attributes:
        tensors: on the device, which belong to the graph.
    """

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        _retired[:] = [(table, event) for table, event in _retired if not event.query()]
        self._table = torch.zeros(CALLS, PARTS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._rows = self._table.numpy()
        self._counts = len(inputs), len(outputs)
        self._sizes = _word_of(inputs), _word_of(outputs)
        self._own, self._words, self._turns = (
            torch.zeros(n, dtype=torch.int64, device=device) for n in (PARTS, PARTS, 2)
        )
        self.tensors = self._own, self._words, self._turns
        self._turn, self._unsure = 0, False
        self._over: Any = None  # an event: the calls before the last half of the table are
        for out in (0, 1):  # what is compiled at a first launch is not to be recorded; nothing has a size yet
            self._launch(out)
        words = [part.nbytes // self._sizes[0] for part in inputs] + [part.nbytes // self._sizes[1] for part in outputs]
        self._words[: len(words)] = torch.tensor(words, device=device)
        self._turns.zero_()

    @staticmethod
    def takes(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether these can be handed over: memory without gaps, and not too many."""
        dense = all(torch.empty_like(part).stride() == part.stride() for part in outputs)
        there = all(part.numel() for part in (*inputs, *outputs))
        return dense and there and len(inputs) + len(outputs) <= PARTS

    def _launch(self, out: int) -> None:
        hand_over[(_PROGRAMS, self._counts[out])](
            self._own, self._words, self._table, self._turns, out * self._counts[0], out, _INTEGERS[self._sizes[out]],
            CALLS, PARTS, _BLOCK,
        )  # fmt: skip

    def take(self) -> None:
        """Launch the copies of inputs; the first of what a graph does."""
        self._launch(0)

    def give(self) -> None:
        """Launch the copies of outputs; the last of what a graph does."""
        self._launch(1)

    def recorded(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Where the graph's own are, now that it is recorded. Raises RuntimeError where words do not begin."""
        addresses = [part.data_ptr() for part in (*inputs, *outputs)]
        if any(part.data_ptr() % self._sizes[1] for part in outputs):
            raise RuntimeError("outputs of a recording lie otherwise than those of a call")
        self._own[: len(addresses)] = torch.tensor(addresses, device=self._own.device)
        if self._own.is_cuda:
            torch.cuda.current_stream(self._own.device).synchronize()

    def call(self, given: Sequence[Tensor], outputs: Sequence[Tensor], stream: Any, launch: Callable[[], None]) -> None:
        """Launch the graph for these inputs and outputs, on this stream, which is the current one."""
        if self._unsure:  # somebody interrupted this: it may have launched
            if self._turns.is_cuda:
                torch.cuda.synchronize(self._turns.device)
            self._turn = int(self._turns[0])
        if self._turn % (CALLS // 2) == 0:
            self._wait_for_half(stream)
        addresses = [part.data_ptr() for part in (*given, *outputs)]
        self._rows[self._turn % CALLS, : len(addresses)] = addresses
        self._unsure = True
        launch()
        self._turn += 1
        self._unsure = False

    def _wait_for_half(self, stream: Any) -> None:
        """Until the rows that are written next have been read, by the calls of the turn before."""
        if self._over is not None:
            self._over.synchronize()
        if stream is not None:
            self._over = torch.cuda.Event()
            self._over.record(stream)

    def retire(self, event: Any) -> None:
        """Keep the table until this event is over: the graph may be running still."""
        _retired.append((self._table, event))
