"""Whether several pruners mask the same weights in turn, which no one means: each undoes what the other one counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from srnn.pruning.parts import some_of

_last: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> whose it was when it was last looked at


class OtherPruners:
    """The others of one pruner. One that goes on where another has ended is none."""

    def __init__(self) -> None:
        self.mine: set[str] = set()
        self.told = False

    def __getstate__(self) -> dict[str, Any]:
        return {"mine": set(), "told": False}  # a copy has parameters of its own, which nobody has masked yet

    def look(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Warn once of weights that another pruner has masked since the last look."""
        both = [name for name, p in parameters.items() if name in self.mine and _last.get(p) is not self]
        if both and not self.told:
            self.told = True
            warnings.warn(
                f"another Pruner or callback masks {some_of(both)}, too: together they zero more weights than either "
                f"was asked for. Use one, with a scope for each part.",
                stacklevel=4,  # of ``Pruner.step``, and torch's decorator is between
            )
        for name, parameter in parameters.items():
            _last[parameter] = self
            self.mine.add(name)
