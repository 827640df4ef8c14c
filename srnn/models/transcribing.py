"""Writing speech down with a trained network: whole recordings, and streams.

Shapes: N samples, T frames or steps, I bands, V characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from srnn.audio import HOP_SAMPLES, Features, Running, frames_of, read_audio
from srnn.cells import CLIP
from srnn.errors import UserError
from srnn.models.decoding import Phrases, WordSequences, beam_search, greedy
from srnn.vocabulary import Vocabulary

WORDS_BEAM = 20  # width of the beam search for words, where none is given
STEP_SECONDS = 0.02  # seconds: networks halve the frames


class Transcriber:
    """Writes speech down; ``srnn.load(path).transcriber()`` makes one.

    Args:
        model: a ``DeepSpeech2``, dense or on sparse kernels, in eval mode.
        vocabulary: its characters.
        audio: the features that it was trained on.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, audio: Features) -> None:
        self.model, self.vocabulary, self.audio = model, vocabulary, audio

    @property
    def device(self) -> torch.device:
        """Where the network runs; sound becomes features, and outputs become text, on the CPU."""
        where: torch.device = self.model.norm.running_mean.device
        return where

    @torch.inference_mode()
    def __call__(
        self,
        source: str | Path | Tensor,
        beam: int = 1,
        phrases: Phrases | None = None,
        words: WordSequences | None = None,
    ) -> str:
        """The text of a recording.

        Args:
            source: a WAV, FLAC or OGG file, or samples at 16 kHz, fp32 in -1 .. 1.
            beam: 1 takes the likeliest character of each step; more, the likeliest text that a prefix beam search of
                this width finds.
            phrases: what can be said, as ``phrases`` makes it: the text is the likeliest of them.
            words: what texts consist of, as ``words`` makes it, for a beam search, of width 20 where ``beam`` is 1.

        Raises:
            UserError: the file is no audio.
        """
        x_N = source if isinstance(source, Tensor) else read_audio(source)
        if not frames_of(len(x_N)):
            return ""
        outputs = self.model(self.audio(x_N.cpu())[None].to(self.device))
        logits_BTV, lengths_B = (part.cpu() for part in outputs)
        if phrases is not None:
            return self.vocabulary.decode(phrases(logits_BTV[0]))
        if words is None and beam == 1:
            return self.vocabulary.decode(greedy(logits_BTV, lengths_B)[0])
        return self.vocabulary.decode(beam_search(logits_BTV[0], beam if beam > 1 else WORDS_BEAM, words))

    def phrases(self, texts: Iterable[str]) -> Phrases:
        """A list of all that can be said.

        Raises:
            UserError: a text has a character that the network does not write, or there is no text.
        """
        several = [" ".join(text.split()) for text in texts]
        if not all(several) or not several:
            raise UserError("a list of phrases must have some, and no empty ones.")
        return Phrases(self._tokens(several))

    def words(self, texts: Iterable[str]) -> WordSequences:
        """All the words of some texts; any of them may follow another.

        Raises:
            UserError: a word has a character that the network does not write, or there is no word.
        """
        several = dict.fromkeys(word for text in texts for word in text.split())
        if not several:
            raise UserError("a list of words must have some.")
        space = None if self.vocabulary.unknown(" ") else int(self.vocabulary.encode(" ")[0])
        return WordSequences(self._tokens(several), space)

    def _tokens(self, texts: Iterable[str]) -> list[list[int]]:
        for text in texts:
            if unknown := self.vocabulary.unknown(text):
                raise UserError(f"this network does not write {''.join(unknown)!r}, which is in {text!r}.")
        return [self.vocabulary.encode(text).tolist() for text in texts]

    def stream(self, pause: float | None = None) -> Listener:
        """What writes down sound as it comes in.

        Args:
            pause: seconds without a character after which an utterance has ended; None takes all for one.

        Raises:
            UserError: the network, or the features that it was trained on, need the end of an utterance first.
        """
        if self.audio.normalise != "running":
            raise UserError(
                f"this network was trained with dataset.normalise={self.audio.normalise}, which needs whole "
                f"utterances: streams want one that was trained with dataset.normalise=running."
            )
        return Listener(self, pause)


class Listener:
    """Sound in pieces -> the text so far: the same text as of the whole, however it is cut. Only the text grows.

    Attributes:
        text: of the utterance that is heard.
        ended: texts of the utterances before it; take out what you have read.

    Args:
        transcriber: whose network listens.
        pause: seconds without a character after which an utterance has ended; None takes all for one.
    """

    def __init__(self, transcriber: Transcriber, pause: float | None = None) -> None:
        self.transcriber = transcriber
        self.text = ""
        self.ended: list[str] = []
        self._patience = math.inf if pause is None else max(1, round(pause / STEP_SECONDS))
        self._quiet = 0  # steps since the last character
        self._network = NetworkStream(transcriber.model)
        self._running = Running()
        self._samples = torch.zeros(0)
        self._last = 0

    @torch.inference_mode()
    def hear(self, x_N: Tensor) -> str:
        """The text so far, after more samples at 16 kHz, fp32 in -1 .. 1. Raises ValueError of several channels."""
        if x_N.dim() != 1:
            raise ValueError(f"sound to hear must be one channel of samples, [N], not of shape {tuple(x_N.shape)}")
        self._samples = torch.cat([self._samples, x_N.cpu()])
        x_TI = self.transcriber.audio.logarithms(self._samples)
        self._samples = self._samples[len(x_TI) * HOP_SAMPLES :]
        return self._write(self._network.feed(self._running(x_TI).to(self.transcriber.device)) if len(x_TI) else None)

    @torch.inference_mode()
    def finish(self) -> str:
        """The whole text; nothing more may be heard."""
        return self._write(self._network.finish())

    def _write(self, logits_TV: Tensor | None) -> str:
        for token in logits_TV.argmax(-1).tolist() if logits_TV is not None else ():
            if token and token != self._last:
                self.text += self.transcriber.vocabulary.decode([token])
            self._quiet = 0 if token else self._quiet + 1
            self._last = token
            if self._quiet >= self._patience:
                self._end()
        return self.text

    def _end(self) -> None:
        if self.text.strip():
            self.ended.append(self.text.strip())
        self.text = ""


