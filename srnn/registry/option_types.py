"""The types of options that components of several kinds have, so that their bounds are written once.

An upper bound that nobody needs is there against slips: a hidden size of 10**12 is refused before memory runs out.
"""

from __future__ import annotations

from typing import Annotated

from srnn.registry.schema import Range

Count = Annotated[int, Range(ge=1, le=1_000_000)]  # of units, sequences, tokens
Layers = Annotated[int, Range(ge=1, le=1_000)]
Share = Annotated[float, Range(ge=0, lt=1)]  # part of a whole that is never all of it: dropout, momentum, sparsity
PositiveShare = Annotated[float, Range(gt=0, lt=1)]
Positive = Annotated[float, Range(gt=0, le=1e6)]
NonNegative = Annotated[float, Range(ge=0, le=1e6)]
