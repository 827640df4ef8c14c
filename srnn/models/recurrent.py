"""Recurrent networks on torch's own modules and parameter names: language models, and readers of sequences.

``model=gru`` is one or the other, as the data wants it: for tokens a ``LanguageModel``, for sequences of numbers a
``SequenceModel``.

Shapes: B batch, T time, V vocabulary, E width of a token's vector, I inputs, O outputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.models.generating import generate
from srnn.models.stepping import one_stream
from srnn.registry import register
from srnn.registry.option_types import Count, Layers, Positive, Share

TorchState = Tensor | tuple[Tensor, Tensor]  # h_LBH; of an LSTM (h_LBH, c_LBH); L is layers times directions


def _layers(
    cell: Callable[..., nn.RNNBase], input_size: int, hidden_size: int, num_layers: int, dropout: float, **options: Any
) -> nn.RNNBase:
    between = dropout if num_layers > 1 else 0.0  # torch warns of dropout between layers where there is one only
    return cell(input_size, hidden_size, num_layers=num_layers, dropout=between, batch_first=True, **options)


def _step(rnn: Any, x_BI: Tensor, state: TorchState | None) -> tuple[Tensor, TorchState]:
    """One step of torch's layers, or of the same ones on sparse kernels."""
    if not isinstance(rnn, nn.RNNBase):
        stepped: tuple[Tensor, TorchState] = rnn.step(x_BI, state)
        return stepped
    y_BTH, state = rnn(x_BI[:, None], state)
    return y_BTH[:, 0], state


def _step_of(
    network: Any,
    plain: Callable[[Tensor, TorchState | None], Any],
    x: Tensor,
    state: TorchState | None,
    dimensions: int,
) -> tuple[Tensor, TorchState]:
    """A step of a whole network. Sparse layers run it in one piece: from a graph on a GPU, in one call on a CPU."""
    if not isinstance(x, Tensor) or x.dim() != dimensions:
        alone: tuple[Tensor, TorchState] = one_stream(network.step, x, state, dimensions)
        return alone
    parts = network._modules  # attributes of a module cost a microsecond
    rnn: Any = parts["rnn"]
    done: tuple[Tensor, TorchState] | None = None
    if not isinstance(rnn, nn.RNNBase):
        if x.is_cuda:
            done = rnn.step_of(network, plain, x, state)
        elif state is not None and not network.training and hasattr(rnn, "step_of_network"):
            done = rnn.step_of_network(parts.get("embedding"), parts["decoder"], x, state)
    if done is None:
        done = plain(x, state)
    return done


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, linear decoder: the distribution of the next token.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = LanguageModel(nn.GRU, vocabulary_size=50, embedding_size=8, hidden_size=16)
        >>> logits_BTV, state = model(torch.zeros(2, 5, dtype=torch.long))
        >>> logits_BTV.shape, state.shape
        (torch.Size([2, 5, 50]), torch.Size([1, 2, 16]))
        >>> len(list(model.generate([1, 2, 3], length=4)))
        4

    Args:
        cell: ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``.
        vocabulary_size: V.
        embedding_size: E.
        hidden_size: H.
        num_layers: recurrent layers.
        dropout: share of each layer's outputs dropped in training, 0 to below 1.
        embedding_dropout: the same of the vectors of tokens.
        tie_embeddings: the decoder's weight is the embedding's; then E must be H.
        cell_options: more arguments for ``cell``.

    Raises:
        UserError: bidirectional layers, which would see the token they predict; tied weights of different sizes.
    """

    def __init__(
        self,
        cell: Callable[..., nn.RNNBase],
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        tie_embeddings: bool = False,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        if cell_options.get("bidirectional"):
            raise UserError(
                "model.bidirectional=true: a language model must not see the token it predicts; bidirectional layers "
                "are for sequences that are read whole, such as dataset=digits."
            )
        if tie_embeddings and embedding_size != hidden_size:
            raise UserError(
                f"model.tie_embeddings=true needs model.embedding_size={embedding_size} to be "
                f"model.hidden_size={hidden_size}: one matrix serves both."
            )
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.rnn = _layers(cell, embedding_size, hidden_size, num_layers, dropout, **cell_options)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden_size, vocabulary_size)
        if tie_embeddings:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, state: TorchState | None = None) -> tuple[Tensor, TorchState]:
        """Logits for the token after each one, and the state to continue from.

        Args:
            tokens_BT: token numbers, int64.
            state: what the previous call returned; None starts from zero.

        Returns:
            logits_BTV and the state, as ``nn.GRU`` and its kind give it.
        """
        x_BTE = self.embedding_dropout(self.embedding(tokens_BT))
        y_BTH, state = self.rnn(x_BTE, state)
        return self.decoder(self.dropout(y_BTH)), state

    def step(self, tokens_B: Tensor, state: TorchState | None = None) -> tuple[Tensor, TorchState]:
        """One token of each stream.

        Args:
            tokens_B: token numbers, int64; of one stream also a tensor without dimensions.
            state: what the previous call returned; None starts from zero.

        Returns:
            logits_BV for the token after it, and the state to continue from; of a tensor without dimensions logits_V
            and a state without one for streams.

        Raises:
            TypeError: no tensor is given.
            ValueError: it has more dimensions: whole sequences are for the call itself.
        """
        return _step_of(self, self._plain_step, tokens_B, state, 1)

    def _plain_step(self, tokens_B: Tensor, state: TorchState | None) -> tuple[Tensor, TorchState]:
        x_BE = self.embedding(tokens_B)
        x_BE = self.embedding_dropout(x_BE) if self.training else x_BE  # a call that does nothing costs 4 us
        y_BH, state = _step(self.rnn, x_BE, state)
        return self.decoder(self.dropout(y_BH) if self.training else y_BH), state

    def generate(
        self,
        prompt: Sequence[int],
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield ``length`` tokens that continue the tokens of ``prompt``; see ``srnn.models.generating.generate``."""
        return generate(self, prompt, length, temperature, top_k, seed)


