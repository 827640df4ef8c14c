"""Pruning while training. Knows torch; only ``callback`` knows Lightning."""

from srnn.formats import Structure
from srnn.pruning.groups import Group
from srnn.pruning.methods import (
    OBD,
    Block,
    Cubic,
    Fixed,
    Gradual,
    Hard,
    NoPruning,
    PrunerView,
    PruningMethod,
    Random,
    RigL,
    Shared,
    Structured,
)
from srnn.pruning.once import PruneReport, prune
from srnn.pruning.pruner import Pruner
from srnn.pruning.report_rows import ReportRow
from srnn.pruning.report_rows import ReportRow as Row  # as it was called before
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import prunable

__all__ = ["OBD", "Block", "Cubic", "Fixed", "Gradual", "Group", "Hard", "NoPruning", "PruneReport", "Pruner",
           "PrunerView", "PruningMethod", "Random", "ReportRow", "RigL", "Row", "RunLength", "Shared", "Structure",
           "Structured", "prunable", "prune"]  # fmt: skip
