"""Recurrent language models on torch's own modules and parameter names.

Shapes: B batch, T time, V vocabulary, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from srnn.registry import Range, register

Count = Annotated[int, Range(ge=1, le=1_000_000)]
Share = Annotated[float, Range(ge=0, lt=1)]

State = Tensor | tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, linear decoder: the distribution of the next token.

    Args:
        cell: ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``.
        vocabulary_size: V.
        embedding_size: width of a token's vector.
        hidden_size: H.
        num_layers: recurrent layers.
        dropout: on the input of each layer and of the decoder.
        cell_options: more arguments for ``cell``.
    """

    def __init__(
        self,
        cell: Callable[..., nn.RNNBase],
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        between = dropout if num_layers > 1 else 0.0
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.rnn = cell(
            embedding_size,
            hidden_size,
            num_layers=num_layers,
            dropout=between,
            batch_first=True,
            **cell_options,
        )
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits for the token after each one, and the state to go on from.

        Args:
            tokens_BT: token numbers.
            state: what the previous call returned; None starts from zero.

        Returns:
            logits_BTV and the state, as ``nn.GRU`` and its kind give it.
        """
        x_BTE = self.dropout(self.embedding(tokens_BT))
        y_BTH, state = self.rnn(x_BTE, state)
        return self.decoder(self.dropout(y_BTH)), state

    def step(self, tokens_B: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token of each stream.

        Args:
            tokens_B: token numbers.
            state: what the previous call returned; None starts from zero.

        Returns:
            logits_BV for the token after it, and the state to go on from.
        """
        x_BE = self.dropout(self.embedding(tokens_B))
        if isinstance(self.rnn, nn.RNNBase):
            y_BTH, state = self.rnn(x_BE[:, None], state)
            y_BH = y_BTH[:, 0]
        else:  # on sparse kernels
            y_BH, state = self.rnn.step(x_BE, state)
        return self.decoder(self.dropout(y_BH)), state

    def generate(
        self,
        prompt: Sequence[int],
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield ``length`` tokens that go on from ``prompt``; see ``srnn.deploy.generate``."""
        from srnn.deploy.generate import generate

        return generate(self, prompt, length, temperature, top_k, seed)


def detach(state: State | None) -> State | None:
    """The state without its history: truncated back-propagation through time ends here."""
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else state.detach()
    return state[0].detach(), state[1].detach()


@register.model("rnn")
def rnn(
    hidden_size: Count = 256,
    embedding_size: Count = 64,
    num_layers: Count = 1,
    dropout: Share = 0.0,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    *,
    vocabulary_size: int,
) -> LanguageModel:
    """Vanilla recurrent language model (``nn.RNN``)."""
    return LanguageModel(
        nn.RNN, vocabulary_size, embedding_size, hidden_size, num_layers, dropout, nonlinearity=nonlinearity
    )


@register.model("gru")
def gru(
    hidden_size: Count = 256,
    embedding_size: Count = 64,
    num_layers: Count = 1,
    dropout: Share = 0.0,
    *,
    vocabulary_size: int,
) -> LanguageModel:
    """Gated recurrent unit language model (``nn.GRU``)."""
    return LanguageModel(nn.GRU, vocabulary_size, embedding_size, hidden_size, num_layers, dropout)


@register.model("lstm")
def lstm(
    hidden_size: Count = 256,
    embedding_size: Count = 64,
    num_layers: Count = 1,
    dropout: Share = 0.0,
    *,
    vocabulary_size: int,
) -> LanguageModel:
    """Long short-term memory language model (``nn.LSTM``)."""
    return LanguageModel(nn.LSTM, vocabulary_size, embedding_size, hidden_size, num_layers, dropout)
