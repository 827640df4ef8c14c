"""Steps of one stream that is given without a dimension for streams, as torch's modules take sequences.

Shapes: B streams, H hidden units, L layers times directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def one_stream(step: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Any, state: Any, dimensions: int) -> Any:
    """One step of one stream: outputs and the next state without a dimension for streams.

    Args:
        step: of B streams.
        x: the input of one.
        state: [L, H], of an LSTM two of them; None starts from zero.
        dimensions: of the input of B streams.

    Raises:
        TypeError: the input is no tensor.
        ValueError: it has not one dimension less than that of B streams.
        RuntimeError: the state has a dimension for streams.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"a step takes a tensor, not {type(x).__name__}: torch.tensor([...]), an entry a stream")
    if x.dim() != dimensions - 1:
        raise ValueError(
            f"a step takes an input of {dimensions} dimensions, or of {dimensions - 1} for one stream, not of shape "
            f"{tuple(x.shape)}; whole sequences are for the call itself"
        )
    y, after = step(x[None], with_a_stream(state))
    return y[0], tuple(part[:, 0] for part in after) if isinstance(after, tuple) else after[:, 0]


def with_a_stream(state: Any) -> Any:
    """The state [L, 1, H] of [L, H]; None of None. Raises RuntimeError where there is a dimension for streams."""
    if state is None:
        return None
    parts = tuple(state) if isinstance(state, tuple | list) else (state,)
    for part in parts:
        if part.dim() != 2:
            raise RuntimeError(
                f"for an input without a dimension for streams the state must have 2 dimensions, too, not shape "
                f"{tuple(part.shape)}"
            )
    wide = tuple(part[:, None] for part in parts)
    return wide if isinstance(state, tuple | list) else wide[0]
