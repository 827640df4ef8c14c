"""Writing text with a language model, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from srnn.errors import UserError


def generate(
    model: Any,
    prompt: Sequence[int],
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield ``length`` tokens that continue ``prompt``.

    Args:
        model: a language model, with ``step``.
        prompt: token numbers, at least one.
        length: tokens to write.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample among so many likeliest tokens; None takes all.
        seed: of the sampling, which has a generator of its own: the same seed writes the same text.

    Raises:
        UserError: the prompt is text, or holds no token.
    """
    if isinstance(prompt, str) or not len(prompt):
        raise UserError(
            f"the prompt is {'text' if len(prompt) else 'empty'}: give token numbers, at least one. Of a text, "
            "model.vocabulary.encode(text) gives them; model.vocabulary.decode(tokens) reads what is written."
        )
    random = torch.Generator().manual_seed(seed)
    logits_V, state = None, None
    for _ in range(length):
        # Not around the loop: whoever takes the tokens would be in inference mode between two of them.
        with torch.inference_mode():
            if logits_V is None:
                logits_BTV, state = model(torch.tensor([list(prompt)]))
                logits_V = logits_BTV[0, -1]
            token = _sample(logits_V.float(), temperature, top_k, random)
            logits_BV, state = model.step(torch.tensor([token]), state)
            logits_V = logits_BV[0]
        yield token


def _sample(logits_V: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < logits_V.numel():
        smallest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    scaled_V = logits_V / temperature
    if not scaled_V.max().isfinite():  # so near to 0 that it is 0 in single precision
        return int(logits_V.argmax())
    return int(torch.multinomial(scaled_V.softmax(0), 1, generator=random))
