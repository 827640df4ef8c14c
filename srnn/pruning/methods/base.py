"""What every pruning method provides, and the options most of them share.

A method is a choice of parts: a schedule (``schedules``) says when and how far, a structure (``structures``) what goes
as a whole, a score (``scores``) what goes first, the scope (``scope``) which weights, with which settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor, nn

from srnn.formats import Structure
from srnn.pruning.groups import Group, magnitude
from srnn.pruning.parts import Piece
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import DEFAULT_LAYER_TYPES, LayerType, Scope, Share, build_groups
from srnn.pruning.scores import Score
from srnn.registry import Range, check_ranges

if TYPE_CHECKING:
    from srnn.pruning.pruner import Pruner

LayerTypes = list[LayerType]
Sparsity = Annotated[float, Range(gt=0, lt=1)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]


class PruningMethod(ABC):
    """One way to prune. ``prepare`` tells it how long the run is; then it updates groups at its ``updates``.

    A subclass registered as ``@register.pruning("name")`` is ``pruning=name``; its arguments are its options. Most
    derive from ``Shared``, which has the common ones.

    Attributes:
        layer_types: which weights it prunes.
        zero_state: whether the optimiser's state of a pruned weight is zeroed too.
        updates: the iterations after which masks are updated; set by ``prepare``.
        dense_until: the iteration up to which nothing is masked (the paper's start_itr); set by ``prepare``.
        done_from: the iteration from which the sparsity is final (end_itr); set by ``prepare``.
        delayed: masks found at an update act after the *next* step, as Algorithm 1 is printed, and not at once.
        soft: pruned weights compete with their live values, and may come back before ``done_from``.
        regrows: it gives weights back by itself.
    """

    layer_types: Sequence[str] = ()
    zero_state: bool = True
    updates: Sequence[int] = ()
    dense_until: int
    done_from: int
    delayed: bool = False
    soft: bool = False
    regrows: bool = False

    @abstractmethod
    def groups(self, model: nn.Module) -> list[Group]:
        """The weights of a model that it prunes; those of a group share a threshold."""

    @abstractmethod
    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the schedule for a run of this length, and refuse what cannot work.

        Args:
            run: the length of the run.
            groups: what will be pruned. Masks that are set here act at once.
            reference: weights of a trained dense model, when ``reference_path`` names one.
        """

    @property
    def reference_path(self) -> str | None:
        """A file with a trained dense model that the method wants to see, if any."""
        return None

    @property
    def phases(self) -> dict[str, int]:
        """The steps where its schedule changes, by the names of its options: start_itr, ramp_itr (if any), end_itr."""
        schedule = getattr(self, "schedule", None)
        ramp = getattr(schedule, "ramp_itr", None)
        start = getattr(schedule, "start_itr", max(0, self.dense_until))
        end = getattr(schedule, "end_itr", self.done_from)
        return {"start_itr": start} | ({} if ramp is None else {"ramp_itr": ramp}) | {"end_itr": end}

    def is_update(self, itr: int) -> bool:
        """Whether masks are updated after iteration ``itr``."""
        return itr in self.updates

    @abstractmethod
    def update(self, itr: int, group: Group) -> None:
        """Set the group's masks and ``epsilon``; called only where ``is_update`` says so."""

    def importance(self, piece: Piece) -> Tensor:
        """What ranks the weights of a piece, at least 0, [G, R, C]: their magnitude."""
        return magnitude(piece)

    def after_masks(self, pruner: Pruner) -> None:
        """After every optimiser step and masking: what else it does to weights."""
        return

    def wanted(self, group: Group) -> int | None:
        """How many weights of the group have to end up pruned; None where the number results."""
        return group.target

    def expected(self, itr: int, group: Group) -> float | None:
        """The group's sparsity after iteration ``itr``, as far as it can be told before training."""
        return None

    @property
    def settings(self) -> str:
        """Its name and options, to tell it from others; only its name where it is no dataclass."""
        return repr(self) if is_dataclass(self) else type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What it has to remember besides masks and thresholds."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        return


@dataclass(kw_only=True)
class Structured(PruningMethod):
    """Options of every method that chooses weights.

    Attributes:
        layer_types: which weights are pruned.
        structure: what is kept or zeroed as a whole: ``element``, ``16x1``, ``4x4``, ``2:4``.
        score: what stands for a block.
        keep_diagonal: the diagonal of recurrent matrices stays; in blocks, the blocks it runs through.
        scope: settings of their own for weights by pattern; see ``scope.build_groups``.
        zero_state: whether the optimiser's state of a pruned weight is zeroed too.
    """

    layer_types: LayerTypes = field(default_factory=lambda: list(DEFAULT_LAYER_TYPES))
    structure: str = "element"
    score: Score = "max"
    keep_diagonal: bool = False
    scope: Scope | None = None
    zero_state: bool = True

    def __post_init__(self) -> None:
        check_ranges(self)
        Structure.parse(self.structure)

    def _groups(self, model: nn.Module, share: Share, sparsity: float) -> list[Group]:
        structure = Structure.parse(self.structure)
        return build_groups(
            model, self.layer_types, self.scope, share, sparsity, structure, self.score, self.keep_diagonal
        )


@dataclass(kw_only=True)
class Shared(Structured):
    """Options of methods under a threshold that weights share.

    Attributes:
        sparsity: the share of zeros asked for.
        share: which weights share a threshold: those of a layer type (the paper), of a matrix, or all.
    """

    sparsity: Sparsity = 0.9
    share: Share = "layer_type"

    def groups(self, model: nn.Module) -> list[Group]:
        """The model's weights, in groups that share a threshold."""
        return self._groups(model, self.share, self.sparsity)
