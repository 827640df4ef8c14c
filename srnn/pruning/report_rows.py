"""What came of pruning: a row for each parameter, and for each gate of a recurrent one; a line for each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srnn.pruning.groups import Group
from srnn.pruning.parts import Part, count

_SHOWN = 6  # groups: with a threshold a matrix there are as many as matrices


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


def group_lines(groups: Sequence[Group], wanted: Callable[[Group], int | None]) -> list[str]:
    """A line for each of the first groups: what is pruned of it, and what is to be, where ``wanted`` says a number."""
    lines = []
    for group in groups[:_SHOWN]:
        asked = "" if wanted(group) is None or group.sparsity is None else f", {100 * group.sparsity:.4g} % asked for"
        zeros = f"{100 * group.pruned / group.size:.2f} % pruned{asked}"
        lines.append(f"({group.name}): {group.size:,} weights, {group.structure}, {zeros}")
    return lines + [f"... and {len(groups) - _SHOWN} more groups"] * (len(groups) > _SHOWN)
