"""What a run wants of a data set: three splits in batches, an objective, and the sizes a model has to fit.

Shapes: N sequences, B batch, T time, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.vocabulary import Vocabulary

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Batch = tuple[Tensor, Tensor]


class Batches:
    """The batches of a split, pass after pass; it can be stopped in the middle of one and resume there.

    Example:
        >>> batches = Batches(lambda epoch, index: (torch.tensor(epoch), torch.tensor(index)), count=3)
        >>> next(iter(batches))
        (tensor(0), tensor(0))
        >>> resumed = Batches(batches.fetch, count=3)
        >>> resumed.load_state_dict(batches.state_dict())
        >>> [index.item() for _, index in resumed]
        [1, 2]

    Attributes:
        epoch: number of the pass, from 0: what a shuffled order depends on.
        position: batches given so far in this pass.

    Args:
        fetch: (epoch, index) -> batch. It depends on nothing else, so that epoch and position are all there is to
            a checkpoint.
        count: batches in a pass.
    """

    def __init__(self, fetch: Callable[[int, int], Batch], count: int) -> None:
        self.fetch = fetch
        self.count = count
        self.epoch = 0
        self.position = 0
        self._resumes = False

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        # Whoever asks anew starts a new pass, also in the middle of one, unless a checkpoint said to resume there.
        if self.position and not self._resumes:
            self.epoch, self.position = self.epoch + 1, 0
        self._resumes = False
        while self.position < self.count:
            # Before the batch is given: a checkpoint made while it is trained on must not see it again.
            self.position += 1
            yield self.fetch(self.epoch, self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume there: in the middle of a pass, or with the next one."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._resumes = 0 < self.position < self.count


def _rows(fetch: Callable[[int, int], Batch], rank: int, ranks: int) -> Callable[[int, int], Batch]:
    """Of every batch the same contiguous rows, so that a stream stays in its rank."""

    def fetch_rows(epoch: int, index: int) -> Batch:
        inputs, targets = fetch(epoch, index)
        return inputs.tensor_split(ranks)[rank], targets.tensor_split(ranks)[rank]

    return fetch_rows


class DataModule:
    """Base of all data sets. A subclass says how to ``setup`` them and what their ``batches`` are.

    Registered as ``@register.dataset("name")`` it is ``dataset=name``; its arguments are its options. Text data sets
    derive from ``TextStreams``, others most easily from ``LabelledSequences``.

    Example:
        >>> class Sums(DataModule):
        ...     "Sequences of three pairs of numbers, and their sums."
        ...     objective, unit = "regression", "sequences"
        ...     def setup(self, stage=None, vocabulary=None):
        ...         self.sizes = {"input_size": 2, "output_size": 1}
        ...         self.counts = dict.fromkeys(SPLITS, 20)
        ...     def batches(self, split):
        ...         x_BTI = torch.rand(4, 3, 2)
        ...         targets_BO = x_BTI.sum((1, 2))[:, None]
        ...         return Batches(lambda epoch, index: (x_BTI, targets_BO), count=5)
        >>> data = Sums()
        >>> data.setup()
        >>> len(data.train_dataloader()), len(data.test_dataloader())
        (5, 5)

    Attributes:
        objective: the name of what is learned: ``next_token``, ``classification``, ``regression``, ``ctc``, or a
            plug-in's.
        sizes: what a model has to fit: ``vocabulary_size``, or ``input_size`` and ``output_size``.
        vocabulary: of text; else None.
        counts: split -> its length in ``unit``.
        unit: what ``counts`` counts, for tables.
        limits: split -> at most so many batches; absent takes all.
        left_out: why data were left out -> how many, for the report.
        from_file: whether its options come out of a packed file, which may be anybody's: such options must not say
            where to download from.
    """

    objective: str
    from_file = False
    vocabulary: Vocabulary | None = None
    unit: str

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Split, int] = {}
        self.sizes: dict[str, int] = {}
        self.limits: dict[Split, int] = {}
        self.left_out: dict[str, int] = {}
        self._train: Batches | None = None
        self._rank, self._ranks = 0, 1

    @abstractmethod
    def setup(self, stage: str | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Read the data, once: sets ``counts`` and ``sizes``.

        Args:
            stage: not used, as all splits are made at once.
            vocabulary: a trained model's own, for text.

        Raises:
            UserError: data that cannot be used.
        """

    @abstractmethod
    def batches(self, split: Split) -> Batches:
        """All batches of a split, from its beginning.

        Args:
            split: ``train``, ``valid`` or ``test``.

        Returns:
            Pairs of inputs and targets, both with B rows first: B tokens_T and the tokens after them, or x_BTI and
            what the objective wants.
        """

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config that finds the same data from any folder: with paths made absolute."""
        return config

    def limited(self, split: Split) -> Batches:
        """The batches of a split, within ``limits``."""
        batches = self.batches(split)
        batches.count = min(batches.count, self.limits.get(split, batches.count))
        return batches

    def checksum(self, split: Split) -> str:
        """SHA-256 of all the split's batches, in the order of the first pass: a resumed run must find the same."""
        batches, sha = self.batches(split), hashlib.sha256()
        for index in range(len(batches)):
            for tensor in batches.fetch(0, index):
                sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def share(self, rank: int, ranks: int) -> None:
        """Train on this rank's rows of every batch: all ranks together have the batches of one process.

        Args:
            rank: of this process, from 0.
            ranks: how many processes train together.

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
        """The training split, this rank's rows; the same object at each call, so that its place is known."""
        if self._train is None:
            self._train = self.limited("train")
            if self._ranks > 1:
                self._train.fetch = _rows(self._train.fetch, self._rank, self._ranks)
        return self._train

    def val_dataloader(self) -> Batches:
        """The validation split."""
        return self.limited("valid")

    def test_dataloader(self) -> Batches:
        """The test split."""
        return self.limited("test")

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints: the place in the training split."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a checkpoint's place."""
        self.train_dataloader().load_state_dict(state)


