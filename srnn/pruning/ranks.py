"""Whether all ranks of a distributed run hold the same weights and masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.parts import PIECE

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """Two int64 numbers of a tensor's bits: equal for equal tensors, different for all but contrived others."""
    bits = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), PIECE):
        part = bits[start : start + PIECE].long()
        place = torch.arange(start, start + len(part), device=part.device)
        # Odd factors and a shift, so that swapped values and opposite changes show; sums wrap around alike everywhere.
        mixed = (part + 1) * (2 * place + 0x9E3779B1)
        total += torch.stack([part.sum(), (mixed ^ (mixed >> 29)).sum()])
    return total


def compare(tensors: Mapping[str, Tensor], itr: int) -> None:
    """Compare digests over all ranks; nothing to do where there is one.

    Args:
        tensors: what has to be equal, by name.
        itr: the iteration, for the message.

    Raises:
        UserError: on every rank, naming the first tensor that differs and the ranks.
    """
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    mine = torch.stack([digest(tensor) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for rank, theirs in enumerate(everyone):
        different = (theirs != everyone[0]).any(1).nonzero().flatten()
        if len(different):
            name = list(tensors)[int(different[0])]
            raise UserError(
                f"the ranks have diverged: after step {itr}, {name} of rank {rank} is not that of rank 0. Ranks must "
                f"start from the same weights and average their gradients (DistributedDataParallel does both)."
            )
