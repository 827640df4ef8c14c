"""Example plug-in: a network, as ``model=skip_gru``.

GRU layers with a connection around each (their outputs are added to their inputs), which keeps deep stacks trainable.
A network is any ``nn.Module`` called as ``outputs, state = model(inputs, state)``; made of torch's own layers it is
pruned, packed and run on sparse kernels like srnn's. ``vocabulary_size`` is supplied by the data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srnn.registry import register
from srnn.registry.option_types import Count


@register.model("skip_gru")
class SkipGRU(nn.Module):
    """Language model of GRU layers with a connection around each."""

    def __init__(self, hidden_size: Count = 128, num_layers: Count = 4, *, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden_size)
        self.layers = nn.ModuleList(nn.GRU(hidden_size, hidden_size, batch_first=True) for _ in range(num_layers))
        self.decoder = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens_BT: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits_BTV, and the state of all layers, ``[num_layers, B, H]``."""
        x_BTH = self.embedding(tokens_BT)
        states = []
        for index, layer in enumerate(self.layers):
            y_BTH, h_1BH = layer(x_BTH, None if state is None else state[index : index + 1])
            x_BTH = x_BTH + y_BTH
            states.append(h_1BH)
        return self.decoder(x_BTH), torch.cat(states)
