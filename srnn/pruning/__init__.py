"""Pruning while training. Knows torch; only ``callback`` knows Lightning."""

from srnn.formats import Structure
from srnn.pruning.groups import Group
from srnn.pruning.methods import (
    Block,
    Cubic,
    Fixed,
    Gradual,
    Hard,
    NoPruning,
    PruningMethod,
    Random,
    RigL,
    Shared,
    Structured,
)
from srnn.pruning.pruner import Pruner, Row
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import prunable

__all__ = ["Block", "Cubic", "Fixed", "Gradual", "Group", "Hard", "NoPruning", "Pruner", "PruningMethod", "Random",
           "RigL", "Row", "RunLength", "Shared", "Structure", "Structured", "prunable"]  # fmt: skip
