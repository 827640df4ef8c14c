"""Old import paths, which warn of where their names are now; they go in a later minor release."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(old: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds names in their new modules.

    Args:
        old: the module that had the names.
        homes: name -> the module that has it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{old}' has no attribute '{name}'")
        warnings.warn(f"{old}.{name} is now {homes[name]}.{name}", FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(homes[name]), name)

    return find
