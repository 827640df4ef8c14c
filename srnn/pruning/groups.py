"""A group: the weights that share a threshold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.formats import Structure
from srnn.pruning.cutting import MOST_UNITS, Cut, GpuCut, UnitRow
from srnn.pruning.launches import has_triton
from srnn.pruning.parts import Part, Piece, count
from srnn.pruning.ranking import Ranking, Scorer
from srnn.pruning.scores import RankedBy, Score, unit_scores


def magnitude(piece: Piece) -> Tensor:
    """``|w|`` of each weight, [G, R, C]."""
    return piece.weight.abs()


class Saliency:
    """``|w| v^(1/4)`` of each weight, [G, R, C], where v is a mean of squared gradients.

    It is in the order of w^2 sqrt(v), the saliency of LeCun, Denker and Solla, *Optimal brain damage*, NIPS 1989, with
    the root of v for the second derivative.

    Attributes:
        moments: parameter name -> v.
    """

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}

    def __call__(self, piece: Piece) -> Tensor:
        """Of a piece."""
        moment, size = piece.of(self.moments[piece.part.parameter_name]), piece.weight.abs()
        if size.itemsize < 4:  # in fp16 the product of two small numbers is zero
            size, moment = size.float(), moment.float()
        return size * _root(_root(moment))


def _root(numbers: Tensor) -> Tensor:
    """Square roots, rounded alike on all devices, as powers are not, so that all find the same masks."""
    if numbers.device.type != "cpu":
        return numbers.sqrt()
    # torch's own on a CPU are MKL's, of which a fifth are off by the last bit on an AMD EPYC, and take 8 times as long.
    known = numbers.float() if numbers.dtype == torch.bfloat16 else numbers  # to numpy
    return torch.from_numpy(np.sqrt(known.numpy())).to(numbers.dtype)


def _refuse_unrankable(importance: Callable[[Piece], Tensor], pieces: list[Piece], extremes: Tensor) -> None:
    """Raise UserError for a piece whose scores cannot be ranked: NaN, infinite or negative.

    Args:
        importance: what gave them.
        pieces: of the weights.
        extremes: the largest score of each piece, or the smallest and the largest, [P, 1 or 2].
    """
    # A maximum is NaN if anything is: one pass tells both. NaN compares false with every threshold and would be pruned
    # silently; the training is past saving, and this says so.
    for piece, values in zip(pieces, extremes.tolist(), strict=True):
        unrankable = [value for value in values if not math.isfinite(value) or value < 0]
        if unrankable and bool(piece.weight.isfinite().all()):
            raise UserError(
                f"{_name(importance)} gives {unrankable[0]:g} for a weight of {piece.part.name}: what ranks weights "
                f"must be finite and at least 0."
            )
        if unrankable:
            advice = "lower the learning rate, or clip gradients (on the command line optimizer.lr, "
            advice += "trainer.gradient_clip_val)"
            if piece.weight.dtype == torch.float16:
                advice += "; beside Adam, whose eps is 0 in float16, train float32 under torch.autocast"
            raise UserError(
                f"{piece.part.name} holds weights that are NaN or infinite, and cannot be ranked: the training has "
                f"diverged; {advice}."
            )


@dataclass
class Group:
    """Weights that are ranked together, under one threshold.

    Attributes:
        name: the layer type, the parameter's name or ``all``, and the settings that are its own.
        layer_type: ``recurrent``, ``linear``, ``embedding``, ``convolution``, ``other``; ``all`` if it mixes them.
        parts: the parameters and gates.
        sparsity: the share of zeros asked for, 0 to 1; None where it is not asked for.
        structure: what is kept or zeroed as a whole.
        score: what stands for a block.
        keep_diagonal: the recurrent diagonal stays.
        target: how many weights have to be zero in the end; 0 where no sparsity is asked for.
        importance: what a method ranks weights by: piece -> [G, R, C], at least 0.
        soft: whether pruned weights are ranked by their values, and not always last.
        waited: seconds that its updates waited for what a GPU had been given before.

    Raises:
        UserError: N:M or the diagonal keep more than the sparsity allows.
    """

    name: str
    layer_type: str
    parts: list[Part]
    sparsity: float | None
    structure: Structure
    score: Score = "max"
    keep_diagonal: bool = False
    target: int = 0
    importance: Callable[[Piece], Tensor] = magnitude
    soft: bool = False
    waited: float = field(default=0.0, init=False, repr=False)
    _epsilon: float | Tensor = field(default=0.0, init=False, repr=False)  # on a GPU until somebody asks
    _gpu_cut: GpuCut = field(default_factory=GpuCut, init=False, repr=False)

    def __post_init__(self) -> None:
        self._unchecked: list[tuple[Piece, Tensor]] = []  # the extreme scores of pieces on a GPU
        # Cut once: a piece holds a place in its parameter, not values, so that it never goes stale.
        self.pieces = [piece for part in self.parts for piece in part.pieces(self.structure.rows)]
        if self.sparsity is not None:
            self.target = self.zeros_for(self.sparsity)
            self._check_target()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_epsilon": self.epsilon}

    @property
    def epsilon(self) -> float:
        """The threshold of the last update. Waits for a GPU that has not found it yet."""
        return float(self._epsilon)

    @epsilon.setter
    def epsilon(self, value: float | Tensor) -> None:
        self._epsilon = value

    @cached_property
    def size(self) -> int:
        """Number of weights."""
        return sum(part.size for part in self.parts)

    @property
    def pruned(self) -> int:
        """Number of weights whose mask is zero."""
        counts = [count(part.of(part.mask)) for part in self.parts]
        return self.size - int(sum(one.to(counts[0].device) for one in counts))  # of a GPU awaited once

    @property
    def largest_unit(self) -> int:
        """How many weights the largest block has that goes as a whole."""
        return max(math.prod(self.structure.extent(part.shape)) for part in self.parts)

    @property
    def tolerance(self) -> int:
        """How many weights whole blocks may miss the target by, where some are left to go."""
        return self.largest_unit // 2

    def zeros_for(self, sparsity: float) -> int:
        """How many weights have to be zero for a sparsity, to the nearest; those that must stay are left out."""
        # One weight stays, however few there are: a group of zeros has no threshold, and passes nothing on. Rounded
        # half up: Python's own rounding, half to even, goes now up and now down.
        wanted = min(self.size - 1, math.floor(sparsity * self.size + 0.5))
        return min(wanted, self.most_zeros) if self.structure.of else wanted

    def ranking(self, scorer: Scorer | None = None) -> Ranking:
        """Its units by score, as the weights are now. What must stay, stays.

        Args:
            scorer: other scores of a piece's units, [U], at least 0, infinite for what must stay; None takes the
                importance of the weights.

        Raises:
            UserError: a weight is infinite or NaN; what ranks weights is so, or negative.
        """
        self._wait()
        if scorer is not None:
            return Ranking(self.pieces, self.structure, lambda p: self._protect(p, _checked(p, scorer(p))))
        found = self._ranking()
        self._check_finite()
        return found

    def _ranking(self) -> Ranking:
        """By importance, of weights that nobody has looked at yet."""
        self._unchecked.clear()
        return Ranking(self.pieces, self.structure, self._scores)

    def _wait(self) -> None:
        """For what GPUs were given before, which is not this group's."""
        began = time.perf_counter()
        for device in {part.mask.device for part in self.parts if part.mask.is_cuda}:
            torch.cuda.synchronize(device)
        self.waited += time.perf_counter() - began

    def prune_to(self, zeros: int) -> None:
        """Prune the smallest units until ``zeros`` weights are pruned, to the nearest unit; sets the threshold."""
        self.cut(Cut(zeros))

    def cut(self, cut: Cut) -> None:
        """Set masks and threshold. A GPU does it in its own time, but for the last blocks that are smaller than others.

        Raises:
            UserError: as ``ranking``; ``check`` tells what a GPU finds in its own time.
        """
        rows = self._plain_rows()
        if rows:
            keep = max(1, self.size - cut.zeros)  # a group of zeros has no threshold
            ranked_by = RankedBy.MAGNITUDES if self.importance is magnitude else RankedBy.SALIENCIES
            self.epsilon = self._gpu_cut(rows, ranked_by, keep, cut, self._epsilon)
            return
        ranking = self._ranking()
        if ranking.is_cut_on_gpu():
            self._gpu_cut.note_unrankable(self._extremes())
        else:
            self._wait()
            self._check_finite()
        self.epsilon = ranking.cut(cut, self._epsilon, self._gpu_cut)

    def check(self) -> None:
        """Raise UserError if an earlier cut met a weight or score that cannot be ranked, as far as a GPU has told."""
        if not self._gpu_cut.met_unrankable:
            return
        self._gpu_cut.forget_unrankable()
        largest = [piece.weight.abs().max()[None].cpu() for piece in self.pieces]  # of weights on several devices
        _refuse_unrankable(magnitude, self.pieces, torch.stack(largest))
        raise UserError(
            f"{_name(self.importance)} gave NaN or something infinite or negative for a weight of {self.name} at an "
            f"earlier update, or that weight was: what ranks weights must be finite and at least 0."
        )

    def restore(self, epsilon: float) -> None:
        """Take up a threshold with the masks of an earlier step, and forget what cuts since then have met."""
        float(self._epsilon)  # a GPU has told all then
        self._gpu_cut.forget_unrankable()
        self.epsilon = epsilon

    def set_epsilon(self, smallest_kept: float) -> None:
        """Take the smallest score kept for the threshold, unless all that is kept had to be."""
        if math.isfinite(smallest_kept):
            self.epsilon = max(0.0, smallest_kept)

    def _scores(self, piece: Piece) -> Tensor:
        importance, extremes = self._importance(piece)
        if extremes.is_cuda:  # each look at a number waits for the GPU
            self._unchecked.append((piece, extremes))
        else:
            _refuse_unrankable(self.importance, [piece], extremes[None])
        scores = unit_scores(importance, self.structure, self.score)
        if not self.soft:
            kept = self.kept_units(piece)
            if scores.is_cuda:
                scores = torch.where(kept, scores, scores.new_full((), -1))
            else:
                kept = kept.to(scores.dtype)
                scores = torch.addcmul(kept - 1, scores, kept)  # -1 where pruned; 7x faster than masked_fill
        return self._protect(piece, scores)

    def _importance(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Of the weights of a piece, [G, R, C], and its largest value, or its smallest and largest, [1 or 2]."""
        found = self.importance(piece)
        if self.importance is magnitude:
            return found, found.max()[None]
        if found.shape != piece.shape:
            raise UserError(
                f"{_name(self.importance)} gives {list(found.shape)} numbers for {list(piece.shape)} weights of "
                f"{piece.part.name}: it must give one for each."
            )
        found = found.detach().to(piece.mask.device) + 0.0  # -0.0 becomes 0.0: scores are ranked by their bits
        return found, torch.stack(found.aminmax())

    def _plain_rows(self) -> list[UnitRow]:
        """All units, where a GPU can cut them by their weights: single ones in fp32, of which none is protected."""
        plain = self.structure.block == 1 and not (self.structure.of or self.keep_diagonal)
        by_weights = self.importance is magnitude or isinstance(self.importance, Saliency)
        if not plain or not by_weights or self.size > MOST_UNITS or not has_triton():
            return []
        moments = self.importance.moments if isinstance(self.importance, Saliency) else None
        home, rows = self.parts[0].mask.device, []
        for part in self.parts:
            weight, moment = part.parameter.detach(), None if moments is None else moments[part.parameter_name]
            numbers = [weight] if moment is None else [weight, moment]
            if not all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in numbers):
                return []
            if not all(t.device == home for t in (*numbers, part.mask)):
                return []
            mask = part.of(part.mask)
            own = None if self.soft else mask  # what is pruned is ranked by its value, or last
            rows.append(UnitRow(part.of(weight), own, mask, None if moment is None else part.of(moment)))
        return rows

    def _check_finite(self) -> None:
        """Of pieces on a GPU, all together."""
        pieces = [piece for piece in self.pieces if piece.part.parameter.is_cuda]
        if pieces and not self._unchecked:  # the ranking computes scores as it needs them
            for piece in pieces:
                self._scores(piece)
        if pieces:
            _refuse_unrankable(self.importance, pieces, self._extremes())
        self._unchecked.clear()

    def _extremes(self) -> Tensor:
        """Of pieces on GPUs, on the first of these, [P, 1 or 2]."""
        first = self._unchecked[0][1].device
        return torch.stack([extremes.to(first) for _, extremes in self._unchecked])

    def kept_units(self, piece: Piece) -> Tensor:
        """Which units the masks keep, bool [U]. A block is kept or pruned as a whole, so its largest bit says it."""
        if self.structure.block == 1:
            return piece.mask.flatten()
        return self.structure.maxima(piece.mask.byte()) > 0

    def _protect(self, piece: Piece, scores: Tensor) -> Tensor:
        """Infinite scores for what must stay: the diagonal, and the best N of each M."""
        if self.keep_diagonal and piece.part.is_square:
            scores = scores.masked_fill(self.structure.maxima(piece.diagonal()) > 0, torch.inf)
        best = self.structure.protected(scores, piece.shape)
        return scores if best is None else scores.masked_fill(best, torch.inf)

    @cached_property
    def most_zeros(self) -> int:
        """How many weights may be zero: all but those that N:M and the diagonal keep."""
        free = 0
        for piece in self.pieces:
            # N:M keeps N of each M whatever the scores are, so equal ones tell how many.
            sizes = self.structure.sizes(piece.shape, piece.mask.device)
            free += int(sizes[self._protect(piece, torch.zeros(len(sizes), device=sizes.device)).isfinite()].sum())
        return free

    def _check_target(self) -> None:
        share, sparsity = self.structure, self.sparsity or 0.0
        if share.of and not math.isclose(sparsity, left := 1 - share.keep / share.of):
            raise UserError(
                f"structure={share} leaves {share.keep} of {share.of} weights, a sparsity of {left:g}, and "
                f"sparsity={sparsity:g} is asked for: set pruning.sparsity={left:g} with it."
            )
        if self.keep_diagonal and self.target > (most := self.most_zeros):
            raise UserError(
                f"pruning.keep_diagonal=true keeps so much of {self.name} in blocks of {share} that at most "
                f"{most / self.size:.4g} can be pruned, and sparsity={sparsity:g} is asked for: choose smaller "
                f"blocks, or less sparsity."
            )


def _checked(piece: Piece, scores: Tensor) -> Tensor:
    """A method's own scores, [U]: without NaN, negative numbers or -0.0, whose bits are in another order."""
    if not bool((scores >= 0).all()):  # as NaN is not
        raise UserError(f"scores of {piece.part.name} are negative or NaN: what ranks weights must be at least 0.")
    return scores + 0.0


def _name(importance: Callable[[Piece], Tensor]) -> str:
    return str(getattr(importance, "__qualname__", type(importance).__qualname__))