class LabelledSequences(DataModule):
    """Base of data sets of whole sequences with a label or number each: a subclass says what they are.

    Example:
        >>> class Signs(LabelledSequences):
        ...     "Is the sum of random numbers positive?"
        ...     objective = "classification"
        ...     def __init__(self, batch_size: int = 4):
        ...         super().__init__(batch_size)
        ...     def sequences(self):
        ...         x_NTI = torch.randn(30, 6, 2)
        ...         labels_N = (x_NTI.sum((1, 2)) > 0).long()
        ...         return {split: (x_NTI, labels_N) for split in ("train", "valid", "test")}
        >>> data = Signs()
        >>> data.setup()
        >>> data.sizes, len(data.train_dataloader())
        ({'input_size': 2, 'output_size': 2}, 7)

    Args:
        batch_size: B, sequences a step.

    Raises:
        UserError: from ``setup``, if there are fewer training sequences than ``batch_size``.
    """

    unit = "sequences"

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._parts: dict[Split, Batch] = {}

    @abstractmethod
    def sequences(self) -> dict[Split, Batch]:
        """Split -> x_NTI (fp32) and labels_N (int64 classes) or targets_NO (fp32)."""

    def setup(self, stage: str | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Make the sequences, once."""
        if self._parts:
            return
        self._parts = self.sequences()
        x_NTI, targets = self._parts["train"]
        if len(x_NTI) < self.batch_size:
            raise UserError(f"dataset.batch_size={self.batch_size} is more than the {len(x_NTI)} training sequences.")
        # Over all splits: a class that training lacks must have an output for scores to be computed.
        classes = 1 + max(int(labels.max()) for _, labels in self._parts.values())
        outputs = classes if self.objective == "classification" else targets.shape[1]
        self.sizes = {"input_size": x_NTI.shape[2], "output_size": outputs}
        self.counts = {split: len(x) for split, (x, _) in self._parts.items()}

    def batches(self, split: Split) -> Batches:
        """Training in a new order each pass, whole batches only; the others in order, all of them."""
        # ``initial_seed`` is the run's seed, however much has been drawn since.
        x_NTI, targets = self._parts[split]
        size, length, seed = self.batch_size, len(x_NTI), torch.initial_seed()

        @functools.lru_cache(maxsize=1)  # a pass: drawing it anew for each batch takes longer than the batch
        def order(epoch: int) -> Tensor:
            # Of the seed and the pass alone, so that a resumed run sees the same order.
            return torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch))

        def fetch(epoch: int, index: int) -> Batch:
            chosen: Any = slice(index * size, (index + 1) * size)
            if split == "train":
                chosen = order(epoch)[chosen]
            return x_NTI[chosen], targets[chosen]

        return Batches(fetch, length // size if split == "train" else -(-length // size))
