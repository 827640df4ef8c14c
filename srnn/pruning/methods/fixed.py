"""``pruning=fixed``: keep the zeros a network came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from srnn.errors import UserError
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import LayerTypes, PruningMethod
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import DEFAULT_LAYER_TYPES, GroupSettings, build_groups
from srnn.registry import register


@register.pruning("fixed")
@dataclass
class Fixed(PruningMethod):
    """Train on the weights that are not zero at the start: to fine-tune a pruned network, with ``init_from``."""

    layer_types: LayerTypes = field(default_factory=lambda: list(DEFAULT_LAYER_TYPES))
    needs_training = False

    def groups(self, model: nn.Module) -> list[Group]:
        """The model's weights by layer type."""
        # Zeros of frozen weights stay by themselves; they are reported with the others.
        return build_groups(model, self.layer_types, None, "layer_type", GroupSettings(), frozen=True)

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Take the masks from the weights. Raises UserError if there is no zero."""
        self.dense_until, self.done_from = -1, 0  # masked from the start
        for group in groups:
            for part in group.parts:
                part.of(part.mask).copy_(part.of(part.parameter.detach()) != 0)
        if not any(group.pruned for group in groups):
            raise UserError("pruning=fixed keeps the zeros of a pruned network, and here is none: give init_from=FILE.")

    def update(self, itr: int, group: Group) -> None:
        """Never called."""

    def wanted(self, group: Group) -> None:
        """What there was."""
        return

    def expected(self, itr: int, group: Group) -> float:
        """What there was."""
        return group.pruned / group.size
