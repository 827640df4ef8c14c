"""Pruning a trained network once, without training: ``srnn.prune``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from srnn.pruning.pruner import Pruner
from srnn.pruning.report_rows import ReportRow
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import DEFAULT_LAYER_TYPES, LayerType, Scope, Sharing, left_dense


@dataclass(frozen=True, repr=False)
class PruneReport:
    """What ``srnn.prune`` did. Printed, it is a line a parameter.

    Attributes:
        rows: a row for each parameter that was pruned, and for each gate of a recurrent one.
        left_out: every other matrix, or gates of one, and why it is as it was.
    """

    rows: list[ReportRow]
    left_out: dict[str, str]

    @property
    def sparsity(self) -> float:
        """Share of zeros among all the weights that were pruned, 0 to 1."""
        return sum(row.zeros for row in self.rows) / sum(row.weights for row in self.rows)

    def __str__(self) -> str:
        of: dict[str, list[ReportRow]] = {}
        for row in self.rows:
            of.setdefault(row.parameter, []).append(row)
        zeros, weights = sum(row.zeros for row in self.rows), sum(row.weights for row in self.rows)
        lines = [f"pruned {zeros:,} of {weights:,} weights, {100 * self.sparsity:.2f} %"]
        for name, rows in of.items():
            share = sum(row.zeros for row in rows) / sum(row.weights for row in rows)
            structures = ", ".join(dict.fromkeys(row.structure for row in rows))
            lines.append(f"  {name}: {100 * share:.2f} % ({structures})")
        if self.left_out:
            lines += ["left as they were:", *(f"  {name} {why}" for name, why in self.left_out.items())]
        return "\n".join(lines)

    __repr__ = __str__


def prune(
    model: nn.Module,
    sparsity: float = 0.9,
    structure: str = "element",
    share: Sharing = "layer_type",
    layer_types: Sequence[LayerType] = DEFAULT_LAYER_TYPES,
    scope: Scope | None = None,
    **options: Any,
) -> PruneReport:
    """Prune a trained network once, in place: zero its smallest weights.

    It is ``Pruner`` with the method ``hard``, before the first step. Nothing keeps the zeros afterwards: to train
    further on the weights that are left, give the network to a ``Pruner`` with the method ``fixed``.

    Args:
        model: any module with recurrent layers and their cells, ``nn.Linear``, ``nn.Embedding``, ``nn.Conv1d/2d``.
        sparsity: the share of zeros, above 0 and below 1; it is met to the weight, or to the nearest block.
        structure: what is zeroed as a whole: ``element``, blocks such as ``16x1`` or ``4x4``, or N of every M weights
            (``2:4``), which needs ``sparsity`` = 1 - N/M.
        share: which weights are ranked together: those of a ``layer_type``, of a ``matrix``, or all (``global``).
        layer_types: which are pruned: ``recurrent``, ``linear``, ``embedding``, ``convolution``.
        scope: settings of their own for weights by pattern, such as ``{"*.weight_hh*[z]": {"sparsity": 0.95}}``;
            ``{"sparsity": 0}`` leaves them as they are.
        options: more of the method ``hard``: ``score``, ``keep_diagonal``.

    Returns:
        What was pruned and what was left out, for which reason. Of layers of these types that are frozen or cannot be
        pruned, such as those under weight norm, a warning tells too.

    Raises:
        UserError: nothing in the model can be pruned, a weight is NaN or infinite, a layer is lazy and has no weights
            yet, a pattern matches nothing, or an option is wrong. The model is then as it was.

    Example:
        >>> import torch, srnn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Conv1d(64, 8, 1))
        >>> srnn.prune(model, sparsity=0.75, structure="4x1")
        pruned 3,072 of 4,096 weights, 75.00 %
          0.weight: 75.00 % (4x1)
        left as they were:
          1.weight is of type convolution, which is not in layer_types
        >>> int((model[0].weight == 0).sum())
        3072
    """
    chosen = {"structure": structure, "share": share, "layer_types": list(layer_types), "scope": scope, **options}
    pruner = Pruner(model, {"name": "hard", "prune_itr": 0, "sparsity": sparsity, **chosen}, RunLength(1))
    pruner.finalize()
    return PruneReport(pruner.report(), left_dense(model, layer_types, scope, pruner.parts))
