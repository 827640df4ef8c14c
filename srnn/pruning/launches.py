"""Launches of the pruner's kernels: tables of addresses for them, kept for tensors that come again, and CUDA graphs."""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from srnn.cuda_graphs import Graph, undisturbed

KEPT_SETS = 8  # sets of tensors; an eager loop's gradients take turns in memory
_TIMES = 3  # that a set of tensors comes before its launches are recorded


@functools.cache
def has_triton() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("triton") is not None


class RecentLaunches:
    """What was made for the sets of tensors that were used last, by their addresses.

    Args:
        kept: how many.
    """

    def __init__(self, kept: int = KEPT_SETS) -> None:
        self.kept = kept
        self._known: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What there is for a set, or is made now."""
        found = self._known.pop(key, None)
        if found is None:
            found = make()
        self._known[key] = found  # the last one used stands last
        if len(self._known) > self.kept:
            self._known.popitem(last=False)
        return found


class Launches:
    """Those for a set of tensors; as a graph once they have come often enough.

    Args:
        launches: each launches a kernel.
        device: of all of them; None for several, which are not recorded.
        times: after which they are recorded.
    """

    def __init__(
        self, launches: Sequence[Callable[[], None]], device: torch.device | None, times: int = _TIMES
    ) -> None:
        self._launches = launches
        self._device = device
        self._after = times
        self._recordable = device is not None and device.type == "cuda"
        self._times = 0
        self._graph: Any = None

    def run(self) -> None:
        """Launch them."""
        self._times += 1
        if self._graph is not None and not torch.cuda.is_current_stream_capturing():
            self._graph.replay()
            return
        for launch in self._launches:
            launch()
        if self._times == self._after and self._recordable and self._launches:
            self._record()

    def _record(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        assert self._device is not None
        graph, pool = Graph(), torch.cuda.graph_pool_handle()
        try:
            with undisturbed(self._device, pool), torch.cuda.stream(torch.cuda.Stream(self._device)):
                # Nothing is allocated inside, and other threads may go on with what they do.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    for launch in self._launches:
                        launch()
                finally:
                    graph.capture_end()
        except RuntimeError:  # it goes on being launched
            return
        self._graph = graph


def put(numbers: Any, device: torch.device) -> Tensor:
    """Numbers on a device, from pinned memory, so that the host does not wait for what a GPU does."""
    made = torch.as_tensor(numbers, device="cpu")  # whatever device torch makes tensors on by default
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def blocks_of(sizes: Sequence[int], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tensor that each program of a launch has a block of, [programs], and the first program of each tensor, [M].

    Args:
        sizes: [M] elements of each tensor, at least 1.
        block: elements of a program.
        device: which reads it.
    """
    programs = torch.tensor([-(-size // block) for size in sizes], device="cpu")
    owners = torch.arange(len(sizes), device="cpu").repeat_interleave(programs)
    return put(owners.int(), device), put((programs.cumsum(0) - programs).int(), device)


def pointer(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for none, as kernels understand it."""
    return 0 if tensor is None else tensor.data_ptr()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU: makes it this one. On a CPU, where Triton's interpreter runs, nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
