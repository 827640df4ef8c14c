"""What came of pruning: a row for each parameter, and for each gate of a recurrent one; and what did not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srnn.cells import GATE_LETTERS
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.parts import Part, count, some_of
from srnn.pruning.scope import in_a_scope


@dataclass(frozen=True)
class ReportRow:
    """What became of a parameter, or of a gate of one.

    Attributes:
        parameter: its name in the model.
        gate: ``r``, ``z``, ``n`` or ``i``, ``f``, ``g``, ``o``; empty for what has none.
        layer_type: of its layer.
        weights: how many there are.
        zeros: how many of them are pruned.
        threshold: of its group, at the last update; in the unit of what ranks weights, as their magnitude.
        revived: how many weights came back, over all updates.
        structure: what is kept or zeroed as a whole.
        blocks: how many units it falls into.
        blocks_left: how many of them are kept.
    """

    parameter: str
    gate: str
    layer_type: str
    weights: int
    zeros: int
    threshold: float
    revived: int
    structure: str
    blocks: int
    blocks_left: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        return self.zeros / self.weights


def report_rows(group: Group, part: Part) -> list[ReportRow]:
    """A row for each gate of a part; one row where it has no gates."""
    masks_GRC, shape = part.of(part.mask), (1, *part.shape[1:])  # a row is about one gate
    rows = []
    for index, gate in enumerate(part.letters):
        mask = masks_GRC[index : index + 1]
        row = ReportRow(
            parameter=part.parameter_name,
            gate=gate,
            layer_type=part.layer_type,
            weights=mask.numel(),
            zeros=mask.numel() - int(count(mask)),
            threshold=group.epsilon,
            revived=int(part.revived[index]),
            structure=str(group.structure),
            blocks=group.structure.units(shape),
            blocks_left=int((group.structure.maxima(mask.byte()) > 0).sum()),
        )
        rows.append(row)
    return rows


def nothing_left(parts: Sequence[Part], masks: Mapping[str, Tensor]) -> list[str]:
    """The matrices, and the gates of others, of which every weight is pruned.

    Args:
        parts: all that is pruned.
        masks: parameter name -> mask; True keeps the weight.
    """
    gates = {part.parameter_name: part.gates for part in parts}
    gates = {name: gates[name] for name in masks}
    return _named(gates, _gates_left(gates, masks).tolist())


def _gates_left(gates: Mapping[str, int], masks: Mapping[str, Tensor]) -> Tensor:
    """Whether each gate of each mask keeps a weight, bool, on the device of the first; a GPU is not awaited."""
    left = [mask.reshape(gates[name], -1).any(1) for name, mask in masks.items()]
    return torch.cat([one.to(left[0].device) for one in left]) if left else torch.empty(0, dtype=torch.bool)


def _named(gates: Mapping[str, int], flags: Sequence[bool]) -> list[str]:
    """The matrices of which nothing is left, and the gates of others."""
    several, found = iter(flags), []
    for name, own in gates.items():
        kept = [next(several) for _ in range(own)]
        named = zip(GATE_LETTERS[own], kept, strict=False)
        found += [f"{name}[{gate}]" for gate, is_left in named if not is_left] if any(kept) else [name]
    return found


class Emptied:
    """Warns, while a network is pruned, of each matrix or gate that loses its last weight: the loss tells it late."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self._asked: list[tuple[int, Mapping[str, int], Tensor, Any]] = []  # step, gates, answers, when they are there

    def __getstate__(self) -> dict[str, Any]:
        return {"told": self.told, "_asked": []}

    def look(self, method: PruningMethod, itr: int, groups: Sequence[Group], masks: Mapping[str, Tensor]) -> None:
        """After an update. Arguments are those of ``warn_of_the_end``."""
        if method.soft or method.regrows:  # weights may come back
            return
        gates = {part.parameter_name: part.gates for group in groups for part in group.parts}
        gates = {name: gates[name] for name in masks}
        flags, over = _gates_left(gates, masks), None
        if flags.is_cuda:
            answers = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            answers.copy_(flags, non_blocking=True)
            over = torch.cuda.Event()
            over.record(torch.cuda.current_stream(flags.device))
            flags = answers
        self._asked.append((itr, gates, flags, over))

    def tell(self) -> None:
        """Warn of what was not told before, as far as a GPU has answered."""
        while self._asked and _is_over(self._asked[0][3]):
            itr, gates, flags, _ = self._asked.pop(0)
            if new := [name for name in _named(gates, flags.tolist()) if name not in self.told]:
                self.told.update(new)
                _warn_of_empty(new, f" at step {itr}", stacklevel=5)


def _is_over(event: Any) -> bool:
    """Whether what it stands for is done; not asked inside a capture of a CUDA graph, which that would break off."""
    return event is None or (not torch.cuda.is_current_stream_capturing() and bool(event.query()))


def _warn_of_empty(names: Sequence[str], when: str, stacklevel: int) -> None:
    warnings.warn(
        f"pruning left no weight of {some_of(names)}{when}: nothing passes through them any more. "
        f"Lower the sparsity, or give them a lower one of their own: {in_a_scope(names[0])}.",
        stacklevel=stacklevel,  # of whoever steps or finalizes, through torch's no_grad
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
                f"pruning ended{ended} with {100 * have / group.size:.2f} % of the {group.name} weights at zero, "
                f"and {100 * want / group.size:.2f} % were asked for.",
                stacklevel=4,  # of whoever finalizes, through torch's no_grad
            )
    if method.updates and (empty := nothing_left([part for group in groups for part in group.parts], masks)):
        _warn_of_empty(empty, "", stacklevel=5)
