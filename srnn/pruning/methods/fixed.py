"""``pruning=fixed``: keep the zeros a network came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.groups import LAYER_TYPES, Group
from srnn.pruning.methods.base import LayerTypes, PruningMethod
from srnn.pruning.schedules import RunLength
from srnn.registry import register


@register.pruning("fixed")
@dataclass
class Fixed(PruningMethod):
    """Train on the weights that are not zero at the start: to fine-tune a pruned network, with ``init_from``."""

    layer_types: LayerTypes = field(default_factory=lambda: list(LAYER_TYPES))

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Take the masks from the weights. Raises UserError if there is no zero."""
        self.dense_until = self.done_from = 0
        for group in groups:
            for name, parameter in group.parameters.items():
                group.masks[name] = parameter.detach() != 0
        if not any(group.pruned for group in groups):
            raise UserError("pruning=fixed keeps the zeros of a pruned network, and here is none: give init_from=FILE.")

    def is_update(self, itr: int) -> bool:
        """Never."""
        return False

    def update(self, itr: int, group: Group) -> None:
        """Never called."""

    def wanted(self, group: Group) -> None:
        """What there was."""
        return
