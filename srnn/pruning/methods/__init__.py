"""The pruning methods, a file each."""

from srnn.pruning.methods.base import ForecastRow, PruningMethod
from srnn.pruning.methods.fixed import Fixed
from srnn.pruning.methods.gradual import Gradual
from srnn.pruning.methods.hard import Hard
from srnn.pruning.methods.none import NoPruning

__all__ = ["Fixed", "ForecastRow", "Gradual", "Hard", "NoPruning", "PruningMethod"]
