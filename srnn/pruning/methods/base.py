"""What every pruning method provides, and the options most of them share.

A method is a choice of parts: a schedule (``schedules``) says when and how far, a structure (``srnn.formats``) what
goes as a whole, a score (``scores``) what goes first, the scope (``scope``) which weights, with which settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from srnn.formats import Structure
from srnn.pruning.groups import Group, magnitude
from srnn.pruning.parts import Part, Piece
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import DEFAULT_LAYER_TYPES, GroupSettings, LayerType, Scope, Sharing, build_groups
from srnn.pruning.scores import Score
from srnn.registry import Range, check_ranges
from srnn.registry.option_types import PositiveShare
from srnn.registry.schema import plain_containers

LayerTypes = list[LayerType]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]


class PrunerView(Protocol):
    """What a method sees of the ``Pruner`` that runs it, which is built on methods and not the other way round.

    Attributes:
        itr: optimiser steps done so far.
        optimizers: the optimisers that were given to the pruner; may be none.
        groups: what is pruned.
    """

    itr: int
    optimizers: list[torch.optim.Optimizer]
    groups: list[Group]

    @property
    def parts(self) -> list[Part]:
        """All that is pruned: parameters, or gates of parameters."""

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask; True keeps the weight."""

    def state_of(self, parameter: nn.Parameter) -> list[Tensor]:
        """The optimisers' tensors that go with a parameter, element for element."""


