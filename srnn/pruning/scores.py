"""How much a unit matters. ``|w|`` for a single weight; for a block what stands for its weights' magnitudes."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from srnn.formats import Shape, Structure

Score = Literal["max", "mean", "energy"]


class RankedBy(IntEnum):
    """What units are ranked by: scores as they are; magnitudes of weights; these times the fourth roots of moments."""

    SCORES = 0
    MAGNITUDES = 1
    SALIENCIES = 2


def unit_scores(importance_GRC: Tensor, structure: Structure, score: Score) -> Tensor:
    """The score of each unit, [U], from the importance of each weight: at least 0.

    Args:
        importance_GRC: of each weight, at least 0; usually its magnitude.
        structure: the units.
        score: ``max`` (Narang et al. 2017), ``mean`` (WaveRNN, 2018) or ``energy``, the root of the mean square
            (LPCNet, 2019). All are the weight's own magnitude where units are single weights.

    Returns:
        In the order of ``structure``: gate after gate, block row after block row.
    """
    if structure.block == 1:
        return importance_GRC.flatten()
    if score == "max":
        return structure.maxima(importance_GRC)
    if importance_GRC.itemsize < 4:  # squares of small numbers are zero in fp16, and sums are coarse in both
        importance_GRC = importance_GRC.float()
    shape: Shape = (importance_GRC.shape[0], importance_GRC.shape[1], importance_GRC.shape[2])
    # By the weights a block has, not by N x M: a block that is cut off at an edge would else look small, and go first.
    sizes = structure.sizes(shape, importance_GRC.device)
    if score == "mean":
        return structure.sums(importance_GRC) / sizes
    return (structure.sums(importance_GRC.square()) / sizes).sqrt()


def random_scores(count: int, device: torch.device, *key: object) -> Tensor:
    """``count`` numbers between 0 and 1 that depend on nothing but ``key``: the same on every device and rank.

    Args:
        count: how many.
        device: where they are put.
        key: what they depend on: numbers and strings.
    """
    # Drawn on the CPU, because a GPU's generator gives other numbers; by one of its own, so that no other draw changes.
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu").to(device)
