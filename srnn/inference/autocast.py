"""Sparse modules under ``torch.autocast``: what they are given is cast, and what they compute is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_NARROW = (torch.float16, torch.bfloat16)


def is_autocast(input: Any) -> bool:
    """Whether autocast is on where an input is."""
    tensor = input.data if isinstance(input, PackedSequence) else input
    return isinstance(tensor, Tensor) and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(call: Callable[..., Any], input: Any, *others: Any) -> Any:
    """The call outside autocast, of inputs of one type: of fp32 on a CPU, else of that of the first one.

    As ``torch.amp.custom_fwd(cast_inputs=...)`` does for operators that want a type of their own.

    Args:
        call: what to call.
        input: a tensor or ``PackedSequence``.
        others: states, or None.
    """
    tensor = input.data if isinstance(input, PackedSequence) else input
    kind = torch.float32 if tensor.is_cpu else tensor.dtype
    with torch.autocast(tensor.device.type, enabled=False):
        return call(*(_cast(one, kind) for one in (input, *others)))


def _cast(value: Any, kind: torch.dtype) -> Any:
    if isinstance(value, PackedSequence):
        return value.to(kind) if value.data.dtype in _NARROW else value
    if isinstance(value, tuple | list):
        return tuple(_cast(part, kind) for part in value)
    wide = isinstance(value, Tensor) and value.dtype == torch.float32 and kind in _NARROW
    return value.to(kind) if isinstance(value, Tensor) and (wide or value.dtype in _NARROW) else value