class SequenceModel(nn.Module):
    """Recurrent layers and a linear decoder of their last state: a class or a number for each sequence.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = SequenceModel(nn.LSTM, input_size=8, output_size=10, hidden_size=16, bidirectional=True)
        >>> outputs_BO, state = model(torch.randn(2, 5, 8))
        >>> outputs_BO.shape
        torch.Size([2, 10])

    Args:
        cell: ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``.
        input_size: I.
        output_size: O: classes, or numbers to predict.
        hidden_size: H.
        num_layers: recurrent layers.
        dropout: share of each layer's outputs dropped in training, 0 to below 1.
        cell_options: more arguments for ``cell``.
    """

    def __init__(
        self,
        cell: Callable[..., nn.RNNBase],
        input_size: int,
        output_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        self.directions = 2 if cell_options.get("bidirectional") else 1
        self.rnn = _layers(cell, input_size, hidden_size, num_layers, dropout, **cell_options)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(self.directions * hidden_size, output_size)

    def forward(self, x_BTI: Tensor, state: TorchState | None = None) -> tuple[Tensor, TorchState]:
        """Read whole sequences.

        Args:
            x_BTI: the sequences, which are of equal length.
            state: what they start from; None starts from zero.

        Returns:
            outputs_BO, and the layers' final state.
        """
        _, state = self.rnn(x_BTI, state)
        h_LBH = state[0] if isinstance(state, tuple) else state
        # The last layer's: of both directions, each of which has read the whole sequence.
        last_BH = h_LBH[-self.directions :].transpose(0, 1).flatten(1)
        return self.decoder(self.dropout(last_BH)), state

    def step(self, x_BI: Tensor, state: TorchState | None = None) -> tuple[Tensor, TorchState]:
        """One step of each stream: outputs_BO as if the sequence ended here, and the state to continue from.

        Of x_I, one stream without a dimension for it, outputs_O and a state without one.

        Raises:
            ValueError: the input has another number of dimensions.
            RuntimeError: the layers are bidirectional: they have to see the end first.
        """
        if self.directions > 1:
            raise RuntimeError("bidirectional layers cannot step: they read a sequence from its end too")
        return _step_of(self, self._plain_step, x_BI, state, 2)

    def _plain_step(self, x_BI: Tensor, state: TorchState | None) -> tuple[Tensor, TorchState]:
        y_BH, state = _step(self.rnn, x_BI, state)
        return self.decoder(self.dropout(y_BH) if self.training else y_BH), state


def detach(state: TorchState | None) -> TorchState | None:
    """The state without its history: truncated back-propagation through time ends here."""
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else state.detach()
    return tuple(part.detach() for part in state)  # type: ignore[return-value]  # of torch's own modules two


def recurrent(
    cell: Callable[..., nn.RNNBase],
    sizes: dict[str, int],
    embedding_size: int,
    embedding_dropout: float,
    tie_embeddings: bool,
    init_range: float | None,
    **options: Any,
) -> LanguageModel | SequenceModel:
    """The network that fits the data: what ``model=rnn``, ``gru`` and ``lstm`` build, with these options.

    Args:
        cell: ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``.
        sizes: what the data set gives: ``vocabulary_size``, or ``input_size`` and ``output_size``.
        embedding_size: width of a token's vector; data without tokens have none.
        embedding_dropout: share of the tokens' vectors dropped in training.
        tie_embeddings: the decoder's weight is the embedding's; ``embedding_size`` must be ``hidden_size``.
        init_range: weights start uniform in [-init_range, init_range]; None leaves torch's own.
        options: ``hidden_size``, ``num_layers``, ``bidirectional``, ``dropout`` and what else ``cell`` takes.

    Raises:
        UserError: options that do not fit the data, or each other.
    """
    model: LanguageModel | SequenceModel
    if "vocabulary_size" in sizes:
        options |= {"embedding_dropout": embedding_dropout, "tie_embeddings": tie_embeddings}
        model = LanguageModel(cell, sizes["vocabulary_size"], embedding_size, **options)
    elif tie_embeddings or embedding_dropout:
        given = "tie_embeddings=true" if tie_embeddings else f"embedding_dropout={embedding_dropout}"
        raise UserError(f"model.{given} is for language models: these data have no tokens and so no embedding.")
    else:
        model = SequenceModel(cell, sizes["input_size"], sizes["output_size"], **options)
    if init_range is not None:  # biases too
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)
    return model


