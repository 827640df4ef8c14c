"""The ranks of a run that several processes train, and what they agree on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srnn.errors import UserError

_PIECE = 1 << 22  # numbers looked at together: temporaries of larger tensors stay this small
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ranks() -> int:
    """Processes that train together now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's value; every rank has to ask for it."""
    if ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks()


def any_rank(*flags: bool) -> list[bool]:
    """Whether any rank says yes, to each of some questions; every rank has to ask."""
    if ranks() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_cpu_group())
    return votes.bool().tolist()


def gather(value: Any) -> list[Any]:
    """Every rank's value by rank, tensors on the CPU; every rank has to ask for it."""
    from lightning_fabric.utilities.apply_func import move_data_to_device  # whoever gathers trains by Lightning

    values = [move_data_to_device(value, torch.device("cpu"))]
    if ranks() > 1:
        mine, values = values[0], [None] * ranks()
        dist.all_gather_object(values, mine, group=_cpu_group())
    return values


def own(values: Sequence[Any]) -> Any:
    """This rank's value of those that were gathered. Raises UserError if other ranks were there."""
    if len(values) != ranks():
        raise UserError(
            f"the checkpoint is of a run with trainer.devices={len(values)}, which cannot be resumed with "
            f"trainer.devices={ranks()}; to train its network further, start a run with init_from=FOLDER."
        )
    return values[dist.get_rank() if len(values) > 1 else 0]


def forget_groups() -> None:
    """Forget what belongs to a process group that this process leaves."""
    _cpu_group.cache_clear()


@functools.cache
def _cpu_group() -> Any:
    """A group that exchanges what is on the CPU, as NCCL does not."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def digest(tensor: Tensor) -> Tensor:
    """Two int64 numbers of a tensor's bits: equal for equal tensors, different for all but contrived others."""
    bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _PIECE):
        part = bits[start : start + _PIECE].long()
        place = torch.arange(start, start + len(part), device=part.device)
        # Odd factors and a shift, so that swapped values and opposite changes show; sums wrap around alike everywhere.
        mixed = (part + 1) * (2 * place + 0x9E3779B1)
        total += torch.stack([part.sum(), (mixed ^ (mixed >> 29)).sum()])
    return total


def check_equal(tensors: Mapping[str, Tensor], itr: int) -> None:
    """Raise unless tensors have the same bits on all ranks; nothing to do where there is one.

    Args:
        tensors: what has to be equal, by name.
        itr: the iteration, for the message.

    Raises:
        UserError: on every rank, naming the first tensor that differs and the ranks.
    """
    if not tensors or ranks() == 1:
        return
    # On a GPU, if there is one among them: what NCCL exchanges.
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), torch.device("cpu"))
    mine = torch.stack([digest(tensor).to(device) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(ranks())]
    dist.all_gather(everyone, mine)
    for rank, theirs in enumerate(everyone):
        different = (theirs != everyone[0]).any(1).nonzero().flatten()
        if len(different):
            name = list(tensors)[int(different[0])]
            raise UserError(
                f"the ranks have diverged: after step {itr}, {name} of rank {rank} is not that of rank 0. Ranks must "
                f"start from the same weights and average their gradients (DistributedDataParallel does both)."
            )