class NetworkStream:
    """A network that reads forward only, fed with frames as they come: the same outputs as for the whole.

    Each convolution keeps the frames that its next output needs, each recurrent layer its state.

    Args:
        model: a ``DeepSpeech2``, dense or on sparse kernels, in eval mode.

    Raises:
        UserError: its layers run both ways.

    Example:
        >>> import torch
        >>> from srnn.models import deepspeech2
        >>> model = deepspeech2("gru", 16, 1, False, row_taps=3, channels=2, input_size=40, output_size=5).eval()
        >>> x_TI, stream = torch.randn(30, 40), NetworkStream(model)
        >>> with torch.no_grad():
        ...     pieces = torch.cat([stream.feed(x_TI[:7]), stream.feed(x_TI[7:]), stream.finish()])
        ...     whole = model(x_TI[None])[0][0]
        >>> torch.allclose(pieces, whole, atol=1e-5)
        True
    """

    def __init__(self, model: Any) -> None:
        if model.look_ahead is None:
            raise UserError(
                "this network's layers run both ways, and need the end of an utterance first: streams want one that "
                "was trained with model.bidirectional=false."
            )
        self.model = model
        # Once: a few frames of a small network take so little time that what norms prepare at each call would count.
        parts = [*model.convolutions, *model.layers, model, *([] if model.row is None else [model.row])]
        with torch.no_grad():
            self._norms = {part.norm: part.norm.scale_and_shift() for part in parts}
        self._waiting: dict[str, Tensor] = {}
        self._states: list[Any] = [None] * len(model.layers)

    def feed(self, x_TI: Tensor) -> Tensor:
        """logits_TV of the steps that are complete with these frames; there may be none.

        Raises:
            ValueError: they are no frames of the network's bands.
        """
        bands = self.model.convolutions[0].bands
        if x_TI.dim() != 2 or x_TI.shape[1] != bands:
            raise ValueError(f"frames must have shape [frames, {bands}], not {tuple(x_TI.shape)}")
        return self._run(x_TI, last=False)

    def finish(self) -> Tensor:
        """logits_TV of the steps that waited for more."""
        return self._run(self.model.output.bias.new_zeros(0, self.model.convolutions[0].bands), last=True)

    def _run(self, x_TI: Tensor, last: bool) -> Tensor:
        x_BTI = x_TI[None]
        for number, part in enumerate(self.model.convolutions):
            x_BTI = self._convolved(f"convolution {number}", part, x_BTI, last)
        if x_BTI.shape[1]:
            lengths_B = torch.tensor([x_BTI.shape[1]])
            for number, layer in enumerate(self.model.layers):
                u_BTG = self._normed(layer.norm, layer.input(x_BTI))
                x_BTI, self._states[number] = layer.recurrence(u_BTG, lengths_B, self._states[number])
        else:
            x_BTI = x_BTI.new_zeros(1, 0, self.model.output.in_features)
        if self.model.row is not None:
            x_BTI = self._convolved("row", self.model.row, x_BTI, last)
        if not x_BTI.shape[1]:
            return x_BTI.new_zeros(0, self.model.output.out_features)
        logits_BTV: Tensor = self.model.output(self._normed(self.model.norm, self.model.dense(x_BTI)).clamp_(0, CLIP))
        return logits_BTV[0]

    def _normed(self, norm: Any, x_BTH: Tensor) -> Tensor:
        scale, shift = self._norms[norm]
        return torch.addcmul(shift, x_BTH, scale)

    def _convolved(self, name: str, part: Any, x_BTI: Tensor, last: bool) -> Tensor:
        """A convolution's outputs that are complete; what later ones need waits."""
        before = self._waiting.get(name)
        if before is None:
            before = x_BTI.new_zeros(1, part.before, x_BTI.shape[2])
        frames = torch.cat([before, F.pad(x_BTI, (0, 0, 0, part.after)) if last else x_BTI], 1)
        taps = part.before + part.after + 1
        outputs = max(0, (frames.shape[1] - taps) // part.stride + 1)
        self._waiting[name] = frames[:, outputs * part.stride :]
        if not outputs:
            return frames.new_zeros(1, 0, part.out_size)
        products = part.products(frames[:, : (outputs - 1) * part.stride + taps])
        return self._normed(part.norm, products).clamp_(0, CLIP)
