"""What every pruning method provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from srnn.pruning.groups import Group, LayerType
from srnn.pruning.schedules import RunLength
from srnn.registry import Range

LayerTypes = list[LayerType]
Sparsity = Annotated[float, Range(gt=0, lt=1)]


@dataclass(frozen=True)
class ForecastRow:
    """What a schedule will do at one iteration, told before training."""

    event: str
    itr: int
    epsilon_over_q: float | None
    sparsity: float


class PruningMethod(ABC):
    """One way to prune. ``prepare`` tells it how long the run is; then it updates groups when asked.

    A subclass registered as ``@register.pruning("name")`` is ``pruning=name``; its arguments are its options.

    Attributes:
        layer_types: which weights it prunes, of ``recurrent``, ``linear`` and ``embedding``.
        dense_until: the iteration up to which nothing is masked (the paper's start_itr); set by ``prepare``.
        done_from: the iteration from which masks stay as they are (end_itr); set by ``prepare``.
        soft: whether pruned weights may come back before ``done_from``.
    """

    layer_types: Sequence[str]
    dense_until: int
    done_from: int
    soft: bool = False

    @abstractmethod
    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the schedule for a run of this length, and refuse what cannot work.

        Args:
            run: the length of the run.
            groups: what will be pruned.
            reference: weights of a trained dense model, when ``reference_path`` names one.
        """

    @property
    def reference_path(self) -> str | None:
        """A file with a trained dense model that the method wants to see, if any."""
        return None

    @abstractmethod
    def is_update(self, itr: int) -> bool:
        """Whether masks are updated after iteration ``itr``."""

    @abstractmethod
    def update(self, itr: int, group: Group) -> None:
        """Set the group's ``epsilon`` and masks; called only where ``is_update`` says so."""

    @abstractmethod
    def wanted(self, group: Group) -> int | None:
        """How many weights of the group have to end up pruned; None where the number results."""

    def forecast(self) -> list[ForecastRow]:
        """The schedule in a few rows."""
        return []
