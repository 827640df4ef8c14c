"""What a run wants of a data set: three parts in batches, an objective, and the sizes a model has to fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.vocabulary import Vocabulary

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
Batch = tuple[Tensor, Tensor]


class Batches:
    """The batches of a part, pass after pass; it can be stopped in the middle of one and go on there.

    Attributes:
        epoch: number of the pass, from 0: what a shuffled order depends on.
        position: batches given so far in this pass.

    Args:
        fetch: (epoch, index) -> batch.
        count: batches in a pass.
    """

    def __init__(self, fetch: Callable[[int, int], Batch], count: int) -> None:
        self.fetch = fetch
        self.count = count
        self.epoch = 0
        self.position = 0
        self._goes_on = False

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        if self.position and not self._goes_on:
            self.epoch, self.position = self.epoch + 1, 0
        self._goes_on = False
        while self.position < self.count:
            self.position += 1
            yield self.fetch(self.epoch, self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: in the middle of a pass, or with the next one."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._goes_on = 0 < self.position < self.count


def _rows(fetch: Callable[[int, int], Batch], rank: int, ranks: int) -> Callable[[int, int], Batch]:
    """Of every batch the same contiguous rows, so that a stream stays in its rank."""

    def fetch_rows(epoch: int, index: int) -> Batch:
        inputs, targets = fetch(epoch, index)
        return inputs.tensor_split(ranks)[rank], targets.tensor_split(ranks)[rank]

    return fetch_rows


class DataModule(pl.LightningDataModule):
    """Base of all data sets.

    Attributes:
        objective: the name of what is learned: ``next_token``, ``classification``, ``regression``, or a plug-in's.
        sizes: what a model has to fit: ``vocabulary_size``, or ``input_size`` and ``output_size``.
        vocabulary: of text; else None.
        counts: part -> its length in ``unit``.
        unit: what ``counts`` counts, for tables.
        limits: part -> at most so many batches; absent takes all.
    """

    objective: str
    vocabulary: Vocabulary | None = None
    unit: str

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Part, int] = {}
        self.sizes: dict[str, int] = {}
        self.limits: dict[Part, int] = {}
        self._train: Batches | None = None
        self._rank, self._ranks = 0, 1

    @abstractmethod
    def setup(self, stage: str | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Read the data, once. Raises UserError for what cannot be used.

        Args:
            stage: Lightning's; all parts are made for any.
            vocabulary: a trained model's own, for text.
        """

    @abstractmethod
    def batches(self, part: Part) -> Batches:
        """All batches of a part, from its beginning."""

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config that finds the same data from any folder: with paths made absolute."""
        return config

    def limited(self, part: Part) -> Batches:
        """The batches of a part, within ``limits``."""
        batches = self.batches(part)
        batches.count = min(batches.count, self.limits.get(part, batches.count))
        return batches

    def share(self, rank: int, ranks: int) -> None:
        """Train on this rank's rows of every batch: all ranks together have the batches of one process.

        Raises:
            UserError: the batches have not as many rows for each.
        """
        rows = len(self.batches("train").fetch(0, 0)[0])
        if rows % ranks:
            raise UserError(
                f"dataset.batch_size={rows} cannot be shared equally by trainer.devices={ranks}: choose a multiple, "
                f"such as {rows + ranks - rows % ranks}."
            )
        self._rank, self._ranks, self._train = rank, ranks, None

    def train_dataloader(self) -> Batches:
        """The training part, this rank's rows; the same object at each call, so that its place is known."""
        if self._train is None:
            self._train = self.limited("train")
            if self._ranks > 1:
                self._train.fetch = _rows(self._train.fetch, self._rank, self._ranks)
        return self._train

    def val_dataloader(self) -> Batches:
        """The validation part."""
        return self.limited("valid")

    def test_dataloader(self) -> Batches:
        """The test part."""
        return self.limited("test")

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints: the place in the training part."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's place."""
        self.train_dataloader().load_state_dict(state)


class LabelledSequences(DataModule):
    """Base of data sets of whole sequences with a label or number each: a subclass says what they are.

    Args:
        batch_size: B, sequences a step.
    """

    unit = "sequences"

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._parts: dict[Part, Batch] = {}

    @abstractmethod
    def sequences(self) -> dict[Part, Batch]:
        """Part -> x_NTI (fp32) and labels_N (int64 classes) or targets_NO (fp32)."""

    def setup(self, stage: str | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Make the sequences, once."""
        if self._parts:
            return
        self._parts = self.sequences()
        x_NTI, targets = self._parts["train"]
        if len(x_NTI) < self.batch_size:
            raise UserError(f"dataset.batch_size={self.batch_size} is more than the {len(x_NTI)} training sequences.")
        classes = 1 + max(int(labels.max()) for _, labels in self._parts.values())
        outputs = classes if self.objective == "classification" else targets.shape[1]
        self.sizes = {"input_size": x_NTI.shape[2], "output_size": outputs}
        self.counts = {part: len(x) for part, (x, _) in self._parts.items()}

    def batches(self, part: Part) -> Batches:
        """Training in a new order each pass, whole batches only; the others in order, all of them."""
        x_NTI, targets = self._parts[part]
        size, length, seed = self.batch_size, len(x_NTI), torch.initial_seed()

        def fetch(epoch: int, index: int) -> Batch:
            chosen = slice(index * size, (index + 1) * size)
            if part != "train":
                return x_NTI[chosen], targets[chosen]
            # Of the seed and the pass alone, so that a resumed run sees the same order.
            order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch))
            return x_NTI[order[chosen]], targets[order[chosen]]

        return Batches(fetch, length // size if part == "train" else -(-length // size))
