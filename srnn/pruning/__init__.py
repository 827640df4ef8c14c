"""Pruning while training. Knows torch; only ``callback`` knows Lightning."""

from srnn.pruning.groups import Group, prunable
from srnn.pruning.methods import Fixed, Gradual, Hard, NoPruning, PruningMethod
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength

__all__ = ["Fixed", "Gradual", "Group", "Hard", "NoPruning", "Pruner", "PruningMethod", "RunLength", "prunable"]
