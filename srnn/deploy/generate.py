"""Writing text with a language model, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield ``length`` tokens that go on from ``prompt``.

    Args:
        model: ``logits_BTV, state = model(tokens_BT, state)``.
        prompt: at least one token.
        length: tokens to write.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample among so many likeliest tokens; None takes all.
        seed: of the sampling.
    """
    random = torch.Generator().manual_seed(seed)
    tokens_BT, state = torch.tensor([list(prompt)]), None
    for _ in range(length):
        logits_BTV, state = model(tokens_BT, state)
        token = _sample(logits_BTV[0, -1].float(), temperature, top_k, random)
        yield token
        tokens_BT = torch.tensor([[token]])


def _sample(logits_V: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < logits_V.numel():
        smallest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=random))
