"""Deep Speech 2 (Amodei et al. 2015), the network that the paper prunes: speech -> characters, for CTC.

Shapes: B batch, T frames or steps, I bands, C channels, F bands after a convolution, H hidden units, G gates * H,
V characters.

Frames of NaN pad an utterance. Two convolutions over bands and frames halve the bands twice and the frames once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srnn.audio import Features
from srnn.cells import CLIP, GATES, Cell
from srnn.errors import UserError
from srnn.models.recurring import Recurring, RecurringState
from srnn.models.transcribing import Transcriber
from srnn.registry import Range, register
from srnn.registry.option_types import Count
from srnn.vocabulary import Vocabulary

_TAPS = 11  # frames of a convolution's filters
_BANDS = (41, 21)  # and bands
_CELLS: dict[str, Cell] = {"rnn": "clipped_relu", "gru": "gru", "lstm": "lstm"}


def _clipped(x: Tensor) -> Tensor:
    return x.clamp(0, CLIP)


def _steps_within(lengths_B: Tensor, steps: int) -> Tensor:
    """bool [B, T, 1]: whether a step is of its utterance and no padding."""
    return (torch.arange(steps, device=lengths_B.device) < lengths_B[:, None])[:, :, None]


class StepNorm(nn.Module):
    """Batch norm over the steps of all utterances of a batch, padding left out (the paper's sequence-wise norm).

    Args:
        features: numbers of a step, each with its own mean, variance, scale and shift.
    """

    MOMENTUM, EPSILON = 0.1, 1e-5
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x_BTH: Tensor, real_BT1: Tensor) -> Tensor:
        """Normalise, in fp32.

        Args:
            x_BTH: steps.
            real_BT1: which of them count.
        """
        x_BTH = x_BTH.float() if x_BTH.dtype in (torch.float16, torch.bfloat16) else x_BTH
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = real_BT1.sum().clamp(min=1)
            mean = (x_BTH * real_BT1).sum((0, 1)) / count
            var = ((x_BTH - mean).square() * real_BT1).sum((0, 1)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.MOMENTUM)
                self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.MOMENTUM)
        scale, shift = self._scale_and_shift(mean, var)
        return x_BTH * scale + shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What each number is multiplied by, and what is added, outside training."""
        return self._scale_and_shift(self.running_mean, self.running_var)

    def _scale_and_shift(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(var + self.EPSILON)
        return scale, self.bias - mean * scale


class BandConvolution(nn.Module):
    """Convolution over bands and frames, norm, clipped ReLU.

    Attributes:
        before, after: frames of padding at an utterance's beginning and end.
        out_size: C times F.

    Args:
        inputs: channels of the input.
        channels: C.
        bands: of the input; F is half of them, rounded up.
        size: filters have so many bands, and 11 frames.
        stride: frames between two outputs.
        future: frames that an output sees ahead.
    """

    def __init__(self, inputs: int, channels: int, bands: int, size: int, stride: int, future: int) -> None:
        super().__init__()
        self.inputs, self.bands, self.stride = inputs, bands, stride
        self.before, self.after = _TAPS - 1 - future, future
        self.out_bands = (bands + 1) // 2
        self.out_size = channels * self.out_bands
        padding = (size // 2, 0)
        self.convolution = nn.Conv2d(inputs, channels, (size, _TAPS), (2, stride), padding, bias=False)
        self.norm = StepNorm(self.out_size)

    def lengths(self, lengths_B: Tensor) -> Tensor:
        """Outputs of so many frames."""
        return (lengths_B - 1) // self.stride + 1

    def forward(self, x_BTI: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """y_BTI, I being C times F; of frames that ``before`` and ``after`` have been added to.

        Args:
            x_BTI: frames, I being the input's channels times its bands.
            lengths_B: outputs of each utterance, after which all is 0; None takes all.
        """
        y_BTI = self.products(x_BTI)
        real_BT1 = _steps_within(lengths_B, y_BTI.shape[1]) if lengths_B is not None else y_BTI.new_ones(1, 1, 1)
        return _clipped(self.norm(y_BTI, real_BT1)) * real_BT1

    def products(self, x_BTI: Tensor) -> Tensor:
        """y_BTI before the norm."""
        x_BCIT = x_BTI.transpose(1, 2).unflatten(1, (self.inputs, self.bands))
        y_BTI: Tensor = self.convolution(x_BCIT).flatten(1, 2).transpose(1, 2)
        return y_BTI


class RowConvolution(nn.Module):
    """Each unit's weighted sum of its value now and at the next steps; norm, clipped ReLU.

    The paper gives it 42 H parameters, and no more. They are read as 40 weights a unit, of this step and the next 39,
    and a scale and a shift of the norm.

    Args:
        hidden_size: H.
        taps: weights a unit, of this step and those after it.
    """

    def __init__(self, hidden_size: int, taps: int) -> None:
        super().__init__()
        self.before, self.after, self.stride, self.out_size = 0, taps - 1, 1, hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.norm = StepNorm(hidden_size)

    def forward(self, x_BTH: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """y_BTH of steps that ``after`` have been added to; ``lengths_B`` as of ``BandConvolution``."""
        y_BTH = self.products(x_BTH)
        real_BT1 = _steps_within(lengths_B, y_BTH.shape[1]) if lengths_B is not None else y_BTH.new_ones(1, 1, 1)
        return _clipped(self.norm(y_BTH, real_BT1)) * real_BT1

    def products(self, x_BTH: Tensor) -> Tensor:
        """y_BTH before the norm."""
        return F.conv1d(x_BTH.transpose(1, 2), self.weight[:, None], groups=len(self.weight)).transpose(1, 2)


class RecurrentLayer(nn.Module):
    """One input matrix and its norm, shared by the directions, and their recurrences, summed.

    Args:
        cell: the recurrence.
        inputs: of a step.
        hidden_size: H.
        bidirectional: whether there are two directions.
    """

    def __init__(self, cell: Cell, inputs: int, hidden_size: int, bidirectional: bool) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, GATES[cell] * hidden_size, bias=False)
        self.input.layer_type = "recurrent"  # type: ignore[assignment]  # its threshold is that of recurrent matrices
        # So is its scale, which means nothing to the norm: under one threshold nearly all of a smaller one would go.
        nn.init.uniform_(self.input.weight, -(hidden_size**-0.5), hidden_size**-0.5)
        self.norm = StepNorm(GATES[cell] * hidden_size)
        self.recurrence = Recurring(cell, hidden_size, bidirectional)

    def forward(
        self, x_BTI: Tensor, lengths_B: Tensor, state: RecurringState | None = None
    ) -> tuple[Tensor, RecurringState]:
        """y_BTH and the state, as ``Recurring``; steps after an utterance's end are 0."""
        real_BT1 = _steps_within(lengths_B, x_BTI.shape[1])
        y_BTH, state = self.recurrence(self.norm(self.input(x_BTI), real_BT1), lengths_B, state)
        return y_BTH * real_BT1, state


class DeepSpeech2(nn.Module):
    """Two convolutions, recurrent layers, perhaps a row convolution, a fully connected layer, characters.

    Every matrix product is followed by a norm over all steps of a batch, padding left out, and has no bias but for the
    last. What pads an utterance never changes its outputs.

    Example:
        >>> import torch
        >>> model = DeepSpeech2("rnn", input_size=161, output_size=29, hidden_size=16, num_layers=2, channels=4).eval()
        >>> x_BTI = torch.randn(2, 50, 161)
        >>> x_BTI[1, 30:] = torch.nan
        >>> logits_BTV, lengths_B = model(x_BTI)
        >>> logits_BTV.shape, lengths_B
        (torch.Size([2, 25, 29]), tensor([25, 15]))

    Attributes:
        vocabulary, audio: its characters, and the features that it was trained on; set by ``srnn.load``.
        look_ahead: milliseconds of sound that an output needs beyond its own frame; None if all of it.

    Args:
        cell: ``rnn``, with the clipped ReLU min(max(x, 0), 20), ``gru`` or ``lstm``.
        input_size: I.
        output_size: V, the blank, number 0, among them.
        hidden_size: H.
        num_layers: recurrent layers.
        bidirectional: whether they run both ways.
        row_taps: of the row convolution, this step and those after it; 0 for none.
        channels: C, of each convolution.
        future: frames that a convolution sees ahead, of its 11.
    """

    def __init__(
        self,
        cell: Literal["rnn", "gru", "lstm"],
        input_size: int,
        output_size: int,
        hidden_size: int,
        num_layers: int,
        bidirectional: bool = True,
        row_taps: int = 0,
        channels: int = 32,
        future: int = 5,
    ) -> None:
        super().__init__()
        first = BandConvolution(1, channels, input_size, _BANDS[0], 2, future)
        second = BandConvolution(channels, channels, first.out_bands, _BANDS[1], 1, future)
        self.convolutions = nn.ModuleList([first, second])
        inputs = [channels * second.out_bands] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(RecurrentLayer(_CELLS[cell], i, hidden_size, bidirectional) for i in inputs)
        self.row = RowConvolution(hidden_size, row_taps) if row_taps else None
        self.dense = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = StepNorm(hidden_size)
        self.output = nn.Linear(hidden_size, output_size)
        self.vocabulary: Vocabulary | None = None
        self.audio: Features | None = None
        self.look_ahead = None if bidirectional else 10 * future + 20 * future + 20 * max(0, row_taps - 1)

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Steps of so many frames."""
        for convolution in self.convolutions:
            lengths_B = convolution.lengths(lengths_B)  # type: ignore[operator]
        return lengths_B

    def forward(self, x_BTI: Tensor, state: object = None) -> tuple[Tensor, Tensor]:
        """Read whole utterances.

        Args:
            x_BTI: frames; those of NaN are padding.
            state: passed over: every utterance starts from zero.

        Returns:
            logits_BTV, 0 after an utterance's end, and lengths_B, its steps.
        """
        lengths_B = (~x_BTI[:, :, 0].isnan()).sum(1)
        x_BTI = x_BTI.nan_to_num(0.0)
        for part in self.convolutions:
            lengths_B = part.lengths(lengths_B)  # type: ignore[operator]
            x_BTI = part(F.pad(x_BTI, (0, 0, part.before, part.after)), lengths_B)  # type: ignore[arg-type]
        for layer in self.layers:
            x_BTI, _ = layer(x_BTI, lengths_B)
        if self.row is not None:
            x_BTI = self.row(F.pad(x_BTI, (0, 0, 0, self.row.after)), lengths_B)
        real_BT1 = _steps_within(lengths_B, x_BTI.shape[1])
        return self.characters(x_BTI, real_BT1) * real_BT1, lengths_B

    def transcriber(self) -> Transcriber:
        """What writes speech down with this network, which ``srnn.load`` gave.

        Raises:
            UserError: the network does not know its characters or the features that it was trained on.
        """
        if self.vocabulary is None or self.audio is None:
            raise UserError(
                "this network does not know its characters and features: srnn.load it from the packed file of a run, "
                "or make a srnn.models.Transcriber of it."
            )
        return Transcriber(self.eval(), self.vocabulary, self.audio)

    def characters(self, x_BTH: Tensor, real_BT1: Tensor) -> Tensor:
        """logits_BTV of what the recurrent layers, or the row convolution, give."""
        logits: Tensor = self.output(_clipped(self.norm(self.dense(x_BTH), real_BT1)))
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@dataclass(frozen=True)
class _Sizes:
    cell: Literal["rnn", "gru", "lstm"]
    hidden_size: int
    num_layers: int
    bidirectional: bool
    row_taps: int = 0
    channels: int = 32
    future: int = 5


def _network(name: str, own: _Sizes, about: str) -> Callable[..., DeepSpeech2]:
    """Registers a network with sizes of its own; its options are explained at ``DeepSpeech2``."""

    def build(
        cell: Literal["rnn", "gru", "lstm"] = own.cell,
        hidden_size: Count = own.hidden_size,
        num_layers: Annotated[int, Range(ge=1, le=100)] = own.num_layers,
        bidirectional: bool = own.bidirectional,
        row_taps: Annotated[int, Range(ge=0, le=1000)] = own.row_taps,
        channels: Annotated[int, Range(ge=1, le=1024)] = own.channels,
        future: Annotated[int, Range(ge=0, le=10)] = own.future,
        *,
        input_size: int,
        output_size: int,
    ) -> DeepSpeech2:
        if bidirectional and row_taps:
            raise UserError(
                f"model.row_taps={row_taps} is for layers that run forward only, and model.bidirectional=true sees all "
                f"that comes anyway: set model.row_taps=0."
            )
        return DeepSpeech2(
            cell, input_size, output_size, hidden_size, num_layers, bidirectional, row_taps, channels, future
        )

    build.__doc__, build.__name__, build.__qualname__ = about, name, name
    return register.model(name)(build)


deepspeech2 = _network(
    "deepspeech2",
    _Sizes("gru", 512, 3, True),
    "Deep Speech 2 (Amodei et al. 2015): convolutions, recurrent layers with norms, characters of speech.",
)
deepspeech2_rnn = _network(
    "deepspeech2_rnn",
    _Sizes("rnn", 1760, 7, True),
    "The paper's vanilla Deep Speech 2: 7 layers both ways, clipped ReLU, 67.6 M weights.",
)
deepspeech2_gru = _network(
    "deepspeech2_gru",
    _Sizes("gru", 2560, 3, False, row_taps=40),
    "The paper's gated Deep Speech 2: 3 layers forward and a row convolution, 115 M weights.",
)
deepspeech2_small = _network(
    "deepspeech2_small",
    _Sizes("gru", 192, 2, False, row_taps=4, channels=8, future=1),
    "Deep Speech 2 for one CPU and streams: forward only, it sees 90 ms ahead, 0.6 M weights.",
)
