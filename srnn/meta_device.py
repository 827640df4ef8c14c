"""Building modules whose weights are replaced at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NothingInPlace(TorchFunctionMode):
    """Skips initialisers. On the meta device they do nothing, but some import torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside take no memory and no time for their weights: load them with ``assign=True``."""
    with torch.device("meta"), _NothingInPlace():
        yield
