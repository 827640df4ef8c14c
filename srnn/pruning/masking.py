"""Zeroing what is pruned on a GPU: weights, and all that goes with them."""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Masked = tuple[Tensor, Sequence[Tensor]]  # a mask, and tensors of its shape
_SIZES = (2, 4, 8)  # bytes of an element
_KEPT = 8  # sets of tensors; an eager loop's gradients take turns in memory
_TIMES = 3  # that a set of tensors comes before its launches are recorded


@functools.cache
def has_triton() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("triton") is not None


class GpuMasking:
    """Zeroes tensors where their masks are zero, whatever was there: one launch for all of them.

    Tables of addresses are kept for the last few sets of tensors, as an eager loop's gradients take turns in memory. A
    launch that comes again and again is replayed from a CUDA graph, to spare the host Triton's own launcher. Without
    Triton, and where elements do not lie as those of their mask, torch's operations do it, two launches a tensor.

    Args:
        mostly_zero: whether most of what is masked is zero already, as weights are between two updates; only faster.
        found: [1], int32, set on the device where something was not zero yet, if ``mostly_zero``; None for nothing.
        kept: sets of tensors.
    """

    def __init__(self, mostly_zero: bool = False, found: Tensor | None = None, kept: int = _KEPT) -> None:
        self.mostly_zero, self.found = mostly_zero, found
        self._recent = RecentLaunches(kept)

    def __reduce__(self) -> tuple[type[GpuMasking], tuple[bool]]:
        return GpuMasking, (self.mostly_zero,)  # addresses are no good elsewhere

    def __call__(self, masked: Sequence[Masked]) -> bool:
        """Zero them. Returns whether ``found`` would tell of all."""
        several = [tensor for mask, tensors in masked for tensor in (mask, *tensors)]
        key = tuple([(tensor.data_ptr(), tensor.itemsize, tensor.is_contiguous()) for tensor in several])
        launches, apart = self._recent.get(key, lambda: self._launches(masked))
        launches.run()
        for row, place in apart:
            mask, tensors = masked[row]
            tensors[place].masked_fill_(~mask, 0)
        return not apart

    def _launches(self, masked: Sequence[Masked]) -> tuple[Launches, list[tuple[int, int]]]:
        """For a set of tensors: its launches, and the places of those that these leave, as gradients are not kept."""
        alike = has_triton()
        apart = [
            (row, place)
            for row, (mask, tensors) in enumerate(masked)
            for place, tensor in enumerate(tensors)
            if not (alike and _lies_alike(mask, tensor))
        ]
        several = list(_launches(masked, self.mostly_zero, self.found)) if alike else []
        device = masked[0][0].device
        return Launches(several, device if all(mask.device == device for mask, _ in masked) else None), apart


class RecentLaunches:
    """What was made for the sets of tensors that were used last, by their addresses.

    Args:
        kept: how many.
    """

    def __init__(self, kept: int = _KEPT) -> None:
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
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream(self._device)):
                # Nothing is allocated inside, and other threads may go on with what they do.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for launch in self._launches:
                        launch()
                finally:
                    graph.capture_end()
        except RuntimeError:  # it goes on being launched
            return
        self._graph = graph


def _lies_alike(mask: Tensor, tensor: Tensor) -> bool:
    return mask.is_contiguous() and tensor.is_contiguous() and tensor.itemsize in _SIZES


def _launches(masked: Sequence[Masked], mostly_zero: bool, found: Tensor | None) -> Iterator[Callable[[], None]]:
    """One for each device and size of elements."""
    from srnn.pruning.masking_kernel import BLOCK, launch  # here, because Triton may be missing

    for device in {mask.device for mask, _ in masked}:
        for size in _SIZES:
            alike = [(m, [t for t in ts if t.itemsize == size and _lies_alike(m, t)]) for m, ts in masked]
            rows = [(mask, tensors) for mask, tensors in alike if tensors and mask.numel() and mask.device == device]
            if not rows:
                continue
            look = 0 if not mostly_zero else 1 if found is None else 2
            most = max(len(tensors) for _, tensors in rows)
            flag = 0 if found is None else found.data_ptr()
            several = [[*(t.data_ptr() for t in ts), *[0] * (most - len(ts))] for _, ts in rows]
            table = [[m.data_ptr(), m.numel(), flag, *own] for (m, _), own in zip(rows, several, strict=True)]
            sizes = [mask.numel() for mask, _ in rows]
            yield partial(launch, size, most, look, put(table, device), *blocks_of(sizes, BLOCK, device))


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
