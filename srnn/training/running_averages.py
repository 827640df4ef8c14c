"""Running averages of the weights: what is validated, kept as the best, packed and scored in place of the last ones.

Lightning's ``WeightAveraging``, with torch's ``AveragedModel``. ``PruningCallback``, which stands behind it, masks the
average after each update: a weight that is pruned now is zero in the average now.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class RunningAverage(WeightAveraging):
    """An exponential moving average of a run's network from ``start`` on; before it, the weights as they are.

    After n updates it keeps the share min(``decay``, (1 + n) / (10 + n)) of itself, so that a short run is not ruled by
    its first weights: the average is over about the last ninth of its updates until ``decay`` limits it.

    Args:
        start: optimiser steps before the first that counts.
        decay: the largest share that it keeps at an update.
    """

    def __init__(self, start: int, decay: float = 0.999) -> None:
        super().__init__(multi_avg_fn=self._update)
        self.start = start
        self.decay = decay

    def kept(self, updates: int) -> float:
        """The share of itself that it keeps after so many updates."""
        return min(self.decay, (1 + updates) / (10 + updates))

    def _update(self, averages: Any, weights: Any, _: Any) -> None:
        get_ema_multi_avg_fn(self.kept(int(self.average.n_averaged)))(averages, weights, None)

    def begun(self, itr: int) -> bool:
        """Whether the weights after step ``itr`` are averaged."""
        return itr > self.start

    @property
    def average(self) -> AveragedModel:
        """The average; there once ``fit`` has begun."""
        assert self._average_model is not None
        return self._average_model

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average where the network will be: Lightning would copy the data along, and leave it on the CPU."""
        if stage != "fit":
            return
        network = nn.ModuleDict({"model": pl_module.get_submodule("model")})  # under the names that the module has
        device = trainer.strategy.root_device
        self._average_model = AveragedModel(network, device, use_buffers=self._use_buffers, **self._kwargs)
        # It is asked for at each step, and a GPU would have to be waited for.
        self.average.n_averaged = self.average.n_averaged.cpu()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Update it, once an optimiser step."""
        if not self.begun(trainer.global_step):
            self.average.n_averaged.zero_()  # the next update copies
        super().on_train_batch_end(trainer, pl_module, *rest)


class TriggeredAverage(RunningAverage):
    """NT-ASGD: the mean of all weights since the validation loss last stopped falling, from ``start`` on.

    It begins after a validation whose loss is above the lowest of those before the last ``patience``, and never ends
    (Merity, Keskar and Socher, *Regularizing and optimizing LSTM language models*, ICLR 2018, algorithm 1).

    Args:
        start: optimiser steps before the first validation that counts.
        patience: the validations n of the trigger.
    """

    def __init__(self, start: int, patience: int) -> None:
        super().__init__(start)
        self.patience = patience
        self.losses: list[float] = []
        self.triggered = False

    def begun(self, itr: int) -> bool:
        """Whether the trigger has been pulled."""
        return self.triggered

    def kept(self, updates: int) -> float:
        """All weights count alike."""
        return updates / (updates + 1)

    def look(self, loss: float) -> None:
        """At the loss of a validation."""
        before = self.losses[: -self.patience]
        self.triggered = self.triggered or (bool(before) and loss > min(before))
        self.losses.append(loss)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loss, if it counts."""
        if trainer.global_step >= self.start:
            self.look(float(trainer.callback_metrics["valid_loss"]))

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints."""
        return super().state_dict() | {"losses": self.losses, "triggered": self.triggered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        super().load_state_dict(state_dict)
        self.losses, self.triggered = list(state_dict["losses"]), state_dict["triggered"]
