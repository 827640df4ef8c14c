"""Units in the order of their scores: thresholds, and masks by threshold or by rank.

Small groups hold their scores while they are looked at. Large ones compute them anew, piece by piece, on each pass:
a threshold for 100 million weights then needs a few passes over them and no copy of them. A sort would need several
copies (values, 64-bit indices and scratch), just when a large model has filled the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from srnn.formats import Structure
from srnn.pruning.cutting import MOST_UNITS, Cut, GpuCut, UnitRow
from srnn.pruning.launches import has_triton
from srnn.pruning.parts import PIECE, Piece
from srnn.pruning.scores import RankedBy

Scorer = Callable[[Piece], Tensor]  # the scores of a piece's units, [U]
_HELD_ON_GPU = 1 << 26  # scores: 256 MB beside a network of as much; computing them anew costs launches
_GPU_BINS = 1 << 13  # of which torch's histogram fits the memory that threads share
_SORTED = 1 << 22  # of one bin: 64 MB
BINS = 1 << 16  # half of the 32 bits of a score: two passes find it, and a histogram takes 0.5 MB


class Ranking:
    """The units of some pieces of weights by score. A score below 0 is a unit that is pruned already.

    Ties are broken alike everywhere: among equals the earlier units are kept, in the order of the pieces. Ranks of a
    distributed run, the CPU and the GPU then find the same masks.

    Args:
        pieces: of the weights.
        structure: the units they fall into.
        scorer: gives the scores of a piece, [U]: at least 0; -1 for what is pruned already; infinite for a unit that
            must be kept. It is called again on each pass, and has to give the same.
    """

    def __init__(self, pieces: Sequence[Piece], structure: Structure, scorer: Scorer) -> None:
        self.pieces = pieces
        self.structure = structure
        home = pieces[0].part.parameter.device  # of all scores, where weights are on several
        self.scorer: Scorer = lambda piece: scorer(piece).to(home)
        self.units = sum(structure.units(piece.shape) for piece in pieces)
        self.size = sum(piece.shape[0] * piece.shape[1] * piece.shape[2] for piece in pieces)
        self._on_gpu = home.type == "cuda"
        few = self.units <= (_HELD_ON_GPU if self._on_gpu else PIECE)
        self._together: Tensor | None = None  # all that are held, in one: fewer launches
        self._held: list[Tensor] | None = None
        if few:
            self._held = [self.scorer(piece) for piece in pieces]
            if self._on_gpu and all(one.dtype == self._held[0].dtype for one in self._held):
                self._together = torch.cat(self._held) if len(self._held) > 1 else self._held[0]
        if self._together is not None:
            self._held = list(self._split(self._together))

    @property
    def held(self) -> bool:
        """Whether scores were computed once, and not on each pass."""
        return self._held is not None

    def __iter__(self) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with the scores of its units."""
        for index, piece in enumerate(self.pieces):
            # Where they are not held, 32 bits are enough, and the order of the bits is the order of the numbers. Held
            # ones keep their type: a network in fp64 is ranked in fp64.
            yield piece, self._held[index] if self._held is not None else self.scorer(piece).float()

    def _scores(self) -> Iterator[Tensor]:
        """All scores, in as few tensors as they are held in."""
        return iter([self._together]) if self._together is not None else (scores for _, scores in self)

    def kth_smallest(self, k: int) -> float:
        """The ``k``-th smallest score, counted from 1."""
        if self._on_gpu and not (self._held is not None and self._held[0].dtype == torch.float64):
            return _kth_on_gpu(lambda: (scores.float() for scores in self._scores()), k, self.units)
        if self._held is None:
            return _kth_by_bits((scores for _, scores in self), (scores for _, scores in self), k)
        scores = torch.cat(self._held)
        if scores.device.type == "cpu":  # numpy has no bfloat16
            return _kth_by_partition((scores.float() if scores.dtype == torch.bfloat16 else scores).numpy(), k)
        # A single block of threads looks for kthvalue: sorting is 20 times faster than that.
        return float(scores.sort().values[k - 1])

    def quantile(self, share: float) -> float:
        """The score that ``share`` (0 to 1) of all units lie at or under: the paper's ``q`` for magnitudes and 0.9."""
        return self.kth_smallest(max(1, min(self.units, round(share * self.units))))

    def largest(self) -> float:
        """The largest score."""
        return max(float(scores.max()) for scores in self._scores())

    def count_at_least(self, epsilon: float) -> int:
        """How many units reach a threshold, of at least 0."""
        return sum(int((scores >= epsilon).sum()) for scores in self._scores())

    def _split(self, units: Tensor) -> Sequence[Tensor]:
        """Something of all units, by pieces."""
        return units.split([self.structure.units(piece.shape) for piece in self.pieces])

    def keep_at_least(self, epsilon: float) -> None:
        """Set the masks: keep what reaches the threshold."""
        if self._together is not None:
            self._set_all(self._split(self._together >= epsilon))
            return
        for piece, scores in self:
            self._set_all([scores >= epsilon], [piece])

    def count_for(self, zeros: int) -> int:
        """How many units to keep so that ``zeros`` weights are pruned, to the nearest unit; at least 1.

        For units of equal size; where the last of a row or gate are smaller, ``prune`` counts their weights.
        """
        return max(1, self.units - int(zeros * self.units / self.size + 0.5))

    def cut(self, cut: Cut, before: float | Tensor, on_gpu: GpuCut | None = None) -> float | Tensor:
        """Set the masks.

        Args:
            cut: how far to prune.
            before: the threshold of the last cut.
            on_gpu: what does it on a GPU, in memory of its own; None for a new one.

        Returns:
            The threshold; of a GPU a tensor that the next cut by ``on_gpu`` writes to.
        """
        if self.is_cut_on_gpu():
            assert self._together is not None
            keep = torch.empty(self.units, dtype=torch.bool, device=self._together.device)
            rows = [UnitRow(self._together.float(), None, keep, None)]
            epsilon = (on_gpu or GpuCut())(rows, RankedBy.SCORES, self.count_for(cut.zeros), cut, before)
            self._set_all(self._split(keep))
            return epsilon
        least = float(before)
        if cut.share is not None:
            # An infinite score is of what has to stay (the diagonal, N:M), and says nothing of the rest.
            q = self.kth_smallest(cut.rank(self.units))
            threshold = max(least, q * cut.factor) if math.isfinite(q) else least
            if self.count_at_least(threshold) >= self.count_for(cut.zeros):
                self.keep_at_least(threshold)
                return threshold
        boundary = self.keep_largest(self.count_for(cut.zeros)) if self._is_even() else self._prune_uneven(cut.zeros)
        return max(least if cut.rising else 0.0, boundary) if math.isfinite(boundary) else least

    def _is_even(self) -> bool:
        return all(self.structure.is_even(piece.shape) for piece in self.pieces)

    def is_cut_on_gpu(self) -> bool:
        """Whether ``cut`` is launched on a GPU, and not waited for."""
        held = self._together is not None and self._together.is_cuda and self._together.dtype != torch.float64
        return held and has_triton() and self.units <= MOST_UNITS and self._is_even()

    def prune(self, zeros: int) -> float:
        """Set the masks: prune the smallest units until ``zeros`` weights are pruned, to the nearest unit.

        Returns:
            The smallest score kept, at least 0, infinite if all that is kept had to be.
        """
        return float(self.cut(Cut(zeros), math.inf))

    def _prune_uneven(self, zeros: int) -> float:
        """As ``prune``, of units of several sizes, such as the last block of a row."""
        # In the order of their scores, with their weights added up, until the count is nearest. Sorts all scores at
        # once, which is affordable: blocks are few beside weights. Stable, for the sake of ties.
        scores = torch.cat([scores for _, scores in self])
        sizes = torch.cat([self.structure.sizes(piece.shape, scores.device) for piece in self.pieces])
        order = scores.argsort(descending=True, stable=True)
        missed = (self.size - zeros - sizes[order].cumsum(0)).abs()
        kept = order[: int(missed.argmin()) + 1]
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[kept] = True
        self._set_all(self._split(keep))
        return float(scores[kept[-1]])

    def keep_largest(self, count: int) -> float:
        """Set the masks: keep exactly ``count`` units, the largest. Returns the smallest score kept."""
        boundary = self.kth_smallest(self.units - count + 1)
        # All above the boundary stay, and as many of its equals as are still missing: a matrix of equal scores, such as
        # zeros, is cut to the exact count too.
        left = count - sum(int((scores > boundary).sum()) for scores in self._scores())
        kept = self._kept(boundary, left)
        if self._together is not None:
            self._set_all(self._split(next(kept)))
        else:
            for piece, keep in zip(self.pieces, kept, strict=True):
                self._set_all([keep], [piece])
        return boundary

    def _kept(self, boundary: float, left: int) -> Iterator[Tensor]:
        """Which scores are above the boundary, or among its first ``left`` equals; in as few tensors as they are."""
        for scores in self._scores():
            keep = scores > boundary
            if left > 0:
                equal = (scores == boundary).nonzero().flatten()[:left]
                keep[equal] = True
                left -= len(equal)
            yield keep

    def _set_all(self, keep: Sequence[Tensor], pieces: Sequence[Piece] | None = None) -> None:
        """The masks of some pieces, or of all, from the units [U] to keep of each."""
        pieces = self.pieces if pieces is None else pieces
        spread = [self.structure.spread(keep_U, piece.shape) for keep_U, piece in zip(keep, pieces, strict=True)]
        masks = [piece.mask for piece in pieces]
        torch._foreach_copy_(masks, [new.to(mask.device) for new, mask in zip(spread, masks, strict=True)])


