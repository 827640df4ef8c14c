"""Write speech down: connectionist temporal classification (Graves et al. 2006).

Shapes: B batch, T steps, U characters, V vocabulary, of which number 0 is the blank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.text import CharErrorRate, WordErrorRate

from srnn.datasets.base import Batch, DataModule, Split
from srnn.datasets.text import IGNORED
from srnn.errors import UserError
from srnn.models.decoding import greedy
from srnn.objectives.base import Objective
from srnn.objectives.teacher import softened_cross_entropy
from srnn.registry import register
from srnn.terminal import console
from srnn.vocabulary import Vocabulary


def ctc_losses(logits_BTV: Tensor, lengths_B: Tensor, targets_BU: Tensor) -> Tensor:
    """Negative log-likelihood of each transcript, nats, in fp32; 0 where it is longer than its steps allow."""
    targets = targets_BU.clamp(min=0)
    characters_B = (targets_BU != IGNORED).sum(1)
    with torch.autocast(logits_BTV.device.type, enabled=False):
        log_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(log_TBV, targets, lengths_B, characters_B, reduction="none", zero_infinity=True)


def impossible(lengths_B: Tensor, targets_BU: Tensor) -> Tensor:
    """How many transcripts are longer than their steps allow, a blank between two equal characters counted."""
    equal_BU = (targets_BU[:, 1:] == targets_BU[:, :-1]) & (targets_BU[:, 1:] != IGNORED)
    needed_B = (targets_BU != IGNORED).sum(1) + equal_BU.sum(1)
    return (needed_B > lengths_B).sum()


class CtcScore(Metric):
    """How well speech is written down: ``loss`` in nats a character, and the error rates of greedy decoding.

    ``cer`` and ``wer`` are the characters and words to insert, delete and replace, over those of the transcripts.

    Args:
        vocabulary: tokens -> text.
    """

    EXAMPLES = 4
    nats: Tensor
    characters: Tensor

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self._first: list[dict[str, str]] = []  # of each batch
        self.cer, self.wer = CharErrorRate(), WordErrorRate()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("characters", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_BTV: Tensor, lengths_B: Tensor, targets_BU: Tensor) -> None:
        """Add a batch."""
        said = [self.vocabulary.decode([t for t in row if t != IGNORED]) for row in targets_BU.tolist()]
        heard = [self.vocabulary.decode(tokens) for tokens in greedy(logits_BTV, lengths_B)]
        self._first.append({"said": said[0], "heard": heard[0]})
        self.cer.update(heard, said)
        self.wer.update(heard, said)
        self.nats += ctc_losses(logits_BTV, lengths_B, targets_BU).sum()
        self.characters += (targets_BU != IGNORED).sum()

    def examples(self) -> list[dict[str, str]]:
        """A few of the utterances, from the shortest to the longest: what was ``said``, and what was ``heard``."""
        last = len(self._first) - 1
        places = {round(last * k / (self.EXAMPLES - 1)) for k in range(self.EXAMPLES)} if self._first else ()
        return [self._first[place] for place in sorted(places)]

    def compute(self) -> dict[str, Tensor]:
        """The scores."""
        return {"loss": self.nats / self.characters, "cer": self.cer.compute(), "wer": self.wer.compute()}


@register.objective("ctc")
class Ctc(Objective):
    """Write speech down, by connectionist temporal classification.

    The network gives logits_BTV and how many steps each utterance has: ``logits_BTV, lengths_B = model(x_BTI)``; it has
    ``output_lengths``, which tells these of so many frames.

    Raises:
        UserError: the network is no such one.
    """

    telling = "cer"
    loss_name = "CTC loss, nats a character"
    words = "CER {cer:.2%}, WER {wer:.2%}, loss {loss:.4f}"

    def __init__(
        self, model: nn.Module, optimizer: Mapping[str, Any], data: DataModule, call: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(model, optimizer, data, call)
        if not hasattr(model, "output_lengths"):
            raise UserError(
                f"{type(model).__name__} gives one answer for a whole sequence, and speech wants a character at every "
                f"step: choose model=deepspeech2."
            )
        self.impossible: Tensor | None = None

    @classmethod
    def metrics(cls, data: DataModule, part: Split) -> CtcScore:
        """Loss, error rates of characters and words."""
        assert data.vocabulary is not None
        return CtcScore(data.vocabulary)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean over utterances of the loss, each in nats a character."""
        x_BTI, targets_BU = batch
        logits_BTV, lengths_B = self.call(x_BTI)
        characters_B = (targets_BU != IGNORED).sum(1)
        loss = (ctc_losses(logits_BTV, lengths_B, targets_BU) / characters_B).mean()
        count = impossible(lengths_B, targets_BU)
        self.impossible = count if self.impossible is None else self.impossible + count
        self.train_loss = loss.detach()
        return self.taught(loss, x_BTI, logits_BTV, lengths_B)

    def imitation(self, outputs: Tensor, teachers: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy of each step, the mean over all that are no padding; ``targets`` are lengths_B."""
        real_BT = torch.arange(outputs.shape[1], device=outputs.device) < targets[:, None]
        losses = softened_cross_entropy(outputs.flatten(0, 1).float(), teachers.flatten(0, 1).float(), temperature)
        return (losses * real_BT.flatten()).sum() / real_BT.sum()

    def on_train_epoch_end(self) -> None:
        """Say how many transcripts could not be learned."""
        if self.impossible is not None and (count := int(self.impossible)):
            console.print(f"{count} transcripts were longer than their steps: nothing was learned of them.")
        self.impossible = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the scores."""
        x_BTI, targets_BU = batch
        self.metric.update(*self.model(x_BTI), targets_BU)

    def on_validation_epoch_end(self) -> None:
        """Log the scores, and keep a few transcripts beside them."""
        super().on_validation_epoch_end()
        self.examples = self.metric.examples()

    @classmethod
    @torch.inference_mode()
    def score(cls, model: nn.Module, data: DataModule, part: Split) -> dict[str, float]:
        """Score a model on a whole part of the data, on the CPU."""
        model.eval()
        metric = cls.metrics(data, part)
        for x_BTI, targets_BU in data.limited(part):
            logits_BTV, lengths_B = model(x_BTI)
            metric.update(logits_BTV, lengths_B, targets_BU)
        return {name: float(value) for name, value in metric.compute().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The vocabulary, without which the weights mean nothing."""
        assert self.data.vocabulary is not None
        checkpoint["vocabulary"] = self.data.vocabulary.to_dict()
