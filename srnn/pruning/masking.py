"""Zeroing what is pruned on a GPU: weights, and all that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from srnn.pruning.launches import KEPT_SETS, Launches, RecentLaunches, blocks_of, has_triton, pointer, put

Masked = tuple[Tensor, Sequence[Tensor]]  # a mask, and tensors of its shape
_SIZES = (2, 4, 8)  # bytes of an element


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

    def __init__(self, mostly_zero: bool = False, found: Tensor | None = None, kept: int = KEPT_SETS) -> None:
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
            several = [[*(t.data_ptr() for t in ts), *[0] * (most - len(ts))] for _, ts in rows]
            sizes, flag = [mask.numel() for mask, _ in rows], pointer(found)
            table = [[m.data_ptr(), m.numel(), flag, *own] for (m, _), own in zip(rows, several, strict=True)]
            yield partial(launch, size, most, look, put(table, device), *blocks_of(sizes, BLOCK, device))
