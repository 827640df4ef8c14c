"""Warnings of what pruning has emptied, of a sparsity that it has missed, and of one that was there before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srnn.cells import GATE_LETTERS
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.parts import count, some_of
from srnn.pruning.scope import in_a_scope


class _Update(NamedTuple):
    """What is left after an update.

    Attributes:
        itr: its step.
        gates: name -> gates of each parameter.
        left: whether each gate of each keeps a weight, bool.
        copied: an event, after which ``left`` is there; None where it is.
    """

    itr: int
    gates: Mapping[str, int]
    left: Tensor
    copied: Any

    def is_told(self) -> bool:
        """Whether ``left`` is there; not asked inside a capture of a CUDA graph, which that would break off."""
        if self.copied is None:
            return True
        return not torch.cuda.is_current_stream_capturing() and bool(self.copied.query())


class Emptied:
    """Warns, while a network is pruned, of each matrix or gate that loses its last weight: the loss tells it late."""

    def __init__(self) -> None:
        self._named: set[str] = set()
        self._updates: list[_Update] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_named": self._named, "_updates": []}

    def look(self, method: PruningMethod, itr: int, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
        """After an update; ``warn`` says what was found. Arguments are those of ``warn_of_the_end``."""
        if method.soft or method.regrows:  # weights may come back
            return
        gates = _gates_of(groups, masks)
        left, copied = _are_left(gates, masks), None
        if left.is_cuda:
            on_host = torch.empty(left.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            on_host.copy_(left, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(left.device))
            left = on_host
        self._updates.append(_Update(itr, gates, left, copied))

    def warn(self) -> None:
        """Of what was not named before, as far as a GPU has answered."""
        while self._updates and self._updates[0].is_told():
            update = self._updates.pop(0)
            if new := [name for name in _empty(update.gates, update.left) if name not in self._named]:
                self._named.update(new)
                _warn_of_empty(new, f" at step {update.itr}", stacklevel=5)


_NOTED = 0.001  # a tenth of a percent: zeros more than asked for that are worth a word


def warn_of_zeros_there(groups: Sequence[Group]) -> None:
    """Warn, before anything else is done, where a network that is pruned at once has more zeros than are asked for.

    Args:
        groups: with the masks that are to act now; what they take is still there.
    """
    found = []
    for group in (group for group in groups if group.sparsity is not None):
        pairs = [(part.of(part.parameter.detach()), part.of(part.mask)) for part in group.parts]
        zeros = sum(int(count(weight == 0)) for weight, _ in pairs)
        more = zeros - group.target > max(group.tolerance, _NOTED * group.size)
        if more and not any(bool((weight.bool() & ~mask).any()) for weight, mask in pairs):
            there, asked = (f"{100 * number / group.size:.2f} %" for number in (zeros, group.target))
            found.append(f"{group.name} weights ({there}, {asked} asked for)")
    if found:
        warnings.warn(
            f"more is zero already than was asked for of {some_of(found)}: nothing of these is pruned. Ask for a "
            "higher sparsity, or train further on what is left, with pruning=fixed.",
            stacklevel=3,  # of whoever makes the pruner
        )


def warn_of_the_end(method: PruningMethod, itr: int, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
    """Warn if the sparsity asked for was missed, and if nothing is left of a matrix or gate.

    Args:
        method: that pruned.
        itr: the step it ended at.
        groups: what it pruned.
        masks: by the names of parameters.
    """
    for group in groups:
        want, have = method.wanted(group), group.pruned
        if want is not None and abs(have - want) > group.tolerance:
            ended = "" if itr >= method.done_from else f" before step {method.done_from}"
            warnings.warn(
                f"pruning ended{ended} with {100 * have / group.size:.2f} % of {group.name} weights at zero, "
                f"and {100 * want / group.size:.2f} % were asked for.",
                stacklevel=4,  # of whoever finalizes, through torch's no_grad
            )
    gates = _gates_of(groups, masks)
    if method.updates and (empty := _empty(gates, _are_left(gates, masks))):
        _warn_of_empty(empty, "", stacklevel=5)


def _gates_of(groups: Sequence[Group], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameter name -> how many gates it has, in the order of the masks."""
    gates = {part.parameter_name: part.gates for group in groups for part in group.parts}
    return {name: gates[name] for name in masks}


def _are_left(gates: Mapping[str, int], masks: Mapping[str, Tensor]) -> Tensor:
    """Whether each gate of each mask keeps a weight, bool, on the device of the first; a GPU is not awaited."""
    left = [mask.reshape(gates[name], -1).any(1) for name, mask in masks.items()]
    return torch.cat([one.to(left[0].device) for one in left]) if left else torch.empty(0, dtype=torch.bool)


def _empty(gates: Mapping[str, int], left: Tensor) -> list[str]:
    """The matrices of which nothing is left, and the gates of others."""
    several, found = iter(left.tolist()), []
    for name, own in gates.items():
        kept = [next(several) for _ in range(own)]
        named = zip(GATE_LETTERS[own], kept, strict=False)
        found += [f"{name}[{gate}]" for gate, is_left in named if not is_left] if any(kept) else [name]
    return found


def _warn_of_empty(names: Sequence[str], when: str, stacklevel: int) -> None:
    warnings.warn(
        f"pruning left no weight of {some_of(names)}{when}: nothing passes through them any more. "
        f"Lower the sparsity, or give them a lower one of their own: {in_a_scope(names[0])}.",
        stacklevel=stacklevel,  # of whoever steps or finalizes, through torch's no_grad
    )