@register.model("rnn")
def rnn(
    hidden_size: Count = 256,
    embedding_size: Count = 64,
    num_layers: Layers = 1,
    bidirectional: bool = False,
    dropout: Share = 0.0,
    embedding_dropout: Share = 0.0,
    tie_embeddings: bool = False,
    init_range: Positive | None = None,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    **sizes: int,
) -> LanguageModel | SequenceModel:
    """Vanilla recurrent network (``nn.RNN``).

    Its options are explained at ``recurrent``; those of sizes are supplied by the data.
    """
    return recurrent(
        nn.RNN, sizes, embedding_size, embedding_dropout, tie_embeddings, init_range, hidden_size=hidden_size,
        num_layers=num_layers, bidirectional=bidirectional, dropout=dropout, nonlinearity=nonlinearity,
    )  # fmt: skip


def _gated(name: str, cell: type[nn.RNNBase], about: str) -> Callable[..., LanguageModel | SequenceModel]:
    """Registers a network of gated cells; its options are those of ``rnn`` but for the nonlinearity."""

    def build(
        hidden_size: Count = 256,
        embedding_size: Count = 64,
        num_layers: Layers = 1,
        bidirectional: bool = False,
        dropout: Share = 0.0,
        embedding_dropout: Share = 0.0,
        tie_embeddings: bool = False,
        init_range: Positive | None = None,
        **sizes: int,
    ) -> LanguageModel | SequenceModel:
        return recurrent(
            cell, sizes, embedding_size, embedding_dropout, tie_embeddings, init_range, hidden_size=hidden_size,
            num_layers=num_layers, bidirectional=bidirectional, dropout=dropout,
        )  # fmt: skip

    build.__doc__, build.__name__, build.__qualname__ = about, name, name
    return register.model(name)(build)


gru = _gated("gru", nn.GRU, "Network of gated recurrent units (``nn.GRU``).")
lstm = _gated("lstm", nn.LSTM, "Network of long short-term memory (``nn.LSTM``).")