class PruningMethod(ABC):
    """One way to prune. ``prepare`` tells it how long the run is; then it updates groups at its ``updates``.

    A subclass registered as ``@register.pruning("name")`` is ``pruning=name``; its arguments are its options. Most
    derive from ``Shared``, which has the common ones, and brings ``groups``.

    Example:
        >>> import torch
        >>> from srnn.pruning import Cubic, Pruner
        >>> pruner = Pruner(torch.nn.GRU(4, 8), Cubic(sparsity=0.8), run=100)
        >>> pruner.method.phases
        {'start_itr': 5, 'end_itr': 50}
        >>> [f"{pruner.method.expected(itr, pruner.groups[0]):.2f}" for itr in (5, 20, 50)]
        ['0.00', '0.56', '0.80']

    Attributes:
        layer_types: which weights it prunes.
        zero_state: whether the optimiser's state of a pruned weight is zeroed too.
        updates: the iterations after which masks are updated; set by ``prepare``.
        dense_until: the iteration up to which nothing is masked (the paper's start_itr); set by ``prepare``.
        done_from: the iteration from which the sparsity is final (end_itr); set by ``prepare``.
        delayed: masks found at an update act after the *next* step, as Algorithm 1 is printed, and not at once.
        soft: pruned weights compete with their live values, and may come back before ``done_from``.
        regrows: it gives weights back by itself.
        needs_training: whether it prunes while a network trains, and not before the first step.
    """

    layer_types: Sequence[str] = ()
    zero_state: bool = True
    updates: Sequence[int] = ()
    dense_until: int
    done_from: int
    delayed: bool = False
    soft: bool = False
    regrows: bool = False
    needs_training: bool = True

    @abstractmethod
    def groups(self, model: nn.Module) -> list[Group]:
        """The weights of a model that it prunes; those of a group share a threshold.

        Raises:
            UserError: a pattern of the scope matches nothing, or settings contradict each other.
        """

    @abstractmethod
    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the schedule for a run of this length: set ``updates``, ``dense_until`` and ``done_from``.

        Args:
            run: the length of the run.
            groups: what will be pruned. Masks that are set here act at once.
            reference: weights of a trained dense model by name, when ``reference_path`` names one.

        Raises:
            UserError: what cannot work in such a run.
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

    def before_update(self, pruner: PrunerView) -> None:
        """Before groups are updated: what it looks up to rank by, such as the optimiser's state.

        Args:
            pruner: the ``Pruner``, after the optimiser's step.
        """
        return

    def means_to_take_in(self, pruner: PrunerView, given: Collection[nn.Parameter]) -> Mapping[nn.Parameter, Tensor]:
        """Before gradients are clipped on a GPU: means of their squares that are to take them in, clipped and masked.

        Args:
            pruner: the ``Pruner``, before the optimiser's step.
            given: the parameters whose gradients are clipped: fp32, contiguous, on one device.

        Returns:
            Parameter -> mean, like its gradient, which keeps ``mean_squares.DECAY`` of itself; none by default. They do
            take them in, unless the norm is infinite or NaN.
        """
        return {}

    @abstractmethod
    def update(self, itr: int, group: Group) -> None:
        """Set the group's masks and ``epsilon``; called only where ``is_update`` says so.

        Args:
            itr: optimiser steps done so far.
            group: one of ``groups``: ``group.prune_to`` and ``group.ranking`` set its masks.
        """

    def importance(self, piece: Piece) -> Tensor:
        """What ranks the weights of a piece, at least 0, [G, R, C]: their magnitude."""
        return magnitude(piece)

    def ranked_by(self) -> Callable[[Piece], Tensor]:
        """``importance``, or ``magnitude`` itself where a method ranks by that, which a GPU does in fewer launches."""
        return magnitude if type(self).importance is PruningMethod.importance else self.importance

    def after_masks(self, pruner: PrunerView) -> None:
        """After every optimiser step and masking: what else it does to weights.

        Args:
            pruner: the ``Pruner``. Pruned weights have to stay zero.
        """
        return

    def wanted(self, group: Group) -> int | None:
        """How many weights of the group have to end up pruned; None where the number is a result, not a goal."""
        return group.target

    def expected(self, itr: int, group: Group) -> float | None:
        """The forecast: the group's sparsity after iteration ``itr``, 0 to 1; None if only training can tell."""
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
    """Options of every method that chooses weights. A subclass says which of them share a threshold.

    Example:
        >>> import torch
        >>> class HalfOfEach(Structured):
        ...     "Prunes half of each matrix in the fifth step."
        ...     def groups(self, model):
        ...         return self._groups(model, "matrix", 0.5)
        ...     def prepare(self, run, groups, reference):
        ...         self.updates, self.dense_until, self.done_from = [5], 4, 5
        ...     def update(self, itr, group):
        ...         group.prune_to(group.target)
        >>> [f"{group.name}: {group.target}" for group in HalfOfEach().groups(torch.nn.GRU(4, 8))]
        ['weight_ih_l0: 48', 'weight_hh_l0: 96']

    Attributes:
        layer_types: which weights are pruned.
        structure: what is kept or zeroed as a whole: ``element``, ``16x1``, ``4x4``, ``2:4``.
        score: what stands for a block.
        keep_diagonal: the diagonal of recurrent matrices stays; in blocks, the blocks it runs through.
        scope: settings of their own for weights by pattern; see ``scope.build_groups``.
        zero_state: whether the optimiser's state of a pruned weight is zeroed too.

    Raises:
        UserError: a number is out of bounds, or ``structure`` is none.
    """

    layer_types: LayerTypes = field(default_factory=lambda: list(DEFAULT_LAYER_TYPES))
    structure: str = "element"
    score: Score = "max"
    keep_diagonal: bool = False
    scope: Scope | None = None
    zero_state: bool = True

    def __post_init__(self) -> None:
        check_ranges(self)
        # Given in code as a tuple, or by OmegaConf, they are the same settings, also in a checkpoint.
        self.layer_types, self.scope = plain_containers(self.layer_types), plain_containers(self.scope)
        Structure.parse(self.structure)

    def _groups(self, model: nn.Module, share: Sharing, sparsity: float) -> list[Group]:
        """What ``groups`` of a subclass returns, with these options."""
        settings = GroupSettings(sparsity, Structure.parse(self.structure), self.score, self.keep_diagonal)
        return build_groups(model, self.layer_types, self.scope, share, settings)


@dataclass(kw_only=True)
class Shared(Structured):
    """Options of methods under a threshold that weights share; most methods derive from it.

    Example:
        >>> import torch
        >>> from srnn.pruning import Pruner, Shared
        >>> class EveryTenth(Shared):
        ...     "Prunes in equal parts, every tenth step."
        ...     def prepare(self, run, groups, reference):
        ...         self.updates = range(10, run.total_steps, 10)
        ...         self.dense_until, self.done_from = 9, self.updates[-1]
        ...     def update(self, itr, group):
        ...         group.prune_to(group.target * itr // self.done_from)
        >>> pruner = Pruner(torch.nn.GRU(4, 8), EveryTenth(sparsity=0.6), 40)
        >>> for _ in range(40):
        ...     if pruner.step():
        ...         print(f"{pruner.itr}: {pruner.sparsity:.1f}")
        10: 0.2
        20: 0.4
        30: 0.6

    Attributes:
        sparsity: the share of zeros asked for, between 0 and 1.
        share: which weights share a threshold: those of a layer type (the paper), of a matrix, or all.
    """

    sparsity: PositiveShare = 0.9
    share: Sharing = "layer_type"

    def groups(self, model: nn.Module) -> list[Group]:
        """The model's weights, in groups that share a threshold."""
        return self._groups(model, self.share, self.sparsity)