def _kth_by_partition(scores: np.ndarray, k: int) -> float:
    """The ``k``-th smallest. 8x faster than kthvalue (246 k values: 0.46 ms against 3.7 ms), but 25x slower where a
    value is there many times, as those of pruned and of kept weights are: these are set aside."""
    # The two such values are the least, of pruned weights (-1 or 0), and infinity, of those that must stay.
    least = scores.min()
    between = scores[(scores > least) & (scores < np.inf)]
    place = k - 1 - int((scores == least).sum())
    if place < 0:
        return float(least)
    return float(np.partition(between, place)[place]) if place < len(between) else np.inf


def _kth_by_bits(first: Iterator[Tensor], second: Iterator[Tensor], k: int) -> float:
    """The ``k``-th smallest of fp32 numbers, at least 0 or -1, in two passes: upper half of its bits, then the lower.

    As integers such numbers are in the same order, so that two histograms of 65,536 bins find it exactly. That holds
    for floats from 0 up; -1 is the only negative one, so its bits, a negative integer, are below those of 0 as well.
    """
    counts = _histogram((_bits(scores) >> 16) + BINS // 2 for scores in first)
    # The shift of a signed integer keeps its sign: BINS // 2 makes the bins of both signs start from 0.
    high, below = _bin_of(counts, k)
    inside = (bits[(bits >> 16) + BINS // 2 == high] & (BINS - 1) for bits in map(_bits, second))
    low, _ = _bin_of(_histogram(inside), k - below)
    pattern = ((high - BINS // 2) << 16) | low
    return float(np.int32(pattern).view(np.float32))


def _kth_on_gpu(passes: Callable[[], Iterator[Tensor]], k: int, units: int) -> float:
    """The same of so many on a GPU: two or three histograms of 8192 bins, or one and the scores of one bin, sorted.

    Each waits for the GPU once. Threads that count into one bin wait for each other. What is pruned, 90 % of all
    weights towards the end, would all fall into one: bins are of the bits less 1, which 0 and -1 lie below, and those
    are all that is in no bin.
    """
    first, base = 0, 0  # what is below, and the bits less 1 that it ends at
    for number, shift in enumerate((18, 5, 0)):
        counts = _sum(_in_bins((_bits(scores) - 1 - base) >> shift) for scores in passes()).cpu()
        if number == 0:
            first = units - int(counts.sum())
            if k <= first:
                negative = int(_sum((scores < 0).sum() for scores in passes()))
                return -1.0 if k <= negative else 0.0
        place, below = _bin_of(counts, k - first)
        first, base = first + below, base + (place << shift)
        if number == 0 and int(counts[place]) <= _SORTED:
            bits = [bits[(bits - 1) >> shift == place] for bits in map(_bits, passes())]
            return float(torch.cat(bits).sort().values[k - first - 1].view(torch.float32))
    return float(np.int32(base + 1).view(np.float32))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    several = list(parts)
    return several[0] if len(several) == 1 else torch.stack(several).sum(0)


def _in_bins(places: Tensor) -> Tensor:
    """How often each of 0 to 8191 is there, int64 [8192]; others are left out."""
    if torch.are_deterministic_algorithms_enabled():  # histc refuses on a GPU then, of integers too
        return torch.bincount(places[(places >= 0) & (places < _GPU_BINS)], minlength=_GPU_BINS)
    # One more bin than is wanted, so that a place is its bin in any arithmetic. Without integers on a CPU.
    counts = torch.histc(places if places.is_cuda else places.double(), _GPU_BINS + 1, 0, _GPU_BINS + 1)
    return counts[:_GPU_BINS].long()


def _bits(scores: Tensor) -> Tensor:
    """The bits of fp32 numbers as integers, without a copy."""
    return scores.contiguous().view(torch.int32)


def _histogram(parts: Iterator[Tensor]) -> Tensor:
    """How often each of ``BINS`` small integers is there, [BINS]."""
    none = torch.zeros((), dtype=torch.int64, device="cpu")  # exact beyond 16 million, as floats are not
    return sum((torch.bincount(part.flatten(), minlength=BINS) for part in parts), start=none)


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the ``k``-th smallest, and how many are in the bins below."""
    sums = counts.cumsum(0)
    found = int(torch.searchsorted(sums, k))
    return found, int(sums[found - 1]) if found else 0
