"""Sparse recurrent networks: pruned while they train, packed small, measured.

The names below are the public interface; everything else may change without notice. They are imported
on first use, so that ``import srnn`` stays light and ``srnn.load`` needs no training stack.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from srnn.importing import nothing_collected

__version__ = "0.1.0"

if TYPE_CHECKING:
    from srnn.errors import UserError as UserError
    from srnn.exporting.exporter import export as export
    from srnn.inference.packed_file import load as load
    from srnn.inference.saving import save as save
    from srnn.inference.sparsify import desparsify as desparsify
    from srnn.inference.sparsify import sparsify as sparsify
    from srnn.pruning.callback import PruningCallback as PruningCallback
    from srnn.pruning.once import prune as prune
    from srnn.pruning.pruner import Pruner as Pruner
    from srnn.registry import register as register

_HOME = {
    "Pruner": "srnn.pruning.pruner",
    "PruningCallback": "srnn.pruning.callback",
    "UserError": "srnn.errors",
    "desparsify": "srnn.inference.sparsify",
    "export": "srnn.exporting.exporter",
    "load": "srnn.inference.packed_file",
    "prune": "srnn.pruning.once",
    "register": "srnn.registry",
    "save": "srnn.inference.saving",
    "sparsify": "srnn.inference.sparsify",
}
__all__ = [
    "Pruner",
    "PruningCallback",
    "UserError",
    "__version__",
    "desparsify",
    "export",
    "load",
    "prune",
    "register",
    "save",
    "sparsify",
]

# Exported programs name an operator of srnn, which ``torch.export.load`` must find: that alone is cheap.
if "torch" in sys.modules:
    importlib.import_module("srnn.inference.operator")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        with nothing_collected():
            return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'srnn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
