"""The pruning methods, a file each."""

from srnn.pruning.methods.base import PrunerView, PruningMethod, Shared, Structured
from srnn.pruning.methods.block import Block
from srnn.pruning.methods.cubic import Cubic
from srnn.pruning.methods.fixed import Fixed
from srnn.pruning.methods.gradual import Gradual
from srnn.pruning.methods.hard import Hard
from srnn.pruning.methods.none import NoPruning
from srnn.pruning.methods.obd import OBD
from srnn.pruning.methods.random import Random
from srnn.pruning.methods.rigl import RigL

__all__ = ["OBD", "Block", "Cubic", "Fixed", "Gradual", "Hard", "NoPruning", "PrunerView", "PruningMethod", "Random",
           "RigL", "Shared", "Structured"]  # fmt: skip
